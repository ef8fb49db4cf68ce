"""What the planner sees in a program, and that no fixed policy beats its plan."""

import itertools
import types

import jax
import jax.numpy as jnp
import models
import pytest
from flax import nnx

import nexus_jax as nj
from nexus_jax.planner import loop
from nexus_jax.planner import needs as needed
from nexus_jax.planner.allocate import price_of
from nexus_jax.planner.baselines import baselines
from nexus_jax.planner.graph import Choice
from nexus_jax.planner.loss import Loss
from nexus_jax.planner.make import Planner, draft
from nexus_jax.planner.model import model_of
from nexus_jax.planner.options import of_choice
from nexus_jax.planner.plan import Subject
from nexus_jax.planner.prices import Prices
from nexus_jax.planner.solve import frontier, optimum
from nexus_jax.targets.compiler import find_target

F32 = jnp.float32
FLOPS = Prices(find_target(None), "flops")


def shape(*dims, dtype=F32):
    return jax.ShapeDtypeStruct(dims, dtype)


def needs_of(fn, *args, argnums=(0,)):
    loss = Loss(lambda *a: [fn(*a)], args)
    return loss.flat, needed.needs_of(loss.flat, loss.differentiated(argnums))


def model(fn, *args, argnums=(0,), price=FLOPS, solves=8, **kwargs):
    loss = Loss(fn, args)
    return model_of(loss.flat, loss.differentiated(argnums), price, solves=solves, **kwargs)


def gpt(layers=3, d=32, length=16, batch=4, **kwargs):
    net = models.GPT(layers=layers, d=d, heads=4, vocab=64, **kwargs)
    tokens = shape(batch, length, dtype=jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), tokens)
    return (lambda p, t: models.loss_of(net.apply(p, t), t)), (params, tokens)


def chain(widths, ops=jnp.tanh, batch=256):
    """A chain of matmuls of these widths; each result is bent."""

    def loss(ws, x):
        for w in ws:
            x = ops(x @ w)
        return jnp.sum(x)

    ws = [shape(a, b) for a, b in itertools.pairwise(widths)]
    return loss, (ws, shape(batch, widths[0]))


# --- what the backward pass needs ------------------------------------------------------------------------------------


def test_derived_values_are_told_from_the_programs_own():
    flat, found = needs_of(lambda x: jnp.sum(jnp.sin(x) * 2.0), shape(8))
    [residual] = found.residuals
    assert residual not in found.named  # cos(x): no name reaches it
    step = next(s for s in found.steps if residual in s.outs)
    assert step.eqn.primitive.name == "cos"
    assert not step.forward
    assert step.ins == (flat.number[flat.jaxpr.invars[0]],)
    assert step.home == 0


def test_what_a_custom_rule_keeps_is_seen():
    @jax.custom_vjp
    def bent(x):
        return x**3

    bent.defvjp(lambda x: (x**3, x**2 * 3), lambda r, g: (r * g,))
    _, found = needs_of(lambda w, x: jnp.sum(bent(x @ w)), shape(8, 8), shape(4, 8))
    [kept] = [v for v in found.residuals if found.avals[v].shape == (4, 8) and v not in (0, 1)]
    assert kept not in found.named


def test_a_mask_can_be_kept_by_name():
    def loss(w, x, key):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.sum(jnp.where(keep, x @ w, 0.0))

    _, found = needs_of(loss, shape(8, 8), shape(4, 8), jax.random.key(0))
    assert any(found.avals[v].dtype == bool and v in found.named for v in found.residuals)


# --- cuts ------------------------------------------------------------------------------------------------------------


def test_a_transformer_is_cut_where_only_the_residual_stream_crosses():
    found = model(*_called(gpt(layers=3, batch=8)))
    widths = [span.shape.crossing for (i, j), span in found.spans.items() if j == i + 1 and j < len(found.cuts) - 1]
    stream = 8 * 16 * 32 * 4
    assert len(widths) == 6  # the halves of three layers
    assert all(stream <= w < 2 * stream for w in widths[:-1])


def _called(workload):
    fn, args = workload
    return (fn, *args)


def test_equal_layers_are_solved_once():
    few, many = (model(*_called(gpt(layers=n))) for n in (4, 9))
    assert len(many.cuts) - len(few.cuts) == 10
    assert many.options.solved == few.options.solved


def test_a_chain_of_equal_layers_is_cut_between_them():
    found = model(*_called(chain([64] * 9)))
    assert len(found.cuts) == 9


