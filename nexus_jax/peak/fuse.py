"""Which values a compiled program writes to memory, and the kernels between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from nexus_jax.peak.graph import Graph, Node, Value, needs, root
from nexus_jax.peak.rules import CONTRACTIONS, EXPENSIVE, FUSIBLE, REDUCTIONS, Backend

_MANY = 8  # readers; more are as many
_WIDE = 24  # sources of one fusion
_WIDEST = 32  # elementwise operations that a matmul computes on its way out; a GELU's gradient has 14
_LONGEST_ROW = 16384  # of a softmax that is one kernel; seen: 8192 is one, 32768 is not


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Kernel:
    """One thing that the device runs: reads ``ins``, writes ``outs``, at ``position`` of the program.

    ``fused``: a fusion of elementwise operations, and no matmul, reduction or anything else. ``matmuls``: those in it.
    """

    node: Node
    ins: list[Value]
    outs: list[Value]
    position: float
    fused: bool
    matmuls: tuple[Node, ...]


def kernels(graph: Graph, backend: Backend, size: Callable[[Value], int]) -> list[Kernel]:
    """The kernels of a program in JAX's order, each with what it reads from memory."""
    return _Fusion(graph, backend, size).kernels()


class _Fusion:
    def __init__(self, graph: Graph, backend: Backend, size: Callable[[Value], int]):
        self.graph, self.backend, self.size = graph, backend, size
        self.results: set[Value] = {v for v in graph.outputs if v is not None}
        self.written: set[Value] = set(self.results)
        for node in graph.nodes:
            self._require(node)
        if backend.fused_results:
            self._sink()
        for _ in range(2):
            self._decide(self._readers())

    def _require(self, node: Node) -> None:
        """What is written whatever reads it: results that no fusion computes, operands that none can."""
        fusible = self.fusible(node)
        if not fusible or self._is_softmax(node):
            self.written.update(node.outs)
        if fusible or (node.op in CONTRACTIONS and self.backend.fused_operands):
            return
        if node.op in REDUCTIONS and not (node.op == "select_and_scatter_add" and self.backend.tiled):
            return
        sunk = self._sunk(node) if self.backend.sunk_broadcasts and node.op == "scan" else ()
        self.written.update(v for v in node.ins if v not in sunk)

    def _sunk(self, loop: Node) -> list[Value]:
        given = zip(loop.ins, loop.params["operands"], strict=True)
        consts = [v for v, i in given if i < loop.params["consts"]]
        return [v for v in consts if v.node is not None and v.node.op == "broadcast_in_dim"]

    def _is_softmax(self, node: Node) -> bool:
        if not (self.backend.fused_softmax and _is_shift(node)):
            return False
        maker = node.ins[0].node
        return not (self.backend.maximum_of_halves and maker is not None and maker.op == "convert_element_type")

    def fusible(self, node: Node) -> bool:
        """Whether a fusion may hold this operation."""
        if node.op == "gather":
            return self.backend.fused_gather
        if node.op in ("scatter-add", "scatter_add", "scatter"):
            return self.backend.one_hot_scatter and not node.params["dimension_numbers"].update_window_dims
        return node.op in FUSIBLE

    def _sink(self) -> None:
        """A matmul computes on its way out what is made of its result alone and ends in one value."""
        for node in self.graph.nodes:
            if node.op in CONTRACTIONS:
                [out] = node.outs
                end = self._end(out)
                if end is not out:
                    self.written.discard(out)
                    self.written.add(end)

    def _end(self, out: Value) -> Value:
        """The last and least value that all paths from a matmul's result run through, over elementwise operations."""
        inner, waiting, end = {out}, list(out.users), out
        unread = {out: len(out.users)}  # of each value inside, its readers that are not inside
        for _ in range(_WIDEST):
            waiting.sort(key=lambda n: -n.position)
            user = next((n for n in reversed(waiting) if self._joins(n, inner, out)), None)
            if user is None or any(v in self.results for v in user.ins if v in inner):
                break
            waiting.remove(user)
            for value in inner.intersection(user.ins):
                unread[value] -= 1
            [made] = user.outs
            inner.add(made)
            unread[made] = len(made.users)
            waiting += [n for n in made.users if n not in waiting]
            alone = all(count == 0 for value, count in unread.items() if value is not made)
            if alone and (self.size(made) <= self.size(end) or made in self.results):
                end = made
        return end

    def _joins(self, user: Node, inner: set[Value], out: Value) -> bool:
        """Whether an operation can be computed with a matmul's result: what else it reads does not wait for that."""
        if len(user.outs) != 1 or not self.fusible(user) or not self._small(user, out):
            return False
        return not any(needs(v, out) for v in user.ins if v not in inner)

    def _small(self, user: Node, out: Value) -> bool:
        """Whether an operation keeps a matmul's result as it is, or makes less of it."""
        made = user.outs[0]
        if user.op in ("concatenate", "stack", "pad", "broadcast_in_dim"):
            return False
        return self.size(made) <= self.size(out) or made in self.results

    def _readers(self) -> dict[Value, frozenset]:
        """The kernels that read each value, through fusions."""
        found: dict[Value, frozenset] = {}
        for node in reversed(self.graph.nodes):
            for out in node.outs:
                readers: set = set()
                for user in out.users:
                    if len(readers) >= _MANY:
                        break
                    fused = user.outs and all(o not in self.written for o in user.outs)
                    readers |= found[user.outs[0]] if fused else {_identity(user)}
                found[out] = frozenset(readers)
        return found

    def _decide(self, readers: dict[Value, frozenset]) -> None:
        """Write some of what could be computed by every reader anew."""
        self.sources: dict[Value, dict[Value, None]] = {}
        for node in self.graph.nodes:
            if node.op == "barrier":
                continue
            sources = self._sources(node)
            for out in node.outs:
                if out not in self.written:
                    if sources and self._worth_writing(node, out, sources, readers[out]):
                        self.written.add(out)
                    self.sources[out] = sources

    def _worth_writing(self, node: Node, out: Value, sources: dict[Value, None], readers: frozenset) -> bool:
        """Whether the readers, each computing a value anew, would move more bytes than writing and reading it does."""
        if node.op in ("concatenate", "stack") and self.backend.fused_operands:
            return False  # a matmul reads the pieces
        count, once = len(readers), self.size(out)
        moved = sum(self.size(v) for v in sources)
        if len(sources) > _WIDE or (self.backend.keeps_expensive and node.op in EXPENSIVE and count > 1):
            return True
        if self.backend.fused_results and any(isinstance(r, tuple) for r in readers):
            return (count - 1) * moved >= count * once  # a reduction has read the sources, and writes it on the way
        return (count - 1) * moved > (count + 1) * once

    def _sources(self, node: Node) -> dict[Value, None]:
        found: dict[Value, None] = {}
        for value in node.ins:
            if value in self.written or value.node is None:
                found[value] = None
            else:
                found.update(self.sources.get(value, {}))
        return found

    def kernels(self) -> list[Kernel]:
        """One for each operation that writes something."""
        self.sources = {}
        held: dict[Value, dict[Node, None]] = {}  # the matmuls of what is not written
        found = []
        for node in self.graph.nodes:
            sources = self._sources(node)
            matmuls = {m: None for v in node.ins if v not in self.written for m in held.get(v, ())}
            if node.op in CONTRACTIONS:
                matmuls[node] = None
            for out in node.outs:
                self.sources[out], held[out] = sources, matmuls
            if any(out in self.written for out in node.outs) or not node.outs:
                ins = list(dict.fromkeys(root(v) for v in sources))
                fused = self.fusible(node) and not (self.backend.softmax_apart and self._is_softmax(node))
                found.append(Kernel(node, ins, list(node.outs), float(node.position), fused, tuple(matmuls)))
        return found


def _is_shift(node: Node) -> bool:
    """``x - max(x)`` of a log-softmax: the softmax kernel ends there, and writes it."""
    if node.op != "sub" or len(node.ins) != 2 or node.ins[0].shape[-1:] > (_LONGEST_ROW,):
        return False
    x, other = node.ins
    for _ in range(5):
        maker = other.node
        if maker is None or len(maker.ins) != 1:
            return False
        if maker.op == "reduce_max":
            if maker.ins[0] is not x:
                return False
            exps = [u for u in node.outs[0].users if u.op == "exp"]
            return not any(u.op == "div" for e in exps for u in e.outs[0].users)
        other = maker.ins[0]
    return False


def _identity(node: Node) -> object:
    """Reductions of one module over the same values are one kernel."""
    return ("reduce", node.scope) if node.op in REDUCTIONS else node
