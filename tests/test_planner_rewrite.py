"""A rewritten program: the same values and gradients, the residuals and the recomputation that the plan says."""

import functools
import itertools
import tomllib

import chex
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import tomli_w
from checks import assert_close, steps_of, unfused
from flax import nnx

import nexus_jax as nj
from nexus_jax.planner.graph import Choice
from nexus_jax.planner.loss import Loss
from nexus_jax.planner.make import draft
from nexus_jax.planner.model import model_of
from nexus_jax.planner.options import of_choice, plain
from nexus_jax.planner.plan import PlanMismatch, Subject
from nexus_jax.planner.prices import Prices
from nexus_jax.planner.rewrite import Segment, rewritten
from nexus_jax.planner.solve import trimmed
from nexus_jax.planner.table import rows_of
from nexus_jax.targets.compiler import find_target

FLOPS = Prices(find_target(None), "flops")


def plans(fn, *args, argnums=(0,), solves=4):
    """The model, and plans over its frontier from the least memory to the most."""
    loss = Loss(fn, args)
    model = model_of(loss.flat, loss.differentiated(argnums), FLOPS, solves=solves)
    last = len(model.frontier.peaks) - 1
    paths = [model.frontier.path(at) for at in sorted({0, last // 3, 2 * last // 3, last})]
    return model, [(path, draft(Subject.of(model.flat), model.segments(path))) for path in paths]


def inner_flops(fn, *args, argnums=0):
    from nexus_jax import flops

    return flops.count(jax.value_and_grad(fn, argnums), *args).flops


def gpt_loss(**kwargs):
    net = models.GPT(layers=2, **kwargs)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
    params = jax.jit(net.init)(jax.random.key(0), tokens)
    return net, params, tokens


def test_gradients_are_those_of_the_plain_model():
    net, params, tokens = gpt_loss()
    fn = lambda p, t: models.loss_of(net.apply(p, t), t)
    plain = unfused(jax.value_and_grad(fn), params, tokens)
    _, found = plans(fn, params, tokens)
    for _, plan in found:
        assert_close(plain, unfused(jax.value_and_grad(plan.apply(fn)), params, tokens), 1e-5)


def test_dropout_is_the_same_dropout():
    net, params, tokens = gpt_loss(dropout=0.5)
    fn = lambda p, t, key: models.loss_of(net.apply(p, t, train=True, rngs={"dropout": key}), t)
    key = jax.random.key(7)
    plain = unfused(jax.value_and_grad(fn), params, tokens, key)
    _, found = plans(fn, params, tokens, key)
    for _, plan in found:
        assert_close(plain, unfused(jax.value_and_grad(plan.apply(fn)), params, tokens, key), 1e-5)
    assert found[0][0].ticks > 0


def test_residuals_and_recomputation_are_those_of_the_plan():
    net, params, tokens = gpt_loss()
    fn = lambda p, t: models.loss_of(net.apply(p, t), t)
    model, found = plans(fn, params, tokens)
    before = inner_flops(fn, params, tokens)
    sizes = []
    for path, plan in found:
        again = inner_flops(plan.apply(fn), params, tokens) - before
        assert again == pytest.approx(path.ticks * model.spans_of.unit, rel=1e-3, abs=200)
        sizes.append(nj.residuals(plan.apply(fn), params, tokens).nbytes)
    assert max(sizes[:-1]) < 0.6 * sizes[-1]


def test_a_boundary_keeps_what_crosses_and_what_it_saves_and_nothing_else():
    def fn(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    ws, x = [jnp.ones((16, 16)) / 16] * 4, jnp.ones((8, 16))
    loss = Loss(fn, (ws, x))
    flat = loss.flat
    assert [e.primitive.name for e in flat.eqns] == ["dot_general", "tanh"] * 4 + ["reduce_sum"]
    size = 8 * 16 * 4

    def kept(*segments):
        run = rewritten(flat, segments)
        return nj.residuals(lambda *a: run(*flat.consts, *jax.tree.leaves(a))[0], ws, x).nbytes

    whole = Segment(start=0, stop=9, boundary=True)
    assert kept(whole) == 0
    assert kept(Segment(start=0, stop=9, boundary=True, save=(1,))) == size
    assert kept(Segment(start=0, stop=9, boundary=True, save=(1, 3))) == 2 * size
    halves = Segment(start=0, stop=4, boundary=True), Segment(start=4, stop=9, boundary=True)
    assert kept(*halves) == size
    assert kept(Segment(start=0, stop=9, boundary=False)) >= 4 * size  # how a tanh is kept differs between versions


def test_what_is_offloaded_waits_on_the_host():
    fn = lambda ws, x: jnp.sum(jnp.tanh(jnp.tanh(x @ ws[0]) @ ws[1]))
    ws, x = [jnp.ones((16, 16)) / 16] * 2, jnp.ones((8, 16))
    flat = Loss(fn, (ws, x)).flat
    run = rewritten(flat, [Segment(start=0, stop=len(flat.eqns), boundary=True, offload=(1,))])
    found = nj.residuals(lambda *a: run(*flat.consts, *jax.tree.leaves(a))[0], ws, x)
    assert found.host_bytes == 8 * 16 * 4
    assert found.device_bytes == 0


def layered(n=6):
    fn = lambda ws, x: (jnp.sum(functools.reduce(lambda x, w: jnp.sin(jnp.tanh(x @ w) @ w), ws, x)), x)
    keys = jax.random.split(jax.random.key(0), n)
    return fn, [jax.random.normal(k, (16, 16)) / 4 for k in keys], jax.random.normal(jax.random.key(1), (8, 16))


def by_fours(flat, **kept):
    """Each layer a boundary, what is behind them as it is."""
    layers = [Segment(start=i, stop=i + 4, boundary=True, **kept) for i in range(0, len(flat.eqns) - 1, 4)]
    return [*layers, Segment(start=4 * len(layers), stop=len(flat.eqns), boundary=False)]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("offload", [(0,), (0, 2), (0, 2, 3)])  # the last: what the next layer takes leaves too
def test_stages_send_away_what_the_plan_says_and_change_nothing(offload, jit):
    fn, ws, x = layered()
    loss = Loss(fn, (ws, x))
    flat = loss.flat
    assert [e.primitive.name for e in flat.eqns] == ["dot_general", "tanh", "dot_general", "sin"] * 6 + ["reduce_sum"]
    run = rewritten(flat, by_fours(flat, offload=offload))
    planned = lambda ws, x: loss.result(run(*flat.consts, *ws, x))
    grad = lambda f: jax.value_and_grad(f, has_aux=True)
    if jit:  # compiled, some versions fuse the one and not the other
        assert_close(jax.jit(grad(planned))(ws, x), grad(fn)(ws, x))
    else:
        chex.assert_trees_all_equal(grad(planned)(ws, x), grad(fn)(ws, x))
    forward = lambda f: jax.jvp(lambda x: f(ws, x)[0], (x,), (x,))
    assert_close(forward(planned), forward(fn))
    found = nj.residuals(lambda *a: planned(*a)[0], ws, x)
    inside, between = len({0, 2} & {*offload}), 5  # nobody needs what the last layer hands to the sum
    assert found.host_bytes == (6 * inside + (between if 3 in offload else 0)) * 8 * 16 * 4
    assert found.device_bytes == (0 if 3 in offload else between * 8 * 16 * 4)


def test_stages_copy_beside_their_neighbours():
    fn, ws, x = layered()
    loss = Loss(fn, (ws, x))
    run = rewritten(loss.flat, by_fours(loss.flat, offload=(0, 2)))
    step = jax.value_and_grad(lambda ws, x: loss.result(run(*loss.flat.consts, *ws, x)), has_aux=True)
    conds = [e for e in steps_of(jax.make_jaxpr(step)(ws, x)) if e.primitive.name == "cond"]
    taken = [c.params["branches"][1].jaxpr.eqns for c in conds]
    copies = [sum(e.primitive.name == "device_put" for e in eqns) for eqns in taken]
    assert copies == [0, 2, 2, 2, 2, 4, 4, 2, 2, 2, 2, 0]  # the last layer's own move with it


def test_a_choice_costs_in_the_program_what_it_costs_in_the_graph():
    fn = lambda ws, x: jnp.sum(jnp.sin(jnp.sin(x @ ws[0]) @ ws[1]))
    ws, x = [jnp.ones((16, 16))] * 2, jnp.ones((8, 16))
    loss = Loss(fn, (ws, x))
    model = model_of(loss.flat, loss.differentiated((0,)), FLOPS)
    span = model.spans_of.of(0, len(loss.flat.eqns))
    before = inner_flops(fn, ws, x)
    names = {n: v for n, v in enumerate(span.values) if n in span.shape.graph.keepable}
    for kept in [(), *[(n,) for n in names], tuple(names)]:
        choice = trimmed(span.shape.graph, Choice(saved=frozenset(kept)))  # JAX does not keep in vain
        option = of_choice(span.shape, choice)
        at = {loss.flat.number[v]: n for n, v in enumerate(v for e in loss.flat.eqns for v in e.outvars)}
        save = tuple(at[names[n]] for n in kept)
        run = rewritten(loss.flat, [Segment(start=0, stop=len(loss.flat.eqns), boundary=True, save=save)])
        after = inner_flops(lambda ws, x: run(*loss.flat.consts, *ws, x)[0], ws, x)
        assert after - before == option.ticks * model.spans_of.unit
        residuals = nj.residuals(lambda ws, x: run(*loss.flat.consts, *ws, x)[0], ws, x).nbytes
        assert residuals == option.kept


# --- programs of every kind ------------------------------------------------------------------------------------------


def custom():
    @jax.custom_vjp
    def bent(x):
        return x**3

    bent.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
    return lambda w, x: jnp.sum(jax.nn.relu(bent(x @ w)) @ w)


def scanned():
    return lambda w, x: jnp.sum(jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0] ** 2)


def branched():
    return lambda w, x: jnp.sum(jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x @ w) @ w)


def remat():
    return lambda w, x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ w))(jnp.tanh(x @ w)) @ w)


