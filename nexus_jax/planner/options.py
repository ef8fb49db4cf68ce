"""The ways to run a stretch of the program: as it is, or as a boundary that keeps one of its frontier's choices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from nexus_jax.planner.allocate import Option, Path
from nexus_jax.planner.graph import Choice, Graph, price
from nexus_jax.planner.solve import Bound, SolverTimeout, Stairs, frontier
from nexus_jax.planner.spans import Shape

_SOLVES, _EASY = 40, 5_000  # programs with a limit for a frontier; of many values, fewer: they take longer


@dataclasses.dataclass(frozen=True)
class Way:
    """How a stretch is run: as a boundary that keeps ``choice``, or as it is.

    Attributes:
        inside: how a step is run, where the stretch is a scan: a path of the model of its body.
        group: how many of its steps are run as one, so.
        away: whether what later stretches take from it waits on the host.
        carry: which of what the scan carries waits there, by number.
    """

    choice: Choice | None
    inside: Path | None = None
    group: int = 1
    away: bool = False
    carry: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ways:
    """The options of a stretch, and bounds on all that were not asked for (:class:`allocate.Edge`)."""

    options: tuple[Option, ...]
    bounds: tuple[Option, ...] = ()
    corners: tuple[Option, ...] = ()


class Options:
    """The options of each shape, found once.

    Args:
        solves: integer programs with a limit for a stretch's frontier; None is by its size, ``most`` at most.
        host: bytes of host memory.
        stairs: what was solved for another program under the same terms.
    """

    def __init__(
        self,
        deadline: float = math.inf,
        solves: int | None = None,
        most: int = _SOLVES,
        host: int = 0,
        stairs: dict[Graph, Stairs] | None = None,
    ):
        self.host = host
        self.deadline, self.solves, self.most = deadline, solves, min(most, _SOLVES)
        self.known: dict[tuple[Shape, bool], Ways] = {}
        self.stairs = {} if stairs is None else stairs
        self.solved = 0

    def of(self, shape: Shape, whole: bool) -> Ways:
        """Its options; with ``whole``, only the fixed policies. Fewer, once the deadline has passed."""
        key = (shape, whole)
        if key not in self.known:
            self.known[key] = self._found(shape, whole)
        return self.known[key]

    def _found(self, shape: Shape, whole: bool) -> Ways:
        if shape.effects:
            return Ways(() if whole else (plain(shape),))
        if whole:
            return Ways(undominated([of_choice(shape, choice) for choice in fixed(shape).values()]))
        found, bounds, corners = [plain(shape)], [plain(shape)], [plain(shape)]
        for away in (False, True) if shape.leaving else (False,):
            stairs = self._solved(_graph(shape, away))
            found += [of_choice(shape, p.choice, away) for p in stairs.points]
            bounds += _bounds(shape, stairs.bounds, away)
            corners += _bounds(shape, stairs.corners(also=_both(shape)), away)
        found += [of_choice(shape, choice) for choice in fixed(shape).values()]  # they may need less while they run
        return Ways(undominated(found), undominated(bounds), undominated(corners))

    def _solved(self, graph: Graph) -> Stairs:
        if graph not in self.stairs:
            self.solved += 1
            solves = self.solves
            if solves is None:
                solves = min(self.most, _EASY // (1 + len(graph.keepable) ** 2))
            try:
                self.stairs[graph] = frontier(graph, solves=solves, deadline=self.deadline, host=self.host)
            except SolverTimeout:
                return Stairs((), (Bound(low=0, high=sum(graph.sizes), ticks=0),))
        return self.stairs[graph]


def plain(shape: Shape) -> Option:
    """The stretch as it is: what autodiff keeps. What a compiler makes again by itself is not counted on: a boundary that
    makes it again costs no more.
    """
    kept = sum(shape.graph.sizes[v] for v in shape.graph.needed - shape.graph.free)
    working = shape.transient + shape.entering
    return Option(kept=shape.crossing + kept, working=working, ticks=0, what=Way(None))


def of_choice(shape: Shape, choice: Choice, away: bool = False) -> Option:
    """A stretch as a boundary that keeps what is chosen.

    What was on the host is there while it is differentiated, and so is what comes back for the stretch before it, which
    is taken for as much.
    """
    graph = _graph(shape, away)
    paid = price(graph, choice)
    host = paid.host + (shape.leaving if away else 0)
    made = {v for i in graph.again(choice.kept) for v in graph.ops[i].outs} - choice.kept - graph.free
    working = sum(graph.sizes[v] for v in made & shape.written) + shape.transient + shape.entering + 2 * paid.host
    kept = shape.crossing - (shape.leaving if away else 0) + paid.device
    return Option(kept=kept, working=working, ticks=paid.ticks, what=Way(choice, away=away), host=host)


def _graph(shape: Shape, away: bool) -> Graph:
    """The graph of a stretch; with ``away``, what later stretches take has part of its time on the link."""
    if not away or shape.graph.link is None:
        return shape.graph
    return dataclasses.replace(shape.graph, link=dataclasses.replace(shape.graph.link, already=shape.leaving))


def _both(shape: Shape) -> int:
    """What is written and needed is kept, or made again and then written: together they are never fewer bytes."""
    graph = shape.graph
    return sum(graph.sizes[v] for v in (graph.needed & shape.written) - graph.free)


def _bounds(shape: Shape, bounds: Sequence[Bound], away: bool) -> list[Option]:
    both = _both(shape)
    return [
        Option(
            kept=shape.crossing - (shape.leaving if away else 0) + bound.low,
            working=shape.transient + shape.entering + max(0, both - bound.high),
            ticks=bound.ticks,
            what=Way(None),
        )
        for bound in bounds
    ]


def undominated(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those that no other is at least as good as in everything; the first of equal ones."""
    found: list[Option] = []
    for o in sorted(options, key=lambda o: (o.kept, o.ticks, o.working, o.host)):
        if not any(f.ticks <= o.ticks and f.working <= o.working and f.host <= o.host for f in found):
            found.append(o)
    return tuple(found)


def fixed(shape: Shape) -> dict[str, Choice]:
    """What the fixed policies of ``jax.checkpoint_policies`` keep of a stretch, by their names."""
    if not makeable(shape.graph):
        return {}
    dots = {v for v, _ in shape.matmuls}
    plain = {v for v, batched in shape.matmuls if not batched}
    return {
        "nothing_saveable": Choice(),
        "dots_saveable": Choice(saved=frozenset(dots)),
        "dots_with_no_batch_dims_saveable": Choice(saved=frozenset(plain)),
    }


def makeable(graph: Graph) -> bool:
    """Whether everything can be made again."""
    try:
        graph.again(())
    except ValueError:
        return False
    return True
