"""A stretch of the program as a graph of integers, equal for equal stretches: each kind is solved once."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence

from jax.extend import core as jex

from nexus_jax.flat import Flat, is_floating
from nexus_jax.offloading.loops import loop_of
from nexus_jax.offloading.stages import variables
from nexus_jax.planner import prices
from nexus_jax.planner.graph import Graph, Op
from nexus_jax.planner.needs import Needs, Step
from nexus_jax.planner.prices import Prices


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that decides how a stretch can be run; equal for equal layers.

    Attributes:
        graph: its values and equations, renumbered.
        written: values that are written to memory when they are made again.
        crossing: bytes of what later stretches take from this one.
        leaving: of those, bytes of what can wait on the host meanwhile.
        entering: bytes of what this one takes from earlier stretches, where something may be offloaded: then they come back.
        transient: bytes of gradients that are alive at once inside.
        effects: whether something in it must happen exactly once.
        matmuls: the results of its matmuls that can be kept, and whether each has batch dimensions.
    """

    graph: Graph
    written: frozenset[int]
    crossing: int
    transient: int
    effects: bool
    matmuls: tuple[tuple[int, bool], ...] = ()
    leaving: int = 0
    entering: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Span:
    """The equations from ``start`` to ``stop``, their shape, and the value that each number of it stands for."""

    start: int
    stop: int
    shape: Shape
    values: tuple[int, ...]


# What is differentiated into a broadcast: no kernel writes it.
_BROADCASTS = {"reduce_sum", "reduce_max", "reduce_min"}