def jitted():
    return lambda w, x: jnp.sum(jax.jit(lambda x: jnp.sin(jnp.sin(x) @ w))(x @ w) @ w)


def mapped():
    return lambda w, x: jnp.sum(jax.vmap(lambda r: jnp.sin(jnp.tanh(r @ w) @ w))(x))


def printed():
    def fn(w, x):
        y = jnp.tanh(x @ w)
        jax.debug.callback(lambda y: None, y[0, 0])
        return jnp.sum(jnp.sin(y @ w))

    return fn


@pytest.mark.parametrize("make", [custom, scanned, branched, remat, jitted, mapped, printed])
def test_programs_of_every_kind_keep_their_gradients(make):
    fn = make()
    w, x = jax.random.normal(jax.random.key(0), (16, 16)) / 4, jax.random.normal(jax.random.key(1), (8, 16))
    plain = unfused(jax.value_and_grad(fn, (0, 1)), w, x)
    model, found = plans(fn, w, x, argnums=(0, 1))
    for _, plan in found:
        assert_close(plain, unfused(jax.value_and_grad(plan.apply(fn), (0, 1)), w, x), 1e-5)
    pieces = []
    for start, stop in itertools.pairwise(model.cuts):
        effects = any(e.effects for e in model.flat.eqns[start:stop])
        pieces.append(Segment(start=start, stop=stop, boundary=not effects))
    assert any(s.boundary for s in pieces)
    everything = draft(Subject.of(model.flat), tuple(pieces))
    assert_close(plain, unfused(jax.value_and_grad(everything.apply(fn), (0, 1)), w, x), 1e-5)


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def test_an_nnx_model_keeps_its_statistics_and_its_random_streams():
    fn = lambda m, x: jnp.mean(m(x) ** 2)
    x = jax.random.normal(jax.random.key(1), (8, 16))
    make = lambda: Noisy(nnx.Rngs(0))
    _, found = plans(fn, make(), x)
    step = lambda f: nnx.jit(nnx.value_and_grad(f))
    plain = make()
    wanted = [step(fn)(plain, x) for _ in range(2)]
    for _, plan in found:
        ours = make()
        got = [step(plan.apply(fn))(ours, x) for _ in range(2)]
        for (a, b), (c, d) in zip(wanted, got, strict=True):
            np.testing.assert_allclose(a, c, rtol=1e-5)
            chex.assert_trees_all_close(nnx.to_pure_dict(b), nnx.to_pure_dict(d), rtol=1e-4, atol=1e-6)
        state = lambda m: jax.tree.map(_data, nnx.to_pure_dict(nnx.state(m)))
        chex.assert_trees_all_close(state(plain), state(ours), rtol=1e-5)


