"""One boundary: the solver against every choice there is, and against what can be derived by hand."""

import itertools
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexus_jax.planner.graph import GIGA, CannotRecompute, Choice, Graph, Link, Op, price
from nexus_jax.planner.solve import Model, SolverTimeout, frontier, optimum, trimmed


@st.composite
def graphs(draw, largest=7, transfers=False):
    """Chains and graphs with shared values, equations of several results, values that nothing can keep or make again."""
    n_inputs = draw(st.integers(1, 2))
    count, ops = n_inputs, []
    while count < draw(st.integers(n_inputs, n_inputs + largest)):
        ins = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True))
        n_outs = draw(st.sampled_from([1, 1, 1, 2]))
        pinned = draw(st.sampled_from([False] * 7 + [True]))
        cost = draw(st.integers(0, 20))
        ops.append(Op(ins=tuple(ins), outs=tuple(range(count, count + n_outs)), cost=cost, pinned=pinned))
        count += n_outs
    values = st.integers(0, count - 1)
    return Graph(
        sizes=tuple(draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))),
        ops=tuple(ops),
        needed=draw(st.frozensets(values)),
        free=draw(st.frozensets(st.integers(0, n_inputs - 1))),
        keepable=frozenset(range(count)) - draw(st.frozensets(values, max_size=2)),
        movable=draw(st.frozensets(values)) if transfers else frozenset(),
        link=draw(st.none() | links()) if transfers else None,
    )


def links():
    """Links of any speed, time windows of any length."""
    a_byte, ticks = st.integers(0, 3 * GIGA), st.integers(0, 30)
    return st.builds(
        Link, out=a_byte, back=a_byte, hidden_out=ticks, hidden_back=ticks, touch=a_byte, already=st.integers(0, 8)
    )


def choices(graph, offload):
    """Every choice that is one, with its price."""
    places = ("recompute", "save", "offload") if offload else ("recompute", "save")
    values = sorted(graph.keepable)
    for picked in itertools.product(*(places if v in graph.movable else places[:2] for v in values)):
        where = {p: frozenset(v for v, q in zip(values, picked, strict=True) if q == p) for p in places}
        choice = Choice(saved=where["save"], offloaded=where.get("offload", frozenset()))
        try:
            yield choice, price(graph, choice)
        except CannotRecompute:
            continue


def best(graph, device, host, offload):
    fitting = [p.ticks for _, p in choices(graph, offload) if p.device <= device and p.host <= host]
    return min(fitting, default=None)


@settings(max_examples=1000, deadline=None)
@given(graphs(), st.integers(0, 40))
def test_the_optimum_is_that_of_all_choices(graph, device):
    found = optimum(graph, device)
    wanted = best(graph, device, 0, offload=False)
    assert (None if found is None else price(graph, found).ticks) == wanted
    if found is not None:
        assert price(graph, found).device <= device


@settings(max_examples=500, deadline=None)
@given(graphs(largest=5, transfers=True), st.integers(0, 20), st.integers(1, 30))
def test_the_optimum_with_a_host_is_that_of_all_choices(graph, device, host):
    found = optimum(graph, device, host)
    assert (None if found is None else price(graph, found).ticks) == best(graph, device, host, offload=True)
    if found is not None:
        assert price(graph, found).device <= device
        assert price(graph, found).host <= host


PARTS_OF_A_TICK = Graph(  # the second of two bytes that move costs a tick in the price, and next to nothing before it
    sizes=(1, 1, 0),
    ops=(Op(ins=(0,), outs=(1,), cost=1), Op(ins=(0,), outs=(2,), cost=0)),
    needed=frozenset({0, 1}),
    keepable=frozenset({0, 1, 2}),
    movable=frozenset({0, 1}),
    link=Link(out=0, back=0, touch=GIGA // 10 + 1, already=8),
)


@settings(max_examples=200, deadline=None)
@given(graphs(largest=5, transfers=True), st.integers(1, 30), st.sampled_from([None, 0, 3]))
@example(PARTS_OF_A_TICK, 2, 0)
def test_the_frontier_with_a_host_is_that_of_all_choices(graph, host, solves):
    prices = {(p.device, p.ticks) for _, p in choices(graph, offload=True) if p.host <= host}
    undominated = {p for p in prices if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in prices)}
    found = frontier(graph, host=host, solves=solves)
    points = {(p.price.device, p.price.ticks) for p in found.points}
    assert points == undominated if solves is None else points <= prices
    assert all(price(graph, p.choice) == p.price and p.price.host <= host for p in found.points)
    for device, ticks in prices:
        assert next(b for b in found.bounds if b.low <= device).ticks <= ticks


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_the_frontier_is_that_of_all_choices(graph):
    prices = {(p.device, p.ticks) for _, p in choices(graph, offload=False)}
    undominated = {p for p in prices if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in prices)}
    found = frontier(graph)
    assert {(p.price.device, p.price.ticks) for p in found.points} == undominated
    assert all(price(graph, p.choice) == p.price for p in found.points)
    assert found.exact


@settings(max_examples=300, deadline=None)
@given(graphs(), st.integers(0, 4), st.integers(0, 5), st.integers(0, 5))
def test_a_coarse_frontier_says_how_much_it_may_have_missed(graph, solves, a_tick, a_byte):
    found = frontier(graph, solves=solves)
    weighed = lambda ticks, nbytes: a_tick * ticks + a_byte * nbytes
    for _, paid in choices(graph, offload=False):
        bound = next(b for b in found.bounds if b.low <= paid.device)
        assert bound.ticks <= paid.ticks
        corners = found.corners(also=3)
        assert min(weighed(c.ticks, c.low) for c in corners) <= weighed(paid.ticks, paid.device)


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_the_corners_of_the_hull_are_found_without_a_limit(graph):
    prices = [p for _, p in choices(graph, offload=False)]
    found = [(p.price.device, p.price.ticks) for p in frontier(graph, solves=0).points]
    for a_tick, a_byte in itertools.product(range(1, 8), range(1, 8)):
        weighed = lambda device, ticks: a_tick * ticks + a_byte * device
        best = min((weighed(p.device, p.ticks) for p in prices), default=None)
        assert min((weighed(*p) for p in found), default=None) == best


