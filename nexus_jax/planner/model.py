"""A program's whole frontier of (peak, time): its stretches, their options, and one pass over them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jax.extend import core as jex

from nexus_jax.flat import Flat
from nexus_jax.planner.allocate import Edge, Frontier, Option, Path, price_of
from nexus_jax.planner.cuts import cuts
from nexus_jax.planner.graph import Choice, Graph
from nexus_jax.planner.needs import needs_of
from nexus_jax.planner.options import Options, Way, Ways, of_choice, plain
from nexus_jax.planner.prices import Prices
from nexus_jax.planner.rewrite import Segment
from nexus_jax.planner.scans import Body, bodies, flattened, of_path
from nexus_jax.planner.scans import ways as scan_ways
from nexus_jax.planner.solve import Stairs
from nexus_jax.planner.spans import Span, Spans

_TOGETHER = 6  # stretches between neighbouring cuts that are solved as one
_EQUATIONS = 140  # of what is solved as one, unless it is a single stretch
_MANY = 64  # cuts; with more, long stretches start at every other, fourth, eighth ...
_TOTAL = 2000  # integer programs with a limit, over all kinds of stretches
_LABELS = 2048  # at a cut; fewer where there are many cuts


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What the planner knows of one program on one target.

    Attributes:
        frontier: every undominated (peak, time). Peaks are bytes beside arguments and results; times are ticks.
        spans: what each edge of the frontier is.
        bodies: of the scans that were opened, by the position of their equation and how many steps are taken at once.
        spans_of: makes them.
        body: the step that the program is, of a scan. The frontier's peaks are then what steps keep, and nothing else.
        least: bytes that are alive at once while such a step is differentiated, whatever the plan.
    """

    flat: Flat
    frontier: Frontier
    spans: dict[tuple[int, int], Span]
    spans_of: Spans
    options: Options
    cuts: tuple[int, ...]
    bodies: dict[tuple[int, int], Model]
    body: Body | None = None
    least: int = 0

    @functools.cached_property
    def plain(self) -> int:
        """The peak of the program as it is."""
        options = [plain(self.span(i, i + 1).shape) for i in range(len(self.cuts) - 1)]
        kept, peak = 0, 0
        for option in options:
            kept += option.kept
            peak = max(peak, kept + option.working)
        return peak

    @functools.cached_property
    def carried(self) -> list[int]:
        """Inputs of a scan's body that are carried and kept: the backward pass may need them, or something made of them."""
        if self.body is None:
            return []
        wanted = set(self.spans_of.needs.residuals)
        for step in reversed(self.spans_of.steps):
            if wanted & set(step.outs):
                wanted.update(step.ins)
        return [i for i in self.body.carry if i in self.body.differentiated and i in wanted]

    def span(self, start: int, stop: int) -> Span:
        """The stretch between two cuts."""
        return self.spans[start, stop]

    def unmoved(self, path: Path) -> Path:
        """The path, with what it offloads kept on the device."""
        if not path.host:
            return path
        steps = [(edge, self._stays(self.span(edge.start, edge.stop), option)) for edge, option in path.steps]
        options = [option for _, option in steps]
        peak, ticks = price_of(options)
        return Path(peak if self.body is None else sum(o.kept for o in options), ticks, tuple(steps))

    def _stays(self, span: Span, option: Option) -> Option:
        way = option.what
        if not option.host:
            return option
        if way.inside is None:
            return of_choice(span.shape, Choice(saved=way.choice.kept))
        inner = self.bodies[span.start, way.group]
        return of_path(span.shape, inner, inner.unmoved(way.inside), self.spans_of.unit)

    def segments(self, path: Path) -> tuple[Segment, ...]:
        """A path as what to rewrite. Neighbours that run as they are become one."""
        found: list[Segment] = []
        for edge, option in path.steps:
            segment = self._segment(self.span(edge.start, edge.stop), option)
            as_it_is = lambda s: not s.boundary and not s.inside
            if found and as_it_is(segment) and as_it_is(found[-1]):
                segment = dataclasses.replace(segment, start=found.pop().start)
            found.append(segment)
        return tuple(found)

    def _segment(self, span: Span, option: Option) -> Segment:
        way = option.what
        if way.choice is None:
            inside = () if way.inside is None else self.bodies[span.start, way.group].segments(way.inside)
            scan = {"inside": inside, "group": way.group, "carry": way.carry}
            return Segment(start=span.start, stop=span.stop, boundary=False, **scan)
        eqns = self.flat.eqns[span.start : span.stop]
        at = {self.flat.number[v]: n for n, v in enumerate(v for eqn in eqns for v in eqn.outvars)}
        place = lambda values: tuple(sorted(at[span.values[v]] for v in values))
        away = [at[v] for v in self.spans_of.leaving(span.start, span.stop)] if way.away else []
        return Segment(
            start=span.start,
            stop=span.stop,
            boundary=True,
            save=place(way.choice.saved),
            offload=tuple(sorted({*place(way.choice.offloaded), *away})),
        )


