"""What every transform is held to: same values, same state, fewer residual bytes, recomputed matmuls."""

import re
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nexus_jax as nj
from nexus_jax import _compat, flat
from nexus_jax.flops import count_matmuls
from nexus_jax.targets.compiler import find_target

KINDS = {"v5e": "tpu", "h200": "gpu"}
SMALL = nj.SelectiveCheckpointConfig(policy="auto", auto_wrap_min_params=100)


def needs(*targets):
    """Skip the test where no compiler for one of these targets is installed."""
    for target in targets:
        kind = find_target(target).sheet.kind
        if not _compat.has_compiler(kind):
            pytest.skip(f"no compiler for {target}: {_compat.install_line(kind)}")


def total(tree):
    """A scalar in which every floating-point leaf of a result has its own weight."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact)]
    return sum((i + 1) * jnp.sum(jnp.sin(jnp.asarray(x, jnp.float32))) for i, x in enumerate(floats))


UNFUSED = {
    "xla_disable_hlo_passes": "fusion",
    "xla_allow_excess_precision": False,
    "xla_backend_optimization_level": 0,  # a third less time to compile
    "xla_llvm_disable_expensive_passes": True,
}


def unfused(fn, *args):
    """``fn(*args)``, jitted, without XLA's fusion: the CPU backend then adds in the same order in both programs."""
    return jax.jit(fn).lower(*args).compile(UNFUSED)(*args)


def assert_close(a, b, rtol=1e-6):
    """Equal trees; leaves equal to within ``rtol`` of their largest value (XLA's CPU fusion reorders sums).

    A leaf that is nothing but rounding (the gradient of a key's bias, say) is measured against the tree's largest.
    """
    chex.assert_trees_all_equal_structs(a, b)
    floats = [x for x in jax.tree.leaves(a) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact)]
    least = 1e-2 * max((float(np.abs(np.asarray(x, np.float64)).max(initial=0)) for x in floats), default=0.0)
    others = dict(jax.tree_util.tree_leaves_with_path(b))
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        y = others[path]
        assert jnp.asarray(x).dtype == jnp.asarray(y).dtype, path
        if jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact):
            x, y = (np.asarray(v, np.float64) for v in (x, y))
            scale = max(float(np.abs(x).max(initial=0)), least)
            np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale, err_msg=str(path))
        else:
            assert jnp.array_equal(x, y), path


def assert_effect(plain_loss, loss, params, *, recomputes=True):
    """Residuals shrink, and matmuls are recomputed: a transform that does nothing fails both."""
    before, after = nj.residuals(plain_loss, params), nj.residuals(loss, params)
    assert after.nbytes < before.nbytes, (after.nbytes, before.nbytes)
    if recomputes:
        assert count_matmuls(jax.grad(loss), params) > count_matmuls(jax.grad(plain_loss), params)
    return before, after


def check_linen(model, *args, policy="all", rngs=None, mutable=False, rtol=1e-6, recomputes=True, **kwargs):
    """The whole contract for one linen model; returns the transformed model."""
    transformed = nj.apply_selective_checkpointing(model, policy)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1), **(rngs or {})}
    init = lambda m: lambda: m.init(keys, *args, **kwargs)
    assert program(init(model)) == program(init(transformed))  # the same initial values, bit for bit
    assert jax.eval_shape(init(model)) == jax.eval_shape(init(transformed))
    variables = unfused(init(model))

    def loss_of(m):
        def loss(params):
            given = {**variables, "params": params}
            out = m.apply(given, *args, rngs=rngs, mutable=mutable, **kwargs)
            return total(out), out

        return loss

    plain = unfused(jax.value_and_grad(loss_of(model), has_aux=True), variables["params"])  # warms every cache
    ours = unfused(jax.value_and_grad(loss_of(transformed), has_aux=True), variables["params"])
    assert_close(plain, ours, rtol)
    assert_effect(
        lambda p: loss_of(model)(p)[0], lambda p: loss_of(transformed)(p)[0], variables["params"], recomputes=recomputes
    )
    return transformed


def check_nnx(plain, *args, policy="all", rtol=1e-6):
    """The whole contract for one nnx model; returns the transformed model."""
    ours = nj.apply_selective_checkpointing(plain, policy)
    pure = lambda m, kind=nnx.Param: nnx.to_pure_dict(nnx.state(m, kind))
    chex.assert_trees_all_equal(pure(plain), pure(ours))
    loss = lambda m, *args: total(m(*args))
    jitted = nnx.jit(nnx.value_and_grad(loss))
    step = lambda *args: jitted.lower(*args).compile(UNFUSED)(*args)
    before, after = nnx.clone(plain), nnx.clone(ours)
    (value, grads), (our_value, our_grads) = step(before, *args), step(after, *args)  # the same function, warm
    assert_close(value, our_value, rtol)
    assert_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(our_grads), rtol)
    for kind in (nnx.BatchStat, nnx.RngCount, nnx.Intermediate):
        chex.assert_trees_all_close(pure(before, kind), pure(after, kind), rtol=1e-6)
    assert nj.residuals(loss, ours, *args).nbytes < nj.residuals(loss, plain, *args).nbytes
    assert nnx_matmuls(loss, ours, *args) > nnx_matmuls(loss, plain, *args)
    return ours


def nnx_matmuls(loss, model, *args):
    """How many matmuls the gradient of a loss of an nnx model runs."""
    graphdef, state = nnx.split(model)
    gradient = jax.grad(lambda state: loss(nnx.merge(graphdef, state), *args), allow_int=True)
    return count_matmuls(gradient, state)


def program(fn, *args) -> str:
    """The jaxpr, without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(fn)(*args)))


def normalised(hlo: str) -> list[str]:
    """An optimized HLO's instructions without names and metadata, in order."""
    hlo = re.sub(r", metadata=\{[^}]*\}|, (frontend_attributes|backend_config|origin)=\{.*?\}(?=,|$)", "", hlo)
    hlo = re.sub(r"(?s)FileNames.*?(?=\n\n%|\n\nENTRY)|StackFrames.*?(?=\n\n)", "", hlo)
    order: dict[str, str] = {}
    return [
        re.sub(r"%[\w.\-]+", lambda m: order.setdefault(m.group(), f"%{len(order)}"), line.strip())
        for line in hlo.splitlines()
        if " = " in line
    ]


def steps_of(closed):
    """The equations of a differentiated program that its results need; calls opened, those of custom derivatives too."""
    with mock.patch.dict(flat._CALLS, custom_jvp_call="call_jaxpr"):
        return flat.flatten(closed).eqns
