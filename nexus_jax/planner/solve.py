"""One boundary, exactly: the cheapest choice for so many bytes, and the whole frontier of bytes and cost.

The integer program has a variable for each value saved, each value offloaded, and each equation made again:

    minimise    sum of ticks made again + sum of ticks of transfers
    such that   saved + offloaded + made again >= 1                      for each value that is needed
                saved + offloaded + made again >= made again of user     for each input of each equation
                bytes saved <= device,  bytes offloaded <= host

HiGHS solves it in floating point; its answer is rounded, priced again in integers, and rid of what it keeps in vain.
Whether an equation is made again follows from what is kept, so only the latter need be whole: the relaxation is tight.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence

import numpy as np
from scipy import optimize, sparse

from nexus_jax.planner.graph import CannotRecompute, Choice, Graph, Price, price


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A choice on a frontier.

    Attributes:
        floor: no choice that keeps at least so many bytes on the device, and fewer than the point before, costs less.
    """

    choice: Choice
    price: Price
    floor: int


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
    model = model or Model(graph, offload=host > 0)
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


def frontier(
    graph: Graph, *, host: int = 0, solves: int | None = None, deadline: float = math.inf
) -> tuple[Point, ...]:
    """The choices that no other beats in bytes and ticks, most bytes first.

    Args:
        host: bytes that may be kept on the host. The points are then those of bytes on the device and ticks.
        solves: how many integer programs may be solved, where most is not known first; None is until all is known. Each
            point is optimal for its bytes all the same, and its ``floor`` says how far down that is certain.
        deadline: of ``time.monotonic()``. After it, the points so far are the answer.

    Raises:
        SolverTimeout: the deadline passed before there were any points.
    """
    model = Model(graph, offload=host > 0)
    ask = lambda limit: optimum(graph, limit, host, deadline=deadline, model=model)
    first = ask(sum(graph.sizes))
    if first is None:
        return ()
    found = [_Known(first, price(graph, first), sum(graph.sizes))]
    found.append(_Known(None, Price(-1, found[0].price.ticks + 1 + sum(op.cost for op in graph.ops)), -1))
    limit = 0
    while solves is None or len(found) < solves + 2:
        if limit is None:
            break
        try:
            choice = ask(limit)
        except SolverTimeout:
            break
        _insert(found, limit, choice, None if choice is None else price(graph, choice))
        limit = _widest(found)
    points = []
    for known, below in itertools.pairwise(found):
        if known.choice is not None and below.price.ticks > known.price.ticks:
            points.append(Point(choice=known.choice, price=known.price, floor=below.limit + 1))
    return tuple(points)


@dataclasses.dataclass
class _Known:
    """A point, optimal for every limit from its bytes to ``limit``; without a choice, limits for which there is none."""

    choice: Choice | None
    price: Price
    limit: int


def _insert(found: list[_Known], limit: int, choice: Choice | None, paid: Price | None) -> None:
    """Put an answer among those there are, most bytes first."""
    if choice is None or paid is None:
        found[-1].limit = max(found[-1].limit, limit)
        return
    for known in found:
        if known.price.ticks == paid.ticks:  # the same step of the stairs: its bytes are the fewer
            known.limit = max(known.limit, limit)
            if paid.device < known.price.device:
                known.choice, known.price = choice, paid
            return
    found.append(_Known(choice, paid, limit))
    found.sort(key=lambda k: -k.price.device)


def _widest(found: list[_Known]) -> int | None:
    """The limit to ask about next: in the middle of where most bytes times ticks are uncertain; None if nowhere is."""
    best, at = 0, None
    for above, below in itertools.pairwise(found):
        width, height = above.price.device - 1 - below.limit, below.price.ticks - above.price.ticks
        if width > 0 and width * height > best:
            best, at = width * height, below.limit + (width + 1) // 2
    return at


def trimmed(graph: Graph, choice: Choice) -> Choice:
    """The choice without what it keeps in vain: values whose absence costs nothing, largest first."""
    best = price(graph, choice)
    again = graph.again(choice.kept)
    read = graph.needed.union(*(graph.ops[i].ins for i in again))
    for value in sorted(choice.kept, key=lambda v: (-graph.sizes[v], v)):
        op = graph.maker.get(value)
        if value in read and op not in again and (op is None or graph.ops[op].cost > graph.moved(value)):
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

    def __init__(self, graph: Graph, offload: bool = False):
        self.graph = graph
        ops = self._reachable()
        values = sorted({v for i in ops for v in (*graph.ops[i].ins, *graph.ops[i].outs)} | graph.needed)
        self.values = [v for v in values if v in graph.keepable and v not in graph.free]
        self.ops = sorted(ops)
        n, m = len(self.values), len(self.ops)
        self.offload = n if offload else 0
        self.save_at = {v: k for k, v in enumerate(self.values)}
        self.op_at = {i: n + self.offload + k for k, i in enumerate(self.ops)}
        self.count = n + self.offload + m
        transfers = [graph.moved(v) for v in self.values] if offload else []
        self.costs = np.array([0] * n + transfers + [graph.ops[i].cost for i in self.ops], float)
        self.sizes = [graph.sizes[v] for v in self.values]
        self.unit = math.gcd(*self.sizes) or 1
        self.scale = max(1.0, self.costs.sum() / 1e7)
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
            if self.offload:
                found.append(self.save_at[value] + self.offload)
        op = self.graph.maker.get(value)
        if op in self.op_at:
            found.append(self.op_at[op])
        return found

    def _matrix(self) -> sparse.csr_array | None:
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
        return sparse.csr_array((data, (at, columns)), shape=(len(rows), self.count))

    def solve(self, device: int, host: int, deadline: float) -> Choice | None:
        """What HiGHS answers, rounded; within the limits but for its tolerance. None if nothing fits."""
        if not self.feasible:
            return None
        if not self.count or not self.rows:
            return Choice()
        n = len(self.values)
        lower = np.concatenate([np.ones(self.ones), np.zeros(self.rows - self.ones)])
        constraints = [optimize.LinearConstraint(self.matrix, lower, np.inf)]  # type: ignore[arg-type]
        for offset, limit in ((0, device), (self.offload, host))[: 2 if self.offload else 1]:
            row = np.zeros(self.count)
            row[offset : offset + n] = [size // self.unit / self.heavy for size in self.sizes]
            constraints.append(optimize.LinearConstraint(row[None], -np.inf, limit // self.unit / self.heavy))
        left = deadline - time.monotonic()
        if left <= 0:
            raise SolverTimeout("the solver's time is over.")
        options = {"mip_rel_gap": 0.0, **({"time_limit": left} if left < math.inf else {})}
        whole = np.concatenate([np.ones(n + self.offload), np.zeros(len(self.ops))])
        answer = optimize.milp(
            self.costs / self.scale, constraints=constraints, integrality=whole, bounds=(0, 1), options=options
        )
        if answer.status == 1:
            raise SolverTimeout("the solver's time is over.")
        return None if answer.x is None else self._choice(answer.x)

    def _choice(self, x: Sequence[float]) -> Choice:
        saved = {v for v, k in self.save_at.items() if x[k] > 0.5}
        moved = {v for v, k in self.save_at.items() if self.offload and x[k + self.offload] > 0.5}
        return Choice(saved=frozenset(saved), offloaded=frozenset(moved - saved))
