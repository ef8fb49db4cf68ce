"""What autodiff keeps from the forward for the backward pass: bytes, place, module path, op and source line."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from nexus_jax import _compat, adapters
from nexus_jax.boundary import is_floating, split
from nexus_jax.families import families
from nexus_jax.policy.rules import nbytes
from nexus_jax.scopes import module_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
    """One value that the backward pass needs.

    Attributes:
        nbytes: its size, exact.
        shape, dtype: its type; of all steps together where a scan stacks it.
        place: ``"device"`` or ``"host"``.
        path: the module that made it, as ``"GPT/blocks_0/attn"``; for an argument, where it is in the arguments.
        op: the primitive that made it; ``"argument"`` or ``"constant"`` for what was there before.
        source: ``file.py:line (function)`` of the innermost frame outside JAX and Flax.
    """

    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    place: str
    path: str
    op: str
    source: str


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

    def as_dict(self) -> dict[str, Any]:
        each = dataclasses.asdict(self.each)
        return {**each, "path": self.pattern, "count": self.count, "nbytes": self.nbytes, "shape": list(each["shape"])}


@dataclasses.dataclass(frozen=True)
class Residuals(Sequence[Residual]):
    """The residuals of one function, largest first; arguments that are kept anyway are apart and cost nothing.

    ``.nbytes``, ``.device_bytes`` and ``.host_bytes`` are sums; ``.arguments`` are the parameters and inputs that the
    backward pass reads again. Prints as a table.
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
        >>> x = jax.ShapeDtypeStruct((128, 256), jnp.float32)
        >>> found = residuals(lambda x: jnp.sum(jnp.sin(x)), x)
        >>> found.nbytes, found[0].op
        (131072, 'cos')
    """
    fun, inputs = adapters.nnx.opened(fn, args, kwargs)
    arrays, rebuild = split(inputs, _DATA)
    if not arrays:
        raise TypeError("residuals(fn, *args): no argument is an array or a jax.ShapeDtypeStruct.")

    def backward(*arrays):
        wrt = [i for i, x in enumerate(arrays) if is_floating(x)]

        def forward(*floats):
            filled = list(arrays)
            for i, x in zip(wrt, floats, strict=True):
                filled[i] = x
            return [x for x in split(fun(rebuild(filled)))[0] if is_floating(x)]

        return jax.tree.leaves(jax.vjp(forward, *(arrays[i] for i in wrt))[1])

    return _read(jax.make_jaxpr(backward)(*arrays).jaxpr, _argument_names(inputs))


_DATA = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)


def _argument_names(inputs: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(inputs)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, x in leaves if isinstance(x, _DATA)]


def _read(jaxpr: Any, names: list[str]) -> Residuals:
    named = dict(zip(jaxpr.invars, names, strict=False))
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    kept, arguments = [], []
    for var in dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, jex.Literal)):
        source = _before_views(var, made)
        if source in made:
            kept.append(_residual(var, made[var], *_maker(var, made, "")))
        else:
            op = "argument" if source in named else "constant"
            arguments.append(_residual(var, None, op, named.get(source, ""), ""))
    return Residuals(*(tuple(sorted(x, key=lambda r: -r.nbytes)) for x in (kept, arguments)))


# The compiler keeps what these were made from instead; what they make is no memory of its own.
_FREE = {"reshape", "squeeze", "expand_dims", "name", "copy_p"}


def _before_views(var: Any, made: dict[Any, Any]) -> Any:
    while var in made and made[var].primitive.name in _FREE and not isinstance(made[var].invars[0], jex.Literal):
        var = made[var].invars[0]
    return var


def _residual(var: Any, eqn: Any, op: str, path: str, source: str) -> Residual:
    aval = var.aval
    on_host = aval.memory_space == jax.memory.Space.Host or (eqn is not None and _moves_to_host(eqn))
    return Residual(
        nbytes=nbytes(aval),
        shape=tuple(aval.shape),
        dtype=str(aval.dtype),
        place="host" if on_host else "device",
        path=path,
        op=op,
        source=source,
    )


def _moves_to_host(eqn: Any) -> bool:
    """Whether an equation puts its result in host memory under a name that its type does not show."""
    kinds = [getattr(d, "memory_kind", None) for d in eqn.params.get("devices", ())]
    return eqn.primitive.name == "device_put" and any(k is not None and k.endswith("_host") for k in kinds)


# Equations that only hand on or move a value: what made it is further up.
_HANDED_ON = {"name", "device_put", "reduce_precision", "optimization_barrier", "copy", "copy_p"}


def _maker(var: Any, made: dict[Any, Any], outer: str, line: str = "") -> tuple[str, str, str]:
    """``(op, module path, source line)`` of the equation that made a value, inside loops and jitted functions too."""
    while True:
        eqn = made.get(var)
        if eqn is None:
            return "argument", module_path(outer), line
        name = eqn.primitive.name
        scope = "/".join(x for x in (outer, _compat.scope_path(eqn)) if x)
        if name in _HANDED_ON and not isinstance(eqn.invars[eqn.outvars.index(var)], jex.Literal):
            nearer = eqn.invars[eqn.outvars.index(var)]
            if nearer in made:
                var = nearer
                continue
        body = next((p for p in eqn.params.values() if isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)), None)
        if body is not None and name in _compat.CALLS:
            inner = getattr(body, "jaxpr", body)
            out = inner.outvars[eqn.outvars.index(var)]
            if not isinstance(out, jex.Literal) and len(inner.outvars) == len(eqn.outvars):
                inside = {v: e for e in inner.eqns for v in e.outvars}
                if out in inside:
                    return _maker(out, inside, scope, _compat.source_line(eqn) or line)
                if out in inner.invars and len(inner.invars) == len(eqn.invars):
                    var = eqn.invars[inner.invars.index(out)]
                    continue
        return name, module_path(scope), _compat.source_line(eqn) or line
