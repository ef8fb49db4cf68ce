"""The bytes that are alive between kernels, and what they are at the peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from nexus_jax.peak import fast, heap
from nexus_jax.peak.fuse import Kernel, kernels
from nexus_jax.peak.graph import Graph, Node, Value, needs, root
from nexus_jax.peak.heap import Buffer
from nexus_jax.peak.order import orders
from nexus_jax.peak.rules import IN_PLACE, LOOPS, REDUCTIONS, Backend, flops, narrowed

Size = Callable[[Value], int]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a value: as it is kept, and as it is while the compiler decides what to fuse."""

    kept: Size
    whole: Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
    """What a program's temporaries take.

    Attributes:
        temp: bytes of device memory.
        host: bytes of host memory at its own peak.
        fast: bytes of VMEM at their own peak.
        at_peak: the values alive at the peak of device memory, largest first.
        inner: of a loop that runs at the peak, its body's.
        node: what runs at the peak; None in an empty program.
    """

    temp: int
    host: int
    fast: int
    at_peak: tuple[Buffer, ...]
    inner: Life | None
    node: Node | None


def life(graph: Graph, backend: Backend, size: Sizes, body: Node | None = None) -> Life:
    """Simulate one run, or one step of the loop whose ``body`` this is."""
    found = kernels(graph, backend, size.whole)
    lives = [_simulated(order, graph, backend, size, body) for order in orders(found, graph, backend, body)]
    return min(lives, key=lambda x: x.temp)


def _simulated(order: list[Kernel], graph: Graph, backend: Backend, size: Sizes, body: Node | None) -> Life:
    count = len(order)
    inner = {i: _step(k.node, backend, size) for i, k in enumerate(order) if k.node.op in LOOPS}
    buffers = _buffers(order, graph, backend, size, body)
    outputs = set() if body is not None else {root(v) for v in graph.outputs if v is not None}
    temporaries = [b for b in buffers if not b.value.host and b.value not in outputs]
    if backend.converted_stacks and body is None:
        temporaries += _stacks(order, backend)
    if backend.outputs_reused:
        results = [b for b in buffers if not b.value.host and b.value in outputs]
        temporaries = heap.outside_results(temporaries, results)
    most = descriptors = 0
    if backend.fast_bytes:
        arguments = [] if body is not None else _arguments(order, size)
        costs = _costs(order, backend, size)
        loops = {i: fast.Loop(inside=x.fast, carried=_carried(order[i])) for i, x in inner.items()}
        assigned = fast.outside(temporaries, arguments, loops, backend.fast_bytes, costs)
        temporaries, most = assigned.outside, assigned.most
        descriptors = (assigned.descriptors + _sums(order)) * backend.descriptor_bytes
    spans = [(b.born, b.dies, b.size) for b in temporaries]
    spans += [(i, i, x.temp) for i, x in inner.items()]
    spans += [(i, i, backend.scratch(k.node)) for i, k in enumerate(order)]
    temp, when = heap.peak(spans, count)
    if backend.reports_holes_twice and body is None:
        temp = _reported(spans, inner, count, descriptors)
    on_host = [(b.born, b.dies, b.size) for b in buffers if b.value.host]
    host, _ = heap.peak(on_host + [(i, i, x.host) for i, x in inner.items()], count)
    alive = sorted((b for b in temporaries if b.born <= when <= b.dies), key=lambda b: -b.size)
    node = order[when].node if order else None
    return Life(temp=temp, host=host, fast=most, at_peak=tuple(alive), inner=inner.get(when), node=node)


def _step(loop: Node, backend: Backend, size: Sizes) -> Life:
    return max((life(body, backend, size, loop) for body in loop.bodies), key=lambda x: x.temp)


def _reported(spans: list[heap.Span], inner: dict[int, Life], count: int, descriptors: int) -> int:
    """Temporaries as libtpu reports them: what it allots, plus once more the part of it that it counts as holes.

    It counts as holes all but what is alive at the peak, and forgets of that what a loop made, once the loop is over.
    """
    allotted = heap.first_come(spans, count) + descriptors
    alive, _ = heap.peak([(a, a, s) if a in inner else (a, b, s) for a, b, s in spans], count)
    return 2 * allotted - alive


# --- lifetimes -------------------------------------------------------------------------------------------------------


def _buffers(order: list[Kernel], graph: Graph, backend: Backend, size: Sizes, body: Node | None) -> list[Buffer]:
    found: dict[Value, Buffer] = {}
    for i, kernel in enumerate(order):
        for value in kernel.ins:
            if value in found:
                found[value].dies = i
                if kernel.node.op != "barrier":
                    found[value].uses.append(i)
        for out in kernel.outs:
            if out.alias is None and not out.argument:
                found[out] = Buffer(out, size.kept(out), i, i, [i])
    if body is not None and body.op == "scan" and backend.stacked_last:
        _slices(order, graph, found, size.kept, body)
    if body is not None and body.op != "cond":
        _hand_on(order, graph, found, body)
    else:
        for out in graph.outputs:
            if out is not None and root(out) in found:
                found[root(out)].dies = len(order)
    summed: dict[Value, list[Node]] = {}  # by what reductions
    for kernel in order if backend.fused_sums else ():
        if kernel.node.op in REDUCTIONS:
            for value in kernel.ins:
                summed.setdefault(value, []).append(kernel.node)
    for i, kernel in enumerate(order):
        _share(i, kernel, found, summed)
    return [b for b in found.values() if b.dies >= b.born]