def chain(n, cost=1, size=1):
    ops = tuple(Op(ins=(i,), outs=(i + 1,), cost=cost) for i in range(n))
    values = frozenset(range(1, n + 1))
    return Graph(sizes=(size,) * (n + 1), ops=ops, needed=values, free=frozenset({0}), keepable=values)


@pytest.mark.parametrize("n", [1, 5, 12])
@pytest.mark.parametrize("budget", [0, 1, 4, 12])
def test_a_chain_of_equal_steps_costs_one_step_for_each_value_that_is_not_kept(n, budget):
    # Every value is needed and each missing one takes exactly its own step: n - k, as in the unit chain of Checkmate
    # (Jain et al. 2020, section 4) where all recomputation of a stage is kept until that stage is done.
    found = optimum(chain(n), budget)
    assert price(chain(n), found).ticks == n - min(budget, n)


def test_of_two_equal_values_the_one_that_is_dear_to_make_is_kept():
    ops = (Op(ins=(0,), outs=(1,), cost=9), Op(ins=(0,), outs=(2,), cost=1))
    graph = Graph(sizes=(0, 8, 8), ops=ops, needed=frozenset({1, 2}), free=frozenset({0}), keepable=frozenset({1, 2}))
    assert optimum(graph, 8) == Choice(saved=frozenset({1}))


@pytest.mark.parametrize(("hidden", "host", "ticks"), [(0, 0, 6), (1, 0, 6), (4, 8, 4), (8, 8, 0), (30, 8, 0)])
def test_what_is_late_on_the_link_is_made_again_together(hidden, host, ticks):
    """Two values of one equation: to leave out one of them saves 4 ticks of the link and costs 6."""
    link = Link(out=GIGA, back=0, hidden_out=hidden)
    values = frozenset({1, 2})
    graph = Graph(
        sizes=(0, 4, 4), ops=(Op(ins=(0,), outs=(1, 2), cost=6),), needed=values, free=frozenset({0}), keepable=values,
        movable=values, link=link,
    )  # fmt: skip
    paid = price(graph, optimum(graph, 0, host=100))
    assert (paid.host, paid.ticks) == (host, ticks)


def test_what_is_derived_by_differentiation_is_made_again_from_what_is_kept():
    ops = (Op(ins=(0,), outs=(1,), cost=9), Op(ins=(1,), outs=(2,), cost=0))
    graph = Graph(sizes=(0, 4, 8), ops=ops, needed=frozenset({2}), free=frozenset({0}), keepable=frozenset({1}))
    assert optimum(graph, 100) == Choice(saved=frozenset({1}))


def test_what_is_pinned_is_kept_or_the_answer_is_none():
    ops = (Op(ins=(0,), outs=(1,), cost=1, pinned=True),)
    graph = Graph(sizes=(0, 4), ops=ops, needed=frozenset({1}), free=frozenset({0}), keepable=frozenset({1}))
    assert optimum(graph, 4) == Choice(saved=frozenset({1}))
    assert optimum(graph, 3) is None


def test_large_numbers_are_priced_in_integers():
    size, cost = 3 * 2**33 + 1, 10**14 + 1
    graph = chain(6, cost=cost, size=size)
    found = frontier(graph).points
    assert [(p.price.device, p.price.ticks) for p in found] == [((6 - k) * size, k * cost) for k in range(7)]


def test_equal_questions_have_equal_answers():
    graph = chain(9)
    assert len({optimum(graph, 4) for _ in range(3)}) == 1


def test_what_is_kept_in_vain_is_dropped():
    graph = chain(2)
    wasteful = dataclass_with_unused(graph)
    assert trimmed(wasteful, Choice(saved=frozenset({1, 2, 3}))) == Choice(saved=frozenset({1, 2}))


def dataclass_with_unused(graph):
    op = Op(ins=(0,), outs=(3,), cost=1)
    return Graph(
        sizes=(*graph.sizes, 5),
        ops=(*graph.ops, op),
        needed=graph.needed,
        free=graph.free,
        keepable=graph.keepable | {3},
    )


def test_a_deadline_that_has_passed_is_an_error():
    with pytest.raises(SolverTimeout, match="time is over"):
        Model(chain(3)).solve(2, 0, time.monotonic() - 1)


def test_wrong_graphs_and_choices_are_errors():
    with pytest.raises(ValueError, match=r"cost=-1: write a whole number of ticks"):
        Op(ins=(), outs=(0,), cost=-1)
    with pytest.raises(ValueError, match=r"sizes=\(-1,\): write whole numbers of bytes"):
        Graph(sizes=(-1,), ops=(), needed=frozenset())
    with pytest.raises(ValueError, match="value 0 is made by two equations"):
        Graph(sizes=(1,), ops=(Op(ins=(), outs=(0,), cost=1),) * 2, needed=frozenset())
    with pytest.raises(ValueError, match="value 1 is both saved and offloaded"):
        Choice(saved=frozenset({1}), offloaded=frozenset({1}))
    with pytest.raises(ValueError, match="value 0 cannot be kept"):
        price(chain(2), Choice(saved=frozenset({0})))
