"""Scans that take several of their steps at once: which of them keep what, the same values, and what it is good for."""

import dataclasses
import tomllib

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import tomli_w
from checks import assert_close, needs, unfused
from flax import linen as nn

import nexus_jax as nj
from nexus_jax import flops
from nexus_jax.offloading.loops import loop_of
from nexus_jax.planner import groups
from nexus_jax.planner.allocate import price_of
from nexus_jax.planner.loss import Loss
from nexus_jax.planner.make import Planner, draft
from nexus_jax.planner.model import model_of
from nexus_jax.planner.plan import Subject
from nexus_jax.planner.prices import Prices
from nexus_jax.planner.rewrite import Segment
from nexus_jax.targets.compiler import find_target

FLOPS = Prices(find_target(None), "flops")


def recurrence(reverse=False, steps=6):
    """Stacked operands that are differentiated and not, a constant, stacked results, a carry of integers."""

    def fn(ws, shift, x, scales):
        def step(carry, taken):
            y, n = carry
            w, scale = taken
            y = jnp.tanh(y @ w + shift) * scale
            return (y, n + 1), (jnp.sin(y), w[0], n)

        (y, n), (ys, rows, _) = jax.lax.scan(step, (x, 0), (ws, scales), reverse=reverse)
        return jnp.sum(y**2) + jnp.sum(ys**3) + jnp.sum(rows * ws[:, 1]) + n

    keys = jax.random.split(jax.random.key(0), 4)
    ws, scales = jax.random.normal(keys[0], (steps, 8, 8)), 1 + jax.random.uniform(keys[1], (steps, 1, 1))
    return fn, (ws, jax.random.normal(keys[2], (8,)), jax.random.normal(keys[3], (4, 8)), scales)


