"""What autodiff keeps, told exactly."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPT, NNXGPT, ScannedGPT, linen_loss, loss_of

import nexus_jax as nj
from nexus_jax.flops import count_matmuls, matmul_flops

TOKENS = jnp.arange(32).reshape(2, 16) % 64


def leaves_apart_from_arguments(loss, params):
    """Bytes of the distinct leaves of ``jax.vjp`` that are no arguments, counted by hand on real arrays."""
    arrays = {id(x) for x in jax.tree.leaves(params)}
    leaves = {id(x): x for x in jax.tree.leaves(jax.vjp(loss, params)[1]) if hasattr(x, "nbytes")}
    return sum(x.nbytes for i, x in leaves.items() if i not in arrays)


@pytest.mark.parametrize("policy", ["none", "all", "heavy_ops"])
def test_bytes_are_those_of_the_vjps_leaves(policy):
    def loss(params):
        x = params["x"]
        for w in params["ws"]:
            layer = lambda w, x: jnp.tanh(jnp.sin(x @ w) @ w)
            x = layer(w, x) if policy == "none" else jax.checkpoint(layer, policy=nj.load_policy(policy))(w, x)
        return jnp.sum(x**2)

    params = {"x": jnp.ones((4, 8)), "ws": [jnp.eye(8) for _ in range(3)]}
    assert nj.residuals(loss, params).nbytes == leaves_apart_from_arguments(loss, params)


def test_one_of_each_kind():
    def f(w, x):
        y = jnp.sin(x @ w)
        return jnp.sum(jnp.exp(y))

    w, x = jnp.ones((8, 4)), jnp.ones((2, 8), jnp.float32)
    found = nj.residuals(f, w, x)
    assert [(r.op, r.shape, r.dtype, r.nbytes, r.place) for r in found] == [
        ("cos", (2, 4), "float32", 32, "device"),
        ("exp", (2, 4), "float32", 32, "device"),
    ]
    assert sorted(r.path for r in found.arguments) == ["0", "1"] and {r.op for r in found.arguments} == {"argument"}
    assert all("test_residuals.py" in r.source and "(test_one_of_each_kind.<locals>.f)" in r.source for r in found)
    assert found.nbytes == sum(r.nbytes for r in found) == found.device_bytes == 64 and found.host_bytes == 0


def test_abstract_arguments_equal_real_ones():
    model = GPT()
    params = model.init(jax.random.key(0), TOKENS)
    abstract = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert list(nj.residuals(linen_loss(model, TOKENS), params)) == list(
        nj.residuals(linen_loss(model, TOKENS), abstract)
    )


def test_module_paths():
    model = GPT(layers=2)
    found = nj.residuals(linen_loss(model, TOKENS), model.init(jax.random.key(0), TOKENS))
    paths = {r.path for r in found}
    assert {"GPT/blocks_0/attn/q", "GPT/blocks_1/attn/v", "GPT/blocks_1/LayerNorm_0"} <= paths
    nnx_model = NNXGPT(layers=2, rngs=nnx.Rngs(0))
    paths = {r.path for r in nj.residuals(lambda m: loss_of(m(TOKENS), TOKENS), nnx_model)}
    assert {"NNXGPT/blocks/0/attn/q", "NNXGPT/blocks/1/attn", "NNXGPT/blocks/1/norm1"} <= paths


def test_in_a_scan_they_are_those_of_all_steps():
    model = ScannedGPT(layers=5)
    found = nj.residuals(linen_loss(model, TOKENS), model.init(jax.random.key(0), TOKENS))
    stacked = [r for r in found if r.shape == (5, 2, 16, 128)]
    assert stacked and all(r.path.endswith("block") or "block/" in r.path for r in stacked)


def test_table():
    model = GPT(layers=3)
    said = str(nj.residuals(linen_loss(model, TOKENS), model.init(jax.random.key(0), TOKENS)))
    assert "GPT/blocks[0..2]/attn" in said and "models.py" in said and "on the device" in said


def test_flags_among_the_arguments():
    found = nj.residuals(lambda x, flag, note=None: jnp.sin(x).sum() if flag else x.sum(), jnp.ones(8), True, note="n")
    assert found.nbytes == 32


def test_nothing_to_differentiate():
    with pytest.raises(TypeError, match="no argument is an array"):
        nj.residuals(lambda n: n, 3)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 8), k=st.integers(1, 8), n=st.integers(1, 8), steps=st.integers(1, 5))
def test_flops_of_matmuls_and_loops(m, k, n, steps):
    a, b = jnp.ones((m, k)), jnp.ones((k, n))
    assert matmul_flops(jnp.dot, a, b) == 2 * m * k * n
    loop = lambda x: jax.lax.scan(lambda c, _: (c @ jnp.ones((k, k)), None), x, None, length=steps)[0]
    assert matmul_flops(loop, a) == steps * 2 * m * k * k
    assert count_matmuls(loop, a) == steps


def test_flops_of_a_convolution():
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert matmul_flops(conv, x, w) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)
