"""A jaxpr as one flat graph: calls inlined, views aliased, dead equations dropped."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core as jex

from nexus_jax import _compat


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Value:
    """One array: what makes it (None for an argument or a constant) and what reads it."""

    shape: tuple[int, ...]
    dtype: Any
    node: Node | None = None
    argument: bool = False
    host: bool = False
    alias: Value | None = None
    users: list[Node] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """Its bytes, without padding."""
        return math.prod(self.shape) * getattr(self.dtype, "itemsize", 4)


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Node:
    """One operation; ``position`` is its place in the program as JAX wrote it."""

    op: str
    ins: list[Value]
    outs: list[Value]
    params: dict[str, Any]
    scope: str
    position: int = 0
    bodies: tuple[Graph, ...] = ()


@dataclasses.dataclass(eq=False)
class Graph:
    """A flat program."""

    inputs: list[Value]
    consts: list[Value]
    outputs: list[Value | None]
    nodes: list[Node]


# What a value is called after these is the same memory.
VIEWS = {
    "reshape",
    "squeeze",
    "expand_dims",
    "name",
    "stop_gradient",
    "copy_p",
    "pvary",
    "random_wrap",
    "random_unwrap",
}
# Equations that run their body once, in place.
_INLINED = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_lin", "call"}
_REMAT = {"checkpoint", "remat", "remat2"}
_LOOPS = {"scan", "while", "cond"}


def flatten(jaxpr: Any) -> Graph:
    """The graph of a jaxpr without constants of its own, or of a closed one."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    builder = _Builder()
    consts = [_value(v) for v in inner.constvars]
    inputs = [_value(v) for v in inner.invars]
    for v in (*consts, *inputs):
        v.argument = True
    env = dict(zip((*inner.constvars, *inner.invars), (*consts, *inputs), strict=True))
    builder.run(inner, env, "")
    outputs = [None if isinstance(v, jex.Literal) else env[v] for v in inner.outvars]
    return _without_dead(Graph(inputs, consts, outputs, builder.nodes))


def _value(var: Any) -> Value:
    aval = var.aval
    dtype, shape = aval.dtype, tuple(aval.shape)
    if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        dtype, shape = data.dtype, data.shape
    return Value(shape, dtype, host=getattr(aval, "memory_space", None) == jax.memory.Space.Host)


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.seen: dict[Any, list[Value]] = {}

    def run(self, jaxpr: Any, env: dict[Any, Value], outer: str) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            scope = "/".join(s for s in (outer, _compat.scope_path(eqn)) if s)
            body = _body(eqn)
            if name in _REMAT and body is not None:
                self.inline(eqn, body, env, scope, barrier=_keeps_apart(eqn.params.get("prevent_cse", False)))
            elif name in _INLINED and body is not None:
                self.inline(eqn, body, env, scope)
            elif name in VIEWS or (name == "convert_element_type" and _same_type(eqn)):
                source = eqn.invars[0]
                if isinstance(source, jex.Literal):
                    self.add(eqn, env, scope)
                else:
                    env[eqn.outvars[0]] = env[source]
            elif name == "optimization_barrier":
                self.barrier(eqn.invars, eqn.outvars, env, scope)
            else:
                self.add(eqn, env, scope)

    def inline(self, eqn: Any, body: Any, env: dict[Any, Value], scope: str, barrier: bool = False) -> None:
        inner = getattr(body, "jaxpr", body)
        given = eqn.invars[len(eqn.invars) - len(inner.invars) :]
        local: dict[Any, Value] = {}
        for const, value in zip(inner.constvars, getattr(body, "consts", ()), strict=False):
            local[const] = Value(tuple(value.shape), value.dtype, argument=True)
        if barrier:
            self.barrier(given, inner.invars, env, scope, local)
        else:
            for var, source in zip(inner.invars, given, strict=True):
                local[var] = _constant(source) if isinstance(source, jex.Literal) else env[source]
        self.run(inner, local, scope)
        for var, source in zip(eqn.outvars, inner.outvars, strict=True):
            env[var] = _constant(source) if isinstance(source, jex.Literal) else local[source]

    def barrier(self, given: Any, results: Any, env: Any, scope: str, into: Any = None) -> None:
        """New values for the same memory, none before all: what stands on both sides is not one value to XLA."""
        into = env if into is None else into
        ins, outs = [], []
        for source, var in zip(given, results, strict=True):
            if isinstance(source, jex.Literal):
                into[var] = _constant(source)
                continue
            old = env[source]
            new = Value(old.shape, old.dtype, host=old.host, alias=old.alias or old)
            into[var] = new
            ins.append(old)
            outs.append(new)
        self.append(Node("barrier", ins, outs, {}, scope))

    def add(self, eqn: Any, env: dict[Any, Value], scope: str) -> None:
        ins = [env[v] for v in eqn.invars if not isinstance(v, jex.Literal)]
        literals = tuple(str(v) for v in eqn.invars if isinstance(v, jex.Literal))
        name = eqn.primitive.name
        bodies = tuple(flatten(b) for b in _bodies(eqn)) if name in _LOOPS else ()
        key = None
        if not bodies and len(eqn.outvars) == 1 and name in _CHEAP:  # XLA merges equal operations
            key = (name, tuple(map(id, ins)), literals, str(eqn.outvars[0].aval), _params_key(eqn))
            if key in self.seen:
                env[eqn.outvars[0]] = self.seen[key][0]
                return
        outs = [_value(v) for v in eqn.outvars]
        if name == "device_put":
            kinds = [getattr(d, "memory_kind", None) or str(d) for d in eqn.params.get("devices", ())]
            for out, kind in zip(outs, kinds, strict=False):
                out.host = out.host or "host" in kind.lower()
        env.update(zip(eqn.outvars, outs, strict=True))
        if key is not None:
            self.seen[key] = outs
        params = {**eqn.params, **_loop_counts(eqn)} if bodies else eqn.params
        if name == "scan":
            params["operands"] = [i for i, v in enumerate(eqn.invars) if not isinstance(v, jex.Literal)]
        if name in ("dot_general", "conv_general_dilated"):  # the value may be another's, of another shape
            lhs, rhs = (tuple(v.aval.shape) for v in eqn.invars)
            params = {**params, "lhs_shape": lhs, "rhs_shape": rhs}
        self.append(Node(name, ins, outs, params, scope, bodies=bodies))

    def append(self, node: Node) -> None:
        node.position = len(self.nodes)
        for out in node.outs:
            out.node = node
        self.nodes.append(node)