def _data(x):
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_aux_comes_back_as_it_is():
    def fn(w, x):
        y = jnp.tanh(x @ w)
        return jnp.sum(jnp.sin(y @ w)), {"mean": jnp.mean(y), "note": "kept"}

    w, x = jnp.ones((16, 16)) / 16, jnp.ones((8, 16))
    loss = Loss(fn, (w, x))
    model = model_of(loss.flat, loss.differentiated((0,)), FLOPS, solves=4)
    plan = draft(Subject.of(model.flat), model.segments(model.frontier.path(0)))
    (value, aux), grad = jax.value_and_grad(plan.apply(fn), has_aux=True)(w, x)
    (value2, aux2), grad2 = jax.value_and_grad(fn, has_aux=True)(w, x)
    assert aux["note"] == "kept"
    np.testing.assert_allclose((value, aux["mean"]), (value2, aux2["mean"]), rtol=1e-6)
    np.testing.assert_allclose(grad, grad2, rtol=1e-5)


def test_a_warm_cache_does_not_hide_the_plan():
    fn = lambda ws, x: jnp.sum(jnp.tanh(jnp.tanh(jnp.tanh(x @ ws[0]) @ ws[1]) @ ws[2]))
    ws, x = [jnp.ones((16, 16)) / 16] * 3, jnp.ones((8, 16))
    jax.jit(jax.grad(fn))(ws, x)
    nj.residuals(fn, ws, x)
    flat = Loss(fn, (ws, x)).flat
    plan = draft(Subject.of(flat), (Segment(start=0, stop=len(flat.eqns), boundary=True),))
    assert nj.residuals(jax.jit(plan.apply(fn)), ws, x).nbytes < nj.residuals(fn, ws, x).nbytes
    assert nj.flops.count_matmuls(jax.jit(jax.value_and_grad(plan.apply(fn))), ws, x) > nj.flops.count_matmuls(
        jax.grad(fn), ws, x
    )


