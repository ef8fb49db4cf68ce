"""The documented configuration, `SelectiveCheckpoint`, the estimates: what they answer and what they refuse."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from checks import assert_close, total, unfused
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from models import GPT, NNXGPT, Block, linen_loss

import nexus_jax as nj
from nexus_jax.flops import count_matmuls
from nexus_jax.training import gradient_methods

TOKENS = jnp.arange(32).reshape(2, 16) % 64
X = jnp.linspace(-1, 1, 2 * 16 * 32).reshape(2, 16, 32)


def test_documented_names_and_defaults():
    for name in [
        "CheckpointPolicy",
        "SelectiveCheckpointConfig",
        "SelectiveCheckpoint",
        "apply_selective_checkpointing",
        "ActivationOffloader",
        "estimate_checkpointing_memory_savings",
        "estimate_offloading_memory_savings",
    ]:
        assert getattr(gradient_methods, name) is getattr(nj, name) is getattr(nj.training, name)
    config = nj.SelectiveCheckpointConfig()
    assert config.policy is nj.CheckpointPolicy.AUTO and config.auto_wrap_min_params == 1_000_000
    assert (config.custom_policy, config.heavy_ops, config.preserve_rng_state, config.use_reentrant) == (
        None,
        None,
        True,
        False,
    )
    offloader = nj.ActivationOffloader()
    assert (
        offloader.enabled,
        offloader.offload_threshold_mb,
        offloader.prefetch_ahead,
        offloader.pin_memory,
    ) == (True, 10.0, 2, True)
    assert {p.name: p.value for p in nj.CheckpointPolicy} == {
        "NONE": "none", "ALL": "all", "AUTO": "auto", "CUSTOM": "custom", "ALTERNATE": "alternate", "HEAVY_OPS": "heavy_ops",
    }  # fmt: skip


@pytest.mark.parametrize("policy", [p for p in nj.CheckpointPolicy if p.value != "custom"])
def test_a_string_is_as_good_as_the_enum(policy):
    assert nj.SelectiveCheckpointConfig(policy=policy) == nj.SelectiveCheckpointConfig(policy=policy.value)
    assert nj.SelectiveCheckpoint(policy=policy.value).config.policy is policy


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (
            {"policy": "heavy"},
            ValueError,
            "policy='heavy' is unknown: write one of 'none', 'all', 'auto', 'custom', 'alternate', 'heavy_ops'",
        ),
        ({"policy": 3}, TypeError, "policy=3: write one of 'none'"),
        ({"policy": "custom"}, ValueError, "policy=CUSTOM with custom_policy=None: give a function"),
        ({"policy": "all", "custom_policy": lambda m: True}, ValueError, 'only asked with policy="custom"'),
        (
            {"preserve_rng_state": False},
            ValueError,
            "preserve_rng_state=False: JAX replays random keys by construction",
        ),
        ({"use_reentrant": True}, ValueError, "use_reentrant=True: JAX has no reentrant autograd"),
        (
            {"auto_wrap_min_params": -1},
            ValueError,
            "auto_wrap_min_params=-1: write a whole number of parameters",
        ),
        ({"auto_wrap_min_params": math.nan}, ValueError, "auto_wrap_min_params=nan"),
        ({"auto_wrap_min_params": 1.5}, ValueError, r"auto_wrap_min_params=1\.5"),
        (
            {"heavy_ops": "Attention"},
            ValueError,
            "heavy_ops='Attention': write a list of parts of class names",
        ),
        ({"heavy_ops": []}, ValueError, r"heavy_ops=\[\]"),
    ],
)
def test_bad_configurations(kwargs, error, match):
    with pytest.raises(error, match=match):
        nj.SelectiveCheckpointConfig(**kwargs)


@pytest.mark.parametrize("thing", [3, "model", jnp.ones(3), lambda x: x, nnx.Linear])
def test_what_is_no_flax_module(thing):
    with pytest.raises(TypeError, match=r"expected a flax\.linen\.Module"):
        nj.apply_selective_checkpointing(thing, "all")


def test_an_empty_model():
    class Empty(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x

    with pytest.warns(UserWarning, match="'all' checkpoints nothing in this model: it has no submodule"):
        nj.apply_selective_checkpointing(Empty(), "all").init(jax.random.key(0), X)

    class EmptyNNX(nnx.Module):
        def __call__(self, x):
            return x

    with pytest.warns(UserWarning, match="'all' checkpoints nothing in this model: it has no submodule"):
        nj.apply_selective_checkpointing(EmptyNNX(), "all")


def test_a_bound_module():
    bound = GPT().bind(GPT().init(jax.random.key(0), TOKENS))
    with pytest.raises(ValueError, match="GPT is bound: transform the unbound module"):
        nj.apply_selective_checkpointing(bound, "all")


def test_a_config_and_keywords():
    with pytest.raises(TypeError, match="give a config or keywords, not both"):
        nj.SelectiveCheckpoint(nj.SelectiveCheckpointConfig(), policy="all")


@pytest.mark.parametrize("family", ["linen", "nnx"])
def test_custom_policy_is_asked_of_every_module_outermost_first(family):
    asked = []

    def policy(module):
        asked.append(type(module).__name__)
        return type(module).__name__ in ("Block", "NNXBlock")

    config = nj.SelectiveCheckpointConfig(policy="custom", custom_policy=policy)
    if family == "linen":
        ours = nj.apply_selective_checkpointing(GPT(layers=2), config)
        ours.init(jax.random.key(0), TOKENS)
        assert {"Block", "Attention", "Dense", "Embed"} <= set(asked)
    else:
        ours = nj.apply_selective_checkpointing(NNXGPT(layers=2, rngs=nnx.Rngs(0)), config)
        assert {"NNXBlock", "NNXAttention", "Linear", "Embed"} <= set(asked)
    assert len(nj.policy_of(ours).selection.boundaries) == 2


def test_custom_policy_that_returns_no_bool():
    config = nj.SelectiveCheckpointConfig(policy="custom", custom_policy=lambda m: 1)
    with pytest.raises(TypeError, match=r"custom_policy returned 1 for .*: return True or False"):
        nj.apply_selective_checkpointing(GPT(), config).init(jax.random.key(0), TOKENS)
    with pytest.raises(TypeError, match="custom_policy returned 1 for blocks/0"):
        nj.apply_selective_checkpointing(NNXGPT(rngs=nnx.Rngs(0)), config)


# --- SelectiveCheckpoint ------------------------------------------------------------------------------------------


def test_should_checkpoint_as_documented():
    model = NNXGPT(layers=2, d=64, rngs=nnx.Rngs(0))
    block, attention, dense = model.blocks[0], model.blocks[0].attn, model.blocks[0].up
    ask = lambda module, **kwargs: nj.SelectiveCheckpoint(**kwargs).should_checkpoint(module)
    assert not ask(block, policy="none") and ask(dense, policy="all")
    assert ask(attention, policy="heavy_ops") and not ask(block, policy="heavy_ops")
    assert not ask(dense, policy="heavy_ops") and ask(dense, policy="heavy_ops", auto_wrap_min_params=1000)
    assert ask(block, policy="heavy_ops", heavy_ops=["NNXBl"]) and not ask(
        attention, policy="heavy_ops", heavy_ops=["NNXBl"]
    )
    size = sum(x.size for x in jax.tree.leaves(nnx.state(block, nnx.Param)))
    assert ask(block, policy="auto", auto_wrap_min_params=size - 1) and not ask(
        block, policy="auto", auto_wrap_min_params=size
    )
    assert ask(block, policy="custom", custom_policy=lambda m: m is block)
    alternate = nj.SelectiveCheckpoint(policy="alternate")
    assert [alternate.should_checkpoint(b) for b in (block, model.blocks[1], block)] == [True, False, True]


def test_should_checkpoint_of_linen_modules():
    attention = nn.MultiHeadDotProductAttention(4)
    assert nj.SelectiveCheckpoint(policy="heavy_ops").should_checkpoint(attention)
    with pytest.raises(ValueError, match=r"auto asks for the parameter count of Dense, which is unbound.*bind it"):
        nj.SelectiveCheckpoint(policy="auto").should_checkpoint(nn.Dense(3))
    dense = nn.Dense(2000)
    bound = dense.bind(dense.init(jax.random.key(0), jnp.ones((1, 1000))))
    assert nj.SelectiveCheckpoint(policy="auto").should_checkpoint(bound)
    with pytest.raises(TypeError, match=r"expected a flax\.linen\.Module"):
        nj.SelectiveCheckpoint(policy="all").should_checkpoint("x")


class InForward(nn.Module):
    """A model that calls SelectiveCheckpoint itself, with a keyword flag."""

    policy: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(2):
            block = Block(4, dropout=0.5, name=f"b_{i}")
            x = (
                block(x, train=train)
                if self.policy is None
                else nj.SelectiveCheckpoint(policy=self.policy)(block, x, train=train)
            )
        return x


@pytest.mark.parametrize("policy", ["all", "alternate"])
def test_inside_a_linen_forward(policy):
    plain, ours = InForward(), InForward(policy)
    params = plain.init(jax.random.key(0), X)
    assert_close(params, ours.init(jax.random.key(0), X))
    loss = lambda m: lambda p: total(m.apply(p, X, train=True, rngs={"dropout": jax.random.key(1)}))
    assert_close(jax.grad(loss(plain))(params), jax.grad(loss(ours))(params), 1e-5)
    extra = count_matmuls(jax.grad(loss(ours)), params) - count_matmuls(jax.grad(loss(plain)), params)
    assert extra == {"all": 2, "alternate": 1}[policy] * 7
    assert nj.residuals(loss(ours), params).nbytes < nj.residuals(loss(plain), params).nbytes


def test_inside_an_nnx_forward():
    model = NNXGPT(layers=3, rngs=nnx.Rngs(0))

    def forward(m, checkpoint_fn):
        x = m.embed(TOKENS)
        for block in m.blocks:
            x = checkpoint_fn.checkpoint_fn(block, x) if checkpoint_fn else block(x)
        return total(x)

    plain, ours = (
        (lambda m: forward(m, None)),
        (lambda m: forward(m, nj.SelectiveCheckpoint(policy="alternate"))),
    )
    grads = [nnx.to_pure_dict(nnx.grad(f)(model)) for f in (plain, ours)]
    assert_close(*grads, rtol=1e-5)
    assert nj.residuals(ours, model).nbytes < nj.residuals(plain, model).nbytes


def test_a_function():
    w = jnp.eye(8)

    def f(w, x, *, flag, note=None):
        assert flag is True and note == "n"
        return jnp.sin(jnp.tanh(x @ w) @ w)

    x = jnp.ones((4, 8))
    for policy, smaller in (("all", True), ("none", False)):
        ours = lambda w: total(nj.SelectiveCheckpoint(policy=policy)(f, w, x, flag=True, note="n"))
        plain = lambda w: total(f(w, x, flag=True, note="n"))
        assert_close(jax.grad(plain)(w), jax.grad(ours)(w))
        assert (nj.residuals(ours, w).nbytes < nj.residuals(plain, w).nbytes) == smaller
    with pytest.raises(TypeError, match="takes a module or a function, got int"):
        nj.SelectiveCheckpoint(policy="all")(3)


class Named(nn.Module):
    """A model that puts one of its own methods under a checkpoint, not a module."""

    plain: bool = False

    def setup(self):
        self.up, self.down, self.norm = nn.Dense(64), nn.Dense(32), nn.BatchNorm(use_running_average=False)

    def inside(self, x, *, scale):
        return self.norm(self.down(jnp.sin(self.up(x)))) * scale

    def __call__(self, x):
        call = (lambda f, *a, **k: f(*a, **k)) if self.plain else nj.SelectiveCheckpoint(policy="all")
        return call(self.inside, x, scale=0.5)


def test_a_method_of_a_linen_module():
    variables = Named().init(jax.random.key(0), X)

    def run(m):
        def loss(params):
            out, state = m.apply({**variables, "params": params}, X, mutable=["batch_stats"])
            return total(out), state

        return unfused(jax.grad(loss, has_aux=True), variables["params"])

    assert_close(run(Named(plain=True)), run(Named()), 1e-5)
    sizes = [
        nj.residuals(
            lambda p, m=m: m.apply({**variables, "params": p}, X, mutable=["batch_stats"])[0], variables["params"]
        )
        for m in (Named(), Named(plain=True))
    ]
    assert sizes[0].nbytes < sizes[1].nbytes


class NNXNoisy(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def inside(self, x):
        return self.down(self.drop(jnp.sin(self.up(x))))


@pytest.mark.parametrize("how", ["method", "argument"])
def test_an_nnx_module_that_a_function_changes(how):
    """Each call draws another dropout mask: the count of the random stream comes out of the boundary."""
    checkpoint_fn = nj.SelectiveCheckpoint(policy="all")
    ours = {
        "method": lambda m, x: checkpoint_fn(m.inside, x),
        "argument": lambda m, x: checkpoint_fn(lambda m, x: m.inside(x), m, x),
    }[how]
    loss = lambda call: lambda m: total(call(m, call(m, X)))
    models = [NNXNoisy(nnx.Rngs(params=0, dropout=1)) for _ in range(2)]
    plain_loss, our_loss = loss(lambda m, x: m.inside(x)), loss(ours)
    assert nj.residuals(our_loss, models[0]).nbytes < nj.residuals(plain_loss, models[0]).nbytes
    grads = [nnx.to_pure_dict(nnx.grad(f)(m)) for f, m in zip((plain_loss, our_loss), models, strict=True)]
    assert_close(*grads, rtol=1e-5)
    assert [int(m.drop.rngs.count[...]) for m in models] == [2, 2]


def test_a_lone_dense_in_checkpoint_fn_is_no_boundary():
    """Its only residual is its input: a boundary would copy and free nothing."""
    dense = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
    checkpoint_fn = nj.SelectiveCheckpoint(policy="all")
    assert checkpoint_fn.should_checkpoint(dense)
    assert "remat" not in (text := str(jax.make_jaxpr(jax.grad(lambda x: total(checkpoint_fn(dense, x))))(X)))
    assert "checkpoint" not in text


def test_an_unbound_module_in_checkpoint_fn():
    with pytest.raises(ValueError, match="Dense is unbound: checkpoint_fn calls a submodule inside"):
        nj.SelectiveCheckpoint(policy="all")(nn.Dense(3), X)


def test_policy_of_prints_what_was_dropped():
    model = nj.apply_selective_checkpointing(
        GPT(), nj.SelectiveCheckpointConfig(policy="heavy_ops", auto_wrap_min_params=100)
    )
    assert "known once the model is traced" in str(nj.policy_of(model))
    model.init(jax.random.key(0), TOKENS)
    said = str(nj.policy_of(model))
    assert "4 x blocks_*/attn" in said and "dropped: 8 (a lone Dense keeps only its input: nothing to free)" in said


# --- the estimates --------------------------------------------------------------------------------------------------


def test_estimates_as_documented():
    found = nj.estimate_checkpointing_memory_savings(
        activation_memory_mb=100, num_checkpointed_layers=24, total_layers=32
    )
    assert found == {
        "without_checkpointing_mb": 3200.0, "with_checkpointing_mb": 800.0, "savings_mb": 2400.0,
        "savings_percent": 75.0, "checkpointed_layers": 24, "total_layers": 32,
    }  # fmt: skip
    found = nj.estimate_offloading_memory_savings(activation_memory_gpu_mb=8000, offload_ratio=0.25)
    assert found == {
        "gpu_memory_mb": 8000.0, "gpu_savings_mb": 2000.0, "cpu_usage_mb": 2000.0, "offload_ratio": 0.25, "savings_percent": 25.0,
    }  # fmt: skip


@given(st.floats(0, 1e9), st.integers(0, 50), st.integers(1, 50))
def test_estimates_add_up(mb, some, total_layers):
    if some > total_layers:
        with pytest.raises(ValueError, match="is more than total_layers"):
            nj.estimate_checkpointing_memory_savings(mb, some, total_layers)
        return
    found = nj.estimate_checkpointing_memory_savings(mb, some, total_layers)
    assert math.isclose(found["with_checkpointing_mb"] + found["savings_mb"], found["without_checkpointing_mb"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: nj.estimate_checkpointing_memory_savings(-1, 1, 2),
            "activation_memory_mb=-1: write a finite number",
        ),
        (lambda: nj.estimate_checkpointing_memory_savings(math.inf, 1, 2), "activation_memory_mb=inf"),
        (lambda: nj.estimate_checkpointing_memory_savings(1, -1, 2), "num_checkpointed_layers=-1"),
        (lambda: nj.estimate_checkpointing_memory_savings(1, 0, 0), "total_layers=0"),
        (lambda: nj.estimate_checkpointing_memory_savings(1, 1.5, 2), r"num_checkpointed_layers=1\.5"),
        (lambda: nj.estimate_offloading_memory_savings(math.nan), "activation_memory_gpu_mb=nan"),
        (lambda: nj.estimate_offloading_memory_savings(1, 1.5), r"offload_ratio=1\.5: write a share"),
        (lambda: nj.estimate_offloading_memory_savings(1, -0.1), r"offload_ratio=-0\.1"),
    ],
)
def test_bad_estimates(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_loss_is_unchanged_to_the_eye():
    params = GPT().init(jax.random.key(0), TOKENS)
    losses = {
        p: float(linen_loss(nj.apply_selective_checkpointing(GPT(), p), TOKENS)(params))
        for p in ("none", "all", "heavy_ops")
    }
    assert max(losses.values()) - min(losses.values()) < 1e-6
