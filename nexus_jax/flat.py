"""A loss as one flat list of equations: calls inlined, what nothing needs dropped, values numbered.

Custom derivatives, loops, branches, and what the author put under ``jax.checkpoint`` stay one equation each.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from nexus_jax import _compat

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A program of arrays. Its first inputs are its constants.

    Attributes:
        jaxpr: flat, without constants of its own.
        consts: the constants, the first of its inputs.
    """

    jaxpr: Any
    consts: tuple[Any, ...]

    @property
    def eqns(self) -> list[Any]:
        return self.jaxpr.eqns

    @functools.cached_property
    def number(self) -> dict[Any, int]:
        """A number for each variable: the inputs, then what the equations make, in order."""
        variables = [*self.jaxpr.invars, *(v for eqn in self.eqns for v in eqn.outvars)]
        return {v: n for n, v in enumerate(variables)}

    @functools.cached_property
    def variables(self) -> list[Any]:
        return list(self.number)

    @functools.cached_property
    def digest(self) -> str:
        """Equal for equal programs, in every process."""
        kinds = [str(v.aval) for v in self.jaxpr.invars]
        outs = [str(v) if isinstance(v, jex.Literal) else self.number[v] for v in self.jaxpr.outvars]
        return digest_of([kinds, outs, structure(self.eqns, self.number)])


def flatten(closed: Any) -> Flat:
    """The flat program of a closed jaxpr."""
    jaxpr = _compat.without_constvars(closed.jaxpr if hasattr(closed, "jaxpr") else closed)
    consts = tuple(closed.consts)
    eqns: list[Any] = []
    env = {v: v for v in jaxpr.invars}
    outs = _inline(jaxpr, env, None, eqns)
    return Flat(live(jaxpr.replace(eqns=eqns, outvars=outs)), consts)


def _inline(jaxpr: Any, env: dict[Any, Any], outer: Any, eqns: list[Any]) -> list[Any]:
    read = lambda atom: atom if isinstance(atom, jex.Literal) else env[atom]
    for eqn in jaxpr.eqns:
        source = eqn.source_info
        if outer is not None:
            source = source.replace(name_stack=outer + source.name_stack)
        body = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        invars = [read(v) for v in eqn.invars]
        if body is not None and not _constants(body):
            inner = getattr(body, "jaxpr", body)
            inside = dict(zip(inner.invars, invars, strict=True))
            outs = _inline(inner, inside, source.name_stack, eqns)
            env.update(zip(eqn.outvars, outs, strict=True))
            continue
        outvars = [v if isinstance(v, jex.DropVar) else jex.Var(v.aval) for v in eqn.outvars]
        env.update(zip(eqn.outvars, outvars, strict=True))
        eqns.append(eqn.replace(invars=invars, outvars=outvars, source_info=source))
    return [read(v) for v in jaxpr.outvars]


def copied(program: Flat, read: Callable[[Any], Any], eqns: list[Any]) -> list[Any]:
    """Add a program's equations to others, with results of their own.

    Args:
        read: what stands for an input; asked each time that one is used.
        eqns: these are added to them.

    Returns:
        What stands for its results.
    """
    made: dict[Any, Any] = {}
    value = lambda v: v if isinstance(v, jex.Literal) else made[v] if v in made else read(v)
    for eqn in program.eqns:
        ins = [value(v) for v in eqn.invars]
        outs = [v if isinstance(v, jex.DropVar) else jex.Var(v.aval) for v in eqn.outvars]
        made.update(zip(eqn.outvars, outs, strict=True))
        eqns.append(eqn.replace(invars=ins, outvars=outs))
    return [value(v) for v in program.jaxpr.outvars]


def _constants(body: Any) -> bool:
    return bool(getattr(getattr(body, "jaxpr", body), "constvars", ()))


def live(jaxpr: Any) -> Any:
    """The program without what nothing needs."""
    used = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in used for v in eqn.outvars):
            kept.append(eqn)
            used.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    effects = set().union(*(eqn.effects for eqn in kept)) if kept else set()
    return jaxpr.replace(eqns=kept[::-1], effects=effects)


def part(flat: Flat, eqns: Sequence[Any], outs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Some of a program's equations as a jaxpr that returns ``outs``, and the variables that it takes."""
    made: set[Any] = set()
    taken: dict[Any, None] = {}
    for eqn in eqns:
        taken.update((v, None) for v in eqn.invars if not isinstance(v, jex.Literal) and v not in made)
        made.update(eqn.outvars)
    taken.update((v, None) for v in outs if v not in made)
    effects = set().union(*(e.effects for e in eqns)) if eqns else set()
    ins = list(taken)
    return flat.jaxpr.replace(invars=ins, outvars=list(outs), eqns=list(eqns), effects=effects), ins


def structure(eqns: Sequence[Any], number: dict[Any, int]) -> list[Any]:
    """What equations do, with the given names for what they take: equal lists, equal computations."""
    local = dict(number)
    found = []
    for eqn in eqns:
        ins = [
            (str(v), str(v.aval)) if isinstance(v, jex.Literal) else local.setdefault(v, len(local)) for v in eqn.invars
        ]
        for v in eqn.outvars:
            local.setdefault(v, len(local))
        found.append((eqn.primitive.name, ins, [str(v.aval) for v in eqn.outvars], parameters(eqn)))
    return found


_PRINTED: dict[int, tuple[Any, str]] = {}


def parameters(eqn: Any) -> str:
    """An equation's parameters as text, without addresses. Programs in them are printed once."""
    return ", ".join(f"{name}={_printed(value)}" for name, value in sorted(eqn.params.items()))


def _printed(value: Any) -> str:
    if isinstance(value, str | int | float | bool | type(None)):
        return repr(value)
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__qualname__", type(value).__name__)
    known = _PRINTED.get(id(value))
    if known is None or known[0] is not value:
        if len(_PRINTED) > 4096:
            _PRINTED.clear()
        known = (value, re.sub(r" at 0x[0-9a-f]+|id=\d+", "", str(value)))
        _PRINTED[id(value)] = known
    return known[1]


def digest_of(found: Any) -> str:
    """A short name: equal for equal structures, in every process."""
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def avals(flat: Flat) -> list[jax.ShapeDtypeStruct]:
    """What a program takes, as JAX wants to be shown it."""
    return like(flat.jaxpr.invars)


def like(atoms: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """What variables stand for, as JAX wants to be shown it: where axes of a mesh are explicit, with its sharding."""
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=_explicit(v.aval)) for v in atoms]


def _explicit(aval: Any) -> Any:
    sharding = getattr(aval, "sharding", None)
    return sharding if any(axis is not None for axis in getattr(sharding, "spec", None) or ()) else None


def filling(fun: Callable[..., Any], arrays: Sequence[Any], moving: Sequence[int]) -> Callable[..., Any]:
    """``fun`` as a function of its arguments ``moving`` alone; the others are as in ``arrays``."""

    def of(*values: Any) -> Any:
        filled = list(arrays)
        for i, x in zip(moving, values, strict=True):
            filled[i] = x
        return fun(*filled)

    return of


def jvp_by(
    fun: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any], moving: Sequence[int]
) -> tuple[Any, Any]:
    """``jax.jvp`` by the arguments ``moving`` alone; the tangents of the others are not looked at."""
    return jax.jvp(filling(fun, primals, moving), [primals[i] for i in moving], [tangents[i] for i in moving])


def is_floating(x: Any) -> bool:
    """Whether an array holds inexact numbers (keys and integers do not)."""
    dtype = getattr(x, "dtype", None)
    return isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.inexact)
