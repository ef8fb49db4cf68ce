"""The order in which kernels run, and the bytes that are alive between them."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from nexus_jax.peak.fuse import Kernel, kernels
from nexus_jax.peak.graph import Graph, Node, Value, root
from nexus_jax.peak.rules import IN_PLACE, LOOPS, Backend


@dataclasses.dataclass(eq=False, slots=True)
class Buffer:
    """A temporary: alive from kernel ``born`` to kernel ``dies``, both included; ``uses`` are the kernels between."""

    value: Value
    size: int
    born: int
    dies: int
    uses: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
    """What a program's temporaries take.

    Attributes:
        temp: bytes of device memory at the peak.
        host: bytes of host memory at its own peak.
        at_peak: the buffers alive at the peak, largest first; with what a loop's body takes inside, if it is a loop.
        inner: of a loop that runs at the peak, its body's.
    """

    temp: int
    host: int
    at_peak: tuple[Buffer, ...]
    inner: Life | None
    node: Node | None


def life(graph: Graph, backend: Backend, size: Callable[[Value], int], body: Node | None = None) -> Life:
    """Simulate one run, or one step of the loop whose ``body`` this is."""
    found = kernels(graph, backend, size)
    plain = _simulated(_ordered(found, graph), graph, backend, size, body)
    if body is not None and backend.outputs_reused:
        return _simulated(_stacked_last(_ordered(found, graph), graph, body), graph, backend, size, body)
    if body is not None:
        return plain
    if backend.fast_bytes and any(k.node.op in LOOPS for k in found):
        return _simulated(_after_loops(_ordered(found, graph)), graph, backend, size, body)
    late = _simulated(_deferred(_ordered(found, graph), graph), graph, backend, size, body)
    return min(plain, late, key=lambda x: x.temp)


def _simulated(
    order: list[Kernel], graph: Graph, backend: Backend, size: Callable[[Value], int], body: Node | None
) -> Life:
    inner = {i: _loop(k.node, backend, size) for i, k in enumerate(order) if k.node.op in LOOPS}
    buffers = _buffers(order, graph, size, body)
    device = [b for b in buffers if not b.value.host]
    outputs = {root(v) for v in graph.outputs if v is not None}
    results = [] if body is not None else [b for b in device if b.value in outputs]
    temporaries = [b for b in device if b.value not in outputs or body is not None]
    if backend.outputs_reused:
        temporaries = _without_reused(temporaries, results)
    spans = [(b.born, b.dies, b.size) for b in temporaries]
    if backend.fast_bytes:
        spans = _outside_fast(temporaries, inner, backend, len(order))
    spans += [(i, i, x.temp) for i, x in inner.items()]
    temp, when = _peak(spans, len(order))
    if backend.fast_bytes and body is None:
        temp = _tpu_report(spans, inner, len(order), backend)
    host, _ = _peak(
        [(b.born, b.dies, b.size) for b in buffers if b.value.host] + [(i, i, x.host) for i, x in inner.items()],
        len(order),
    )
    alive = sorted((b for b in temporaries if b.born <= when <= b.dies), key=lambda b: -b.size)
    node = order[when].node if order else None
    return Life(temp=temp, host=host, at_peak=tuple(alive), inner=inner.get(when), node=node)


def _loop(node: Node, backend: Backend, size: Callable[[Value], int]) -> Life:
    return max((life(body, backend, size, node) for body in node.bodies), key=lambda x: x.temp)


# --- order -----------------------------------------------------------------------------------------------------------


def _ordered(found: list[Kernel], graph: Graph) -> list[Kernel]:
    """JAX's order, but what only takes memory runs right before it is needed."""
    outputs = {v for v in graph.outputs if v is not None}
    readers: dict[Value, list[Kernel]] = {}
    for kernel in found:
        for value in kernel.ins:
            readers.setdefault(value, []).append(kernel)
    for kernel in reversed(found):
        users = [k for out in kernel.outs for k in readers.get(root(out), ()) if k is not kernel]
        if not users or not kernel.fused or any(out in outputs for out in kernel.outs):
            continue
        freed = sum(v.size for v in kernel.ins if not v.argument and len(readers[v]) == 1)
        if sum(out.size for out in kernel.outs) > freed:
            kernel.position = min(k.position for k in users) - 1e-3 / (1 + kernel.node.position)
    return sorted(found, key=lambda k: k.position)