# --- the frontier ----------------------------------------------------------------------------------------------------


def unet():
    def loss(ws, x):
        skips = []
        for w in ws["down"]:
            x = jax.nn.relu(x @ w)
            skips.append(x)
        for w in ws["up"]:
            x = jnp.tanh(jnp.concatenate([x, skips.pop()], -1) @ w)
        return jnp.mean(x**2)

    down = [shape(64, 64), shape(64, 32), shape(32, 16)]
    up = [shape(32, 32), shape(64, 64), shape(128, 64)]
    return loss, ({"down": down, "up": up}, shape(128, 64))


def experts():
    def loss(ws, x):
        for gate, up, down in ws:
            weights = jax.nn.softmax(x @ gate)
            x = x + jnp.einsum("be,ebd->bd", weights, jax.nn.gelu(jnp.einsum("bd,edf->ebf", x, up)) @ down)
        return jnp.mean(x**2)

    layer = (shape(32, 4), shape(4, 32, 64), shape(4, 64, 32))
    return loss, ([layer] * 3, shape(128, 32))


MODELS = {
    "gpt": gpt(),
    "equal": chain([64] * 9),
    "unequal": chain([64, 256, 16, 512, 32, 128, 128, 64]),
    "unet": unet(),
    "experts": experts(),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("target", "objective"), [(None, "flops"), ("v5e", "seconds"), ("h200", "seconds")])
def test_no_fixed_policy_is_faster_at_its_own_peak(name, target, objective):
    found = model(*_called(MODELS[name]), price=Prices(find_target(target), objective))
    policies = list(baselines(found))
    assert len(policies) > 6
    for policy in policies:
        best = found.frontier.within(policy.path.peak)
        assert best is not None, policy
        assert best.ticks <= policy.path.ticks, policy


def test_the_plan_beats_every_fixed_policy_somewhere():
    found = model(*_called(gpt(layers=6)))
    policies = [b.path for b in baselines(found)]
    better = 0
    for peak in found.frontier.peaks:
        fixed = min((p.ticks for p in policies if p.peak <= peak), default=None)
        better += fixed is not None and found.frontier.within(peak).ticks < 0.8 * fixed
    assert better > len(found.frontier.peaks) / 3


def test_more_budget_is_never_slower_and_the_bound_is_below():
    frontier = model(*_called(gpt())).frontier
    assert frontier.peaks == sorted(frontier.peaks)
    assert frontier.ticks == sorted(frontier.ticks, reverse=True)
    assert frontier.ticks[-1] == 0
    for peak, ticks in zip(frontier.peaks, frontier.ticks, strict=True):
        assert frontier.bound(peak) <= ticks


def test_a_path_is_priced_as_its_options():
    found = model(*_called(gpt()))
    for at in range(0, len(found.frontier.peaks), 50):
        path = found.frontier.path(at)
        assert price_of([o for _, o in path.steps]) == (path.peak, path.ticks)
        assert found.segments(path)[0].start == 0
        assert found.segments(path)[-1].stop == len(found.flat.eqns)


def test_a_deadline_gives_a_plan_with_a_larger_gap():
    loss = _called(gpt())
    rushed = model(*loss, deadline=0.0).frontier
    free = model(*loss).frontier
    assert not rushed.exact
    middle = (free.peaks[0] + free.peaks[-1]) // 2
    assert rushed.within(middle).ticks >= free.within(middle).ticks
    assert rushed.bound(middle) <= free.within(middle).ticks


# --- the families of PyTorch's own tests of its memory budget ---------------------------------------------------------
# test/functorch/test_ac.py, class MemoryBudgetTest: https://github.com/pytorch/pytorch/blob/main/test/functorch/test_ac.py


def one_boundary(fn, *args):
    """The frontier of a program taken as one boundary, as (bytes kept, FLOPs again)."""
    found = model(fn, *args)
    [span] = [found.spans_of.of(0, len(found.flat.eqns))]
    return [(p.price.device, p.price.ticks) for p in frontier(span.shape.graph).points]


def test_equal_matmuls_cost_one_each():
    """Of four matmuls that can be made again, each that is not kept costs the same."""
    loss, args = chain([64] * 5, ops=lambda x: x, batch=64)
    found = one_boundary(lambda ws, x: loss(ws, x), *args)
    size, cost = 64 * 64 * 4, 2 * 64**3
    # The last product is only summed: nothing needs it. Three are needed as operands.
    assert found == [(k * size, (3 - k) * cost) for k in (3, 2, 1, 0)]


