"""One boundary, exactly: the cheapest choice for so many bytes, and the whole frontier of bytes and cost.

The integer program has a variable for each value saved, each value offloaded, and each equation made again:

    minimise    sum of ticks made again + late out + late back + touch * bytes offloaded
    such that   saved + offloaded + made again >= 1                      for each value that is needed
                saved + offloaded + made again >= made again of user     for each input of each equation
                bytes saved <= device,  bytes offloaded <= host
                late >= ticks of the link for the bytes offloaded - time window,  late >= 0,  for each way

HiGHS solves it in floating point; its answer is rounded, priced again in integers, and rid of what it keeps in vain.
Whether an equation is made again follows from what is kept, so only the latter need be whole: the relaxation is tight,
where nothing is offloaded.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy

from nexus_jax.planner.graph import GIGA, CannotRecompute, Choice, Graph, Price, price


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A choice on a frontier, and its price."""

    choice: Choice
    price: Price


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Every choice that keeps from ``low`` to ``high`` bytes on the device costs at least ``ticks``."""

    low: int
    high: int
    ticks: int


@dataclasses.dataclass(frozen=True)
class Line:
    """No choice has less than ``value`` of ``ticks * a_tick + bytes * a_byte``."""

    a_tick: int
    a_byte: int
    value: int

    def least(self, nbytes: int) -> int:
        """Ticks of a choice that keeps so many bytes, at least."""
        return -((nbytes * self.a_byte - self.value) // self.a_tick)

    def meets(self, other: Line) -> int | None:
        """The bytes, rounded down, at which two lines ask for equal ticks; None if they are parallel."""
        slope = self.a_byte * other.a_tick - other.a_byte * self.a_tick
        return (self.value * other.a_tick - other.value * self.a_tick) // slope if slope else None


@dataclasses.dataclass(frozen=True)
class Stairs:
    """A frontier.

    Attributes:
        points: choices of which none beats another in bytes and ticks, most bytes first.
        bounds: what any choice costs at least, most bytes first. There is none that keeps fewer bytes than the last.
        lines: what it costs at least, as a convex function.
    """

    points: tuple[Point, ...] = ()
    bounds: tuple[Bound, ...] = ()
    lines: tuple[Line, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether these are all the points that there are."""
        return [p.price.device for p in self.points] == [b.low for b in self.bounds]

    def corners(self, also: int = 0) -> tuple[Bound, ...]:
        """Bounds from which a convex bound on all choices follows: what costs least in bytes and ticks together, whatever
        a byte is worth, costs no less than one of them. Without lines they are ``bounds``.

        Args:
            also: bytes at which there should be one.
        """
        if not self.lines or not self.bounds:
            return self.bounds
        fewest, most = self.bounds[-1].low, self.bounds[0].low
        least = lambda nbytes: max(line.least(nbytes) for line in self.lines)
        places = {fewest, most, also, also + 1}
        lines = sorted(self.lines, key=lambda line: line.a_byte / line.a_tick)
        for one, other in itertools.combinations(lines, 2):
            at = one.meets(other)
            if at is not None and least(at) <= max(one.least(at), other.least(at)):
                places |= {at, at + 1}
        found = sorted((p for p in places if fewest <= p <= most), reverse=True)
        return tuple(Bound(low=p, high=p, ticks=least(p)) for p in found)


class SolverTimeout(RuntimeError):
    """The solver did not finish in time."""


def optimum(
    graph: Graph, device: int, host: int = 0, *, deadline: float = math.inf, model: Model | None = None
) -> Choice | None:
    """The cheapest choice within ``device`` and ``host`` bytes; None if there is none.

    Args:
        device, host: bytes that may be kept.
        deadline: of ``time.monotonic()``.

    Raises:
        SolverTimeout: the deadline passed.
    """
    model = model or Model(graph, host)
    allowed, host_allowed = device, host
    while allowed >= 0 and host_allowed >= 0:
        found = model.solve(allowed, host_allowed, deadline)
        if found is None:
            return None
        found = trimmed(graph, found)
        paid = price(graph, found)
        if paid.device <= device and paid.host <= host:
            return found
        allowed -= max(paid.device - device, 0)  # rounded up by the solver's tolerance
        host_allowed -= max(paid.host - host, 0)
    return None


