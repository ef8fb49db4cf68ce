"""Linen models of every kind, transformed: equal in all but memory and time."""

import copy
import dataclasses
import functools
import pickle
from typing import Any

import chex
import cloudpickle
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checks import assert_close, assert_effect, check_linen, normalised, total, unfused
from jax.sharding import NamedSharding, PartitionSpec
from models import GPT, Block, ScannedGPT, gpt_by_hand, linen_loss

import nexus_jax as nj
from nexus_jax.flops import count_matmuls

TOKENS = jnp.arange(32).reshape(2, 16) % 64
X = jnp.linspace(-1, 1, 4 * 8 * 16).reshape(4, 8, 16)


class MLP(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(self.width)(nn.tanh(nn.Dense(2 * self.width)(x)))


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = MLP()(x)
        return nn.Dense(3)(x)


class Setup(nn.Module):
    def setup(self):
        self.layers = [MLP() for _ in range(3)]
        self.first = MLP()
        self.head = nn.Dense(3, name="readout")

    def __call__(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        one, two = MLP(name="one"), MLP(name="two")
        return one(two(one(x)))  # called twice


class Holds(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.tanh(self.inner(x)))


class SharedAcross(nn.Module):
    def setup(self):
        self.common = MLP()
        self.a, self.b = Holds(self.common), Holds(self.common)

    def __call__(self, x):
        return self.b(self.a(x))


@dataclasses.dataclass
class Pair:
    """A dataclass that JAX does not know."""

    left: Any
    right: Any
    note: str = ""


class Odd(nn.Module):
    """Arguments and results of every kind."""

    @nn.compact
    def __call__(self, x, scale, *, pair, tree, nothing=None, train=False, mode="sin", shape=(2, 2)):
        assert isinstance(scale, float) and isinstance(train, bool) and nothing is None and mode == "sin"
        assert isinstance(shape[0], int) and isinstance(tree["np"], np.ndarray) and pair.note == "n"
        y = nn.Dense(16)(jnp.sin(nn.Dense(32)(x))) * scale + pair.left + tree["a"][0] + tree["np"]
        out = Pair(left=y, right={"k": y * 2, "s": "text", "none": None}, note="out")
        return y if train else x, out, 3, None


class OddModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        total = 0.0
        for _ in range(2):
            tree = {"a": [x], "np": np.ones(16, np.float32)}
            x, pair, three, nothing = Odd()(x, 0.5, pair=Pair(x, 1, "n"), tree=tree, train=True)
            assert isinstance(pair, Pair) and pair.note == "out" and three == 3 and nothing is None
            assert pair.right["s"] == "text" and pair.right["none"] is None
            total += pair.right["k"]
        return x + total


class NormDrop(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        self.sow("intermediates", "normed", y)
        count = self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing() and self.is_mutable_collection("counters"):
            count.value += 1
        return x + nn.Dense(16)(nn.Dropout(0.5)(nn.relu(y), deterministic=not train))


class State(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        for _ in range(3):
            x = NormDrop()(x, train=train)
        return x


class PassesModule(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Dense(16, name="tied")
        for i in range(2):
            x = UsesModule(name=f"user_{i}")(x, embed)
        return x


class UsesModule(nn.Module):
    @nn.compact
    def __call__(self, x, other):
        return x + other(nn.tanh(nn.Dense(16)(x)))


class ShareScope(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Wrapping(name=f"w_{i}")(x)
        return x


class Wrapping(nn.Module):
    def setup(self):
        self.inner = MLP()
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return nn.tanh(self.inner(x))


class CallsSuper(MLP):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(super().__call__(x))


class Several(nn.Module):
    block: Any = MLP

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = self.block(name=f"b_{i}")(x)
        return x


CASES = {
    "compact, auto-named": (Compact(), (X,), {}),
    "setup, named": (Setup(), (X,), {}),
    "called twice": (Shared(), (X,), {}),
    "shared between modules": (SharedAcross(), (X,), {}),
    "flags, None, pytrees, dataclasses": (OddModel(), (X,), {}),
    "module as argument": (PassesModule(), (X,), {}),
    "share_scope": (ShareScope(), (X,), {}),
    "super().__call__": (Several(CallsSuper), (X,), {}),
    "nn.jit inside": (Several(nn.jit(MLP)), (X,), {}),
    "nn.vmap inside": (
        Several(nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True})),
        (X,),
        {},
    ),
    "nn.scan inside": (ScannedGPT(), (TOKENS,), {}),
    "dropout, BatchNorm, sow, counters": (
        State(),
        (X,),
        {"rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats", "intermediates", "counters"]},
    ),
    "keyword flag": (GPT(dropout=0.3), (TOKENS,), {"train": True, "rngs": {"dropout": jax.random.key(3)}}),
    "bf16 with f32 parameters": (GPT(dtype=jnp.bfloat16), (TOKENS,), {"rtol": 3e-2}),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_in_all_but_memory(case):
    model, args, kwargs = CASES[case]
    check_linen(model, *args, **kwargs)


@pytest.mark.parametrize("policy", ["all", "alternate", "heavy_ops", "offload", "heavy_ops_offload"])
def test_documented_policies(policy):
    transformed = check_linen(GPT(layers=4), TOKENS, policy=policy)
    boundaries = nj.policy_of(transformed).selection.boundaries
    expected = {
        "all": {(f"blocks_{i}",) for i in range(4)},
        "alternate": {("blocks_0",), ("blocks_2",)},
        "heavy_ops": {(f"blocks_{i}", "attn") for i in range(4)},
        "offload": {(f"blocks_{i}",) for i in range(4)},
        "heavy_ops_offload": {(f"blocks_{i}", "attn") for i in range(4)},
    }
    assert boundaries == expected[policy]


def test_none_changes_nothing():
    model = GPT()
    params = model.init(jax.random.key(0), TOKENS)
    same = nj.apply_selective_checkpointing(model, "none")
    assert (
        nj.residuals(linen_loss(same, TOKENS), params).nbytes == nj.residuals(linen_loss(model, TOKENS), params).nbytes
    )


def test_heavy_ops_keeps_projections_and_recomputes_one_matmul_a_layer():
    model = GPT(layers=3)
    params = model.init(jax.random.key(0), TOKENS)
    ours = linen_loss(nj.apply_selective_checkpointing(model, "heavy_ops"), TOKENS)
    kept = [r for r in nj.residuals(ours, params) if "/attn" in r.path]
    assert {r.op for r in kept} == {"dot_general"}
    assert len(kept) == 3 * 4  # q, k, v and the context that enters the output projection
    assert not any(r.shape[-2:] == (16, 16) for r in kept)  # no scores
    assert count_matmuls(jax.grad(ours), params) == count_matmuls(jax.grad(linen_loss(model, TOKENS)), params) + 3


def test_weights_are_told_by_data_flow_under_vmap():
    """Under vmap over a stack of parameters every matmul has batch dimensions; the projections are kept all the same."""
    model = GPT(layers=2)
    stack = jax.vmap(lambda k: model.init(k, TOKENS))(jax.random.split(jax.random.key(0), 3))

    def loss(m):
        return lambda p: jax.vmap(linen_loss(m, TOKENS))(p).sum()

    ours = loss(nj.apply_selective_checkpointing(model, "heavy_ops"))
    assert_close(jax.jit(jax.grad(loss(model)))(stack), jax.jit(jax.grad(ours))(stack))
    kept = [r for r in nj.residuals(ours, stack) if "/attn" in r.path]
    assert len(kept) == 2 * 4 and all(r.shape[0] == 3 for r in kept)


def test_class_decorator():
    @nj.apply_selective_checkpointing
    class Default(nn.Module):
        @nn.compact
        def __call__(self, x):
            return MLP(512, name="big")(nn.Dense(512)(x))

    @functools.partial(nj.apply_selective_checkpointing, config="all")
    class Model(Compact):
        pass

    variables = Compact().init(jax.random.key(0), X)
    chex.assert_trees_all_equal(Model().init(jax.random.key(0), X), variables)
    assert Model.__name__ == "Model"
    loss = lambda m: lambda p: total(m.apply(p, X))
    assert_effect(loss(Compact()), loss(Model()), variables)

    @nn.compact
    def around(self, x):
        return Model()(nn.Dense(16)(x))

    Outer = type("Outer", (nn.Module,), {"__call__": around, "__module__": __name__})
    outer = Outer().init(jax.random.key(0), X)
    assert set(outer["params"]) == {"Model_0", "Dense_0"}
    assert nj.residuals(loss(Outer()), outer).nbytes < 40_000


def test_users_own_remat_is_left_alone():
    mine = Several(nn.remat(MLP))
    with pytest.warns(UserWarning, match="already under the model's own remat"):
        transformed = nj.apply_selective_checkpointing(mine, "all")
        variables = transformed.init(jax.random.key(0), X)
    loss = lambda m: lambda p: total(m.apply(p, X))
    same = [nj.residuals(loss(m), variables).nbytes for m in (mine, transformed)]
    assert same[0] == same[1]
    assert count_matmuls(jax.grad(loss(transformed)), variables) == count_matmuls(jax.grad(loss(mine)), variables)


def test_warm_nn_jit_cache_does_not_hide_the_policy():
    model = Several(functools.partial(nn.jit(Block), 4))
    variables = model.init(jax.random.key(0), X)
    loss = lambda m: lambda p: total(m.apply(p, X))
    jax.grad(loss(model))(variables)
    ours = nj.apply_selective_checkpointing(model, "heavy_ops")
    assert_effect(loss(model), loss(ours), variables)
    jax.grad(loss(ours))(variables)
    assert nj.residuals(loss(model), variables).nbytes > nj.residuals(loss(ours), variables).nbytes


def test_look_ahead_without_init():
    """Families are found also where the model was never initialised in this process."""
    variables = Compact().init(jax.random.key(0), X)

    class Fresh(Compact):
        pass

    ours = nj.apply_selective_checkpointing(Fresh(), "alternate")
    grads = jax.grad(lambda p: total(ours.apply(p, X)))(variables)
    assert nj.policy_of(ours).selection.boundaries == {("MLP_0",), ("MLP_2",)}
    assert_close(jax.grad(lambda p: total(Compact().apply(p, X)))(variables), grads)


def test_one_look_ahead_serves_every_policy():
    """A call is looked at once, whatever the policies; CUSTOM asks every module itself, and another call has others."""
    variables, calls, asked = Compact().init(jax.random.key(0), X), [], []

    class Fresh(Compact):
        @nn.compact
        def __call__(self, x):
            calls.append(x.shape)
            return super().__call__(x)

    def boundaries(policy, x=X):
        ours = nj.apply_selective_checkpointing(Fresh(), policy)
        jax.eval_shape(jax.grad(lambda p: total(ours.apply(p, x))), variables)
        return nj.policy_of(ours).selection.boundaries

    custom = nj.SelectiveCheckpointConfig(
        policy="custom", custom_policy=lambda m: bool(asked.append(m.name)) or m.name == "MLP_1"
    )
    assert boundaries(custom) == {("MLP_1",)} and len(calls) == 2 and asked
    assert boundaries("alternate") == {("MLP_0",), ("MLP_2",)} and len(calls) == 4, "what CUSTOM chose is its own"
    assert len(boundaries("all")) > 2 and len(calls) == 5
    boundaries("matmuls", X[:1])
    assert len(calls) == 7


def test_look_ahead_keeps_random_streams_and_state():
    model = State()

    class Fresh(State):
        pass

    variables = model.init(jax.random.key(0), X)
    run = lambda m: m.apply(variables, X, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats", "counters"])
    chex.assert_trees_all_close(run(model), run(nj.apply_selective_checkpointing(Fresh(), "all")), rtol=1e-6)


def test_capture_intermediates_is_the_plain_models():
    model = Compact()
    variables = model.init(jax.random.key(0), X)
    ours = nj.apply_selective_checkpointing(model, "all")
    plain, transformed = (m.apply(variables, X, capture_intermediates=True)[1] for m in (model, ours))
    assert jax.tree.structure(plain) == jax.tree.structure(transformed)
    loss = lambda m: lambda p: total(m.apply(p, X, capture_intermediates=True)[0])
    assert count_matmuls(jax.grad(loss(ours)), variables) > count_matmuls(jax.grad(loss(model)), variables)


def test_reapplying_replaces_and_never_mutates():
    model = Compact()
    once = nj.apply_selective_checkpointing(model, "all")
    assert type(model) is Compact
    twice = nj.apply_selective_checkpointing(once, "none")
    variables = model.init(jax.random.key(0), X)
    loss = lambda m: lambda p: total(m.apply(p, X))
    assert nj.residuals(loss(twice), variables).nbytes == nj.residuals(loss(model), variables).nbytes
    assert nj.apply_selective_checkpointing(model, "all") == once
    assert type(nj.apply_selective_checkpointing(once, "alternate")) is type(
        nj.apply_selective_checkpointing(model, "alternate")
    )


def test_one_trace_for_equal_configurations():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(model, params):
        traces.append(1)
        return jax.grad(lambda p: total(model.apply(p, X)))(params)

    variables = Compact().init(jax.random.key(0), X)
    for _ in range(3):
        model = nj.apply_selective_checkpointing(Compact(), nj.SelectiveCheckpointConfig(policy="all"))
        step(model, variables)
    assert len(traces) == 1
    step(nj.apply_selective_checkpointing(Compact(), "alternate"), variables)
    assert len(traces) == 2


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
def test_pickle(dumps):
    model = nj.apply_selective_checkpointing(GPT(), "alternate")
    again = pickle.loads(dumps(model))
    params = model.init(jax.random.key(0), TOKENS)
    sizes = [nj.residuals(linen_loss(m, TOKENS), params).nbytes for m in (again, model, GPT())]
    assert sizes[0] == sizes[1] < sizes[2]
    if dumps is pickle.dumps:
        assert again == model and type(again) is type(model)
    assert copy.deepcopy(model) == model


@functools.partial(nj.apply_selective_checkpointing, config="all")
class Decorated(Compact):
    pass


def test_pickle_a_decorated_class():
    assert pickle.loads(pickle.dumps(Decorated)) is Decorated
    assert pickle.loads(pickle.dumps(Decorated())) == Decorated()


def test_orbax_checkpoints_go_both_ways(tmp_path):
    plain, ours = GPT(), nj.apply_selective_checkpointing(GPT(), "all")
    for i, (writer, reader) in enumerate([(plain, ours), (ours, plain)]):
        params = writer.init(jax.random.key(0), TOKENS)
        target = jax.eval_shape(reader.init, jax.random.key(1), TOKENS)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(i), params)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / str(i), target)
        chex.assert_trees_all_equal(params, restored)
        chex.assert_trees_all_equal(writer.apply(params, TOKENS), reader.apply(restored, TOKENS))
    assert_effect(linen_loss(plain, TOKENS), linen_loss(ours, TOKENS), restored)


@pytest.mark.parametrize("policy", ["all", "heavy_ops", "heavy_ops_offload"])
def test_sharded_over_a_mesh(policy):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = GPT()
    params = model.init(jax.random.key(0), TOKENS)
    shard = lambda x: jax.device_put(
        x,
        NamedSharding(
            mesh, PartitionSpec(*([None] * (x.ndim - 1)), "model") if x.shape[-1] % 2 == 0 else PartitionSpec()
        ),
    )
    sharded = jax.tree.map(shard, params)
    tokens = jax.device_put(jnp.tile(TOKENS, (2, 1)), NamedSharding(mesh, PartitionSpec("data")))
    plain = jax.jit(jax.grad(linen_loss(model, tokens)))(sharded)
    ours = nj.apply_selective_checkpointing(model, policy)
    grads = jax.jit(jax.grad(linen_loss(ours, tokens)))(sharded)
    assert_close(plain, grads, 1e-5)
    assert jax.tree.map(lambda x: x.sharding, grads) == jax.tree.map(lambda x: x.sharding, plain)
    assert_effect(linen_loss(model, tokens), linen_loss(ours, tokens), sharded)


def test_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = GPT(layers=2)
    params = model.init(jax.random.key(0), TOKENS)
    tokens = jnp.tile(TOKENS, (4, 1))

    def loss(m):
        def mapped(p):
            inner = lambda p, t: jax.lax.pmean(linen_loss(m, t)(p), "data")
            spec = (PartitionSpec(), PartitionSpec("data"))
            return jax.shard_map(inner, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())(p, tokens)

        return mapped

    ours = nj.apply_selective_checkpointing(model, "all")
    assert_close(jax.jit(jax.grad(loss(model)))(params), jax.jit(jax.grad(loss(ours)))(params), 1e-5)
    assert_effect(loss(model), loss(ours), params)


def test_gradient_accumulation():
    model, tx = GPT(layers=2), optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
    params = model.init(jax.random.key(0), TOKENS)

    def train(m):
        @jax.jit
        def step(params, state, tokens):
            updates, state = tx.update(jax.grad(linen_loss(m, tokens))(params), state, params)
            return optax.apply_updates(params, updates), state

        p, state = params, tx.init(params)
        for i in range(4):
            p, state = step(p, state, (TOKENS + i) % 64)
        return p

    ours = nj.apply_selective_checkpointing(model, "all")
    assert_close(train(model), train(ours), 1e-5)
    assert_effect(linen_loss(model, TOKENS), linen_loss(ours, TOKENS), params)


def test_bit_for_bit_without_fusion():
    """XLA's CPU backend reorders sums when it fuses; without fusion, values and gradients are equal to the bit."""
    model = GPT(layers=2)
    params = model.init(jax.random.key(0), TOKENS)
    run = lambda m: unfused(jax.value_and_grad(linen_loss(m, TOKENS)), params)
    for policy in ("all", "alternate", "heavy_ops"):
        ours = nj.apply_selective_checkpointing(model, policy)
        chex.assert_trees_all_equal(run(model), run(ours))
        assert_effect(linen_loss(model, TOKENS), linen_loss(ours, TOKENS), params)


def test_no_tracer_leaks():
    model = nj.apply_selective_checkpointing(Compact(), "all")
    with jax.checking_leaks():
        variables = model.init(jax.random.key(0), X)
        jax.jit(jax.grad(lambda p: total(model.apply(p, X))))(variables)


class Codec(nn.Module):
    def setup(self):
        self.down = [MLP(), MLP()]
        self.up = [MLP(), MLP()]

    def encode(self, x):
        for layer in self.down:
            x = layer(x)
        return x

    def __call__(self, x):
        x = self.encode(x)
        for layer in self.up:
            x = layer(x)
        return x


ENCODE = {
    "by name": lambda m, p: m.apply(p, X, method="encode"),
    "the model's own": lambda m, p: m.apply(p, X, method=m.encode),
    "the plain class's": lambda m, p: m.apply(p, X, method=Codec.encode),
    "in a function": lambda m, p: m.apply(p, X, method=lambda module, x: Codec.encode(module, x)),
    "nn.apply": lambda m, p: nn.apply(Codec.encode, m)(p, X),
    "bound": lambda m, p: m.bind(p).encode(X),
}


@pytest.mark.parametrize("how", ENCODE)
def test_other_methods_than_call(how):
    model = Codec()
    variables = model.init(jax.random.key(0), X)
    ours = nj.apply_selective_checkpointing(model, "all")
    loss = lambda m: lambda p: total(ENCODE[how](m, p))
    assert_effect(loss(model), loss(ours), variables)
    assert_close(jax.grad(loss(model))(variables), jax.grad(loss(ours))(variables))


@pytest.mark.parametrize("policy", ["all", "alternate", "heavy_ops"])
def test_hlo_equals_that_of_nn_remat_by_hand(policy):
    plain, by_hand = GPT(layers=2), gpt_by_hand(policy, layers=2)
    params = plain.init(jax.random.key(0), TOKENS)
    compiled = lambda m: normalised(
        jax.jit(jax.value_and_grad(linen_loss(m, TOKENS))).lower(params).compile().as_text()
    )
    assert compiled(nj.apply_selective_checkpointing(plain, policy)) == compiled(by_hand)
    assert compiled(by_hand) != compiled(plain)
