"""The ways to run a stretch of the program: as it is, or as a boundary that keeps one of its frontier's choices."""

from __future__ import annotations

import dataclasses
import math

from nexus_jax.planner.allocate import Option
from nexus_jax.planner.graph import Choice, Graph, price
from nexus_jax.planner.solve import SolverTimeout, frontier, optimum
from nexus_jax.planner.spans import Shape

SOLVES = 40  # integer programs for a frontier


@dataclasses.dataclass(frozen=True)
class Way:
    """How a stretch is run: ``choice`` is None for as it is."""

    choice: Choice | None


class Options:
    """The options of each shape, found once."""

    def __init__(self, deadline: float = math.inf, solves: int | None = SOLVES):
        self.deadline, self.solves = deadline, solves
        self.known: dict[tuple[Shape, bool], tuple[Option, ...]] = {}
        self.solved = 0
        self.plains: dict[Shape, Option] = {}

    def of(self, shape: Shape, whole: bool) -> tuple[Option, ...]:
        """Its options; with ``whole``, only to recompute everything. Fewer, once the deadline has passed."""
        key = (shape, whole)
        if key not in self.known:
            self.known[key] = self._found(shape, whole)
        return self.known[key]

    def _found(self, shape: Shape, whole: bool) -> tuple[Option, ...]:
        if shape.effects:
            return () if whole else (self.plain(shape),)
        if whole:
            found = [of_choice(shape, Choice(), floor=0)] if makeable(shape.graph) else []
            return tuple(found)
        self.solved += 1
        try:
            points = frontier(shape.graph, solves=self.solves, deadline=self.deadline)
        except SolverTimeout:
            points = ()
        found = [self.plain(shape)]
        found += [of_choice(shape, p.choice, floor=p.floor) for p in points]
        found += [of_choice(shape, choice) for choice in fixed(shape).values()]  # they may need less while they run
        return tuple(found) if points else (dataclasses.replace(found[0], floor=0), *found[1:])

    def plain(self, shape: Shape) -> Option:
        """The stretch as it is: what autodiff keeps, less what a compiler makes again by fusion."""
        if shape not in self.plains:
            self.plains[shape] = self._plain(shape)
        return self.plains[shape]

    def _plain(self, shape: Shape) -> Option:
        kept = optimum(shape.fused, 0, host=max(sum(shape.fused.sizes), 1))
        if kept is None:
            raise ValueError("a value that the backward pass needs has no equation: the program is not whole.")
        nbytes = shape.crossing + price(shape.fused, kept).host
        return Option(kept=nbytes, working=shape.transient, ticks=0, floor=nbytes, what=Way(None))


def of_choice(shape: Shape, choice: Choice, floor: int | None = None) -> Option:
    """A stretch as a boundary that keeps what is chosen."""
    graph = shape.graph
    paid = price(graph, choice)
    made = {v for i in graph.again(choice.kept) for v in graph.ops[i].outs} - choice.kept - graph.free
    working = sum(graph.sizes[v] for v in made & shape.written) + shape.transient
    kept = shape.crossing + paid.device
    least = kept if floor is None else shape.crossing + floor
    return Option(kept=kept, working=working, ticks=paid.ticks, floor=least, what=Way(choice))


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