def frontier(graph: Graph, *, host: int = 0, solves: int | None = None, deadline: float = math.inf) -> Stairs:
    """The choices that no other beats in bytes and ticks.

    First the corners of its convex hull: each is the cheapest where a byte costs so many ticks, and without a limit the
    relaxation of the program is whole (every row is a difference of two variables: a minimum cut), so that none of them
    branches. Then the points between them, each at a limit of bytes, where most is uncertain first.

    Args:
        host: bytes that may be kept on the host. The points are then those of bytes on the device and ticks.
        solves: how many programs with a limit may be solved, beside the ends; None is until all is known. Each point
            is optimal for its bytes all the same, and ``bounds`` says what others cost at least.
        deadline: of ``time.monotonic()``. After it, the points so far are the answer.

    Raises:
        SolverTimeout: the deadline passed before there were any points.
    """
    search = _Search(graph, host, deadline)
    if not search.ends():
        return Stairs()
    try:
        if solves is not None:
            search.corners()
        while solves is None or solves > 0:
            limit = search.widest()
            if limit is None:
                break
            search.ask(limit)
            solves = None if solves is None else solves - 1
    except SolverTimeout:
        pass
    return search.result()


@dataclasses.dataclass
class _Known:
    """A choice, the cheapest for every limit from its bytes to ``limit``."""

    choice: Choice
    price: Price
    limit: int


_CORNERS = 32  # programs for a hull
_STEPS = 6  # bounds between two known points


