"""A program as equations that make and read values, with the calls in it opened."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex

from nexus_jax import _compat, costs

# Calls that are opened in place: their body runs once, with their operands and results as its own.
_OPENED = (_compat.CALLS - {"scan"}) | {"call", "composite", "eval_jaxpr", "shard_map"}
_OPENED |= {"custom_vjp_call", "custom_vjp_call_jaxpr"}
_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """One equation.

    Attributes:
        op: its primitive.
        index: its place among the nodes of its flow.
        ins, outs: numbers of the values that it reads and makes; None for a literal.
        scope: its ``jax.named_scope`` path with those of the calls around it.
        within: the equations of those calls, outermost first.
        times: how often it runs, for each run of its flow (in a ``shard_map``, once a shard).
        bodies: of a loop or a branch, each a flow of its own.
    """

    op: str
    index: int
    eqn: Any
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]
    scope: str
    within: tuple[Any, ...]
    times: int = 1
    bodies: tuple[Flow, ...] = ()

    @property
    def source(self) -> str:
        """``file.py:line (function)`` of the innermost frame outside JAX and Flax."""
        lines = (_compat.source_line(eqn) for eqn in (self.eqn, *reversed(self.within)))
        return next(filter(None, lines), "")

    # Of a scan, told by the types, since the parameters that say so change with JAX's version: what is stacked has an
    # axis more than in the body. Operands are constants, carried and stacked values; results are the last two.

    @property
    def carried(self) -> int:
        """How many values a scan carries from step to step: its first results."""
        return _of_one_rank(self.bodies[0].jaxpr.outvars, self.eqn.outvars)

    @property
    def first_carried(self) -> int:
        """Where they begin among its operands."""
        return _of_one_rank(self.bodies[0].jaxpr.invars, self.eqn.invars) - self.carried


def _of_one_rank(inner: Sequence[Any], outer: Sequence[Any]) -> int:
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(inner, outer, strict=True))


class Flow:
    """The equations of a jaxpr in order, and for each value its maker and its readers.

    ``jit``, ``jax.checkpoint``, custom derivatives and ``shard_map`` are opened in place, once per call; a
    ``checkpoint_name`` is the value that it names. Loops and branches stay nodes, with flows as their bodies. A value
    is a number, unique over all flows; ``outside`` is the flow and the node whose body a flow is.

    Args:
        jaxpr: an open jaxpr.
        scope, within: those of the equation whose body this is.
    """

    def __init__(self, jaxpr: Any, scope: str = "", within: tuple[Any, ...] = ()):
        self.jaxpr = jaxpr
        self.outside: tuple[Flow, Node] | None = None
        self.nodes: list[Node] = []
        self.maker: dict[int, tuple[Node, int]] = {}
        self.readers: dict[int, list[tuple[Node, int]]] = defaultdict(list)
        self._constant: dict[int, bool] = {}
        env = {var: next(_NUMBERS) for var in jaxpr.invars}
        self.inputs = [env[var] for var in jaxpr.invars]
        self.outputs = self._add(jaxpr, env, scope, within, 1)

    def _add(
        self, jaxpr: Any, env: dict[Any, int], scope: str, within: tuple[Any, ...], times: int
    ) -> list[int | None]:
        for var in jaxpr.constvars:
            env[var] = next(_NUMBERS)
        read = lambda atom: None if isinstance(atom, jex.Literal) else env[atom]
        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            inner = "/".join(x for x in (scope, _compat.scope_path(eqn)) if x)
            outs = self._opened(eqn, ins, inner, within, times) or self._node(eqn, ins, inner, within, times)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _opened(
        self, eqn: Any, ins: list[int | None], scope: str, within: tuple[Any, ...], times: int
    ) -> list[int] | None:
        """The values that an equation hands on or a call's body makes; None for an equation that stays one."""
        if eqn.primitive.name == "name" and ins[0] is not None:
            return [ins[0]]
        if eqn.primitive.name not in _OPENED:
            return None
        body = next(iter(_bodies(eqn)), None)
        if body is None or len(body.invars) != len(ins) or len(body.outvars) != len(eqn.outvars):
            return None
        if eqn.primitive.name == "shard_map":
            times *= _shards(eqn)
        env = {var: next(_NUMBERS) if i is None else i for var, i in zip(body.invars, ins, strict=True)}
        outs = self._add(body, env, scope, (*within, eqn), times)
        return [next(_NUMBERS) if i is None else i for i in outs]

    def _node(self, eqn: Any, ins: list[int | None], scope: str, within: tuple[Any, ...], times: int) -> list[int]:
        op = eqn.primitive.name
        bodies = tuple(Flow(body, scope, (*within, eqn)) for body in _bodies(eqn)) if op in _STRUCTURED else ()
        outs = tuple(next(_NUMBERS) for _ in eqn.outvars)
        node = Node(
            op=op,
            index=len(self.nodes),
            eqn=eqn,
            ins=tuple(ins),
            outs=outs,
            scope=scope,
            within=within,
            times=times,
            bodies=bodies,
        )
        self.nodes.append(node)
        for body in bodies:
            body.outside = self, node
        for i, value in enumerate(outs):
            self.maker[value] = node, i
        for i, value in enumerate(ins):
            if value is not None:
                self.readers[value].append((node, i))
        return list(outs)

    def is_constant(self, value: int) -> bool:
        """Whether a value is made of nothing but literals, by what compilers fold or fuse: a causal mask, zeros."""
        pending = [value]
        while pending:
            now = pending[-1]
            if now in self._constant:
                pending.pop()
                continue
            node = self.maker[now][0] if now in self.maker else None
            if node is None or node.op == "device_put" or costs.kind_of(node.eqn) not in ("view", "fused", "slice"):
                self._constant[now] = False
                continue
            ins = [i for i in node.ins if i is not None]
            unknown = [i for i in ins if i not in self._constant]
            pending += unknown
            if not unknown:
                self._constant[now] = all(self._constant[i] for i in ins)
        return self._constant[value]

    def live(self) -> set[Node]:
        """The equations that an output depends on, those in the bodies of loops too."""
        needed, found = set(self.outputs), set()
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.outs):
                found.add(node)
                needed.update(node.ins)
                found.update(*(body.live() for body in node.bodies))
        return found