def _stacked_last(order: list[Kernel], graph: Graph, body: Node) -> list[Kernel]:
    """The same, with what only the stacked results of a loop need at the end of its step.

    That is what the GPU's latency-hiding scheduler makes of it: in a loop's body, gradients of weights come last.
    """
    needed = {root(v) for v in graph.outputs[: body.params["carried"]] if v is not None}
    early, late = [], []
    for kernel in reversed(order):
        if any(root(out) in needed for out in kernel.outs):
            needed.update(kernel.ins)
            early.append(kernel)
        else:
            late.append(kernel)
    return early[::-1] + late[::-1]


def _after_loops(order: list[Kernel]) -> list[Kernel]:
    """The same, with what no loop needs after the loops: the gradient of an output layer, the loss."""
    needed: set[Value] = set()
    early, late = [], []
    for kernel in reversed(order):
        if kernel.node.op in LOOPS or any(root(out) in needed for out in kernel.outs):
            needed.update(kernel.ins)
            early.append(kernel)
        else:
            late.append(kernel)
    return early[::-1] + late[::-1]


def _deferred(order: list[Kernel], graph: Graph) -> list[Kernel]:
    """The same, with what only small results need at the end: the loss itself may wait for the gradients."""
    large = {root(v) for v in graph.outputs if v is not None and v.shape}
    needed: set[Value] = set(large)
    early, late = [], []
    for kernel in reversed(order):
        if any(root(out) in needed for out in kernel.outs):
            needed.update(kernel.ins)
            early.append(kernel)
        else:
            late.append(kernel)
    return early[::-1] + late[::-1]


# --- lifetimes -------------------------------------------------------------------------------------------------------


def _buffers(order: list[Kernel], graph: Graph, size: Callable[[Value], int], body: Node | None) -> list[Buffer]:
    found: dict[Value, Buffer] = {}
    last = len(order)
    for i, kernel in enumerate(order):
        for value in kernel.ins:
            if value in found:
                found[value].dies = i
                found[value].uses.append(i)
        for out in kernel.outs:
            if out.alias is None and not out.argument:
                found[out] = Buffer(out, size(out), i, i, [i])
    if body is None:
        for out in graph.outputs:
            if out is not None and root(out) in found:
                found[root(out)].dies = last
    else:
        _hand_on(order, graph, found, body)
    for i, kernel in enumerate(order):
        _share(i, kernel, found, graph)
    return [b for b in found.values() if b.dies >= b.born]


def _hand_on(order: list[Kernel], graph: Graph, found: dict[Value, Buffer], body: Node) -> None:
    """What a step of a loop hands on: the carry into the old one's memory, a row of a stacked result into its place.

    A new carry waits beside the old one while something still reads that.
    """
    read = {root(v): i for i, kernel in enumerate(order) for v in kernel.ins}
    consts, carried = body.params["consts"], body.params["carried"]
    if body.op == "cond":
        return
    for i, out in enumerate(graph.outputs):
        buffer = None if out is None else found.get(root(out))
        if buffer is None:
            continue
        if i >= carried:
            if not buffer.uses[1:]:
                buffer.dies = buffer.born - 1
        elif read.get(graph.inputs[consts + i], -1) > buffer.born:
            buffer.dies = len(order)
        elif not buffer.uses[1:]:
            buffer.dies = buffer.born - 1


def _share(i: int, kernel: Kernel, found: dict[Value, Buffer], graph: Graph) -> None:
    """A fusion writes into an operand that nobody reads again, if it is as large; so do updates in place and loops."""
    op = kernel.node.op
    if not kernel.fused and op not in IN_PLACE and op not in LOOPS:
        return
    free = [found[v] for v in kernel.ins if v in found and found[v].dies == i and found[v].born < i]
    for out in kernel.outs:
        mine = found.get(out)
        match = next((b for b in free if mine and b.size == mine.size and b.value.host == out.host), None)
        if match is not None:
            match.dies = i - 1
            free.remove(match)


