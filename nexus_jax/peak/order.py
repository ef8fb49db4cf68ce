"""The order in which a compiled program runs its kernels."""

from __future__ import annotations

from collections.abc import Iterable

from nexus_jax.peak.fuse import Kernel
from nexus_jax.peak.graph import Graph, Node, Value, root
from nexus_jax.peak.rules import LOOPS, Backend


def orders(found: list[Kernel], graph: Graph, backend: Backend, body: Node | None) -> list[list[Kernel]]:
    """The orders among which the compiler takes the one that needs the least memory.

    Args:
        found: the kernels of ``graph``, in JAX's order.
        body: the loop whose body the graph is, else None.
    """
    plain = _demand_driven(found, graph)
    if body is not None:
        if not backend.stacked_last:
            return [plain]
        # The latency-hiding scheduler: in a loop's body, the gradients of weights come last.
        return [_needed_first(plain, graph.outputs[: body.params["carried"]])]
    if backend.hurried_loops and any(k.node.op in LOOPS and _is_hurried(k) for k in found):
        return [_needed_first(plain, (), LOOPS)]
    # The loss itself may wait for the gradients, which do not need it.
    return [plain, _needed_first(plain, [v for v in graph.outputs if v is not None and v.shape])]


def _is_hurried(loop: Kernel) -> bool:
    """Whether a loop runs as soon as it can: it frees more than it makes, or brings from the host what it reads.

    A list scheduler takes the operation that frees most; seen: a scan over layers that reads 2.5 GiB of residuals goes
    before the gradient of the head, and one that keeps its layers' inputs only (64 MiB, for 96 MiB of gradients) after.
    """
    if any(v.host for v in loop.ins):
        return True
    freed = sum(v.size for v in loop.ins if not v.argument and not any(u is not loop.node for u in v.users))
    return freed > sum(v.size for v in loop.outs)


def _demand_driven(found: list[Kernel], graph: Graph) -> list[Kernel]:
    """JAX's order, but a fusion that takes more memory than it frees runs right before it is needed."""
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


def _needed_first(order: list[Kernel], values: Iterable[Value | None], ops: Iterable[str] = ()) -> list[Kernel]:
    """The same, with what neither these values nor operations of these names need at the end."""
    needed = {root(v) for v in values if v is not None}
    first, last = [], []
    for kernel in reversed(order):
        if kernel.node.op in ops or any(root(out) in needed for out in kernel.outs):
            needed.update(kernel.ins)
            first.append(kernel)
        else:
            last.append(kernel)
    return first[::-1] + last[::-1]
