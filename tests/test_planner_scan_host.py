"""Plans that offload what the steps of a scan keep: the same values, bytes where they are said to be, and what it is good for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import models
import pytest
import tomli_w
from checks import assert_close, needs, steps_of, unfused
from test_planner_groups import assert_same_derivatives, noisy, recurrence

import nexus_jax as nj
from nexus_jax.offloading.loops import loop_of
from nexus_jax.planner import files, groups, prices, table
from nexus_jax.planner.graph import Link
from nexus_jax.planner.loss import Loss
from nexus_jax.planner.make import Planner, draft
from nexus_jax.planner.model import model_of
from nexus_jax.planner.plan import Subject
from nexus_jax.planner.prices import Prices
from nexus_jax.planner.rewrite import Segment
from nexus_jax.targets.compiler import find_target


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Programs of a test may move what is small."""
    monkeypatch.setattr(prices, "_SMALL", 64)


def planned(fn, *args, argnums=(0,), host=2**40):
    """The model of a program, on an H200 whose host has room."""
    loss = Loss(fn, args)
    price = Prices(find_target("h200"), "seconds", host)
    return model_of(loss.flat, loss.differentiated(argnums), price, solves=4)


def moving(fn, *args, argnums=(0,), most=5):
    """Some of its plans that offload something of a scan, each with its path; with every number of steps at once."""
    model = planned(fn, *args, argnums=argnums)
    [(at, edge)] = [
        (e.start, e) for e in model.frontier.edges if (model.span(e.start, e.stop).start, 1) in model.bodies
    ]
    start = model.span(at, edge.stop).start
    subject, end = Subject.of(model.flat), len(model.flat.eqns)
    for group in sorted({o.what.group for o in edge.options}):
        options = [o for o in edge.options if o.host and o.what.group == group]
        for option in options[:: max(1, len(options) // most)]:
            scan = model._segment(model.span(at, edge.stop), option)
            around = [Segment(start=0, stop=start, boundary=False)] if start else []
            around += [scan] + ([Segment(start=start + 1, stop=end, boundary=False)] if start + 1 < end else [])
            yield draft(subject, tuple(around)), option


def chain(steps=6):
    """A scan whose steps are two layers, the second of which starts where few bytes are alive."""

    def fn(ws, x):
        def step(y, w):
            for k in range(2):
                y = y + jnp.tanh(jnp.sin(y @ w[k]) @ w[k].T)
            return y, None

        return jnp.sum(jax.lax.scan(step, x, ws)[0] ** 2)

    return fn, (jax.random.normal(jax.random.key(0), (steps, 2, 8, 32)) / 4, jnp.linspace(-1, 1, 128).reshape(16, 8))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_the_plain_scan(reverse):
    fn, args = recurrence(reverse)
    plain = jax.value_and_grad(fn, (0, 1, 2))(*args)
    found = [plan for plan, _ in moving(fn, *args, argnums=(0, 1, 2))]
    assert {s.group for plan in found for s in plan.segments if s.inside} == {1, 2, 3}
    for plan in found:
        assert_close(plain, jax.value_and_grad(plan.apply(fn), (0, 1, 2))(*args), 1e-5)
        assert_close(plain, jax.jit(jax.value_and_grad(plan.apply(fn), (0, 1, 2)))(*args), 1e-5)


def test_every_derivative_is_the_plain_one():
    fn, args = recurrence()
    for plan, _ in moving(fn, *args, argnums=(0, 1, 2), most=1):
        assert_same_derivatives(fn, plan.apply(fn), args)


def test_dropout_and_statistics_are_those_of_the_plain_model():
    fn, args = noisy()
    plain = unfused(jax.value_and_grad(fn, has_aux=True), *args)
    found = list(moving(fn, *args))
    assert found
    for plan, _ in found:
        assert_close(plain, unfused(jax.value_and_grad(plan.apply(fn), has_aux=True), *args), 1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_over_a_mesh(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    fn, (ws, x) = chain()
    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        args = place(ws), place(x, "x", None)
        plain = jax.jit(jax.grad(fn))(*args)
        for plan, _ in moving(fn, *args, most=2):
            assert_close(plain, jax.jit(jax.grad(plan.apply(fn)))(*args), 1e-5)


def copies(jaxpr):
    """How many copies to the host and back a program has, inside its scans and elsewhere."""
    found = {"scan": [0, 0], "elsewhere": [0, 0]}

    def visit(jaxpr, where):
        for eqn in steps_of(jaxpr):
            if eqn.primitive.name == "scan":
                visit(eqn.params["jaxpr"], "scan")
            elif eqn.primitive.name == "device_put":
                for v in eqn.outvars:
                    found[where][v.aval.memory_space != jax.memory.Space.Host] += 1

    visit(jaxpr, "elsewhere")
    return found


@pytest.mark.parametrize("group", [1, 2])
def test_what_a_plan_offloads_is_on_the_host_and_moves_inside_the_steps(group):
    fn, args = chain()
    loss = Loss(fn, args)
    names = [e.primitive.name for e in groups.body_of(loop_of(loss.flat.eqns[0]), group).eqns]
    ends = [i + 1 for i, name in enumerate(names) if name == "add"]
    assert names[0] == "slice" and len(ends) == 2 * group
    # of each layer what is as narrow as its input, before tanh, and all but the last one's result
    inside = tuple(
        Segment(start=a, stop=b, boundary=True, offload=(names[a:b].index("tanh") - 1, *([b - a - 1] if b < ends[-1] else [])))
        for a, b in itertools.pairwise([0, *ends])
    )  # fmt: skip
    inside += (Segment(start=ends[-1], stop=len(names), boundary=False),) if ends[-1] < len(names) else ()
    scan = Segment(start=0, stop=1, boundary=False, inside=inside, group=group, carry=(0,))
    plan = draft(Subject.of(loss.flat), (scan, Segment(start=1, stop=len(loss.flat.eqns), boundary=False)))
    ours = plan.apply(fn)
    assert_close(jax.grad(fn, (0, 1))(*args), jax.grad(ours, (0, 1))(*args), 1e-5)
    found = nj.residuals(ours, *args)
    layers, x = 12, args[1].nbytes
    assert found.host_bytes == 2 * layers * x  # the input of each layer and what is before tanh
    assert (
        sum(r.nbytes for r in found if r.place == "device" and r.op != "argument") == x
    )  # the last result, to be squared
    there = copies(jax.make_jaxpr(jax.grad(ours))(*args))
    assert there == {"scan": [4 * group, 4 * group], "elsewhere": [0, 0]}


def alone(fn, *args, inside=None, carry=(0,), **before):
    """A plan for a program with one scan, which moves its carry; what is before the scan is one boundary."""
    loss = Loss(fn, args)
    names = [e.primitive.name for e in loss.flat.eqns]
    at = names.index("scan")
    body = groups.body_of(loop_of(loss.flat.eqns[at]), 1)
    inside = inside or (Segment(start=0, stop=len(body.eqns), boundary=True),)
    segments = [Segment(start=0, stop=at, boundary=True, **before)] if at else []
    segments.append(Segment(start=at, stop=at + 1, boundary=False, inside=inside, carry=carry))
    segments.append(Segment(start=at + 1, stop=len(names), boundary=False))
    return draft(Subject.of(loss.flat), tuple(segments))


def on_host(tree):
    return any(x.sharding.memory_kind == "pinned_host" for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("jit", [False, True])
def test_what_the_user_gets_is_on_the_device(jit):
    def fn(ws, x):
        y, ys = jax.lax.scan(lambda y, w: (jnp.sin(y @ w), y), x, ws)
        return jnp.sum(y), ys

    ws, x = jax.random.normal(jax.random.key(0), (6, 8, 8)) / 3, jnp.linspace(-1, 1, 32).reshape(4, 8)
    grad = lambda f: (jax.jit if jit else lambda g: g)(jax.value_and_grad(f, (0, 1), has_aux=True))
    (loss, ys), grads = grad(alone(fn, ws, x).apply(fn))(ws, x)
    assert_close(((loss, ys), grads), grad(fn)(ws, x), 1e-5)
    assert not on_host((loss, ys, grads))
    both = lambda f: lambda ws, x: f(ws, x)[0] + jnp.sum(f(ws, x)[1] * x)  # what is returned is used, beside x
    assert_close(jax.grad(both(fn))(ws, x), jax.grad(both(alone(fn, ws, x).apply(fn)))(ws, x), 1e-5)


def test_what_steps_take_as_a_whole_comes_back_before_them():
    """Also where each takes a slice of it too."""

    def fn(ws, x):
        y = jnp.tanh(x @ ws[0])
        z, _ = jax.lax.scan(lambda z, row: (jnp.sin(jnp.tanh(z * row) @ y.T @ y), None), x, y)
        return jnp.sum(z)

    ws, x = jax.random.normal(jax.random.key(0), (6, 8, 8)) / 3, jnp.linspace(-1, 1, 32).reshape(4, 8)
    made = [e.primitive.name for e in Loss(fn, (ws, x)).flat.eqns].index("tanh")
    ours = alone(fn, ws, x, offload=(made,)).apply(fn)
    assert_close(jax.grad(fn, (0, 1))(ws, x), jax.grad(ours, (0, 1))(ws, x), 1e-5)
    assert nj.residuals(ours, ws, x).host_bytes == 5 * x.nbytes
    for eqn in steps_of(jax.make_jaxpr(jax.grad(ours, (0, 1)))(ws, x)):
        if eqn.primitive.name == "scan":
            whole = [v for v in eqn.invars if v.aval.shape == x.shape]
            assert all(v.aval.memory_space != jax.memory.Space.Host for v in whole)


def test_no_plan_offloads_what_a_scan_takes():
    """Compilers refuse to bring it back for a scan whose steps move something."""

    def fn(ws, x):
        y = jnp.tanh(x @ ws[0])
        z, _ = jax.lax.scan(lambda z, w: (jnp.sin(jnp.tanh(z @ w) @ y.T @ y), None), jnp.ones_like(y), ws)
        return jnp.sum(z * y)

    shapes = jax.ShapeDtypeStruct((6, 8192, 8192), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
    found = planned(fn, *shapes)
    assert any(o.host for e in found.frontier.edges for o in e.options)
    scan = next(at for at, _ in found.bodies)
    spans = [found.span(e.start, e.stop) for e in found.frontier.edges]
    assert all(s.shape.leaving == 0 for s in spans if s.stop <= scan)


def test_a_carry_that_the_backward_pass_does_not_need_is_neither_kept_nor_moved():
    def fn(ws, x):
        (a, b), _ = jax.lax.scan(lambda c, w: ((c[0] + jnp.sin(w), jnp.tanh(c[1] @ w)), None), (x, x), ws)
        return jnp.sum(a) + jnp.sum(b)

    args = jax.random.normal(jax.random.key(0), (6, 8, 8)) / 3, jnp.linspace(-1, 1, 64).reshape(8, 8)
    found = list(moving(fn, *args))
    assert {option.what.carry for _, option in found} >= {(1,)}
    for plan, option in found:
        assert 0 not in option.what.carry
        assert nj.residuals(plan.apply(fn), *args).host_bytes == option.host


def test_of_several_values_that_are_carried_some_may_leave():
    def fn(ws, x):
        (a, b), _ = jax.lax.scan(lambda c, w: ((jnp.sin(c[0] @ w), jnp.tanh(c[1] @ w)), None), (x, 2 * x), ws)
        return jnp.sum(a * b)

    args = jax.random.normal(jax.random.key(0), (6, 8, 8)) / 3, jnp.linspace(-1, 1, 64).reshape(8, 8)
    found = list(moving(fn, *args, most=40))
    assert {option.what.carry for _, option in found} >= {(0,), (0, 1)} or {
        option.what.carry for _, option in found
    } >= {(1,), (0, 1)}
    plain = jax.grad(fn, (0, 1))(*args)
    for plan, option in found[:: max(1, len(found) // 6)]:
        assert_close(plain, jax.grad(plan.apply(fn), (0, 1))(*args), 1e-5)
        assert nj.residuals(plan.apply(fn), *args).host_bytes == option.host


@pytest.mark.parametrize("unroll", [2, 3])
def test_a_scan_that_moves_something_is_not_unrolled(unroll):
    """XLA for GPUs fails on the stacks of one that is; the compiled case is below."""

    def fn(ws, x):
        return jnp.sum(jax.lax.scan(lambda y, w: (jnp.sin(jnp.tanh(y @ w) @ w), None), x, ws, unroll=unroll)[0])

    args = jax.random.normal(jax.random.key(0), (6, 8, 8)) / 3, jnp.linspace(-1, 1, 64).reshape(8, 8)
    ours = alone(fn, *args).apply(fn)
    assert_close(jax.grad(fn, (0, 1))(*args), jax.grad(ours, (0, 1))(*args), 1e-5)
    assert copies(jax.make_jaxpr(jax.grad(ours))(*args))["scan"] == [1, 1]
    scans = [e for e in steps_of(jax.make_jaxpr(jax.grad(ours))(*args)) if e.primitive.name == "scan"]
    assert scans and all(e.params["unroll"] == 1 for e in scans)


def test_a_rounding_of_the_users_own_is_no_mark():
    def fn(ws, x):
        h = jnp.sin(x @ ws[0])
        return jnp.sum(jnp.tanh(jax.lax.reduce_precision(h, 5, 2) @ ws[1]) ** 2)

    ws, x = jax.random.normal(jax.random.key(0), (2, 8, 8)), jnp.linspace(-1, 1, 64).reshape(8, 8)
    flat = Loss(fn, (ws, x)).flat
    at = [e.primitive.name for e in flat.eqns].index("sin")
    plan = draft(Subject.of(flat), (Segment(start=0, stop=len(flat.eqns), boundary=True, offload=(at,)),))
    loss, grads = jax.value_and_grad(plan.apply(fn))(ws, x)
    assert nj.residuals(plan.apply(fn), ws, x).host_bytes == x.nbytes
    assert_close((loss, grads), jax.value_and_grad(fn)(ws, x), 1e-5)


def test_layers_before_a_scan_and_its_steps_offload_together():
    def fn(first, ws, x):
        for w in first:
            x = jnp.sin(jnp.tanh(x @ w) @ w)
        x, _ = jax.lax.scan(lambda y, w: (y + jnp.sin(jnp.tanh(y @ w) @ w), None), x, ws)
        for w in first:
            x = jnp.sin(jnp.tanh(x @ w) @ w)
        return jnp.sum(x)

    keys = jax.random.split(jax.random.key(0), 9)
    first, ws = [jax.random.normal(k, (16, 16)) / 4 for k in keys[:3]], jax.random.normal(keys[3], (6, 16, 16)) / 4
    x = jax.random.normal(keys[4], (8, 16))
    loss = Loss(fn, (first, ws, x))
    assert [e.primitive.name for e in loss.flat.eqns] == [
        *["dot_general", "tanh", "dot_general", "sin"] * 3, "scan", *["dot_general", "tanh", "dot_general", "sin"] * 3,
        "reduce_sum",
    ]  # fmt: skip
    layer = lambda at: Segment(start=at, stop=at + 4, boundary=True, offload=(0, 2))
    inside = (Segment(start=0, stop=5, boundary=True, offload=(0,)),)
    scan = Segment(start=12, stop=13, boundary=False, inside=inside, carry=(0,))
    segments = [*map(layer, (0, 4, 8)), scan, *map(layer, (13, 17, 21)), Segment(start=25, stop=26, boundary=False)]
    plan = draft(Subject.of(loss.flat), tuple(segments))
    grad = lambda f: jax.value_and_grad(f, (0, 1, 2))
    plain = grad(fn)(first, ws, x)
    assert_close(plain, grad(plan.apply(fn))(first, ws, x), 1e-5)
    assert_close(plain, jax.jit(grad(plan.apply(fn)))(first, ws, x), 1e-5)
    found = nj.residuals(plan.apply(fn), first, ws, x)
    assert found.host_bytes == (6 * 2 + 6 * 2) * x.nbytes
    step = jax.make_jaxpr(grad(plan.apply(fn)))(first, ws, x)
    inside_steps = copies(step)["scan"]
    assert inside_steps == [2, 2]
    # of the others each moves beside a layer, as without a scan between
    conds = [e for e in steps_of(step) if e.primitive.name == "cond"]
    beside = [sum(e.primitive.name == "device_put" for e in c.params["branches"][1].jaxpr.eqns) for c in conds]
    assert sum(beside) == 2 * 12


def test_a_host_is_never_a_loss_in_the_model_and_no_bound_is_beaten():
    fn, args = recurrence()
    with_one, without = planned(fn, *args).frontier, planned(fn, *args, host=0).frontier
    assert with_one.peaks[0] < without.peaks[0]
    for budget in sorted({*with_one.peaks, *without.peaks}):
        alone, both = without.within(budget), with_one.within(budget)
        assert alone is None or both.ticks <= alone.ticks
        assert both is None or with_one.bound(budget) <= both.ticks


def test_no_more_waits_on_the_host_than_it_has():
    fn, _ = chain()
    wide = jax.ShapeDtypeStruct((12, 2, 8192, 32768), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
    hosts = lambda model: [model.frontier.path(at).host for at in range(len(model.frontier.peaks))]
    most = max(hosts(planned(fn, *wide)))
    assert most >= 12 * wide[1].size * 2  # more than is carried
    less = planned(fn, *wide, host=most // 2)
    assert 0 < max(hosts(less)) <= most // 2
    for body in less.bodies.values():  # also each step: what takes more would hide what takes less
        assert 0 < max(hosts(body)) <= most // 2 // body.body.steps
    assert max(hosts(planned(fn, *wide, host=wide[1].size))) == 0


def test_in_the_model_nothing_is_hidden_behind_another_step():
    """One boundary for a whole step needs what it carries at once: its way back is paid for, its way out is not."""
    wide = jax.ShapeDtypeStruct((4, 8192, 8192), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
    fn = lambda ws, x: jnp.sum(jax.lax.scan(lambda y, w: (jnp.sin(y @ w), None), x, ws)[0].astype(jnp.float32))
    found = planned(fn, *wide)
    options = [o for e in found.frontier.edges for o in e.options if o.what.carry and o.what.group == 1]
    option = min(options, key=lambda o: o.kept)
    sheet, unit = find_target("h200").sheet, found.spans_of.unit
    nbytes, matmul = 4096 * 8192 * 2, 2 * 4096 * 8192 * 8192 / sheet.bf16_flops
    assert nbytes / sheet.device_to_host_bandwidth > matmul  # so that it is late by the rest
    out = nbytes / sheet.device_to_host_bandwidth - matmul
    back = nbytes / sheet.host_to_device_bandwidth
    touch = 2 * nbytes / sheet.memory_bandwidth
    again = option.ticks * unit / 1e12 - 4 * (out + back + touch)
    assert option.host == 4 * nbytes
    assert again == pytest.approx(4 * matmul, rel=0.05) or again == pytest.approx(0, abs=0.05 * 4 * matmul)
    # ... and what a step's last stretch sends leaves beside nothing
    body = found.bodies[next(iter(found.bodies))]
    last = [body.span(e.start, e.stop) for e in body.frontier.edges if e.stop == len(body.cuts) - 1]
    assert last and all(isinstance(s.shape.graph.link, Link) and s.shape.graph.link.hidden_back == 0 for s in last)


def test_a_plan_says_so_in_its_table_and_its_file(tmp_path):
    fn, args = chain()
    model = planned(fn, *args)
    path = next(p for p in map(model.frontier.path, range(len(model.frontier.peaks))) if p.host)
    [row] = [row for row in table.rows_of(model, path) if row.op == "carry"]
    [scan] = [s for s in model.segments(path) if s.inside]
    assert (row.decision, row.nbytes, row.count) == ("offload", args[1].nbytes, 6 // scan.group)
    assert "keeping it on the device would take +512 B" in row.reason
    plan = draft(Subject.of(model.flat), model.segments(path))
    plan = dataclasses.replace(plan, target="h200", rows=table.rows_of(model, path))
    plan.save(tmp_path / "plan.toml")
    assert (
        nj.Plan.load(tmp_path / "plan.toml") == plan and "carry = [\n    0,\n]" in (tmp_path / "plan.toml").read_text()
    )


@pytest.mark.parametrize(
    ("carry", "said"),
    [
        ([1], "carry 1 cannot wait on the host: the scan carries 1 values"),
        ([-1], "carry -1"),
        (["a"], "write a list of value numbers"),
    ],
)
def test_a_plan_edited_into_nonsense_says_what(tmp_path, carry, said):
    fn, args = chain()
    plan = next(plan for plan, option in moving(fn, *args) if option.what.carry)
    written = files.document(dataclasses.replace(plan, target="h200"))
    [scan] = [s for s in written["segment"] if "inside" in s]
    scan["carry"] = carry
    (tmp_path / "plan.toml").write_text(tomli_w.dumps(written))
    with pytest.raises(ValueError, match=said):
        nj.Plan.load(tmp_path / "plan.toml").apply(fn)(*args)


def test_only_a_scan_carries():
    with pytest.raises(ValueError, match="is of a scan"):
        Segment(start=0, stop=1, boundary=True, carry=(0,))


@pytest.mark.parametrize("target", ["v5e", "h200"])
def test_a_scan_that_is_unrolled_compiles(target):
    needs(target)
    fn = lambda ws, x: jnp.sum(jax.lax.scan(lambda y, w: (jnp.sin(jnp.tanh(y @ w) @ w), None), x, ws, unroll=2)[0])
    args = jax.ShapeDtypeStruct((6, 512, 512), jnp.float32), jax.ShapeDtypeStruct((2048, 512), jnp.float32)
    found = nj.measure(alone(fn, *args).apply(fn), *args, target=target, argnums=(0, 1))
    assert found.host_bytes == 6 * 2048 * 512 * 4


@pytest.mark.parametrize("target", ["v5e", "h200"])
def test_less_memory_than_without_a_host_is_enough(target):
    """Compiled: what no plan fits into without a host, and what its steps keep really is on the host."""
    needs(target)
    net = models.ScannedGPT(layers=12, d=512, heads=8, vocab=1024)
    tokens = jax.ShapeDtypeStruct((16, 512), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), tokens)
    fn = lambda p, t: models.loss_of(net.apply(p, t), t)
    alone, both = (Planner(fn, (params, tokens), target=target, host_budget=host) for host in (0, "8GiB"))
    with pytest.raises(nj.Infeasible, match="is too small") as error:
        alone.plan(alone.before.device_bytes // 50)
    budget = int(0.95 * error.value.smallest)
    with pytest.raises(nj.Infeasible, match="is too small"):
        alone.plan(budget)
    plan = both.plan(budget)
    carried = 12 * 16 * 512 * 512 * 4
    assert plan.device_bytes <= budget and plan.host_bytes >= carried
    assert plan.host_bytes == both.path_of(plan).host
    assert plan.predicted_bytes == pytest.approx(plan.device_bytes, rel=0.25)
    assert "offload" in str(plan)