def model_of(
    flat: Flat,
    differentiated: Sequence[int],
    price: Prices,
    *,
    results: Sequence[int] = (0,),
    deadline: float = math.inf,
    solves: int | None = None,
    groups: bool = True,
    stairs: dict[Graph, Stairs] | None = None,
) -> Model:
    """Differentiate a program, cut it, solve every kind of stretch, and find its frontier.

    Args:
        differentiated: which of its inputs, constants counted.
        results: which of its results are; the first alone is the loss.
        deadline: of ``time.monotonic()``; what is not solved by then has fewer options, and the bound knows.
        solves: integer programs with a limit for a stretch's frontier; None is by its size and by how many kinds there are.
        groups: whether scans may take several steps at once.
        stairs: what was solved for another model for the same target and host; what is solved is added.
    """
    stairs = {} if stairs is None else stairs
    spans = Spans(flat, needs_of(flat, differentiated, results), price)
    scans = bodies(flat, differentiated, groups)
    inside = {i: _of_bodies(several, price, deadline, solves, stairs) for i, several in scans.items()}
    return _model(spans, deadline, solves, stairs, inside)


def _of_bodies(
    several: Sequence[Body], price: Prices, deadline: float, solves: int | None, stairs: dict[Graph, Stairs]
) -> list[Model]:
    """Models of what a scan does at each step and at several at once."""
    found: list[Model] = []
    for body in several:
        unit = found[0].spans_of.unit if found else None
        spans = Spans(body.flat, needs_of(body.flat, body.differentiated, body.results), price, unit, looped=True)
        found.append(_model(spans, deadline, solves, stairs, body=body))
    return found


def _model(
    spans: Spans,
    deadline: float,
    solves: int | None,
    stairs: dict[Graph, Stairs],
    scans: Mapping[int, Sequence[Model]] = MappingProxyType({}),
    body: Body | None = None,
) -> Model:
    """The model of a program, or of a scan's body. Equal stretches of all that share ``stairs`` are solved once."""
    loop = body is not None
    around = {p for i in scans for p in (i, i + 1)}
    places = sorted({*cuts(spans.flat, spans.sizes, spans.costs), *around})
    pairs = [(i, j) for i, j in _pairs(places) if j == i + 1 or not any(places[i] <= at < places[j] for at in scans)]
    found = {(i, j): spans.of(places[i], places[j]) for i, j in pairs}
    whole = {(i, j): j > i + 1 and (j - i > _TOGETHER or places[j] - places[i] > _EQUATIONS) for i, j in pairs}
    kinds = len({span.shape for at, span in found.items() if not whole[at]})
    host = spans.price.host
    options = Options(deadline, solves, most=_TOTAL // max(kinds, 1), host=host, stairs=stairs)
    ways = {at: options.of(span.shape, whole[at]) for at, span in found.items() if span.start not in scans}
    for (i, j), span in found.items():
        if span.start in scans:
            ways[i, j] = scan_ways(span.shape, plain(span.shape), scans[span.start], spans.unit)
    edges = [_edge(i, j, ways[i, j], loop) for i, j in pairs if ways[i, j].options]
    limit = max(256, min(_LABELS, 2**19 // len(places)))
    frontier = Frontier(len(places), edges, limit=limit, host=host // body.steps if body else host, repeated=loop)
    kept = {(e.start, e.stop): found[e.start, e.stop] for e in edges}
    inside = {(i, m.body.group): m for i, several in scans.items() for m in several if m.body}
    least = _least(len(places), {at: w.bounds or w.options for at, w in ways.items() if w.options}) if loop else 0
    return Model(spans.flat, frontier, kept, spans, options, tuple(places), inside, body, least)


def _least(cuts: int, bounds: Mapping[tuple[int, int], Sequence[Option]]) -> int:
    """Bytes that some stretch takes on its own, kept and while it is differentiated, on every way from cut to cut."""
    found = [0] * cuts
    for i in reversed(range(cuts - 1)):
        alone = {j: min(o.kept + o.working for o in options) for (k, j), options in bounds.items() if k == i}
        found[i] = min((max(nbytes, found[j]) for j, nbytes in alone.items()), default=0)
    return found[0]


def _edge(start: int, stop: int, ways: Ways, loop: bool) -> Edge:
    if not loop:
        return Edge(start, stop, ways.options, ways.bounds, ways.corners)
    # what is alive while a step is differentiated is alive once, and bounds on what is kept know nothing of it
    bounds, corners = flattened(ways.bounds or ways.options), flattened(ways.corners)
    return Edge(start, stop, ways.options, bounds, corners)


def _pairs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts that a stretch may go between: near ones, and farther ones by powers of two."""
    last = len(places) - 1
    found = []
    for i in range(last):
        near = {
            i + k
            for k in range(1, _TOGETHER + 1)
            if k == 1 or (i + k <= last and places[i + k] - places[i] <= _EQUATIONS)
        }
        far = {i + 2**k for k in range(1, 6) if last <= _MANY or i % 2**k == 0}
        found += [(i, j) for j in sorted(near | far) if j <= last]
    return found


def results(flat: Flat, sizes: Sequence[int]) -> int:
    """Bytes of a program's results."""
    return sum(sizes[flat.number[v]] for v in flat.jaxpr.outvars if not isinstance(v, jex.Literal))


__all__ = ["Model", "Way", "model_of", "results"]