def test_of_unequal_matmuls_the_one_worth_most_for_its_bytes_is_kept():
    loss, args = chain([64, 16, 128, 64, 8], ops=lambda x: x, batch=64)
    found = one_boundary(loss, *args)
    sizes = [64 * n * 4 for n in (16, 128, 64)]
    costs = [2 * 64 * a * b for a, b in ((64, 16), (16, 128), (128, 64))]
    everything = {
        (
            sum(s for s, k in zip(sizes, kept, strict=True) if k),
            sum(c for c, k in zip(costs, kept, strict=True) if not k),
        )
        for kept in [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    }
    best = {p for p in everything if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in everything)}
    assert set(found) == best


def test_a_cheaper_matmul_is_made_again_first():
    def loss(ws, x, y):
        cheap, dear = x @ ws[0], y @ ws[1]  # equal bytes; a quarter of the FLOPs
        return jnp.sum(jnp.sin(cheap) * jnp.sin(dear))

    args = ([shape(16, 64), shape(64, 64)], shape(64, 16), shape(64, 64))
    found = dict(one_boundary(loss, *args))
    size = 64 * 64 * 4
    wave = 64 * 64  # a sine, made again for its cosine's sake or for its own
    assert found[2 * size] <= 4 * wave
    assert 2 * 64 * 16 * 64 <= found[size] <= 2 * 64 * 16 * 64 + 4 * wave


def test_attention_is_made_again_before_the_projections():
    """The scores are many bytes for few FLOPs, the projections few bytes for many (PyTorch's attention against linear)."""
    fn, args = gpt(layers=1, d=64, length=128, batch=1)
    found = model(fn, *args)
    shape = found.span(0, 1).shape
    batched = dict(shape.matmuls)
    assert sorted(batched.values()) == [False] * 4 + [True] * 2  # q, k, v, out; scores, context
    remade = lambda choice: {v for v in batched if shape.graph.maker[v] in shape.graph.again(choice.kept)}
    none = [p for p in frontier(shape.graph, solves=40).points if not remade(p.choice)]
    scores = 4 * 128 * 128 * 4
    less = optimum(shape.graph, none[-1].price.device - scores)
    assert remade(less)
    assert all(batched[v] for v in remade(less))


# --- other programs --------------------------------------------------------------------------------------------------


def test_an_nnx_model_has_the_same_frontier_as_its_linen_twin():
    make = lambda: models.NNXGPT(3, 32, 4, 64, 16, rngs=nnx.Rngs(0))
    net = nnx.eval_shape(make)
    found = model(lambda m, t: models.loss_of(m(t), t), net, shape(4, 16, dtype=jnp.int32))
    twin = model(*_called(gpt()))
    assert len(found.cuts) == len(twin.cuts)
    assert abs(found.frontier.peaks[0] - twin.frontier.peaks[0]) < 0.05 * twin.frontier.peaks[0]


def test_a_program_that_calls_back_keeps_what_it_printed():
    def loss(w, x):
        y = jnp.tanh(x @ w)
        jax.debug.print("{}", y[0, 0])
        return jnp.sum(jnp.sin(y @ w))

    found = model(loss, shape(32, 32), shape(64, 32))
    for at in range(len(found.frontier.peaks)):
        for segment in found.segments(found.frontier.path(at)):
            if segment.boundary:
                assert not any(eqn.effects for eqn in found.flat.eqns[segment.start : segment.stop])


def test_every_way_to_run_a_stretch_is_bounded():
    fn, args = chain([64, 16, 48, 32, 8])
    found = model(fn, *args)
    checked = 0
    for (i, j), span in found.spans.items():
        graph = span.shape.graph
        ways = found.options.of(span.shape, whole=False)
        for kept in itertools.chain.from_iterable(
            itertools.combinations(sorted(graph.keepable), n) for n in range(len(graph.keepable) + 1)
        ):
            option = of_choice(span.shape, Choice(saved=frozenset(kept)))
            better = lambda o: o.kept <= option.kept and o.working <= option.working and o.ticks <= option.ticks
            assert any(better(b) for b in ways.bounds), (i, j, kept)
            for a_byte, a_working in itertools.product((0, 1, 100, 10_000), repeat=2):
                weigh = lambda o: 1000 * o.ticks + a_byte * o.kept + a_working * o.working
                assert min(map(weigh, ways.corners)) <= weigh(option)
            checked += 1
    assert checked > 100


# --- the host ---------------------------------------------------------------------------------------------------------