_STRUCTURED = {"scan", "while", "cond"}


def _bodies(eqn: Any) -> list[Any]:
    """The open jaxprs among an equation's parameters."""
    found = []
    for param in eqn.params.values():
        for body in param if isinstance(param, tuple | list) else (param,):
            if isinstance(body, jex.Jaxpr | jex.ClosedJaxpr):  # pyright: ignore[reportPrivateImportUsage]
                found.append(getattr(body, "jaxpr", body))
    return found


def _shards(eqn: Any) -> int:
    """How often a ``shard_map`` runs its body."""
    mesh, manual = eqn.params["mesh"], eqn.params.get("manual_axes") or eqn.params.get("newly_manual_axes")
    return math.prod(size for name, size in mesh.shape.items() if not manual or name in manual)


def moves_to_host(eqn: Any) -> bool:
    """Whether an equation puts a value that is on the device in host memory."""
    if eqn.primitive.name != "device_put" or all(_on_host(v.aval) for v in eqn.invars):
        return False
    # a memory kind may be in the parameters, and not show in the type
    kinds = [getattr(d, "memory_kind", None) or "" for d in eqn.params["devices"]]
    return any(_on_host(v.aval) for v in eqn.outvars) or any(kind.endswith("_host") for kind in kinds)


def _on_host(aval: Any) -> bool:
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


# --- values that share memory --------------------------------------------------------------------------------------

# One value in another form: either makes the other, and compilers keep one of them.
SAME = {"reshape", "squeeze", "expand_dims", "transpose", "rev", "copy", "copy_p", "optimization_barrier"}
SAME |= {"random_wrap", "random_unwrap", "pvary", "pcast", "sharding_constraint", "layout_constraint"}
# The same numbers elsewhere: jax.checkpoint rounds what it keeps to the precision that it has.
MOVED = SAME | {"device_put", "reduce_precision"}
# A part or a repetition, which compilers read out of what it was made from (see nexus_jax.residuals).
VIEWS = SAME | {"broadcast_in_dim", "slice"}


def before(flow: Flow, value: int, ops: set[str]) -> int:
    """What a value was before equations of these kinds made it another: itself, where none did."""
    while value in flow.maker:
        node, position = flow.maker[value]
        source = node.ins[position] if node.op == "optimization_barrier" else node.ins[0] if node.ins else None
        if node.op not in ops or source is None:
            break
        value = source
    return value


def origin(flow: Flow, value: int) -> Node | None:
    """The equation that made a value's numbers, in loops and branches too; None for an argument or a constant."""
    while value in flow.maker:
        nearer = before(flow, value, MOVED)
        value = nearer if nearer in flow.maker else value
        node, position = flow.maker[value]
        inner = _inside(flow, node, position)
        if inner is None:
            return node
        flow, value = inner
    return None


def _inside(flow: Flow, node: Node, position: int) -> tuple[Flow, int] | None:
    """What a result of a loop or of branches is in its body, or before it; None where it is no one value."""
    if node.op == "cond":
        return _in_branch(flow, node, position)
    if node.op != "scan":
        return None
    body, first = node.bodies[0], node.first_carried
    inner = body.outputs[position]
    if inner in body.inputs:  # handed on from one step to the next, or through
        at = body.inputs.index(inner)
        inner = body.outputs[at - first] if first <= at < first + node.carried else inner
        if inner in body.inputs:
            outer = node.ins[at]
            return (flow, outer) if outer is not None and outer in flow.maker else None
    return (body, inner) if inner is not None and inner in body.maker else None


def _in_branch(flow: Flow, node: Node, position: int) -> tuple[Flow, int] | None:
    """As :func:`_inside`: where one branch computes or hands on a value, and another stands in with zeros, the first."""
    handed_on = None
    for body in node.bodies:
        out = body.outputs[position]
        if out is None:
            continue
        root, same = before(body, out, VIEWS | MOVED), before(body, out, MOVED)
        if root in body.maker and not body.is_constant(root):
            return body, out
        if same in body.inputs and (outer := node.ins[body.inputs.index(same) + 1]) in flow.maker:
            handed_on = flow, outer
    return handed_on
