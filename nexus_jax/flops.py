"""FLOPs and bytes of a program, counted on its jaxpr: per equation, with loops multiplied out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax.extend import core as jex

from nexus_jax import _compat, costs, scopes

Phase = Literal["forward", "backward", "recompute", "transfer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute", "transfer")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One equation, in one place of the program.

    Attributes:
        op: its primitive.
        scope: its name scope, as JAX wrote it; ``path`` is the module in it.
        phase: which part of a step it belongs to; ``transfer`` for copies to and from host memory.
        dtype: of its operands, the widest.
        flops, read, written: of one run; bytes of device memory.
        times: how often a run of the program runs it.
        known: whether the table of :mod:`nexus_jax.costs` knows its FLOPs.
        place: where a transfer goes: ``"host"`` or ``"device"``; empty for the rest.
    """

    op: str
    scope: str
    phase: Phase
    dtype: str
    flops: int
    read: int
    written: int
    times: int
    known: bool = True
    place: str = ""

    @property
    def path(self) -> str:
        return _path(self.scope)


_path = functools.lru_cache(maxsize=2**16)(scopes.module_path)


@dataclasses.dataclass(frozen=True)
class Count:
    """What a program computes and moves, equation by equation. Sums are over all its runs.

    Attributes:
        records: one :class:`Record` an equation that costs anything.
        unknown: equations whose FLOPs are not known, and how often they run; they count 0.
        open_loops: while loops whose length is not in the program, by module path, and how often they start; their
            bodies count once.
    """

    records: tuple[Record, ...]
    open_loops: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def flops(self) -> int:
        return sum(r.flops * r.times for r in self.records)

    @functools.cached_property
    def matmul_flops(self) -> int:
        return sum(r.flops * r.times for r in self.records if r.op in costs.MATMULS)

    @functools.cached_property
    def by_phase(self) -> dict[Phase, int]:
        """FLOPs of each phase."""
        found: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        for r in self.records:
            found[r.phase] += r.flops * r.times
        return found

    @functools.cached_property
    def unknown(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for r in self.records:
            if not r.known:
                found[r.op] += r.times
        return dict(found)


def count(fn: Callable[..., Any], *args: Any) -> Count:
    """What ``fn(*args)`` computes. Nothing is run; arguments may be ``ShapeDtypeStruct``s.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
        >>> found = count(jax.grad(lambda a, b: jnp.sum(jnp.sin(a @ b.T))), x, x)
        >>> found.matmul_flops, found.by_phase["backward"] > 2048
        (4096, True)
    """
    return count_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def count_jaxpr(jaxpr: Any) -> Count:
    """As :func:`count`, of a program that is traced already."""
    walk = _Walk()
    return Count(tuple(walk.records(jaxpr)), dict(walk.open_loops))


def matmul_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs (two per multiply-add) of every ``dot_general`` and convolution of ``fn(*args)``.

    A scan's body counts once per step, a cond's by its largest branch, a while loop's by its length where the program
    says it. Nothing is computed; arguments may be ``ShapeDtypeStruct``s.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
        >>> matmul_flops(lambda a, b: a @ b.T, x, x)
        2048
    """
    return count(fn, *args).matmul_flops


def count_matmuls(fn: Callable[..., Any], *args: Any) -> int:
    """How many times ``fn(*args)`` runs a ``dot_general`` or a convolution, loops multiplied out."""
    return sum(r.times for r in count(fn, *args).records if r.op in costs.MATMULS)


class _Walk:
    """One count: each body is read once, however many equations call it."""

    def __init__(self) -> None:
        self.done: dict[int, list[Record]] = {}
        self.kept: list[Any] = []
        self.open_loops: Counter[str] = Counter()

    def records(self, jaxpr: Any) -> list[Record]:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if id(jaxpr) not in self.done:
            self.kept.append(jaxpr)
            self.done[id(jaxpr)] = [r for eqn in jaxpr.eqns for r in self.equation(eqn)]
        return self.done[id(jaxpr)]

    def equation(self, eqn: Any) -> list[Record]:
        name, p = eqn.primitive.name, eqn.params
        bodies = [b for x in p.values() for b in _bodies(x)]
        known, times = True, 1
        if name == "pallas_call" or not bodies or name.startswith("scatter"):
            return self.leaf(eqn)
        if name == "scan":
            times = p["length"]
        elif name == "shard_map":
            times = math.prod(p["mesh"].shape[a] for a in p["manual_axes"])
        elif name == "cond":
            bodies = [max(bodies, key=lambda b: sum(r.flops * r.times for r in self.records(b)))]
        elif name == "custom_linear_solve":
            bodies = [p["jaxprs"].solve]
        return [_under(r, eqn, times) for b in bodies for r in self.records(b)] if known else []

    def leaf(self, eqn: Any) -> list[Record]:
        flops = costs.flops_of(eqn)
        scope = _compat.scope_path(eqn)
        read, written = sum(map(costs.nbytes, eqn.invars)), sum(map(costs.nbytes, eqn.outvars))
        if flops == 0 and eqn.primitive.name in costs.VIEWS:
            return []
        dtypes = [v.aval.dtype for v in eqn.invars or eqn.outvars if hasattr(v.aval, "dtype")]
        return [
            Record(
                op=eqn.primitive.name,
                scope=scope,
                phase=scopes.phase(scope),
                dtype=str(max(dtypes, key=lambda d: d.itemsize)) if dtypes else "",
                flops=flops or 0,
                read=read,
                written=written,
                times=1,
                known=flops is not None,
            )
        ]


def _under(r: Record, eqn: Any, times: int) -> Record:
    scope = _compat.scope_path(eqn)
    scope = f"{scope}/{r.scope}" if scope and r.scope else scope or r.scope
    return dataclasses.replace(r, scope=scope, phase=scopes.phase(scope), times=r.times * times)


def _bodies(param: Any) -> list[Any]:
    if isinstance(param, jex.Jaxpr | jex.ClosedJaxpr):
        return [param]
    if isinstance(param, tuple | list):
        return [p for p in param if isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)]
    return []
