"""What autodiff keeps from the forward for the backward pass: bytes, place, module path, op and source line."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from nexus_jax.dataflow import VIEWS, Flow, Node, before, moves_to_host, origin
from nexus_jax.families import families
from nexus_jax.policy.rules import nbytes
from nexus_jax.reasons import Reasons, Use, why
from nexus_jax.recompute import Kept, Recompute
from nexus_jax.scopes import module_path
from nexus_jax.traced import Traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
    """One value that the backward pass needs.

    Attributes:
        nbytes: its size, exact.
        shape, dtype: its type; of all steps together where a scan stacks it.
        place: ``"device"`` or ``"host"``.
        path: the module that made it, as ``"GPT/blocks_0/attn"``; for an argument, where it is in the arguments.
        op: the primitive that made it; for what was there before ``"argument"`` or ``"constant"``, or
            ``"transpose of argument"`` and the like.
        source: ``file.py:line (function)`` of the innermost frame outside JAX and Flax.
        uses: what the backward pass does with it; empty where it is kept for nothing, and compilers drop it.
        recompute: what making it again from the arguments and the other residuals would take; None for an argument.
    """

    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    place: str
    path: str
    op: str
    source: str
    uses: tuple[Use, ...] = ()
    recompute: Recompute | None = None

    @property
    def why(self) -> str:
        """Why it is kept, in words: ``"operand of dot_general in the backward of GPT/blocks_3/attn/q"``."""
        return why(self.uses)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        cost = None if self.recompute is None else {**dataclasses.asdict(self.recompute), "text": str(self.recompute)}
        if cost is not None:
            cost["matmuls"] = dict(self.recompute.matmuls)
        return {**dataclasses.asdict(self), "shape": list(self.shape), "why": self.why, "recompute": cost}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Residuals of one layer family that are the same but for the layer: ``blocks[0..11]/attn``, 12 times.

    Attributes:
        pattern: the modules that made them, in one line.
        members: the residuals, in the order of their layers.
    """

    pattern: str
    members: tuple[Residual, ...]

    @property
    def each(self) -> Residual:
        """The first of them; the others have its op, shape, dtype, place and source line."""
        return self.members[0]

    @property
    def count(self) -> int:
        return len(self.members)

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.members)

    @property
    def uses(self) -> tuple[Use, ...]:
        """What the backward pass does with them, with the modules of all layers as patterns."""
        alike: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        for use in (use for r in self.members for use in r.uses):
            alike[use.role, use.op][use.path] = None
        return tuple(Use(role=r, op=op, path=p) for (r, op), paths in alike.items() for p in families(paths))

    @property
    def recompute(self) -> tuple[Recompute, Recompute] | None:
        """The least and the most that making one of them again takes; None for arguments."""
        costs = sorted((r.recompute for r in self.members if r.recompute), key=lambda cost: cost.flops)
        return (costs[0], costs[-1]) if costs else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the first of them, with ``path`` as the pattern and ``nbytes`` the sum; ``count`` says how many."""
        return {
            **self.each.as_dict(),
            "path": self.pattern,
            "count": self.count,
            "nbytes": self.nbytes,
            "uses": [dataclasses.asdict(use) for use in self.uses],
            "why": why(self.uses),
        }


@dataclasses.dataclass(frozen=True)
class Residuals(Sequence[Residual]):
    """The residuals of one function, largest first; what is there anyway is apart and costs nothing.

    ``.nbytes``, ``.device_bytes`` and ``.host_bytes`` are sums over what is kept. ``.arguments`` are the leaves of
    ``jax.vjp`` that take no memory of their own: the parameters and inputs that the backward pass reads again, views of
    those, and constants. Both together are all leaves. Prints as a table.
    """

    kept: tuple[Residual, ...]
    arguments: tuple[Residual, ...] = ()

    def __getitem__(self, index):
        return self.kept[index]

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Residual]:
        return iter(self.kept)

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.kept)

    @property
    def device_bytes(self) -> int:
        return sum(r.nbytes for r in self.kept if r.place == "device")

    @property
    def host_bytes(self) -> int:
        return sum(r.nbytes for r in self.kept if r.place == "host")

    def groups(self) -> tuple[Group, ...]:
        """The kept ones by layer family, largest first."""
        return grouped(self.kept)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sums, and the groups of what is kept and of the arguments that are kept anyway."""
        return {
            "nbytes": self.nbytes,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "kept": [group.as_dict() for group in self.groups()],
            "arguments": [group.as_dict() for group in grouped(self.arguments)],
        }

    def __str__(self) -> str:
        from nexus_jax import report

        return report.residuals_table(self)