def test_the_link_is_that_of_the_data_sheet():
    target = find_target("h200")
    # a stretch of a millisecond, in ticks of a nanosecond
    link = Prices(target, "seconds", host=2**30).link(10**9, unit=1000)
    assert (link.hidden_out, link.hidden_back) == (10**6, 2 * 10**6)
    hidden = int(1e-3 * target.sheet.device_to_host_bandwidth)
    memory = 2e9 * hidden / target.sheet.memory_bandwidth  # out of it and into it
    assert link.ticks(hidden) == pytest.approx(memory, abs=1)
    assert link.ticks(3 * hidden) == pytest.approx(3 * memory + 2e6 + 1e6, abs=2)  # 2 ms late out, 1 ms back
    flops = Prices(target, "flops", host=2**30).link(10**9, unit=1)
    late = flops.ticks(3 * hidden) - 3 * flops.ticks(hidden)
    assert late == pytest.approx(3e-3 * target.sheet.bf16_flops, rel=1e-6)
    assert Prices(target, "seconds").link(10**9, unit=1) is None


def layers(ws, x):
    for w in ws:
        x = jnp.sin(jnp.tanh(x @ w) @ w)
    return jnp.sum(x)


def test_a_program_keeps_on_the_host_what_its_path_says():
    args = [shape(512, 512)] * 5, shape(8192, 512)
    found = model(layers, *args, price=Prices(find_target("h200"), "seconds", host=2**30))
    paths = [found.frontier.path(at) for at in range(len(found.frontier.peaks))]
    assert any(o.what.away for p in paths for _, o in p.steps)
    moving = [p for p in paths if p.host]
    for path in moving[:: max(1, len(moving) // 6)]:
        plan = draft(Subject.of(found.flat), found.segments(path))
        assert nj.residuals(plan.apply(layers), *args).host_bytes == path.host <= 2**30
    assert not any(p.host for p in (found.unmoved(path) for path in paths))


def test_what_the_host_takes_is_not_predicted_for_the_device():
    planner = Planner(layers, ([shape(512, 512)] * 5, shape(8192, 512)), target="h200", host_budget="1GiB")
    frontier = planner.model.frontier
    path = next(p for p in map(frontier.path, range(len(frontier.peaks))) if p.host)
    stays = planner.model.unmoved(path)
    assert planner.predicted(stays) - planner.predicted(path) == stays.peak - path.peak > 0


@pytest.mark.parametrize("copies", [0, 2**40])
def test_to_be_allowed_a_host_is_no_loss(monkeypatch, copies):
    """Also where a compiler makes so much of copies that they free nothing; and it costs no more compiles."""
    wide = [shape(8192, 8192)] * 5, shape(8192, 8192)  # so wide that a layer's values move while it computes
    planner = Planner(layers, wide, target="h200", host_budget="64GiB")

    def measured(path):
        taken = planner.predicted(path) + (copies if path.host else 0)
        found = types.SimpleNamespace(device_bytes=taken, host_bytes=path.host, flops=path.ticks, target="h200")
        key = planner.model.segments(path)
        planner._measurements[key] = found
        planner._paths[key] = planner._tried[key] = path
        return found

    monkeypatch.setattr(planner, "measured", measured)
    monkeypatch.setitem(planner.__dict__, "offset", 0)
    before = types.SimpleNamespace(device_bytes=2**40, host_bytes=0, flops=0, target="h200")
    monkeypatch.setitem(planner.__dict__, "before", before)
    frontier, alone = planner.model.frontier, planner.models[0].frontier
    paths = [frontier.path(at) for at in range(len(frontier.peaks))]
    least = min(planner.predicted(alone.path(at)) for at in range(len(alone.peaks)))
    budget = next(n for p in paths if p.host and (n := planner.predicted(p)) >= least)
    found = planner.plan(budget)
    assert len(planner.compiled()) < loop.COMPILES
    assert found.device_bytes <= budget and (found.host_bytes > 0) == (copies == 0)
    fits = [alone.path(at) for at in range(len(alone.peaks)) if planner.predicted(alone.path(at)) <= budget]
    assert found.cost <= min(p.ticks for p in fits) * planner.model.spans_of.unit


def test_without_a_host_nothing_is_offloaded():
    found = model(layers, [shape(512, 512)] * 5, shape(8192, 512), price=Prices(find_target("h200"), "seconds"))
    assert not any(found.frontier.path(at).host for at in range(len(found.frontier.peaks)))
