"""What a boundary could keep, as a graph of integers: values with bytes, equations with costs, what the backward needs.

A value that the backward pass needs is kept on the device, kept on the host, or made again by its equation, whose own
inputs must then be there in turn. An equation is made again at most once, whatever needs it: nothing is recursive. That
is what the partial evaluation of ``jax.checkpoint`` does with names, so that the cost of a choice here is the cost there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable


class CannotRecompute(ValueError):
    """A choice that leaves out a value which nothing can make again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """An equation: the values it takes and makes, and what running it once more costs, in whole ticks.

    An equation that is ``pinned`` must not run again (it calls back, say): what it makes is kept if anything needs it.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    cost: int
    pinned: bool = False

    def __post_init__(self) -> None:
        if self.cost < 0:
            raise ValueError(f"cost={self.cost}: write a whole number of ticks, 0 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What moving bytes to the host and back costs a boundary, in whole numbers.

    A copy runs beside the computing: what ends in its time window is hidden, what does not delays the step. Hidden or not,
    it reads and writes device memory, which the computing uses too.

    Attributes:
        out, back: billionths of a tick that the link takes for a byte, each way.
        hidden_out, hidden_back: ticks of computing that copies run beside, each way.
        touch: billionths of a tick that a byte's way takes of the device's memory.
        already: bytes that move in any case.
    """

    out: int
    back: int
    hidden_out: int = 0
    hidden_back: int = 0
    touch: int = 0
    already: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: write a whole number, 0 or more.")

    def ticks(self, nbytes: int) -> int:
        """What moving so many bytes costs.

        Example:
            >>> Link(out=10**9, back=2 * 10**9, hidden_out=5, hidden_back=5).ticks(4)
            3
        """
        moved = nbytes + self.already
        late = (max(0, moved * a - hidden * GIGA) for a, hidden in self.ways)
        return -(-(sum(late) + moved * self.touch) // GIGA)

    @property
    def ways(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What a byte takes and what is hidden, out and back."""
        return (self.out, self.hidden_out), (self.back, self.hidden_back)


GIGA = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """A boundary. Values are numbers from 0.

    Attributes:
        sizes: bytes of each value.
        ops: the equations, in an order in which they can run.
        needed: values that the backward pass needs.
        free: values that are there anyway: arguments, parameters, what crosses into or out of the boundary.
        keepable: values that can be kept; the others are only made by differentiation, and no name reaches them.
        movable: of those, what can be kept on the host.
        link: what that costs; without one nothing is kept there.
    """

    sizes: tuple[int, ...]
    ops: tuple[Op, ...]
    needed: frozenset[int]
    free: frozenset[int] = frozenset()
    keepable: frozenset[int] = frozenset()
    movable: frozenset[int] = frozenset()
    link: Link | None = None

    def __post_init__(self) -> None:
        if any(size < 0 for size in self.sizes):
            raise ValueError(f"sizes={self.sizes}: write whole numbers of bytes, 0 or more.")
        made: set[int] = set()
        for i, op in enumerate(self.ops):
            again = made & set(op.outs)
            if again:
                raise ValueError(f"value {min(again)} is made by two equations: number {i} makes it again.")
            made |= set(op.outs)

    @functools.cached_property
    def maker(self) -> dict[int, int]:
        """The equation that makes each value."""
        return {v: i for i, op in enumerate(self.ops) for v in op.outs}

    def transfer(self, nbytes: int) -> int:
        """Ticks that so many bytes on the host cost."""
        return 0 if self.link is None else self.link.ticks(nbytes)

    def again(self, kept: Iterable[int]) -> frozenset[int]:
        """The equations that run again when these values are kept.

        Raises:
            CannotRecompute: something is needed that is neither kept nor free, and no equation makes it.
        """
        have = self.free | frozenset(kept)
        found: set[int] = set()
        wanted = [v for v in self.needed if v not in have]
        while wanted:
            value = wanted.pop()
            op = self.maker.get(value)
            if op is None or self.ops[op].pinned:
                raise CannotRecompute(f"value {value} is needed, not kept, and cannot be made again.")
            if op not in found:
                found.add(op)
                wanted += [v for v in self.ops[op].ins if v not in have]
        return frozenset(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Values kept on the device and on the host; all others are made again where they are needed."""

    saved: frozenset[int] = frozenset()
    offloaded: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        both = self.saved & self.offloaded
        if both:
            raise ValueError(f"value {min(both)} is both saved and offloaded.")

    @property
    def kept(self) -> frozenset[int]:
        return self.saved | self.offloaded


@dataclasses.dataclass(frozen=True, order=True)
class Price:
    """What a choice takes: bytes kept on the device, ticks, bytes kept on the host."""

    device: int
    ticks: int
    host: int = 0


def price(graph: Graph, choice: Choice) -> Price:
    """The price of a choice, in integers, whoever made it.

    Raises:
        ValueError: it keeps what cannot be kept.
        CannotRecompute: it leaves out what cannot be made again.

    Example:
        >>> chain = Graph(
        ...     sizes=(8, 8, 8), ops=tuple(Op(ins=(i,), outs=(i + 1,), cost=5) for i in range(2)),
        ...     needed=frozenset({0, 1, 2}), free=frozenset({0}), keepable=frozenset({1, 2}),
        ... )
        >>> price(chain, Choice()), price(chain, Choice(saved=frozenset({1})))
        (Price(device=0, ticks=10, host=0), Price(device=8, ticks=5, host=0))
    """
    wrong = (choice.kept - graph.keepable) | (choice.offloaded - graph.movable)
    if wrong:
        raise ValueError(f"value {min(wrong)} cannot be kept there.")
    paid = lambda values: sum(graph.sizes[v] for v in values - graph.free)
    host = paid(choice.offloaded)
    ticks = sum(graph.ops[i].cost for i in graph.again(choice.kept)) + graph.transfer(host)
    return Price(paid(choice.saved), ticks, host)
