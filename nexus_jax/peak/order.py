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
    results = [v for v in graph.outputs if v is not None]
    if backend.greedy:
        return [_greedy(plain, results)]
    # The loss itself may wait for the gradients, which do not need it.
    return [plain, _needed_first(plain, [v for v in results if v.shape])]


def _greedy(order: list[Kernel], results: list[Value]) -> list[Kernel]:
    """What a list scheduler makes of an order, which always runs what frees most for what it makes.

    A loop that frees memory goes before all that it does not need. Seen: a scan over layers that reads 2.5 GiB of
    residuals goes before the gradient of the head; one that keeps its layers' inputs only (64 MiB, for 96 MiB of
    gradients) after. One that reads residuals from the host goes before the gradient of the head, but after the loss.

    The loss goes last where it makes more than waits for it, as the float32 log-softmax of a language model does: last of
    all, or before the last loop, which makes more.
    """
    loops = [k for k in order if k.node.op in LOOPS]
    if any(v.host for k in loops for v in k.ins):
        return _needed_first(order, [v for v in results if not v.shape], LOOPS)
    if any(_freed(k) > sum(v.size for v in k.outs) for k in loops):
        return _needed_first(order, (), LOOPS)
    rest, loss = _split(order, [v for v in results if v.shape])
    ours = {out for k in loss for out in k.outs}
    waiting = [v.size for k in loss for v in k.ins if v not in ours and not v.argument]
    made = [v.size for k in loss for v in k.outs if v.alias is None]
    if max(made, default=0) < max(waiting, default=0):
        return order
    before = rest.index(loops[-1]) if loops and loops[-1] in rest else len(rest)
    return rest[:before] + loss + rest[before:]


def _freed(kernel: Kernel) -> int:
    """Bytes of what only this kernel reads."""
    return sum(v.size for v in kernel.ins if not v.argument and all(u is kernel.node for u in v.users))


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
    first, last = _split(order, values, ops)
    return first + last


def _split(
    order: list[Kernel], values: Iterable[Value | None], ops: Iterable[str] = ()
) -> tuple[list[Kernel], list[Kernel]]:
    """What these values or operations of these names need, and what they do not; each in order."""
    needed = {root(v) for v in values if v is not None}
    first, last = [], []
    for kernel in reversed(order):
        if kernel.node.op in ops or any(root(out) in needed for out in kernel.outs):
            needed.update(kernel.ins)
            first.append(kernel)
        else:
            last.append(kernel)
    return first[::-1], last[::-1]
