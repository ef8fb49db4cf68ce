"""What it would take to make a residual again, in the backward pass, from what else is there."""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Any

from nexus_jax import costs
from nexus_jax.dataflow import MOVED, VIEWS, Flow, Node, before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recompute:
    """The equations that make a residual again from the arguments and the other residuals.

    Attributes:
        flops: of all of them, loops multiplied out.
        matmuls: how often each matmul-like primitive runs, as ``(("dot_general", 1),)``; kernels that are not known too.
        reductions: whether any of them reduces, sorts or scans: those start a kernel of their own.
        random: whether random bits are drawn again.
        free: nothing to compute: another residual, or an argument, holds the same numbers.
    """

    flops: int = 0
    matmuls: tuple[tuple[str, int], ...] = ()
    reductions: bool = False
    random: bool = False
    free: bool = False

    def __str__(self) -> str:
        if self.free:
            return "nothing: a view"
        kinds = [f"{n} {op}" for op, n in self.matmuls]
        kinds += ["random bits"] * self.random
        if self.reductions:
            kinds.append("reductions")
        return f"{' + '.join(kinds) or 'elementwise only'}, {flop(self.flops)}"


def flop(n: float) -> str:
    """FLOPs for people.

    Example:
        >>> flop(17_179_869_184), flop(640)
        ('17.2 GFLOP', '640 FLOP')
    """
    for unit in ("", "k", "M", "G", "T"):
        if n < 1000 or unit == "T":
            return f"{n:.0f} {unit}FLOP" if n >= 100 or not unit else f"{n:.3g} {unit}FLOP"
        n /= 1000
    raise AssertionError


class Kept:
    """What is there when the backward pass runs: residuals, by the value that they are forms of.

    Args:
        flow: the forward pass.
        values: those that are kept.
    """

    def __init__(self, flow: Flow, values: Iterable[int]):
        self.flow = flow
        self.names = {value: _names(flow, value) for value in values}
        self.times = Counter(name for names in self.names.values() for name in names)
        self.known: dict[Any, _Tally] = {}

    def recompute(self, value: int) -> Recompute:
        """What making one of them again from the others takes."""
        names = self.names[value]
        if self.times[names[0]] > 1:
            return Recompute(free=True)
        tally = _Tally()
        _remake(self.flow, [value], _Without(self.times, names), tally, 1, self.known)
        return tally.result()


def _names(flow: Flow, value: int) -> list[int]:
    """A value without its views; for what a scan stacks or a branch makes, the value in its body too."""
    root = before(flow, value, MOVED)
    node, position = flow.maker.get(root, (None, 0))
    if node is None or not (node.op == "cond" or (node.op == "scan" and position >= node.carried)):
        return [root]
    inner = [(body, body.outputs[position]) for body in node.bodies]
    return [root, *(name for body, out in inner if out is not None for name in _names(body, out))]


_RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "random_gamma"}


class _Without(Container[int]):
    """What is kept but for one value. It may be kept in another form too: then it is there."""

    def __init__(self, times: Counter[int], names: Sequence[int]):
        self.times, self.names = times, names

    def __contains__(self, value: Any) -> bool:
        return self.times[value] > (value in self.names)


class _Tally:
    """Counts what runs."""

    def __init__(self):
        self.flops = self.nodes = self.reductions = self.random = 0
        self.matmuls: Counter[str] = Counter()

    def add(self, node: Node, times: int) -> None:
        kind = "kernel" if node.bodies else costs.kind_of(node.eqn)
        flops = _flops(node)
        self.flops += (flops or 0) * times * node.times
        self.nodes += kind not in ("view", "barrier") and node.op not in VIEWS
        if node.op in _RANDOM or node.op.startswith("random_"):
            self.random += node.op in _RANDOM  # to derive a key is nothing beside the bits
        elif node.op in costs.MATMULS or flops is None or node.bodies:
            self.matmuls[node.op] += times * node.times
        elif kind == "reduce" or (kind == "kernel" and flops):
            self.reductions += 1

    def merge(self, other: _Tally) -> None:
        self.flops += other.flops
        self.matmuls += other.matmuls
        self.nodes += other.nodes
        self.reductions += other.reductions
        self.random += other.random

    def copy(self) -> _Tally:
        made = _Tally()
        made.merge(self)
        return made

    def since(self, then: _Tally) -> _Tally:
        """What was added to a copy that was taken then."""
        made = _Tally()
        made.flops, made.matmuls = self.flops - then.flops, self.matmuls - then.matmuls
        made.nodes, made.reductions = self.nodes - then.nodes, self.reductions - then.reductions
        made.random = self.random - then.random
        return made

    def result(self) -> Recompute:
        matmuls = tuple(sorted(self.matmuls.items()))
        return Recompute(
            flops=self.flops,
            matmuls=matmuls,
            reductions=self.reductions > 0,
            random=self.random > 0,
            free=not self.nodes,
        )


