"""A step as a program: the right gradients, a name that is the same everywhere, bytes that another process compiles."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from models import GPT, NNXGPT, linen_loss, loss_of

import nexus_jax as nj
from nexus_jax.program import step_of
from nexus_jax.targets.compiler import find_target

SHAPE = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def quadratic(w, x):
    return jnp.sum(jnp.tanh(x @ w["a"]) * w["b"])


WEIGHTS = {"a": jnp.arange(16.0).reshape(4, 4) / 9, "b": jnp.ones(4)}


def test_the_program_is_value_and_grad():
    x = jnp.linspace(0, 1, 8).reshape(2, 4)
    for argnums in (0, 1, (0, 1), -1):
        program = step_of(quadratic, (WEIGHTS, x), argnums)
        value, *grads = program.fun(*jax.tree.leaves((WEIGHTS, x)))
        expected = jax.value_and_grad(quadratic, argnums)(WEIGHTS, x)
        assert value == expected[0]
        for ours, theirs in zip(grads, jax.tree.leaves(expected[1]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_aux_is_an_output_and_flags_are_constants():
    def loss(w, x, train):
        assert train is True
        return jnp.sum(w * x), {"n": x * 2}

    program = step_of(loss, (jnp.ones(3), jnp.arange(3.0), True), has_aux=True)
    value, aux, grad = program.fun(jnp.ones(3), jnp.arange(3.0))
    assert (value, list(aux), list(grad)) == (3.0, [0.0, 2.0, 4.0], [0.0, 1.0, 2.0])


def test_an_nnx_module_is_differentiated_in_its_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.out = nnx.Linear(3, 2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.out(self.norm(x)))

    model, x = Model(nnx.Rngs(0)), jnp.arange(12.0).reshape(4, 3)
    loss = lambda model, x: jnp.sum(model(x) ** 2)
    program = step_of(loss, (model, x))
    value, *rest = program.fun(*jax.tree.leaves((nnx.to_pure_dict(nnx.state(model)), x)))
    expected, grads = nnx.value_and_grad(loss)(model, x)
    leaves = jax.tree.leaves(nnx.to_pure_dict(grads))
    assert value == expected and len(leaves) == 4
    for ours, theirs in zip(rest[-4:], leaves, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    changed = [r for r in rest[:-4] if not jnp.issubdtype(r.dtype, jax.dtypes.prng_key)]
    assert any(np.allclose(r, model.norm.mean[...]) for r in changed), "batch statistics come out as they do in nnx"


@pytest.mark.parametrize(
    ("fn", "args", "kwargs", "error", "message"),
    [
        (lambda n: 1.0 * n, (jnp.ones(3, int),), {}, TypeError, r"argument 0 holds an array of int32, .* no gradient"),
        (lambda x: x, (jnp.ones(3),), {}, TypeError, r"must return a scalar loss .* returned float32\[3\]"),
        (
            lambda x: (x.sum(), x),
            (jnp.ones(3),),
            {},
            TypeError,
            "returned tuple. Return the loss alone, or write has_aux=True",
        ),
        (
            lambda x: x.sum(),
            (jnp.ones(3),),
            {"has_aux": True},
            TypeError,
            r"has_aux=True: .* must return \(loss, aux\)",
        ),
        (lambda x: x.sum(), (jnp.ones(3),), {"argnums": (0, -1)}, ValueError, "names an argument twice"),
        (
            lambda x: x.sum(),
            (jnp.ones(3),),
            {"argnums": "x"},
            TypeError,
            "argnums='x': write the number of an argument",
        ),
        (lambda x: x.sum(), (jnp.ones(3),), {"argnums": 2}, ValueError, "argnums=2, but the function has 1 argument"),
        (lambda f, x: x.sum(), (True, jnp.ones(3)), {}, TypeError, "holds no array, so there is nothing to diff"),
        (lambda x: (x > 0).all(), (jnp.ones(3),), {}, TypeError, r"floating point, and returned bool\[\]"),
    ],
)
def test_what_is_no_loss_is_said_in_a_sentence(fn, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        step_of(fn, args, **kwargs).traced  # noqa: B018


def gpt(policy, dropout=0.0):
    model = nj.apply_selective_checkpointing(GPT(layers=2), policy)
    tokens = jnp.zeros((2, 8), jnp.int32)
    return step_of(linen_loss(model, tokens), (jax.eval_shape(model.init, jax.random.key(0), tokens),))


def test_the_digest_names_the_program():
    assert gpt("all").digest == gpt("all").digest
    assert len({gpt(p).digest for p in ("none", "all", "heavy_ops", "alternate")}) == 4
    with_constant = lambda n: step_of(lambda x: jnp.sum(x * np.arange(n, n + 4.0)), (SHAPE,)).digest
    assert with_constant(0) == with_constant(0) != with_constant(1)


def test_the_digest_is_the_same_in_another_process():
    code = (
        "import jax, jax.numpy as jnp\nfrom nexus_jax.program import step_of\n"
        "f = jax.checkpoint(lambda x: jnp.sum(jax.nn.gelu(jnp.sin(x))), policy=jax.checkpoint_policies.dots_saveable)\n"
        "print(step_of(f, (jax.ShapeDtypeStruct((4, 4), jnp.float32),)).digest)"
    )
    run = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    f = jax.checkpoint(lambda x: jnp.sum(jax.nn.gelu(jnp.sin(x))), policy=jax.checkpoint_policies.dots_saveable)
    assert run().strip() == run().strip() == step_of(f, (SHAPE,)).digest


def test_unused_arguments_are_left_out_as_jit_does():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    program = step_of(lambda w, unused, key: jnp.sum(jnp.sin(w)), (SHAPE, SHAPE, keys))
    back = export.deserialize(bytearray(program._serialized("tpu")))
    assert [a.shape for a in back.in_avals] == [(4, 4)]
    everything = step_of(lambda w, x: jnp.sum(jnp.sin(w) * x), (SHAPE, SHAPE))
    assert len(export.deserialize(bytearray(everything._serialized("tpu"))).in_avals) == 2


def test_a_step_that_calls_back_into_python_is_refused():
    def loss(w):
        jax.debug.print("{}", w.sum())
        return w.sum()

    with pytest.raises(ValueError, match=r"calls back into Python .* Leave the callback out"):
        step_of(loss, (SHAPE,))._serialized("tpu")


def test_shardings_must_suit_the_target():
    mesh = AbstractMesh((4, 2), ("data", "model"))
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data", "model")))
    program = step_of(lambda x: jnp.sum(jnp.sin(x)), (x,))
    assert program.mesh == (("data", "model"), (4, 2))
    program.job(find_target("v5e:2x4"), "step")
    with pytest.raises(ValueError, match=r"sharded over 8 devices \(.*'data': 4.*\), and target='v5e' has 1"):
        program.job(find_target("v5e"), "step")
    with pytest.raises(ValueError, match=r"has 8 devices and no argument says .* nexus_jax.target_mesh\('v5e:2x4'"):
        step_of(lambda x: jnp.sum(x), (SHAPE,)).job(find_target("v5e:2x4"), "step")
    other = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(AbstractMesh((8,), ("x",)), P("x")))
    with pytest.raises(ValueError, match="sharded over different meshes"):
        step_of(lambda x, y: jnp.sum(x) + jnp.sum(y), (x, other)).mesh  # noqa: B018


def test_an_nnx_gpt_names_its_modules_in_the_program():
    model = NNXGPT(layers=1, rngs=nnx.Rngs(0))
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    program = step_of(lambda m, t: loss_of(m(t), t), (model, tokens))
    scopes = {str(e.source_info.name_stack) for e in program.traced.jaxpr.eqns}
    assert any("blocks/0/attn" in s for s in scopes)
