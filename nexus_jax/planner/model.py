"""A program's whole frontier of (peak, time): its stretches, their options, and one pass over them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from jax.extend import core as jex

from nexus_jax.flat import Flat
from nexus_jax.planner.allocate import Edge, Frontier, Option, Path
from nexus_jax.planner.cuts import cuts
from nexus_jax.planner.needs import needs_of
from nexus_jax.planner.options import Options, Way
from nexus_jax.planner.prices import Prices
from nexus_jax.planner.rewrite import Segment
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
        spans_of: makes them.
    """

    flat: Flat
    frontier: Frontier
    spans: dict[tuple[int, int], Span]
    spans_of: Spans
    options: Options
    cuts: tuple[int, ...]

    @functools.cached_property
    def plain(self) -> int:
        """The peak of the program as it is."""
        options = [self.options.plain(self.span(i, i + 1).shape) for i in range(len(self.cuts) - 1)]
        kept, peak = 0, 0
        for option in options:
            kept += option.kept
            peak = max(peak, kept + option.working)
        return peak

    def span(self, start: int, stop: int) -> Span:
        """The stretch between two cuts."""
        return self.spans[start, stop]

    def segments(self, path: Path) -> tuple[Segment, ...]:
        """A path as what to rewrite. Neighbours that run as they are become one."""
        found: list[Segment] = []
        for edge, option in path.steps:
            segment = self._segment(self.span(edge.start, edge.stop), option)
            if found and not segment.boundary and not found[-1].boundary:
                segment = dataclasses.replace(segment, start=found.pop().start)
            found.append(segment)
        return tuple(found)

    def _segment(self, span: Span, option: Option) -> Segment:
        way = option.what
        if way.choice is None:
            return Segment(start=span.start, stop=span.stop, boundary=False)
        eqns = self.flat.eqns[span.start : span.stop]
        at = {self.flat.number[v]: n for n, v in enumerate(v for eqn in eqns for v in eqn.outvars)}
        place = lambda values: tuple(sorted(at[span.values[v]] for v in values))
        return Segment(
            start=span.start,
            stop=span.stop,
            boundary=True,
            save=place(way.choice.saved),
            offload=place(way.choice.offloaded),
        )


def model_of(
    flat: Flat, differentiated: Sequence[int], price: Prices, *, deadline: float = math.inf, solves: int | None = None
) -> Model:
    """Differentiate a program, cut it, solve every kind of stretch, and find its frontier.

    Args:
        differentiated: which of its inputs, constants counted.
        deadline: of ``time.monotonic()``; what is not solved by then has fewer options, and the bound knows.
        solves: integer programs with a limit for a stretch's frontier; None is by its size and by how many kinds there are.
    """
    spans = Spans(flat, needs_of(flat, differentiated), price)
    places = cuts(flat, spans.sizes, spans.costs)
    found, whole = {}, {}
    for i, j in _pairs(places):
        found[i, j] = spans.of(places[i], places[j])
        whole[i, j] = j > i + 1 and (j - i > _TOGETHER or places[j] - places[i] > _EQUATIONS)
    kinds = len({span.shape for at, span in found.items() if not whole[at]})
    options = Options(deadline, solves, most=_TOTAL // max(kinds, 1))
    ways = {at: options.of(span.shape, whole[at]) for at, span in found.items()}
    found = {at: span for at, span in found.items() if ways[at].options}
    edges = [Edge(*at, ways[at].options, ways[at].bounds, ways[at].corners) for at in found]
    limit = max(256, min(_LABELS, 2**19 // len(places)))
    frontier = Frontier(len(places), edges, limit=limit)
    return Model(flat, frontier, found, spans, options, tuple(places))


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