class _Search:
    """What is known of a frontier so far."""

    def __init__(self, graph: Graph, host: int, deadline: float):
        self.graph, self.host, self.deadline = graph, host, deadline
        self.model = Model(graph, host)
        self.found: list[_Known] = []  # most bytes first
        self.lines: list[Line] = []
        self.none = -1  # no choice keeps so few bytes

    def ends(self) -> bool:
        """Find the cheapest choice; False if there is none at all."""
        return self.ask(sum(self.graph.sizes))

    def ask(self, limit: int) -> bool:
        """Find the cheapest within a limit; False if there is none."""
        choice = optimum(self.graph, limit, self.host, deadline=self.deadline, model=self.model)
        if choice is None:
            self.none = max(self.none, limit)
            return False
        self._insert(choice, limit)
        return True

    def _insert(self, choice: Choice, limit: int) -> None:
        paid = price(self.graph, choice)
        for known in self.found:
            if known.price.ticks == paid.ticks:  # the same step of the stairs: its bytes are the fewer
                known.limit = max(known.limit, limit)
                if paid.device < known.price.device:
                    known.choice, known.price = choice, paid
                return
        self.found.append(_Known(choice, paid, limit))
        self.found.sort(key=lambda k: -k.price.device)

    def widest(self) -> int | None:
        """The limit to ask about next: in the middle of where most is uncertain; None if nowhere is."""
        best, at = 0, None
        for low, high, above, below in self._gaps():
            middle = (low + high + 1) // 2
            area = (high - low + 1) * (below - self._least(middle, above) + 1)
            if area > best:
                best, at = area, middle
        return at

    def _gaps(self) -> Iterator[tuple[int, int, int, int]]:
        """(fewest bytes, most bytes, ticks just above, ticks just below) of where the cheapest is not known."""
        dearest = 1 + self._dearest()
        after = [(k.limit, k.price.ticks) for k in self.found[1:]]
        for known, (limit, ticks) in zip(self.found, [*after, (self.none, dearest)], strict=True):
            if known.price.device - 1 > limit and ticks > known.price.ticks:
                yield limit + 1, known.price.device - 1, known.price.ticks, ticks

    def _dearest(self) -> int:
        """Ticks that no choice costs more than."""
        moved = min(self.host, sum(self.graph.sizes[v] for v in self.graph.movable))
        return sum(op.cost for op in self.graph.ops) + (self.graph.transfer(moved) if self.host else 0)

    def _least(self, nbytes: int, above: int) -> int:
        return max([above, *(line.least(nbytes) for line in self.lines)])

    def corners(self) -> None:
        """Find the corners of the convex hull, and the lines that no choice is below."""
        if self.found[-1].price.device > 0 and not self.ask(0):
            self.ask(self._fewest())
        self.lines.append(Line(1, 0, self.found[0].price.ticks))
        left = _CORNERS
        untested = list(itertools.pairwise(self.found))
        while untested and left:
            untested.sort(key=lambda pair: _area(*pair))
            above, below = untested.pop()
            ticks, nbytes = below.price.ticks - above.price.ticks, above.price.device - below.price.device
            if ticks <= 0 or nbytes <= 0:
                continue
            left -= 1
            choice = self.model.cheapest(nbytes, ticks, self.deadline)
            if choice is None:
                return
            choice = trimmed(self.graph, choice)
            paid = price(self.graph, choice)
            if paid.host > self.host:
                return
            value = lambda p: p.ticks * nbytes + p.device * ticks
            doubt = (self._dearest() * nbytes + sum(self.graph.sizes) * ticks) >> 20
            doubt += nbytes if self.model.link else 0  # the program knows parts of a tick, and a price is rounded up
            self.lines.append(Line(nbytes, ticks, min(value(paid), value(above.price)) - doubt))
            if value(paid) < value(above.price):
                self._insert(choice, paid.device)
                corner = next(k for k in self.found if k.price.ticks == paid.ticks)
                untested += [(above, corner), (corner, below)]

    def _fewest(self) -> int:
        choice = self.model.cheapest(0, 1, self.deadline)
        return price(self.graph, trimmed(self.graph, choice)).device if choice is not None else 0

    def result(self) -> Stairs:
        bounds = [Bound(low=k.price.device, high=k.limit, ticks=k.price.ticks) for k in self.found]
        for low, high, above, _ in self._gaps():
            edges = [low + (high + 1 - low) * k // _STEPS for k in range(_STEPS + 1)]
            for a, b in itertools.pairwise(edges):
                if a < b:
                    bounds.append(Bound(low=a, high=b - 1, ticks=self._least(b - 1, above)))
        bounds.sort(key=lambda b: -b.low)
        points, last = [], None
        for known in self.found:
            if last is None or known.price.ticks > last:
                points.append(Point(choice=known.choice, price=known.price))
                last = known.price.ticks
        return Stairs(tuple(points), tuple(bounds), tuple(self.lines))


def _area(above: _Known, below: _Known) -> int:
    return (above.price.device - below.price.device) * (below.price.ticks - above.price.ticks)


def trimmed(graph: Graph, choice: Choice) -> Choice:
    """The choice without what it keeps in vain: values whose absence costs nothing, largest first."""
    best = price(graph, choice)
    again = graph.again(choice.kept)
    read = graph.needed.union(*(graph.ops[i].ins for i in again))
    for value in sorted(choice.kept, key=lambda v: (-graph.sizes[v], v)):
        op = graph.maker.get(value)
        stays = value not in choice.offloaded
        if stays and value in read and op not in again and (op is None or graph.ops[op].cost > 0):
            continue  # to make it would cost more
        fewer = Choice(saved=choice.saved - {value}, offloaded=choice.offloaded - {value})
        try:
            paid = price(graph, fewer)
        except CannotRecompute:
            continue
        if paid.ticks <= best.ticks:
            choice, best = fewer, paid
    return choice


class Model:
    """The integer program of one graph; its matrix is built once, and solved for many limits."""

    def __init__(self, graph: Graph, host: int = 0):
        self.graph, self.host = graph, host
        ops = self._reachable()
        values = sorted({v for i in ops for v in (*graph.ops[i].ins, *graph.ops[i].outs)} | graph.needed)
        self.values = [v for v in values if v in graph.keepable and v not in graph.free]
        self.ops = sorted(ops)
        n, m = len(self.values), len(self.ops)
        self.link = graph.link if host else None
        movable = [v for v in self.values if v in graph.movable] if host else []
        self.save_at = {v: k for k, v in enumerate(self.values)}
        self.move_at = {v: n + k for k, v in enumerate(movable)}
        self.op_at = {i: n + len(movable) + k for k, i in enumerate(self.ops)}
        self.late_at = n + len(movable) + m  # by how much copies out and back are late, in scaled ticks
        self.count = self.late_at + (2 if self.link else 0)
        touch = self.link.touch if self.link else 0
        costs = [0] * n + [graph.sizes[v] * touch / GIGA for v in movable] + [graph.ops[i].cost for i in self.ops]
        self.scale = max(1.0, sum(costs) / 1e7)
        self.costs = np.array(costs + [self.scale] * (self.count - self.late_at), float)
        self.sizes = [graph.sizes[v] for v in self.values]
        self.unit = math.gcd(*self.sizes) or 1
        # With larger coefficients HiGHS repairs more of its answers.
        self.heavy = max(1.0, max(self.sizes, default=0) // self.unit / 1e3)
        self.matrix = self._matrix()
        self.feasible = self.matrix is not None

    def _reachable(self) -> set[int]:
        """The equations that could ever run again."""
        graph, found = self.graph, set()
        wanted = [v for v in graph.needed if v not in graph.free]
        while wanted:
            op = graph.maker.get(wanted.pop())
            if op is not None and op not in found and not graph.ops[op].pinned:
                found.add(op)
                wanted += [v for v in graph.ops[op].ins if v not in graph.free]
        return found

    def _sources(self, value: int) -> list[int]:
        """The variables any of which provides a value."""
        found = []
        if value in self.save_at:
            found.append(self.save_at[value])
        if value in self.move_at:
            found.append(self.move_at[value])
        op = self.graph.maker.get(value)
        if op in self.op_at:
            found.append(self.op_at[op])
        return found

    def _matrix(self) -> scipy.sparse.csr_array | None:
        """Rows that must be at least 1 (the needed), then rows that must be at least 0; None if one cannot be."""
        rows: list[tuple[list[int], int | None]] = []
        for value in sorted(self.graph.needed - self.graph.free):
            rows.append((self._sources(value), None))
        self.ones = len(rows)
        if any(not sources for sources, _ in rows):
            return None
        for i in self.ops:
            for value in sorted(set(self.graph.ops[i].ins) - self.graph.free):
                rows.append((self._sources(value), self.op_at[i]))
        data, at, columns = [], [], []
        for r, (sources, user) in enumerate(rows):
            for column in sources:
                data.append(1.0)
                at.append(r)
                columns.append(column)
            if user is not None:
                data.append(-1.0)
                at.append(r)
                columns.append(user)
        self.rows = len(rows)
        return scipy.sparse.csr_array((data, (at, columns)), shape=(len(rows), self.count))

    def solve(self, device: int, host: int, deadline: float) -> Choice | None:
        """What HiGHS answers, rounded; within the limits but for its tolerance. None if nothing fits."""
        if not self.feasible:
            return None
        if not self.count or not self.rows:
            return Choice()
        constraints = [self._rows(), *self._within(self.save_at, device), *self._within(self.move_at, host)]
        return self._answer(self.costs / self.scale, constraints, deadline)

    def _within(self, at: dict[int, int], limit: int) -> list[Any]:
        """The bytes of the values at these places are within a limit."""
        row = np.zeros(self.count)
        for v, k in at.items():
            row[k] = self.graph.sizes[v] // self.unit / self.heavy
        return [scipy.optimize.LinearConstraint(row[None], -np.inf, limit // self.unit / self.heavy)] if at else []

    def _late(self) -> list[Any]:
        """What of each way's copies is not hidden is late."""
        if self.link is None:
            return []
        found = []
        for k, (a_byte, hidden) in enumerate(self.link.ways):
            row = np.zeros(self.count)
            for v, at in self.move_at.items():
                row[at] = self.graph.sizes[v] * a_byte / GIGA / self.scale
            row[self.late_at + k] = -1
            room = hidden - self.link.already * a_byte / GIGA
            found.append(scipy.optimize.LinearConstraint(row[None], -np.inf, room / self.scale))
        return found

    def cheapest(self, a_tick: int, a_byte: int, deadline: float) -> Choice | None:
        """The choice with the least ``ticks * a_tick + bytes on the device * a_byte``; None if there is none."""
        if not self.feasible:
            return None
        if not self.count or not self.rows:
            return Choice()
        costs = self.costs * float(a_tick)
        costs[: len(self.values)] += np.array(self.sizes, float) * a_byte
        constraints = [self._rows(), *self._within(self.move_at, self.host)]
        return self._answer(costs / max(costs.sum() / 1e7, 1e-300), constraints, deadline)

    def _rows(self) -> Any:
        lower = np.concatenate([np.ones(self.ones), np.zeros(self.rows - self.ones)])
        return scipy.optimize.LinearConstraint(self.matrix, lower, np.inf)  # type: ignore[arg-type]

    def _answer(self, costs: np.ndarray, constraints: list[Any], deadline: float) -> Choice | None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise SolverTimeout("the solver's time is over.")
        options = {"mip_rel_gap": 0.0, **({"time_limit": left} if left < math.inf else {})}
        whole = np.zeros(self.count)
        whole[: len(self.values) + len(self.move_at)] = 1
        most = np.ones(self.count)
        most[self.late_at :] = np.inf
        answer = scipy.optimize.milp(
            costs,
            constraints=[*constraints, *self._late()],
            integrality=whole,
            bounds=scipy.optimize.Bounds(0, most),  # type: ignore[arg-type]
            options=options,
        )
        if answer.status == 1:
            raise SolverTimeout("the solver's time is over.")
        return None if answer.x is None else self._choice(answer.x)

    def _choice(self, x: Sequence[float]) -> Choice:
        saved = {v for v, k in self.save_at.items() if x[k] > 0.5}
        moved = {v for v, k in self.move_at.items() if x[k] > 0.5}
        return Choice(saved=frozenset(saved), offloaded=frozenset(moved - saved))