_CHEAP = {
    "convert_element_type",
    "broadcast_in_dim",
    "iota",
    "transpose",
    "mul",
    "add",
    "sub",
    "neg",
    "exp",
    "ge",
    "gt",
}


def _loop_counts(eqn: Any) -> dict[str, int]:
    """How many arguments of a loop's body are constants, and how many results it carries to its next step."""
    if eqn.primitive.name == "while":
        return {"consts": eqn.params["body_nconsts"], "carried": len(eqn.outvars)}
    if eqn.primitive.name != "scan":
        return {"consts": 0, "carried": 0}
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    # names of these counts in the parameters differ between versions of JAX; a stacked value has one dimension more
    same = lambda outer, inner: [len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outer, inner, strict=True)]
    carried, stacked = sum(same(eqn.outvars, body.outvars)), same(eqn.invars, body.invars).count(False)
    return {"consts": len(eqn.invars) - carried - stacked, "carried": carried}


def _params_key(eqn: Any) -> str:
    return str({k: v for k, v in eqn.params.items() if k != "sharding"})


def _keeps_apart(prevent_cse: Any) -> bool:
    return any(prevent_cse) if isinstance(prevent_cse, tuple | list) else bool(prevent_cse)


def _same_type(eqn: Any) -> bool:
    return eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype


def _constant(literal: Any) -> Value:
    return Value(tuple(literal.aval.shape), literal.aval.dtype, argument=True)


def _body(eqn: Any) -> Any:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = eqn.params.get(name)
        if isinstance(found, jex.Jaxpr | jex.ClosedJaxpr):
            return found
    return None


def _bodies(eqn: Any) -> list[Any]:
    if eqn.primitive.name == "cond":
        return list(eqn.params["branches"])
    return [eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["body_jaxpr"]]


def _without_dead(graph: Graph) -> Graph:
    used: set[Value] = set()

    def use(value: Value) -> None:
        used.add(value)

    for out in graph.outputs:
        if out is not None:
            use(out)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if node.op == "barrier":
            pairs = [(i, o) for i, o in zip(node.ins, node.outs, strict=True) if o in used]
            node.ins, node.outs = [i for i, _ in pairs], [o for _, o in pairs]
        if any(out in used for out in node.outs):
            kept.append(node)
            for value in node.ins:
                use(value)
    kept.reverse()
    for position, node in enumerate(kept):
        node.position = position
        for value in dict.fromkeys(node.ins):
            value.users.append(node)
    return dataclasses.replace(graph, nodes=kept)


def inside(user: Node, value: Value) -> list[Value]:
    """What the body of a scan, or what stands behind a barrier, calls a value that it is given."""
    if user.op == "barrier":
        return [o for i, o in zip(user.ins, user.outs, strict=True) if i is value]
    if user.op != "scan":
        return []
    inputs = user.bodies[0].inputs
    return [inputs[i] for v, i in zip(user.ins, user.params["operands"], strict=True) if v is value]


def root(value: Value) -> Value:
    """The value whose memory this is."""
    return value.alias or value


def needs(value: Value, other: Value) -> bool:
    """Whether one value is computed from another."""
    assert other.node is not None
    seen, waiting = {value}, [value]
    while waiting:
        v = waiting.pop()
        if v is other:
            return True
        if v.node is not None and v.node.position > other.node.position:
            waiting += [i for i in v.node.ins if i not in seen]
            seen.update(v.node.ins)
    return False
