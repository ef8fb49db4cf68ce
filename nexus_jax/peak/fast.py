"""What waits in a TPU's VMEM, and what that leaves in device memory.

XLA's memory space assignment (xla/service/memory_space_assignment in the openxla repository), in short: buffers are
served in the order of what VMEM gains them. Each stays in it from use to use while there is room; else it is copied
out, and copied back in time for its next use if there is room by then. libtpu's own settings are not published: what is
below was held against the buffers that it placed.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math

import numpy as np

from nexus_jax.peak.graph import Value
from nexus_jax.peak.heap import Buffer

_SLICED, _SLICES = 2**20, 4  # what is as large comes to VMEM in slices, of which each has two descriptors
# A value waits as long as it takes to fill VMEM so many times: max_overlap_to_mem_size_async_copy_ratio.
_LONGEST = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of each kernel: of what it moves, and of what it multiplies; and the bytes that VMEM moves in a second."""

    moved: list[float]
    multiplied: list[float]
    bandwidth: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """What VMEM holds inside a loop, and the values that it carries: those may be there too."""

    inside: int
    carried: frozenset[Value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assigned:
    """Buffers in device memory, the most bytes that VMEM holds, and how many descriptors the copies between them have."""

    outside: list[Buffer]
    most: int
    descriptors: int


def outside(
    buffers: list[Buffer], arguments: list[Buffer], loops: dict[int, Loop], capacity: int, costs: Costs
) -> Assigned:
    """Which of ``buffers`` are in device memory, and from when to when.

    Args:
        arguments: they are in device memory all the time, and are copied to VMEM for their uses.
        loops: by kernel: nothing but what they carry waits for the end of one.
        capacity: bytes of VMEM.
        costs: of the kernels.
    """
    found = _Assignment(loops, capacity, costs)
    return Assigned(outside=found.run(buffers, arguments), most=int(found.used.max()), descriptors=found.descriptors)


class _Assignment:
    def __init__(self, loops: dict[int, Loop], capacity: int, costs: Costs):
        self.loops, self.at, self.capacity, self.costs = loops, sorted(loops), capacity, costs
        count = len(costs.moved)
        self.used = np.zeros(count + 2, np.int64)
        self.descriptors = 0
        for i, loop in loops.items():
            self.used[i] = loop.inside
        seconds = [max(m, c) for m, c in zip(costs.moved, costs.multiplied, strict=True)]
        self.clock = np.concatenate([[0.0], np.cumsum(seconds), [math.inf]])  # when each kernel begins
        self.longest = _LONGEST * capacity / costs.bandwidth

    def run(self, buffers: list[Buffer], arguments: list[Buffer]) -> list[Buffer]:
        self.fetched_early(arguments)
        outside = []
        given = {id(b) for b in arguments}
        for buffer in sorted((*buffers, *arguments), key=lambda b: -self.gain(b)):
            span = self.walk(buffer, in_memory=id(buffer) in given)
            if span is not None and id(buffer) not in given:
                outside.append(dataclasses.replace(buffer, born=span[0], dies=span[1]))
        return outside

    def fetched_early(self, arguments: list[Buffer]) -> None:
        """The largest argument is copied before the program begins, and stays to its last use."""
        able = [b for b in arguments if b.size <= self.capacity and self.beside(b.value, 0, b.uses[-1])]
        if able:
            largest = max(able, key=lambda b: b.size)
            self.used[: largest.uses[-1] + 1] += largest.size
            arguments.remove(largest)

    def gain(self, buffer: Buffer) -> float:
        """Seconds that VMEM saves the kernels that touch a buffer; what multiplies for longer than it moves loses."""
        saved, once = 0.0, buffer.size / self.costs.bandwidth
        for i in buffer.uses:
            moved, multiplied = self.costs.moved[i], self.costs.multiplied[i]
            saved += moved - (max(multiplied, moved - once) if moved > multiplied else multiplied)
        return saved / math.sqrt(max(buffer.size, 1))

    def walk(self, buffer: Buffer, in_memory: bool) -> tuple[int, int] | None:
        """Place one buffer; from when to when it is in device memory."""
        points = sorted({*buffer.uses, max(buffer.dies, buffer.uses[-1])})
        if len(points) == 1 and not in_memory:
            points *= 2
        first = last = None  # in device memory
        fast = not in_memory and self.stay(buffer, points[0], points[1])
        if not fast:
            first = points[0]
            if in_memory:
                fast = self.fetch(buffer, 0, points[0])
        for i, (a, b) in enumerate(itertools.pairwise(points)):
            if fast and ((i == 0 and not in_memory) or self.stay(buffer, a + 1, b)):
                continue
            if first is None:  # copied out as soon as it is made, and there till it is back
                first = points[0] + 1
                self.descriptors += 1
            fast = self.fetch(buffer, a + 1, b)
            last = max(a, b - 1 if fast else b)
        if first is None:
            return None
        return first, min(points[0] if last is None else last, buffer.dies)  # dies: another value takes its place

    def stay(self, buffer: Buffer, a: int, b: int) -> bool:
        return self.clock[b] - self.clock[a] <= self.longest and self.take(buffer, a, b)

    def fetch(self, buffer: Buffer, after: int, use: int) -> bool:
        """Whether a value can be copied to VMEM for a use; it takes room while it is copied."""
        start = bisect.bisect_right(self.clock, self.clock[use] - buffer.size / self.costs.bandwidth) - 1
        if start < after or not self.take(buffer, start, use):
            return False
        self.descriptors += 2 * _SLICES if buffer.size >= _SLICED else 1
        return True

    def take(self, buffer: Buffer, a: int, b: int) -> bool:
        if not self.beside(buffer.value, a, b) or self.used[a : b + 1].max() + buffer.size > self.capacity:
            return False
        self.used[a : b + 1] += buffer.size
        return True

    def beside(self, value: Value, a: int, b: int) -> bool:
        between = self.at[bisect.bisect_left(self.at, a) : bisect.bisect_right(self.at, b)]
        return all(i in (a, b) and value in self.loops[i].carried for i in between)