def every_way(fn, *args, argnums=(0,), most=4, least=2):
    """A plan for some of the ways in which the scan of a program can take ``least`` steps or more, and each one's group."""
    loss = Loss(fn, args)
    model = model_of(loss.flat, loss.differentiated(argnums), FLOPS, solves=4)
    subject, end = Subject.of(loss.flat), len(loss.flat.eqns)
    for (at, group), body in model.bodies.items():
        count = len(body.frontier.peaks)
        for n in sorted({k * (count - 1) // most for k in range(most)}) if group >= least else ():
            scan = Segment(
                start=at, stop=at + 1, boundary=False, inside=body.segments(body.frontier.path(n)), group=group
            )
            around = [Segment(start=0, stop=at, boundary=False)] if at else []
            around += [scan] + ([Segment(start=at + 1, stop=end, boundary=False)] if at + 1 < end else [])
            yield draft(subject, tuple(around)), group


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_the_plain_scan(reverse):
    fn, args = recurrence(reverse)
    plain = jax.value_and_grad(fn, (0, 1, 2))(*args)
    found = list(every_way(fn, *args, argnums=(0, 1, 2)))
    assert {group for _, group in found} == {2, 3}
    for plan, _ in found:
        assert_close(plain, jax.value_and_grad(plan.apply(fn), (0, 1, 2))(*args), 1e-5)
        np.testing.assert_allclose(fn(*args), plan.apply(fn)(*args), rtol=1e-6)


def assert_same_derivatives(fn, ours, args):
    """Of functions of four arrays: forward mode, a gradient penalty, a Hessian, and gradients under ``jax.vmap``."""
    tangents = jax.tree.map(jnp.ones_like, args)
    batch = tuple(jnp.stack([a, a + 0.1]) for a in args)
    penalty = lambda f: jax.grad(lambda *a: sum(jnp.sum(g**2) for g in jax.grad(f, (0, 2))(*a)))
    assert_close(jax.jvp(fn, args, tangents), jax.jvp(ours, args, tangents), 1e-5)
    assert_close(penalty(fn)(*args), penalty(ours)(*args), 1e-4)
    assert_close(jax.jacfwd(jax.grad(fn, 2), 2)(*args), jax.jacfwd(jax.grad(ours, 2), 2)(*args), 1e-4)
    assert_close(jax.vmap(jax.grad(fn))(*batch), jax.vmap(jax.grad(ours))(*batch), 1e-5)


def test_every_derivative_is_the_plain_one():
    fn, args = recurrence()
    for plan, _ in every_way(fn, *args, argnums=(0, 1, 2), most=2):
        assert_same_derivatives(fn, plan.apply(fn), args)


class Noisy(nn.Module):
    """A scanned model with dropout and batch statistics: keys and state in stacks."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = nn.tanh(nn.Dense(8)(nn.BatchNorm(use_running_average=False)(x)))
                return x + nn.Dropout(0.5, deterministic=False)(y), None

        axes, rngs = {"params": 0, "batch_stats": 0}, {"params": True, "dropout": True}
        x, _ = nn.scan(Step, variable_axes=axes, split_rngs=rngs, length=4)(name="layers")(x, None)
        return x


def noisy():
    """Its loss, which returns its new statistics too, and what to call that with."""
    net, x = Noisy(), jax.random.normal(jax.random.key(2), (6, 8))
    variables = net.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def fn(params, stats, x, key):
        y, new = net.apply({"params": params, "batch_stats": stats}, x, rngs={"dropout": key}, mutable=["batch_stats"])
        return jnp.sum(y**2), new

    args = variables["params"], variables["batch_stats"], x, jax.random.key(3)
    return fn, args


def test_dropout_and_statistics_are_those_of_the_plain_model():
    fn, args = noisy()
    plain = unfused(jax.value_and_grad(fn, has_aux=True), *args)
    found = list(every_way(fn, *args))
    assert {group for _, group in found} == {2}
    for plan, _ in found:
        assert_close(plain, unfused(jax.value_and_grad(plan.apply(fn), has_aux=True), *args), 1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_over_a_mesh(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    _, (ws, x) = layers()

    def fn(ws, x):
        return jnp.sum(jax.lax.scan(lambda y, w: (y + jnp.sin(y @ w), None), x, ws)[0])

    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        args = place(ws), place(x, "x", None)
        plain = jax.jit(jax.grad(fn))(*args)
        found = list(every_way(fn, *args, least=1))
        assert {group for _, group in found} == {1, 2, 4}
        for plan, _ in found:
            ours = jax.jit(jax.grad(plan.apply(fn)))(*args)
            assert_close(plain, ours, 1e-5)
            assert ours.sharding.is_equivalent_to(plain.sharding, 3)


def layers(n=8, d=16):
    """A scan over layers whose cost and bytes are known: one matmul each, and what its tanh keeps."""

    def fn(ws, x):
        return jnp.sum(jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, ws)[0])

    return fn, (jnp.ones((n, d, d)) / d, jnp.ones((4, d)))


def of_groups(fn, args, group, *inside):
    """The plan that runs the scan's steps as said."""
    flat = Loss(fn, args).flat
    at = next(i for i, eqn in enumerate(flat.eqns) if eqn.primitive.name == "scan")
    scan = Segment(start=at, stop=at + 1, boundary=False, inside=inside, group=group)
    rest = (Segment(start=at + 1, stop=len(flat.eqns), boundary=False),)
    return draft(Subject.of(flat), ((Segment(start=0, stop=at, boundary=False),) if at else ()) + (scan, *rest))


def body_of(fn, args, group):
    flat = Loss(fn, args).flat
    [scan] = [eqn for eqn in flat.eqns if eqn.primitive.name == "scan"]
    return groups.body_of(loop_of(scan), group)


def test_some_of_the_steps_recompute_and_no_slice_of_the_weights_is_kept():
    fn, args = layers()
    row = 4 * 16 * 4
    body = body_of(fn, args, 4)
    names = [eqn.primitive.name for eqn in body.eqns]
    assert names == ["slice", "squeeze", "dot_general", "tanh"] * 4
    again = lambda start, stop, **kw: Segment(start=start, stop=stop, boundary=True, **kw)
    count = lambda plan: flops.count_matmuls(jax.value_and_grad(plan.apply(fn)), *args)
    before = flops.count_matmuls(jax.value_and_grad(fn), *args)
    kept = lambda plan: nj.residuals(plan.apply(fn), *args).nbytes

    # three of four make their matmul again, and each keeps what it is given
    three = of_groups(fn, args, 4, again(0, 4), again(4, 8), again(8, 12), again(12, 16, save=(2,)))
    assert count(three) - before == 2 * 3
    assert kept(three) == 8 * row + 2 * row
    # two at once keep half of what they are given
    two = of_groups(fn, args, 2, again(0, 8))
    assert count(two) - before == 8
    assert kept(two) == 4 * row


def test_what_cannot_be():
    fn, args = layers()
    with pytest.raises(ValueError, match="a scan of 8 steps cannot take 3 at once: write a number that divides it"):
        jax.jit(of_groups(fn, args, 3, Segment(start=0, stop=12, boundary=True)).apply(fn))(*args)
    with pytest.raises(ValueError, match="the segments end at equation 4, and the program has 8"):
        jax.jit(of_groups(fn, args, 2, Segment(start=0, stop=4, boundary=True)).apply(fn))(*args)
    for wrong in (0, -2):
        with pytest.raises(ValueError, match=f"group = {wrong} is of steps of a scan; write 1 or more"):
            Segment(start=0, stop=1, boundary=False, group=wrong, inside=(Segment(start=0, stop=1, boundary=True),))
    with pytest.raises(ValueError, match="group = 2 is of steps of a scan; write 1 or more, and inside"):
        Segment(start=0, stop=1, boundary=False, group=2)


def test_a_plan_survives_its_file(tmp_path):
    fn, args = layers()
    plan = of_groups(fn, args, 2, Segment(start=0, stop=8, boundary=True))
    plan = dataclasses.replace(plan, target="v5e")
    plan.save(tmp_path / "plan.toml")
    assert nj.Plan.load(tmp_path / "plan.toml") == plan
    found = tomllib.loads((tmp_path / "plan.toml").read_text())
    scan = next(s for s in found["segment"] if "inside" in s)
    assert scan["group"] == 2 and all("group" not in s for s in (*found["segment"], *scan["inside"]) if s is not scan)
    for wrong in ("2", True, -1):
        scan["group"] = wrong
        (tmp_path / "wrong.toml").write_text(tomli_w.dumps(found))
        with pytest.raises(ValueError, match="group = "):
            nj.Plan.load(tmp_path / "wrong.toml")


@pytest.mark.parametrize(
    ("steps", "sizes"),
    [(2, [1]), (7, [1]), (8, [1, 2, 4]), (9, [1, 3]), (12, [1, 2, 4]), (25, [1]), (96, [1, 2, 4])],
)
def test_how_many_at_once(steps, sizes):
    assert groups.sizes(steps) == sizes


# --- compiled --------------------------------------------------------------------------------------------------------


def gpt(n=24):
    net = models.ScannedGPT(layers=n, d=256, heads=4, vocab=512)
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), tokens)
    return (lambda p, t: models.loss_of(net.apply(p, t), t)), (params, tokens)