def _slices(order: list[Kernel], graph: Graph, found: dict[Value, Buffer], size: Size, loop: Node) -> None:
    """What a step takes of stacks and hands on behind a barrier is copied as the step begins; the rest is read in place."""
    last = {root(v): i for i, kernel in enumerate(order) for v in kernel.ins}
    behind = {v for kernel in order if kernel.node.op == "barrier" for v in kernel.ins}
    for value in graph.inputs[loop.params["consts"] + loop.params["carried"] :]:
        if value in behind and not value.host:
            found[value] = Buffer(value, size(value), 0, last[value], [0, last[value]])


def _stacks(order: list[Kernel], backend: Backend) -> list[Buffer]:
    """The bfloat16 copies of float32 weights that scans multiply: made before the first scan, kept to the last."""
    loops: dict[Value, list[int]] = {}
    for i, kernel in enumerate(order):
        if kernel.node.op == "scan":
            for value in kernel.ins:
                if value.argument and not value.host and narrowed(value):
                    loops.setdefault(value, []).append(i)
    copies = {v: Value(v.shape, jax.numpy.dtype("bfloat16")) for v in loops}
    size = backend.sizer()
    first = {v: max(at[0] - 1, 0) for v, at in loops.items()}
    return [Buffer(copies[v], size(copies[v]), first[v], at[-1], [first[v], *at]) for v, at in loops.items()]


def _arguments(order: list[Kernel], size: Sizes) -> list[Buffer]:
    """The arguments that kernels read, each from its first use to its last."""
    uses: dict[Value, list[int]] = {}
    for i, kernel in enumerate(order):
        if kernel.node.op not in LOOPS and kernel.node.op != "barrier":
            for value in kernel.ins:
                if value.argument and not value.host:
                    uses.setdefault(value, []).append(i)
    return [Buffer(v, size.kept(v), at[0], at[-1], at) for v, at in uses.items()]


def _sums(order: list[Kernel]) -> int:
    """How many kernels have a sum as one of several results: sums of the same values are one kernel."""
    return len({frozenset(k.ins) for k in order if k.node.op in REDUCTIONS and k.ins})


def _carried(loop: Kernel) -> frozenset[Value]:
    """What a scan takes from its step before: as it is given, and as it is made."""
    node = loop.node
    if node.op != "scan":
        return frozenset()
    first, count = node.params["consts"], node.params["carried"]
    given = zip(node.ins, node.params["operands"], strict=True)
    return frozenset((*(root(v) for v, i in given if first <= i < first + count), *node.outs[:count]))


def _costs(order: list[Kernel], backend: Backend, size: Sizes) -> fast.Costs:
    bytes_of = lambda k: 0 if k.node.op == "barrier" else sum(map(size.kept, k.ins)) + sum(map(size.kept, k.outs))
    return fast.Costs(
        moved=[bytes_of(k) / backend.bandwidth for k in order],
        multiplied=[sum(map(flops, k.matmuls)) / backend.flops for k in order],
        bandwidth=backend.bandwidth,
    )


def _hand_on(order: list[Kernel], graph: Graph, found: dict[Value, Buffer], loop: Node) -> None:
    """What a step of a loop hands on: the carry into the old one's memory, a row of a stacked result into its place.

    A new carry waits beside the old one while something still reads that.
    """
    read = {root(v): i for i, kernel in enumerate(order) for v in kernel.ins}
    consts, carried = loop.params["consts"], loop.params["carried"]
    for i, out in enumerate(graph.outputs):
        buffer = None if out is None else found.get(root(out))
        if buffer is None:
            continue
        if i < carried and read.get(graph.inputs[consts + i], -1) > buffer.born:
            buffer.dies = len(order)
        elif not buffer.uses[1:]:
            buffer.dies = buffer.born - 1  # written where it belongs


def _share(i: int, kernel: Kernel, found: dict[Value, Buffer], summed: dict[Value, list[Node]]) -> None:
    """A fusion writes into an operand that nobody reads again, if it is as large; so do updates in place and loops.

    Not where one kernel with it sums that operand, or what it makes: that is no elementwise fusion.
    """
    op = kernel.node.op
    if not kernel.fused and op not in IN_PLACE and op not in LOOPS:
        return
    last = [v for v in kernel.ins if v in found and found[v].dies == i and found[v].born < i]
    beside = lambda sum_: not any(needs(v, out) for v in kernel.node.ins for out in sum_.outs)
    free = [found[v] for v in last if not any(map(beside, summed.get(v, ())))]
    for out in kernel.outs:
        mine = found.get(out)
        mine = None if out in summed else mine
        match = next((b for b in free if mine and b.size == mine.size and b.value.host == out.host), None)
        if match is not None:
            match.dies = i - 1
            free.remove(match)
