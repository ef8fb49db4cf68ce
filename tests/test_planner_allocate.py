"""Over boundaries: the frontier against every path there is."""

import dataclasses
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexus_jax.planner import relaxed
from nexus_jax.planner.allocate import Edge, Frontier, Option, price_of


def option(kept, working, ticks):
    return Option(kept=kept, working=working, ticks=ticks)


_options = st.builds(option, st.integers(0, 20), st.integers(0, 20), st.integers(0, 9))


@st.composite
def programs(draw):
    """Cuts, and boundaries between neighbours and over several."""
    cuts = draw(st.integers(2, 6))
    pairs = [(i, i + 1) for i in range(cuts - 1)]
    pairs += draw(st.lists(st.sampled_from([(i, j) for i in range(cuts) for j in range(i + 1, cuts)]), max_size=3))
    edges = [Edge(i, j, tuple(draw(st.lists(_options, min_size=1, max_size=3)))) for i, j in pairs]
    return cuts, edges


def paths(cuts, edges, start=0):
    """The options of every path from ``start`` to the end."""
    if start == cuts - 1:
        yield ()
    for edge in edges:
        if edge.start == start:
            for rest, own in itertools.product(list(paths(cuts, edges, edge.stop)), edge.options):
                yield (own, *rest)


@settings(max_examples=400, deadline=None)
@given(programs())
def test_the_frontier_is_that_of_all_paths(program):
    cuts, edges = program
    prices = {price_of(path) for path in paths(cuts, edges)}
    undominated = {p for p in prices if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in prices)}
    found = Frontier(cuts, edges)
    assert set(zip(found.peaks, found.ticks, strict=True)) == undominated
    assert found.exact
    for at, (peak, ticks) in enumerate(zip(found.peaks, found.ticks, strict=True)):
        path = found.path(at)
        assert price_of([o for _, o in path.steps]) == (peak, ticks) == (path.peak, path.ticks)


@settings(max_examples=300, deadline=None)
@given(programs())
def test_in_a_loop_what_is_kept_counts_and_of_equal_paths_the_one_that_needs_least_while_it_runs(program):
    cuts, edges = program
    kept = lambda path: (sum(o.kept for o in path), sum(o.ticks for o in path))
    needed = {}
    for path in paths(cuts, edges):
        needed[kept(path)] = min(price_of(path)[0], needed.get(kept(path), 10**9))
    undominated = {p for p in needed if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in needed)}
    found = Frontier(cuts, edges, repeated=True)
    assert set(zip(found.peaks, found.ticks, strict=True)) == undominated
    for at, point in enumerate(zip(found.peaks, found.ticks, strict=True)):
        path = [o for _, o in found.path(at).steps]
        assert kept(path) == point and price_of(path)[0] == needed[point]