def _flops(node: Node) -> int | None:
    if not node.bodies:
        return costs.flops_of(node.eqn)
    from nexus_jax.flops import Count
    from nexus_jax.records import records_of

    return max(Count(records_of(body.jaxpr)).flops for body in node.bodies)


def _remake(
    flow: Flow,
    wanted: Iterable[int],
    there: Container[int],
    tally: _Tally,
    times: int,
    known: dict[tuple[Node, frozenset[int]], _Tally] | None = None,
) -> set[int]:
    """Count what makes ``wanted`` again where ``there`` is there already; returns the inputs of ``flow`` that it takes.

    Args:
        known: what it took from where everything goes through one equation, by that equation and its results that are
            needed: layers in a row would otherwise be walked once for each layer after them.
    """
    inputs: set[int] = set()
    pending: dict[Node, set[int]] = {}
    order: list[tuple[int, Node]] = []
    narrow: dict[tuple[Node, frozenset[int]], _Tally] = {}

    def want(value: int | None) -> None:
        if value is None or (name := before(flow, value, MOVED)) in there:
            return
        if name not in flow.maker:
            inputs.add(name)
            return
        node, position = flow.maker[name]
        if node not in pending:  # readers come after what they read: all of a node's are seen when it is popped
            pending[node] = set()
            heapq.heappush(order, (-node.index, node))
        pending[node].add(position)

    for value in wanted:
        want(value)
    while order:
        node = heapq.heappop(order)[-1]
        if known is not None and not order and not node.bodies:
            at = node, frozenset(pending[node])
            if at in known:
                tally.merge(known[at])
                break
            narrow[at] = tally.copy()
        if node.op in ("scan", "cond"):
            inside = _remake_steps if node.op == "scan" else _remake_branch
            for i in inside(node, pending[node], there, tally, times * node.times):
                want(node.ins[i])
            continue
        tally.add(node, times)
        for value in node.ins:
            want(value)
    if known is not None:
        known.update({at: tally.since(then) for at, then in narrow.items()})
    return inputs


def _remake_steps(node: Node, wanted: set[int], there: Container[int], tally: _Tally, times: int) -> list[int]:
    """As :func:`_remake` for a scan: every step again, with the carried values that a step takes from the one before."""
    body, first = node.bodies[0], node.first_carried
    while True:
        steps = _Tally()
        outs = [out for i in wanted if (out := body.outputs[i]) is not None]
        inputs = _remake(body, outs, there, steps, times * node.eqn.params["length"])
        taken = [i for i, value in enumerate(body.inputs) if value in inputs]
        carried = {i - first for i in taken if first <= i < first + node.carried}
        if carried <= wanted:
            tally.merge(steps)
            return taken
        wanted = wanted | carried


def _remake_branch(node: Node, wanted: set[int], there: Container[int], tally: _Tally, times: int) -> list[int]:
    """As :func:`_remake` for a conditional: its branch with the most FLOPs, and what any of them takes."""
    most, taken = _Tally(), {0}  # the predicate
    for body in node.bodies:
        branch = _Tally()
        outs = [out for i in wanted if (out := body.outputs[i]) is not None]
        inputs = _remake(body, outs, there, branch, times)
        taken |= {i + 1 for i, value in enumerate(body.inputs) if value in inputs}
        most = max(most, branch, key=lambda t: (t.flops, t.nodes))
    tally.merge(most)
    return sorted(taken)