def test_where_one_choice_for_all_is_coarse_several_steps_recompute_less():
    needs("h200")
    fn, args = gpt()
    planner = Planner(fn, args, target="h200", objective="flops")
    simple = planner.models[0].frontier
    # the widest gap of time between neighbours, and a budget in the middle of it
    at = max(range(len(simple.peaks) - 1), key=lambda i: simple.ticks[i] - simple.ticks[i + 1])
    budget = (simple.peaks[at] + simple.peaks[at + 1]) // 2
    path = planner.model.frontier.within(budget)
    assert path.ticks < 0.9 * simple.within(budget).ticks
    [scan] = [s for s in planner.model.segments(path) if s.inside]
    assert scan.group > 1
    again = planner.measured(path).flops - planner.before.flops
    assert again == pytest.approx(path.ticks * planner.model.spans_of.unit, rel=0.01)
    assert planner.predicted(path) + planner.offset == pytest.approx(planner.measured(path).device_bytes, rel=0.1)


def test_bounds_of_a_scan_know_what_a_step_takes_while_it_runs():
    fn, args = layers(d=64)
    loss = Loss(fn, args)
    found = model_of(loss.flat, loss.differentiated((0, 1)), FLOPS, solves=4)
    taken = lambda path: price_of([option for _, option in path.steps])[0]
    for body in found.bodies.values():
        least = min(taken(body.frontier.path(at)) for at in range(len(body.frontier.peaks)))
        assert 0 < body.least <= least
    [bounds] = [
        e.bounds for e in found.frontier.edges if found.span(e.start, e.stop).start in {at for at, _ in found.bodies}
    ]
    opened = [b for b in bounds if b.working and b.ticks]
    smallest = min(body.least for body in found.bodies.values())
    assert opened and all(b.working >= smallest for b in opened)
    for peak, ticks in zip(found.frontier.peaks, found.frontier.ticks, strict=True):
        assert found.frontier.bound(peak) <= ticks


def test_gradients_in_turn_take_less_memory(monkeypatch):
    needs("h200")
    fn, args = gpt(8)
    loss = Loss(fn, args)
    model = model_of(loss.flat, loss.differentiated((0,)), Prices(find_target("h200"), "flops"), solves=2)
    [body] = [m for (_, group), m in model.bodies.items() if group == 4]
    [at] = [at for at, group in model.bodies if group == 4]
    whole = body.segments(body.frontier.path(len(body.frontier.peaks) // 4))
    segments = [Segment(start=at, stop=at + 1, boundary=False, inside=whole, group=4)]
    segments = [Segment(start=0, stop=at, boundary=False), *segments]
    segments.append(Segment(start=at + 1, stop=len(loss.flat.eqns), boundary=False))
    plan = draft(Subject.of(loss.flat), tuple(segments))
    in_turn = nj.measure(plan.apply(fn), *args, target="h200").device_bytes
    monkeypatch.setattr(groups, "fenced", list)
    assert in_turn < 0.95 * nj.measure(plan.apply(fn), *args, target="h200").device_bytes
