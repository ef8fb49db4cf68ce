"""Where temporaries go: into results not written yet, into a heap."""

from __future__ import annotations

import bisect
import dataclasses

from nexus_jax.peak.graph import Value

Span = tuple[int, int, int]  # from kernel, to kernel (included), bytes

_LEAST = 4096  # bytes; smaller values are not worth a search
_TRIES = 256  # results that one temporary tries: keeps the search linear in the number of layers


@dataclasses.dataclass(eq=False, slots=True)
class Buffer:
    """A value in memory: from kernel ``born`` to kernel ``dies``, both included; ``uses`` are those that touch it."""

    value: Value
    size: int
    born: int
    dies: int
    uses: list[int]


def peak(spans: list[Span], count: int) -> tuple[int, int]:
    """The most bytes that are alive at once, and at which of ``count`` kernels.

    Example:
        >>> peak([(0, 1, 10), (1, 3, 5), (3, 3, 7)], 4)
        (15, 1)
    """
    change = [0] * (count + 2)
    for born, dies, size in spans:
        change[born] += size
        change[min(dies, count) + 1] -= size
    best, when, now = 0, 0, 0
    for i, step in enumerate(change[: count + 1]):
        now += step
        if now > best:
            best, when = now, i
    return best, min(when, max(count - 1, 0))


def outside_results(temporaries: list[Buffer], results: list[Buffer]) -> list[Buffer]:
    """The temporaries that do not fit into a result's memory before the result is written.

    As in XLA's buffer assignment: the largest first, each into the smallest place that is free for all its life.
    """
    places = sorted((r.size, r.born) for r in results if r.size >= _LEAST)
    taken: list[list[tuple[int, int]]] = [[] for _ in places]
    left = []
    for buffer in sorted(temporaries, key=lambda b: -b.size):
        first = bisect.bisect_left(places, (buffer.size, 0)) if buffer.size >= _LEAST else len(places)
        for i in range(first, min(first + _TRIES, len(places))):
            if buffer.dies < places[i][1] and all(buffer.dies < a or b < buffer.born for a, b in taken[i]):
                taken[i].append((buffer.born, buffer.dies))
                break
        else:
            left.append(buffer)
    return left


def first_come(spans: list[Span], count: int) -> int:
    """Bytes of a heap that serves these spans in their order, each in the smallest hole that is large enough.

    Example:
        >>> first_come([(0, 1, 4), (0, 3, 1), (2, 3, 5)], 4)  # 5 does not fit where 4 was
        10
    """
    starts: list[list[tuple[int, int]]] = [[] for _ in range(count + 1)]
    ends: list[list[tuple[int, int]]] = [[] for _ in range(count + 2)]
    for a, b, size in spans:
        if size and b >= a:
            starts[a].append((size, b))
    holes: list[tuple[int, int]] = []  # from, to
    top = 0
    for i in range(count + 1):
        for start, end in ends[i]:
            holes = _freed(holes, start, end)
        for size, last in sorted(starts[i], reverse=True):
            fitting = [h for h in holes if h[1] - h[0] >= size]
            at_end = holes[-1] if holes and holes[-1][1] == top else (top, top)
            start, end = min(fitting, key=lambda h: (h[1] - h[0], h[0])) if fitting else at_end
            holes = [h for h in holes if h != (start, end)]
            if end > start + size:
                bisect.insort(holes, (start + size, end))
            top = max(top, start + size)
            ends[min(last, count) + 1].append((start, start + size))
    return top


def _freed(holes: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    apart = []
    for a, b in holes:
        if b == start:
            start = a
        elif a == end:
            end = b
        else:
            apart.append((a, b))
    bisect.insort(apart, (start, end))
    return apart