# --- another program -------------------------------------------------------------------------------------------------


def test_another_program_is_refused_with_what_differs():
    fn = lambda w, x: jnp.sum(jnp.sin(x @ w))
    w, x = jnp.ones((16, 16)), jnp.ones((8, 16))
    flat = Loss(fn, (w, x)).flat
    plan = draft(Subject.of(flat), (Segment(start=0, stop=len(flat.eqns), boundary=True),))
    with pytest.raises(PlanMismatch, match=r"array 1 is float32\[9,16\], planned for float32\[8,16\]"):
        plan.apply(fn)(w, jnp.ones((9, 16)))
    with pytest.raises(PlanMismatch, match=r"it has 1 equations cos, planned for 0; it has 0 equations sin"):
        plan.apply(lambda w, x: jnp.sum(jnp.cos(x @ w)))(w, x)
    turned = lambda w, x: jnp.sum(jnp.sin(jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))))
    with pytest.raises(PlanMismatch, match="other parameters or another order"):
        plan.apply(turned)(w, x)
    with pytest.raises(TypeError, match="x: give a planned function its arguments by position"):
        plan.apply(fn)(w, x=x)


def test_segments_that_make_no_sense_are_errors():
    fn = lambda w, x: jnp.sum(jnp.sin(x @ w))
    flat = Loss(fn, (jnp.ones((16, 16)), jnp.ones((8, 16)))).flat
    with pytest.raises(ValueError, match="segment 1 should start at equation 0"):
        rewritten(flat, [Segment(start=1, stop=3, boundary=True)])
    with pytest.raises(ValueError, match="the segments end at equation 2, and the program has 3"):
        rewritten(flat, [Segment(start=0, stop=2, boundary=True)])
    with pytest.raises(ValueError, match="keeps value 7, which is not there"):
        rewritten(flat, [Segment(start=0, stop=3, boundary=True, save=(7,))])
    with pytest.raises(ValueError, match="write 0 <= start < stop"):
        Segment(start=2, stop=2, boundary=True)
    with pytest.raises(ValueError, match="only a boundary keeps values"):
        Segment(start=0, stop=2, boundary=False, save=(1,))
    with pytest.raises(ValueError, match="value 1 is both saved and offloaded"):
        Segment(start=0, stop=2, boundary=True, save=(1,), offload=(1,))


def test_options_of_a_stretch_with_nothing_to_keep():
    fn = lambda w, x: jnp.sum(x @ w)
    loss = Loss(fn, (jnp.ones((16, 16)), jnp.ones((8, 16))))
    model = model_of(loss.flat, loss.differentiated((0,)), FLOPS)
    assert plain(model.span(0, 1).shape).kept == 0
    assert model.frontier.ticks[-1] == 0


# --- scans -----------------------------------------------------------------------------------------------------------