@settings(max_examples=300, deadline=None)
@given(programs(), st.data())
def test_no_path_takes_more_of_the_host_than_there_is(program, data):
    cuts, edges = program
    hosts = st.sampled_from([0, 0, 3, 5])  # what moves nothing is always among the options, as in the planner
    moving = lambda o: dataclasses.replace(o, kept=o.kept // 2, host=data.draw(hosts))
    edges = [Edge(e.start, e.stop, (*e.options, *map(moving, e.options))) for e in edges]
    host = data.draw(st.integers(0, 12))
    found = Frontier(cuts, edges, host=host)
    fitting = [path for path in paths(cuts, edges) if sum(o.host for o in path) <= host]
    best = lambda budget: min((t for p, t in map(price_of, fitting) if p <= budget), default=None)
    for at, (peak, ticks) in enumerate(zip(found.peaks, found.ticks, strict=True)):
        assert found.path(at).host <= host
        assert ticks >= best(peak) >= found.bound(peak)
    if found.exact:
        assert all(ticks == best(peak) for peak, ticks in zip(found.peaks, found.ticks, strict=True))
    assert found.ticks[-1] == best(found.peaks[-1])


@settings(max_examples=200, deadline=None)
@given(program=programs(), limit=st.integers(2, 4), budget=st.integers(0, 120))
@example(
    program=(
        4,
        [Edge(0, 1, (option(0, 0, 0),)), *(Edge(i, i + 1, (option(0, 0, 1), option(2 - i, i - 1, 0))) for i in (1, 2))],
    ),
    limit=2,
    budget=0,
)
def test_dropped_labels_give_a_worse_plan_and_a_true_bound(program, limit, budget):
    cuts, edges = program
    found = Frontier(cuts, edges, limit=limit)
    best = min((t for p, t in map(price_of, paths(cuts, edges)) if p <= budget), default=None)
    path, bound = found.within(budget), found.bound(budget)
    if path is not None:
        assert path.peak <= budget
        assert best is not None
        assert path.ticks >= best
    if best is not None:
        assert bound is not None
        assert bound <= best


LAYER = (option(8, 0, 0), option(3, 5, 2), option(0, 8, 5))


def test_more_budget_is_never_slower():
    found = Frontier(13, [Edge(i, i + 1, LAYER) for i in range(12)])
    times = [found.within(b).ticks for b in range(found.peaks[0], found.peaks[-1] + 1)]
    assert times == sorted(times, reverse=True)
    assert found.within(found.peaks[0] - 1) is None


def test_recompute_early_and_save_late():
    found = Frontier(7, [Edge(i, i + 1, LAYER) for i in range(6)])
    for at in range(len(found.peaks)):
        chosen = [o for _, o in found.path(at).steps]
        early = sorted(chosen, key=lambda o: o.kept)
        assert price_of(early) == (found.peaks[at], found.ticks[at])
        assert chosen[-1].kept == 8  # the last layer's recomputation frees nothing
        late = price_of(early[::-1])
        assert late[0] > found.peaks[at] or len(set(early)) == 1


def test_equal_layers_are_exact_though_there_are_many():
    # Only how many layers take each option matters, so the best is found by counting.
    layers = 40
    found = Frontier(layers + 1, [Edge(i, i + 1, LAYER) for i in range(layers)])
    counted = {}
    for none in range(layers + 1):
        for some in range(layers + 1 - none):
            kept = [0] * none + [3] * some + [8] * (layers - none - some)
            peak, ticks = price_of([next(o for o in LAYER if o.kept == k) for k in kept])
            counted[peak] = min(ticks, counted.get(peak, 10**9))
    for budget in range(found.peaks[0], found.peaks[-1] + 1):
        assert found.within(budget).ticks == min(t for p, t in counted.items() if p <= budget)


def test_the_optimum_of_one_level_of_segments():
    # n steps of one byte and one tick, each needed: segments that keep only what crosses into them. With k segments the
    # peak is (k - 1) crossings + the largest segment: about 2 sqrt(n), Chen et al. 2016, section 4.1.
    n = 36
    edges = [Edge(i, j, (option(1, j - i - 1, j - i - 1),)) for i in range(n) for j in range(i + 1, n + 1)]
    found = Frontier(n + 1, edges)
    least = min(k + -(-n // k) - 1 for k in range(1, n + 1))
    assert found.peaks[0] <= least  # equal segments; unequal ones, larger towards the start, do better
    triangle = next(m for m in range(n) if m * (m + 1) // 2 >= n)
    assert found.peaks[0] == triangle  # segments of m, m - 1, ..., 1 steps share one peak of m


def test_no_path_is_an_error():
    with pytest.raises(ValueError, match="no path of boundaries"):
        Frontier(3, [Edge(0, 1, LAYER)])


@settings(max_examples=200, deadline=None)
@given(programs(), st.integers(0, 120))
def test_a_mixture_of_paths_costs_no_more_than_a_path(program, budget):
    cuts, edges = program
    best = min((t for p, t in map(price_of, paths(cuts, edges)) if p <= budget), default=None)
    if best is not None:
        assert relaxed.bound(cuts, edges, budget) <= best


def test_the_mixture_is_near_where_there_are_many_equal_layers():
    layers = 40
    edges = [Edge(i, i + 1, LAYER) for i in range(layers)]
    found = Frontier(layers + 1, edges)
    for budget in range(20, 300, 40):
        best, bound = found.within(budget).ticks, relaxed.bound(layers + 1, edges, budget)
        assert 0 <= best - bound <= 5  # one layer's worth