class Spans:
    """Makes spans of one program.

    Args:
        unit: of a tick; None is by what the whole program costs.
        looped: whether the program is a step of a scan. Nothing is copied beside another step.
    """

    def __init__(self, flat: Flat, needs: Needs, price: Prices, unit: int | None = None, looped: bool = False):
        self.flat, self.needs, self.price, self.looped = flat, needs, price, looped
        self.inputs = len(flat.jaxpr.invars)
        self.sizes = [price.bytes_of(aval) for aval in needs.avals]
        self.costs = [price.cost_of(eqn) for eqn in flat.eqns]
        self.unit = unit or max(1, sum(self.costs) // 10**9)  # a tick; so that HiGHS can tell them apart
        order = sorted(range(len(needs.steps)), key=lambda i: needs.steps[i].home)
        self.steps = [needs.steps[i] for i in order]
        self.homes = [step.home for step in self.steps]
        self.used: dict[int, int] = {}  # the last equation that takes a value
        self.scanned: set[int] = set()  # what scans take: no compiler brings it back for steps that move something
        for i, eqn in enumerate(flat.eqns):
            taken = [flat.number[v] for v in variables(eqn.invars)]
            self.used.update(dict.fromkeys(taken, i))
            self.scanned.update(taken if loop_of(eqn) else ())
        self.outputs = {flat.number[v] for v in flat.jaxpr.outvars if not isinstance(v, jex.Literal)}
        self.picoseconds = [price.picoseconds_of(eqn) if price.host else 0 for eqn in flat.eqns]
        self.step_costs = [price.cost_of(s.eqn) // self.unit if s.forward else 0 for s in self.steps]

    def of(self, start: int, stop: int) -> Span:
        """The span of equations ``start`` to ``stop``."""
        low, high = (bisect.bisect_left(self.homes, i) for i in (start, stop))
        steps = self.steps[low:high]
        values = tuple(dict.fromkeys(v for s in steps for v in (*s.ins, *s.outs)))
        local = {v: i for i, v in enumerate(values)}
        made = {v for s in steps for v in s.outs}
        out = {v for v in made if v < len(self.flat.number) and self.used.get(v, -1) >= stop}
        free = frozenset(local[v] for v in values if v not in made or v in out or v in self.outputs)
        needed = frozenset(local[v] for v in made & self.needs.residuals)
        keepable = frozenset(local[v] for v in made if v in self.needs.named and v not in self.outputs)
        sizes = tuple(self.sizes[v] for v in values)
        ops = tuple(
            Op(ins=_at(local, s.ins), outs=_at(local, s.outs), cost=cost, pinned=bool(s.eqn.effects))
            for s, cost in zip(steps, self.step_costs[low:high], strict=True)
        )
        graph = Graph(
            sizes=sizes,
            ops=ops,
            needed=needed,
            free=free,
            keepable=keepable - free,
            movable=frozenset(v for v in keepable - free if self._is_movable(values[v])),
            link=self.price.link(self._beside(start, stop), self.unit),
        )
        shape = Shape(
            graph=graph,
            written=self._written(steps, local, needed),
            crossing=sum(self.sizes[v] for v in out),
            transient=self._transient(start, stop, out),
            effects=any(s.eqn.effects for s in steps),
            matmuls=tuple(
                (local[v], bool(s.eqn.params["dimension_numbers"][1][0]))
                for s in steps
                if s.eqn.primitive.name == "dot_general"
                for v in s.outs
                if local[v] in graph.keepable
            ),
            leaving=sum(self.sizes[v] for v in self.leaving(start, stop)),
            entering=sum(self.sizes[v] for v in self._entering(start, stop)),
        )
        return Span(start, stop, shape, values)

    def _beside(self, start: int, stop: int) -> int:
        """Picoseconds of computing that what a stretch sends away leaves beside: its neighbour's, if that is like it."""
        own = sum(self.picoseconds[start:stop])
        return min(own, sum(self.picoseconds[stop:])) if self.looped else own

    def leaving(self, start: int, stop: int) -> set[int]:
        """What later stretches take from this one, and can wait on the host meanwhile."""
        return {v for v in self._made(start, stop) if self._can_leave(v, stop)}

    def _entering(self, start: int, stop: int) -> set[int]:
        """What this stretch takes from earlier ones, and they may have sent to the host."""
        taken = {self.flat.number[v] for eqn in self.flat.eqns[start:stop] for v in variables(eqn.invars)}
        made = self._made(start, stop)
        return {v for v in taken - made if v >= self.inputs and self._can_leave(v, start)}

    def _made(self, start: int, stop: int) -> set[int]:
        return {self.flat.number[v] for eqn in self.flat.eqns[start:stop] for v in eqn.outvars}

    def _can_leave(self, value: int, stop: int) -> bool:
        return self.used.get(value, -1) >= stop and value not in self.scanned and self._is_movable(value)

    def _is_movable(self, value: int) -> bool:
        return self.price.is_movable(self.needs.avals[value])

    def has_gradient(self, value: int) -> bool:
        """Whether a value is made of numbers that can change a little, and of more than one."""
        aval = self.needs.avals[value]
        return is_floating(aval) and bool(aval.shape)

    def _written(self, steps: Sequence[Step], local: dict[int, int], needed: frozenset[int]) -> frozenset[int]:
        found: set[int] = set()
        for s in steps:
            if not prices.is_fused(s.eqn):
                found.update(local[v] for v in s.outs)
                if not (self.price.is_tpu and s.eqn.primitive.name == "dot_general"):
                    found.update(local[v] for v in s.ins if local[v] in needed)
        return frozenset(found)

    def _transient(self, start: int, stop: int, out: Iterable[int]) -> int:
        """Gradients that are alive at once while these equations are differentiated, last to first.

        A gradient is a buffer where a kernel of its own writes or reads it. What is fused between is no buffer: it holds
        those that it is made of.
        """
        sizes: list[int] = []
        own: dict[int, frozenset[int]] = {}
        held: dict[int, frozenset[int]] = {}  # value: the buffers that its gradient is made of

        def buffer(value: int) -> frozenset[int]:
            sizes.append(self.sizes[value])
            own[value] = frozenset({len(sizes) - 1})
            return own[value]

        def alive(*more: frozenset[int]) -> int:
            return sum(sizes[b] for b in frozenset().union(*held.values(), *more))

        held.update((v, buffer(v)) for v in out if self.has_gradient(v))
        peak = alive()
        for eqn in reversed(self.flat.eqns[start:stop]):
            outs = [self.flat.number[v] for v in eqn.outvars]
            ins = dict.fromkeys(self.flat.number[v] for v in eqn.invars if not isinstance(v, jex.Literal))
            wanted = [v for v in ins if v >= self.inputs and self.has_gradient(v)]
            if prices.is_fused(eqn) or eqn.primitive.name in _BROADCASTS:
                taken = frozenset().union(*(held.pop(v, frozenset()) for v in outs))
                made = dict.fromkeys(wanted, taken)
            else:
                read = frozenset().union(*(held[v] for v in outs if v in held))
                if not (self.price.is_tpu and eqn.primitive.name == "dot_general"):  # it reads what is fused into it
                    written = [own[v] if held[v] == own.get(v) else buffer(v) for v in outs if v in held]
                    peak = max(peak, alive(*written))
                    read = frozenset().union(*written)
                for v in outs:
                    held.pop(v, None)
                made = {v: buffer(v) for v in wanted}
                peak = max(peak, alive(read, *made.values()))
            for v, buffers in made.items():
                held[v] = held.get(v, frozenset()) | buffers
        return peak


def _at(local: dict[int, int], values: Sequence[int]) -> tuple[int, ...]:
    return tuple(local[v] for v in values)