def scanned(layers=4):
    net = models.ScannedGPT(layers=layers, d=32, heads=4, vocab=64)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
    params = jax.jit(net.init)(jax.random.key(0), tokens)
    return (lambda p, t: models.loss_of(net.apply(p, t), t)), params, tokens


def test_a_scan_is_planned_inside():
    fn, params, tokens = scanned()
    model, found = plans(fn, params, tokens)
    plain = unfused(jax.value_and_grad(fn), params, tokens)
    before, most = inner_flops(fn, params, tokens), nj.residuals(fn, params, tokens).nbytes
    least = most
    for path, plan in found:
        [scan] = [s for s in plan.segments if s.inside] or [None]
        again = inner_flops(plan.apply(fn), params, tokens) - before
        assert again == pytest.approx(path.ticks * model.spans_of.unit, rel=2e-3, abs=200)
        kept = nj.residuals(plan.apply(fn), params, tokens).nbytes
        counted = sum(option.kept for _, option in path.steps)
        if scan is not None:
            assert 0.9 * counted < kept < 1.1 * counted
        least = min(least, kept)
        assert_close(plain, unfused(jax.value_and_grad(plan.apply(fn)), params, tokens), 1e-5)
    assert least < most / 4
    assert found[0][0].ticks > 0
    assert not found[0][1].does_nothing
    rows = [row for row in rows_of(model, found[0][0]) if "layers/block" in row.where]
    assert len(rows) > 3
    assert {row.count for row in rows} == {4}  # each holds for every step


def test_a_plan_of_a_scan_survives_its_file(tmp_path):
    fn, params, tokens = scanned()
    _, found = plans(fn, params, tokens)
    plan = found[0][1]
    assert any(s.inside for s in plan.segments)
    plan.save(tmp_path / "plan.toml")
    assert nj.Plan.load(tmp_path / "plan.toml") == plan
    edited = tomllib.loads((tmp_path / "plan.toml").read_text())
    next(s for s in edited["segment"] if "inside" in s)["inside"][0]["start"] = 1
    (tmp_path / "plan.toml").write_text(tomli_w.dumps(edited))
    with pytest.raises(ValueError, match=r"segment \d+, inside 1 should start at equation 0"):
        nj.Plan.load(tmp_path / "plan.toml")


def test_segments_inside_are_those_of_a_scan():
    with pytest.raises(ValueError, match="only a scan alone has segments inside"):
        Segment(start=0, stop=2, boundary=False, inside=(Segment(start=0, stop=1, boundary=True),))
    fn, params, tokens = scanned()
    loss = Loss(fn, (params, tokens))
    wrong = [Segment(start=0, stop=1, boundary=False, inside=(Segment(start=0, stop=1, boundary=True),))]
    wrong.append(Segment(start=1, stop=len(loss.flat.eqns), boundary=False))
    with pytest.raises(ValueError, match=r"has segments inside, and is .*, no scan"):
        rewritten(loss.flat, wrong)


def test_an_inner_loop_with_effects_or_without_gradients_is_left_alone():
    def fn(w, x, n):
        step = lambda c, _: (jnp.tanh(c @ w), jax.debug.print("{}", c[0, 0]))
        c, _ = jax.lax.scan(step, x, None, length=3)
        total, _ = jax.lax.scan(lambda t, _: (t + 1.0, None), n, None, length=5)
        return jnp.sum(c) + total

    args = jnp.ones((8, 8)), jnp.ones((4, 8)), jnp.zeros(())
    _, found = plans(fn, *args)
    assert not any(s.inside for _, plan in found for s in plan.segments)


def test_scans_backwards_with_stacked_inputs_and_results():
    def fn(ws, x):
        def step(carry, w):
            y = jnp.tanh(carry @ w)
            return y, jnp.sin(y)

        c, ys = jax.lax.scan(step, x, ws, reverse=True)
        return jnp.sum(c**2) + jnp.sum(ys**3)

    args = jax.random.normal(jax.random.key(0), (5, 8, 8)), jax.random.normal(jax.random.key(1), (4, 8))
    _, found = plans(fn, *args)
    assert any(s.inside for _, plan in found for s in plan.segments)
    for _, plan in found:
        assert_close(jax.grad(fn)(*args), jax.grad(plan.apply(fn))(*args), 1e-5)
        jax.tree.map(np.testing.assert_array_equal, fn(*args), plan.apply(fn)(*args))