def _peak(spans: list[tuple[int, int, int]], count: int) -> tuple[int, int]:
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


# --- where else than in temporaries ----------------------------------------------------------------------------------


def _without_reused(temporaries: list[Buffer], results: list[Buffer]) -> list[Buffer]:
    """Largest first, a temporary goes into the smallest result's memory that fits and is free until it dies."""
    slots = sorted(([r.size, r.born, []] for r in results), key=lambda s: s[0])
    slots = [s for s in slots if s[0] >= 4096]
    left = []
    for buffer in sorted(temporaries, key=lambda b: -b.size):
        for size, until, taken in slots:
            if size >= buffer.size >= 4096 and buffer.dies < until:
                if all(buffer.dies < a or b < buffer.born for a, b in taken):
                    taken.append((buffer.born, buffer.dies))
                    break
        else:
            left.append(buffer)
    return left


def _tpu_report(spans: list[tuple[int, int, int]], inner: dict[int, Life], count: int, backend: Backend) -> int:
    """Temporaries as libtpu reports them: twice what it allots, less what it counts as alive at the peak.

    It allots in the order of the program, each value in the smallest hole that is large enough; the descriptors of its
    copies to VMEM and back take places of their own. What it counts as alive forgets what a loop made, once that is over.
    """
    allotted = _first_come(spans, count) + 2 * count * backend.descriptor_bytes
    counted, _ = _peak([(a, a, s) if a in inner else (a, b, s) for a, b, s in spans], count)
    return 2 * allotted - counted


def _first_come(spans: list[tuple[int, int, int]], count: int) -> int:
    """Bytes of a heap that serves these spans in their order, best fit."""
    starts: list[list[tuple[int, int]]] = [[] for _ in range(count + 2)]
    for a, b, size in spans:
        if size and b >= a:
            starts[a].append((size, b))
    ends: list[list[tuple[int, int]]] = [[] for _ in range(count + 3)]
    holes: list[tuple[int, int]] = []  # (offset, end), sorted
    top = 0
    for i in range(count + 1):
        for offset, size in ends[i]:
            holes = _freed(holes, offset, offset + size)
        for size, last in sorted(starts[i], reverse=True):
            fits = [h for h in holes if h[1] - h[0] >= size]
            if fits:
                hole = min(fits, key=lambda h: (h[1] - h[0], h[0]))
            elif holes and holes[-1][1] == top:
                hole = holes[-1]
            else:
                hole = (top, top)
            offset = hole[0]
            holes = [h for h in holes if h != hole]
            if hole[1] > offset + size:
                holes = sorted([*holes, (offset + size, hole[1])])
            top = max(top, offset + size)
            ends[min(last + 1, count + 2)].append((offset, size))
    return top


def _freed(holes: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    joined = []
    for a, b in holes:
        if b == start:
            start = a
        elif a == end:
            end = b
        else:
            joined.append((a, b))
    return sorted([*joined, (start, end)])


def _outside_fast(
    buffers: list[Buffer], inner: dict[int, Life], backend: Backend, count: int
) -> list[tuple[int, int, int]]:
    """The spans that stay in the device's memory: what is used again soon waits in the fast one, while it has room.

    Nothing waits there for the end of a loop.
    """
    used = np.zeros(count + 2, np.int64)
    loops = sorted(inner)
    spans, soon = [], []
    for buffer in buffers:
        points = sorted({buffer.born, *(u for u in buffer.uses if u <= buffer.dies), buffer.dies + 1})
        for a, b in zip(points, points[1:], strict=False):
            at = bisect.bisect_left(loops, a)
            beside = at == len(loops) or loops[at] > b
            (soon if b - a <= _SOON and beside else spans).append((a, b - 1, buffer.size))
    for a, b, size in sorted(soon, key=_sooner):
        if used[a : b + 1].max() + size <= backend.fast_bytes:
            used[a : b + 1] += size
        else:
            spans.append((a, b, size))
    return spans


def _sooner(span: tuple[int, int, int]) -> float:
    return (span[1] - span[0]) / span[2]


_SOON = 1000  # kernels

__all__ = ["Buffer", "Callable", "Life", "life", "math"]