def grouped(found: Iterable[Residual]) -> tuple[Group, ...]:
    """Residuals by layer family, largest first: alike in op, type, place and source line, and in path but for numbers."""
    alike: dict[tuple[Any, ...], dict[str, list[Residual]]] = defaultdict(lambda: defaultdict(list))
    for r in found:
        alike[r.op, r.shape, r.dtype, r.place, r.source][r.path].append(r)
    groups = []
    for by_path in alike.values():
        # A layer that keeps two of them is no sibling of one that keeps one.
        for times in sorted({len(rs) for rs in by_path.values()}):
            for name, paths in families(p for p, rs in by_path.items() if len(rs) == times).items():
                groups.append(Group(pattern=name, members=tuple(r for p in paths for r in by_path[p])))
    return tuple(sorted(groups, key=lambda group: -group.nbytes))


def residuals(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Residuals:
    """Every residual of ``fn``, differentiated with respect to its floating-point arguments. Nothing is computed.

    A view of an argument (reshaped, transposed, sliced, broadcast) is not counted: compilers read the argument instead.
    An argument in another type is: XLA for GPUs keeps bfloat16 copies of float32 weights that matmuls read, XLA
    for TPUs converts it twice. What is made of literals alone, as a causal mask is, is a constant: neither keeps one.
    (Compiled by jax 0.12.0.1 for v5e and h200: by how temporary memory grows from 4 layers to 8.)

    Args:
        fn: a function of pytrees (arrays or ``ShapeDtypeStruct``) and nnx modules; flags and the like may be among
            its arguments.
        *args, **kwargs: what to call it with.

    Returns:
        :class:`Residuals`. The bytes are those of the leaves of ``jax.vjp(fn, *args)``, each counted once.

    Raises:
        TypeError: no argument holds an array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w, x = jax.ShapeDtypeStruct((256, 64), jnp.float32), jax.ShapeDtypeStruct((128, 256), jnp.float32)
        >>> [found] = residuals(lambda w, x: jnp.sum(jnp.sin(x @ w)), w, x)
        >>> found.op, found.nbytes, found.why
        ('cos', 32768, 'factor of mul in the backward of the function')
        >>> print(found.recompute)
        1 dot_general, 4.2 MFLOP
    """
    traced = Traced(fn, args, kwargs)
    return _read(*traced.with_backward(), traced.names())


def _read(jaxpr: Any, at: int, count: int, names: list[str]) -> Residuals:
    """The residuals of a program that returns them, and whose equation ``at`` is the backward pass."""
    call, leaves = jaxpr.eqns[at], jaxpr.outvars[:count]
    flow = Flow(jaxpr.replace(eqns=jaxpr.eqns[:at], outvars=leaves))
    backward = Reasons(Flow(call.params["jaxpr"].jaxpr))

    found: dict[int, _Leaf] = {}  # one value may be several leaves: counted once
    for leaf, value, read in zip(leaves, flow.outputs, backward.flow.inputs, strict=False):
        number = -len(found) - 1 if value is None else value  # a literal is a value of its own
        found.setdefault(number, _Leaf(leaf.aval, [])).read_as.append(read)
    there = dict(zip(flow.inputs, names, strict=False))
    apart = {value: known for value in found if (known := _apart(flow, value, there))}
    kept = Kept(flow, (value for value in found if value not in apart))
    made, arguments = [], []
    for value, leaf in found.items():
        uses = backward.uses(leaf.read_as)
        if value in apart:
            arguments.append(_residual(leaf.aval, flow, value, uses=uses, **apart[value]))
        else:
            known = _made_by(origin(flow, value))
            made.append(_residual(leaf.aval, flow, value, uses=uses, recompute=kept.recompute(value), **known))
    return Residuals(*(tuple(sorted(x, key=lambda r: -r.nbytes)) for x in (made, arguments)))


class _Leaf(NamedTuple):
    aval: Any
    read_as: list[int]


def _residual(aval: Any, flow: Flow, value: int, **known: Any) -> Residual:
    node = flow.maker[value][0] if value in flow.maker else None
    on_host = aval.memory_space == jax.memory.Space.Host or (node is not None and moves_to_host(node.eqn))
    place = "host" if on_host else "device"
    return Residual(nbytes=nbytes(aval), shape=tuple(aval.shape), dtype=str(aval.dtype), place=place, **known)


def _made_by(node: Node | None) -> dict[str, str]:
    if node is None:
        return {"op": "argument", "path": "", "source": ""}
    return {"op": node.op, "path": module_path(node.scope), "source": node.source}


def _apart(flow: Flow, value: int, arguments: Mapping[int, str]) -> dict[str, str] | None:
    """What a value is called that was there before the forward pass, or is a view of that; None for one that is made."""
    root = before(flow, value, VIEWS)
    if root in flow.maker:
        made = _made_by(origin(flow, value))
        return {**made, "op": "constant"} if flow.is_constant(root) else None
    kind = "argument" if root in arguments else "constant"
    op = kind if root == value else f"{flow.maker[value][0].op} of {kind}"
    return {"op": op, "path": arguments.get(root, ""), "source": ""}
