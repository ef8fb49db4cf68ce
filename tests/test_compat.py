"""Each private name that nexus_jax touches, held where it is: a failure here says which version moved it."""

import flax.core.lift
import flax.linen as nn
import flax.linen.module as linen_module
import flax.linen.transforms as linen_transforms
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.nnx import extract, graphlib
from flax.nnx.transforms import general

import nexus_jax as nj
from nexus_jax import _compat


def test_private_names_are_where_they_were():
    for owner, names in {
        flax.core.lift: ["pack"],
        linen_transforms: ["decorator_lift_transform"],
        linen_module._context: ["capture_stack"],
        extract: [
            "snapshot",
            "labeled",
            "to_tree2",
            "from_tree2",
            "check_no_aliases",
            "get_updates",
            "apply_updates",
        ],
        graphlib: ["set_graph_mode", "set_graph_updates"],
        general: ["split_inputs", "merge_inputs"],
        nn.Module: [_compat.LINEN_CALL],
        nnx.Variable: ["_can_update", "get_raw_value", "get_value", "set_value"],
        jax: ["make_user_context"],
        _compat.hardware_utils: ["num_available_tpu_chips_and_device_id", "has_visible_nvidia_gpu"],
        _compat.partial_eval: ["convert_constvars_jaxpr", "dce_jaxpr_consts"],
    }.items():
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__ if hasattr(owner, '__name__') else owner}.{name} moved"


def test_an_argument_that_no_result_depends_on_is_not_compiled():
    def f(a, unused, b):
        jnp.sin(unused)
        return a * 2, b

    traced = jax.jit(f).trace(1.0, jnp.ones(3), 2.0)
    assert _compat.kept_inputs(traced.jaxpr.jaxpr) == [True, False, True]
    assert "tensor<3xf32>" not in traced.lower().as_text()


def test_what_jax_says_of_a_plugin_is_said_by_the_logger_we_know():
    from jax._src import xla_bridge

    assert xla_bridge.logger.name == _compat.PLUGIN_LOGGER


def test_lifted_classes_are_told_by_name():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x

    assert _compat.lifted_kind(Layer) is None
    for transform, kind in ((nn.jit, "Jit"), (nn.remat, "Checkpoint"), (nn.vmap, "Vmap"), (nn.scan, "Scan")):
        kwargs = {"variable_axes": {}, "split_rngs": {}} if kind in ("Vmap", "Scan") else {}
        assert _compat.lifted_kind(transform(Layer, **kwargs)) == kind


def test_debug_paths_name_the_lifts():
    seen = []

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            seen.append(self.scope.debug_path[-1])
            return x, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="s")(x, None)
            return nn.remat(Layer)(name="r")(x, None)

    Model().init(jax.random.key(0), jnp.ones(3))
    assert {s.partition("(")[0] for s in seen} == {"scan", "remat"}


def test_equations_know_their_scope_and_line():
    with jax.named_scope("here"):
        [eqn] = jax.make_jaxpr(jnp.sin)(1.0).eqns
    assert isinstance(_compat.scope_path(eqn), str)

    def f(x):
        with jax.named_scope("inside"):
            return jax.lax.sin(x)

    [eqn] = jax.make_jaxpr(f)(1.0).eqns
    assert _compat.scope_path(eqn) == "inside"
    assert "test_compat.py" in _compat.source_line(eqn) and "<locals>.f" in _compat.source_line(eqn)


def test_output_aval_of_a_primitive():
    seen = {}

    def policy(prim, *avals, **params):
        seen[prim.name] = _compat.output_aval(prim, avals, params)
        return False

    f = jax.checkpoint(lambda a, b: jnp.sin(a @ b), policy=policy)
    jax.grad(lambda a, b: f(a, b).sum())(jnp.ones((3, 4)), jnp.ones((4, 5)))
    assert seen["dot_general"].shape == (3, 5)


def test_offloading_under_remat3():
    """jax 0.10's opt-in remat has no offloading: refused by name there, working later."""
    f = jax.checkpoint(lambda w: jnp.sin(w @ w).sum(), policy=nj.checkpoint_policies.offload(min_mb=0.0))
    with jax.enable_x64(False):
        jax.config.update("jax_remat3", True)
        try:
            if jax.__version_info__ < (0, 11):
                with pytest.raises(ValueError, match="cannot offload by policy under jax_remat3"):
                    _compat.require_offload_policies()
            else:
                _compat.require_offload_policies()
        finally:
            jax.config.update("jax_remat3", False)
    jax.grad(f)(jnp.eye(3))


def test_nnx_module_from_outside_the_trace_is_not_written():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jnp.tanh)

    class Holder(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([model, nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(1)), jnp.tanh)])

        def __call__(self, x):
            return self.layers[1](self.layers[0](x))

    holder = Holder()
    ours = nj.apply_selective_checkpointing(holder, nj.Policy(checkpoint=(nj.CheckpointRule(path="layers/."),)))
    x = jnp.ones((2, 4))
    saliency = [jax.jit(jax.grad(lambda x, m=m: m(x).sum()))(x) for m in (holder, ours)]
    assert jnp.allclose(*saliency, rtol=1e-6)


def test_a_traced_program_is_checkpointed_as_a_function_is():
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    weights = jnp.arange(6.0).reshape(2, 3)

    def fun(x):
        return [jnp.sin(jax.ad_checkpoint.checkpoint_name(jnp.sin(x) * weights, "kept"))]

    x = jnp.ones((2, 3))
    closed = jax.make_jaxpr(fun)(x)
    jaxpr = _compat.without_constvars(closed.jaxpr)
    ours = lambda x: _compat.bind_checkpoint(jaxpr, closed.consts, [x], policy)[0].sum()
    plain = lambda x: jax.checkpoint(fun, policy=policy)(x)[0].sum()
    assert len(closed.consts) == 1 and not jaxpr.constvars
    assert str(jax.make_jaxpr(jax.grad(ours))(x)) == str(jax.make_jaxpr(jax.grad(plain))(x))
    assert (jax.grad(ours)(x) == jax.grad(plain)(x)).all()
    with_names = [r.shape for r in nj.residuals(ours, x)]
    assert (2, 3) in with_names


def test_a_traced_program_under_remat3():
    if not hasattr(jax.config, "jax_remat3"):
        pytest.skip("this jax has no jax_remat3")
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    closed = jax.make_jaxpr(lambda x: [jnp.sin(jnp.sin(x))])(1.0)
    jax.config.update("jax_remat3", True)
    try:
        value = jax.grad(lambda x: _compat.bind_checkpoint(closed.jaxpr, (), [x], policy)[0])(1.0)
    finally:
        jax.config.update("jax_remat3", False)
    assert jnp.allclose(value, jnp.cos(jnp.sin(1.0)) * jnp.cos(1.0))


def test_gradients_call_vjp_by_its_name():
    """What `offload_context` hooks: gone from here, it would offload nothing."""
    calls = []

    def around(vjp, fun, *args, **kwargs):
        calls.append(fun)
        return vjp(fun, *args, **kwargs)

    plain = jax.vjp
    with _compat.vjp_through(around), _compat.vjp_through(around):
        for transform in (jax.grad, jax.value_and_grad, jax.jacrev, nnx.grad, nnx.value_and_grad):
            transform(jnp.sin)(1.0)
        jax.vjp(jnp.sin, 1.0)
    assert len(calls) == 6
    assert jax.vjp is plain
    jax.grad(jnp.sin)(1.0)
    assert len(calls) == 6
