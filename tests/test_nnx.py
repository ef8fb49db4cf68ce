"""nnx models of every kind, transformed: equal in all but memory and time."""

import copy
import dataclasses
import functools
import pickle

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from checks import assert_close, assert_effect, check_nnx, nnx_matmuls, normalised, total, unfused
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from models import NNXGPT, loss_of, nnx_gpt_by_hand

import nexus_jax as nj
from nexus_jax.flops import count_matmuls

TOKENS = jnp.arange(32).reshape(2, 16) % 64
X = jnp.linspace(-1, 1, 4 * 8 * 16).reshape(4, 8, 16)


class MLP(nnx.Module):
    def __init__(self, rngs, d=16):
        self.up, self.down = nnx.Linear(d, 2 * d, rngs=rngs), nnx.Linear(2 * d, d, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Listed(nnx.Module):
    def __init__(self, rngs, make=MLP):
        self.layers = nnx.List([make(rngs) for _ in range(3)])
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def sequential(rngs):
    return nnx.Sequential(*[MLP(rngs) for _ in range(3)])


class Shared(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = MLP(rngs), MLP(rngs)
        self.again = self.one

    def __call__(self, x):
        return self.again(self.two(self.one(x)))


class State(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.drop = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.last = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        y = self.norm(self.linear(x))
        self.sow(nnx.Intermediate, "normed", y)
        return x + self.last(self.drop(jax.nn.relu(y)))


class Flags(nnx.Module):
    def __init__(self, rngs):
        self.mlp = MLP(rngs)

    def __call__(self, x, scale, *, deterministic, extra=None, tree=()):
        assert isinstance(scale, float) and isinstance(deterministic, bool) and extra is None
        y = self.mlp(x) * scale + tree["a"][0]
        return (y if deterministic else x), {"s": "text", "none": None, "y": y}


class FlagsModel(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Flags(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x, out = block(x, 0.5, deterministic=True, tree={"a": [x]})
            assert out["s"] == "text" and out["none"] is None
        return x


@dataclasses.dataclass
class Pair:
    """A dataclass that JAX does not know."""

    left: jax.Array
    note: str = ""


class TakesPair(nnx.Module):
    def __init__(self, rngs):
        self.mlp = MLP(rngs)

    def __call__(self, pair, *, count):
        assert pair.note == "n" and isinstance(count, int)
        return Pair(jnp.sin(self.mlp(pair.left)) * count, "n")


class PairModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([TakesPair(rngs) for _ in range(3)])

    def __call__(self, x):
        pair = Pair(x, "n")
        for layer in self.layers:
            pair = layer(pair, count=2)
        return pair.left


class Holder(nnx.Module):
    """Has parameters and no call: it is looked into, and is no boundary."""

    def __init__(self, rngs):
        self.mlp = MLP(rngs)


class Held(nnx.Module):
    def __init__(self, rngs):
        self.holder, self.head = Holder(rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.holder.mlp(x))


class Scanned(nnx.Module):
    def __init__(self, rngs, layers=4):
        make = nnx.vmap(lambda key: MLP(nnx.Rngs(key)), in_axes=0, out_axes=0)
        self.layers = make(jax.random.split(rngs.params(), layers))
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return self.head(forward(x, self.layers))


class VmappedExperts(nnx.Module):
    def __init__(self, rngs):
        self.experts = nnx.vmap(lambda key: MLP(nnx.Rngs(key)), in_axes=0, out_axes=0)(
            jax.random.split(rngs.params(), 4)
        )

    def __call__(self, x):
        return nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None), out_axes=0)(self.experts, x).sum(0)


class Jitted(Listed):
    def __call__(self, x):
        run = nnx.jit(lambda layer, x: layer(x))
        for layer in self.layers:
            x = run(layer, x)
        return self.head(x)


CASES = {
    "List": Listed,
    "Sequential": sequential,
    "shared, called twice": Shared,
    "flags, None, pytrees": FlagsModel,
    "dropout, BatchNorm, sow": functools.partial(Listed, make=State),
    "nnx.scan over stacked layers": Scanned,
    "nnx.vmap over stacked layers": VmappedExperts,
    "nnx.jit inside": Jitted,
    "dataclasses": PairModel,
    "module without a call": Held,
}


def gradients(model, *args, loss):
    """Gradients of the parameters, compiled without fusion."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    fresh = lambda rest: jax.tree.map(lambda x: x, rest)  # Variables of the trace that merges them
    return unfused(jax.grad(lambda p, rest: loss(nnx.merge(graphdef, p, fresh(rest)), *args)), params, rest)


def loss_fn(model, x):
    return total(model(x))


@pytest.mark.parametrize("case", CASES)
def test_equal_in_all_but_memory(case):
    check_nnx(CASES[case](nnx.Rngs(params=0, dropout=1)), X)


@pytest.mark.parametrize("mode", ["graph", "tree"])
@pytest.mark.parametrize("policy", ["all", "alternate", "heavy_ops"])
def test_graph_and_tree_mode(mode, policy):
    graph = mode == "graph"
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        plain = NNXGPT(rngs=nnx.Rngs(0), dropout=0.2)
        ours = nj.apply_selective_checkpointing(plain, policy)

        def run(model):
            graphdef, params, rest = nnx.split(model, nnx.Param, ...)

            def loss(params, rest):
                model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, rest))
                value = loss_of(model(TOKENS), TOKENS)
                return value, jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.RngCount)))

            run = jax.value_and_grad(loss, has_aux=True)
            counts = count_matmuls(run, params, rest)
            return jax.tree.leaves(unfused(run, params, rest)), counts

        (expected, before), (found, after) = run(plain), run(ours)
        assert_close(expected, found)
        assert after > before


def test_boundaries():
    model = NNXGPT(rngs=nnx.Rngs(0))
    chosen = {
        p: nj.policy_of(nj.apply_selective_checkpointing(model, p)).selection.boundaries
        for p in ("all", "alternate", "heavy_ops")
    }
    assert chosen["all"] == {("blocks", str(i)) for i in range(4)}
    assert chosen["alternate"] == {("blocks", "0"), ("blocks", "2")}
    assert chosen["heavy_ops"] == {("blocks", str(i), "attn") for i in range(4)}


def test_more_than_ten_layers_alternate_in_order():
    class Attributes(nnx.Module):
        def __init__(self, rngs):
            for i in range(12):
                setattr(self, f"layer{i}", MLP(rngs))

        def __call__(self, x):
            for i in range(12):
                x = getattr(self, f"layer{i}")(x)
            return x

    chosen = nj.policy_of(nj.apply_selective_checkpointing(Attributes(nnx.Rngs(0)), "alternate")).selection.boundaries
    assert chosen == {(f"layer{i}",) for i in range(0, 12, 2)}


def test_never_mutates_and_reapplying_replaces():
    model = Listed(nnx.Rngs(0))
    ours = nj.apply_selective_checkpointing(model, "all")
    assert type(model.layers[0]) is MLP and isinstance(ours.layers[0], MLP) and type(ours.layers[0]) is not MLP
    assert ours.layers[0].up.kernel is not model.layers[0].up.kernel
    plain = nj.residuals(loss_fn, model, X).nbytes
    assert nj.residuals(loss_fn, nj.apply_selective_checkpointing(ours, "none"), X).nbytes == plain
    alternate = nj.apply_selective_checkpointing(ours, "alternate")
    assert type(alternate.layers[1]) is MLP and type(alternate.layers[0]) is type(ours.layers[0])


def test_one_trace_for_equal_configurations():
    traces = []

    @nnx.jit
    def step(model, x):
        traces.append(1)
        return nnx.grad(loss_fn)(model, x)

    for _ in range(3):
        step(nj.apply_selective_checkpointing(Listed(nnx.Rngs(0)), nj.SelectiveCheckpointConfig(policy="all")), X)
    assert len(traces) == 1
    step(Listed(nnx.Rngs(0)), X)
    assert len(traces) == 2


def test_split_and_merge():
    ours = nj.apply_selective_checkpointing(Listed(nnx.Rngs(0)), "all")
    graphdef, state = nnx.split(ours)
    again = nnx.merge(graphdef, state)
    assert type(again.layers[0]) is type(ours.layers[0])
    sizes = [nj.residuals(loss_fn, m, X).nbytes for m in (again, ours, Listed(nnx.Rngs(0)))]
    assert sizes[0] == sizes[1] < sizes[2]
    assert hash(graphdef) == hash(nnx.split(nj.apply_selective_checkpointing(Listed(nnx.Rngs(0)), "all"))[0])


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
def test_pickle(dumps):
    plain = NNXGPT(layers=2, rngs=nnx.Rngs(0))
    ours = nj.apply_selective_checkpointing(plain, "all")
    graphdef, state = nnx.split(ours)
    again = pickle.loads(dumps(graphdef))
    if dumps is pickle.dumps:
        assert again == graphdef
    merged = nnx.merge(again, state)
    loss = lambda m: loss_of(m(TOKENS), TOKENS)
    sizes = [nj.residuals(loss, m).nbytes for m in (merged, ours, plain)]
    assert sizes[0] == sizes[1] < sizes[2]
    assert type(copy.deepcopy(ours).blocks[0]) is type(ours.blocks[0])


def test_orbax_checkpoints_go_both_ways(tmp_path):
    plain = Listed(nnx.Rngs(0))
    ours = nj.apply_selective_checkpointing(Listed(nnx.Rngs(1)), "all")
    for i, (writer, reader) in enumerate([(plain, ours), (ours, plain)]):
        state = nnx.to_pure_dict(nnx.state(writer))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(i), state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / str(i), nnx.to_pure_dict(nnx.state(reader)))
        target = nnx.state(reader)
        nnx.replace_by_pure_dict(target, restored)
        nnx.update(reader, target)
        chex.assert_trees_all_close(writer(X), reader(X), rtol=1e-6)
    assert nj.residuals(loss_fn, ours, X).nbytes < nj.residuals(loss_fn, plain, X).nbytes


def test_sharded_over_a_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    plain = NNXGPT(rngs=nnx.Rngs(0))
    ours = nj.apply_selective_checkpointing(plain, "heavy_ops")
    tokens = jax.device_put(jnp.tile(TOKENS, (2, 1)), NamedSharding(mesh, PartitionSpec("data")))

    def grads(model):
        graphdef, state = nnx.split(model)
        state = jax.tree.map(
            lambda x: jax.device_put(
                x,
                NamedSharding(
                    mesh, PartitionSpec(*([None] * (x.ndim - 1)), "model") if x.ndim > 1 else PartitionSpec()
                ),
            ),
            nnx.to_pure_dict(state),
        )

        def loss(pure):
            full = nnx.split(model)[1]
            nnx.replace_by_pure_dict(full, pure)
            return loss_of(nnx.merge(graphdef, full)(tokens), tokens)

        return jax.jit(jax.grad(loss, allow_int=True))(state)

    plain_grads, our_grads = grads(plain), grads(ours)
    floats = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]
    assert_close(floats(plain_grads), floats(our_grads), 1e-5)
    assert [x.sharding for x in floats(plain_grads)] == [x.sharding for x in floats(our_grads)]
    loss = lambda m: loss_of(m(tokens), tokens)
    assert nnx_matmuls(loss, ours) > nnx_matmuls(loss, plain)


def test_bf16_with_f32_parameters():
    plain = NNXGPT(rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    ours = nj.apply_selective_checkpointing(plain, "all")
    loss = lambda m: loss_of(m(TOKENS), TOKENS)
    grads = [nnx.to_pure_dict(gradients(m, loss=loss)) for m in (plain, ours)]
    assert_close(*grads, rtol=3e-2)
    assert (
        nj.residuals(lambda m: loss_of(m(TOKENS), TOKENS), ours).nbytes
        < nj.residuals(lambda m: loss_of(m(TOKENS), TOKENS), plain).nbytes
    )


@pytest.mark.parametrize("policy", ["all", "alternate", "heavy_ops"])
def test_hlo_equals_that_of_nnx_remat_by_hand(policy):
    plain = NNXGPT(layers=2, rngs=nnx.Rngs(0))
    by_hand, ours = nnx_gpt_by_hand(policy, plain), nj.apply_selective_checkpointing(plain, policy)

    def compiled(model):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        loss = lambda p, rest: loss_of(nnx.merge(graphdef, p, jax.tree.map(lambda x: x, rest))(TOKENS), TOKENS)
        return normalised(jax.jit(jax.value_and_grad(loss)).lower(params, rest).compile().as_text())

    assert compiled(ours) == compiled(by_hand)
    assert compiled(ours) != compiled(plain)


def test_attention_from_flax_itself():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    plain = Model(nnx.Rngs(0))
    ours = nj.apply_selective_checkpointing(plain, "heavy_ops")
    assert_close(*(nnx.to_pure_dict(gradients(m, X, loss=loss_fn)) for m in (plain, ours)))
    assert nj.residuals(loss_fn, ours, X).nbytes < nj.residuals(loss_fn, plain, X).nbytes


def test_layers_that_are_called_by_another_method():
    class Forward(MLP):
        def forward(self, x):
            return MLP.__call__(self, x)

    class Model(Listed):
        def __call__(self, x):
            for layer in self.layers:
                x = layer.forward(x)
            return self.head(x)

    ours = nj.apply_selective_checkpointing(Model(nnx.Rngs(0), Forward), "all")
    with pytest.warns(UserWarning, match=r"a boundary is the __call__ of a module, and layers/\d \(Forward\) was not"):
        ours(X)


def test_gradient_accumulation():
    def train(model):
        opt = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2), wrt=nnx.Param)

        @nnx.jit
        def step(model, opt, x):
            opt.update(model, nnx.grad(loss_fn)(model, x))

        for i in range(4):
            step(model, opt, X + i)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    plain = Listed(nnx.Rngs(0))
    ours = nj.apply_selective_checkpointing(plain, "all")
    assert nnx_matmuls(loss_fn, ours, X) > nnx_matmuls(loss_fn, plain, X)
    assert_close(train(plain), train(ours), 1e-5)


def test_a_model_that_is_built_in_a_transform():
    @nnx.jit
    def build(key):
        return nj.apply_selective_checkpointing(Listed(nnx.Rngs(key)), "all")

    plain, ours = Listed(nnx.Rngs(jax.random.key(3))), build(jax.random.key(3))
    assert_close(nnx.to_pure_dict(nnx.state(plain)), nnx.to_pure_dict(nnx.state(ours)))
    assert nnx_matmuls(loss_fn, ours, X) > nnx_matmuls(loss_fn, plain, X)


def test_pickle_a_model():
    plain = Listed(nnx.Rngs(0))
    again = pickle.loads(pickle.dumps(nj.apply_selective_checkpointing(plain, "all")))
    chex.assert_trees_all_close(again(X), plain(X), rtol=1e-6)
    assert nnx_matmuls(loss_fn, again, X) > nnx_matmuls(loss_fn, plain, X)


def test_effect_helper_rejects_a_no_op():
    with pytest.raises(AssertionError):
        assert_effect(lambda x: total(jnp.tanh(x @ x)), lambda x: total(jnp.tanh(x @ x)), jnp.ones((4, 4)))
