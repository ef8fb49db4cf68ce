"""What each equation of a program computes and moves: a jaxpr read from outside in, calls inlined, loops multiplied out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.extend import core as jex

from nexus_jax import _compat, costs, scopes
from nexus_jax.fusion import Line, traffic
from nexus_jax.loops import trip_count
from nexus_jax.policy.rules import nbytes

Phase = Literal["forward", "backward", "recompute", "transfer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute", "transfer")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One equation, in one place of a program.

    Attributes:
        op: its primitive.
        scope: its name scope, as JAX wrote it; ``path`` is the module in it.
        phase: the part of a step that it belongs to; ``"transfer"`` for copies to and from host memory.
        flops, read, written: of one run; bytes of device memory that the model of :mod:`nexus_jax.fusion` moves.
        fused: ``(read, written)`` where matmuls are fused with what is around them, as on a TPU.
        times: how often one run of the program runs it, on all devices together.
        dtype: the widest type that it takes.
        passes: of a float32 matmul, by its precision: 1, 3 or 6.
        place: where a transfer goes, ``"host"`` or ``"device"``; empty for the rest.
        known: whether its FLOPs are known.
    """

    op: str
    scope: str
    phase: Phase
    flops: int
    read: int
    written: int
    fused: tuple[int, int]
    times: int = 1
    dtype: str = ""
    passes: int = 1
    place: str = ""
    known: bool = True

    @property
    def path(self) -> str:
        return _path(self.scope)


_path = functools.lru_cache(maxsize=2**16)(scopes.module_path)


def records_of(jaxpr: Any) -> tuple[Record, ...]:
    """A record for each equation that costs anything and that the outputs need, in program order."""
    return tuple(_Counter().records(jaxpr, 0))


# --- reading a jaxpr -----------------------------------------------------------------------------------------------

# Equations that run a body once, with its inputs and outputs as theirs: a compiler sees through them.
_CALLS = (_compat.CALLS - {"scan"}) | {"call", "custom_vjp_call", "custom_vjp_call_jaxpr", "composite", "linear_call"}
_CALLS |= {"call_hi_primitive"}  # a checkpoint under jax_remat3
_CHECKPOINTS = {"checkpoint", "remat", "remat2"}

# A part of the step as a number, so that an outer scope and an inner one combine by max().
_ORDER: tuple[Phase, ...] = ("forward", "backward", "recompute")


class _Facts(NamedTuple):
    """What an equation is, wherever it stands."""

    op: str
    scope: str
    order: int  # of its own scope, in _ORDER
    kind: Any
    call: Any = None  # the body that it stands for
    bodies: tuple[tuple[Any, int], ...] = ()  # what it runs, and how often
    flops: int = 0
    moved: tuple[int, int] = (0, 0)
    dtype: str = ""
    passes: int = 1
    place: str = ""
    known: bool = True


@dataclasses.dataclass(slots=True)
class _Flat:
    """A program without calls: its lines with their facts, scopes and phases, and the bytes of its values."""

    lines: list[Line]
    about: list[tuple[_Facts, str, int]]
    sizes: list[int]

    def value(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1


class _Counter:
    """One count. An equation is understood once, and a body that runs in loops counted once, wherever it is used."""

    def __init__(self) -> None:
        self.facts: dict[int, _Facts] = {}
        self.done: dict[tuple[int, int], list[Record]] = {}

    def records(self, jaxpr: Any, order: int) -> list[Record]:
        """The records of a body; its inputs and outputs are in memory."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if (id(jaxpr), order) not in self.done:
            flat = _Flat([], [], [])
            inputs = [flat.value(nbytes(v.aval)) for v in jaxpr.invars]
            outs = self.flatten(flat, jaxpr, "", order, inputs)
            returned = [o for o in outs if isinstance(o, int)]
            moved, fused = (traffic(flat.lines, flat.sizes, returned, fused_matmuls) for fused_matmuls in (False, True))
            self.done[id(jaxpr), order] = [
                r
                for about, apart, together in zip(flat.about, moved, fused, strict=True)
                if apart is not None and together is not None
                for r in self.line(*about, apart, together)
            ]
        return self.done[id(jaxpr), order]

    def flatten(self, flat: _Flat, jaxpr: Any, scope: str, order: int, atoms: Sequence[Any]) -> list[Any]:
        """Append a body's lines; takes and returns values (numbers) and literals."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env = {v: flat.value(nbytes(v.aval)) for v in jaxpr.constvars}
        env.update(zip(jaxpr.invars, atoms, strict=True))
        at = lambda atom: atom if isinstance(atom, jex.Literal) else env[atom]
        for eqn in jaxpr.eqns:
            given = [at(a) for a in eqn.invars]
            facts = self.facts_of(eqn, given)
            inner, later = _joined(scope, facts.scope), max(order, facts.order)
            if facts.call is not None:
                if facts.op in _CHECKPOINTS and later and eqn.params.get("prevent_cse"):
                    barrier = _Facts("optimization_barrier", "", 0, "barrier")
                    given = self.append(flat, barrier, inner, later, given, [_size(flat, a) for a in given])
                made = self.flatten(flat, facts.call, inner, later, given)
            else:
                made = self.append(flat, facts, inner, later, given, [nbytes(v.aval) for v in eqn.outvars], eqn.effects)
            env.update(zip(eqn.outvars, made, strict=True))
        return [at(a) for a in jaxpr.outvars]

    def append(self, flat: _Flat, facts: _Facts, scope: str, order: int, given, sizes, effects=()) -> list[int]:
        outs = [flat.value(size) for size in sizes]
        if facts.kind in ("view", "barrier"):  # a literal is a value of no bytes
            given = [a if isinstance(a, int) else flat.value(0) for a in given]
        ins = tuple(a for a in given if isinstance(a, int))
        flat.lines.append(Line(facts.kind, ins, tuple(outs), order > 0, facts.moved, bool(effects)))
        flat.about.append((facts, scope, order))
        return outs

    def line(
        self, facts: _Facts, scope: str, order: int, moved: tuple[int, int], fused: tuple[int, int]
    ) -> list[Record]:
        """The records of one line: its own, and those of what it runs."""
        found = []
        if facts.flops or any(moved) or any(fused) or not facts.known:
            phase: Phase = "transfer" if facts.place else _ORDER[order]
            found.append(
                Record(
                    op=facts.op,
                    scope=scope,
                    phase=phase,
                    flops=facts.flops,
                    read=moved[0],
                    written=moved[1],
                    fused=fused,
                    dtype=facts.dtype,
                    passes=facts.passes,
                    place=facts.place,
                    known=facts.known,
                )
            )
        for body, times in facts.bodies:
            found += [_within(r, scope, times) for r in self.records(body, order)]
        return found

    # --- one equation --------------------------------------------------------------------------------------------

    def facts_of(self, eqn: Any, given: Sequence[Any]) -> _Facts:
        if eqn.primitive.name == "while":  # its length may be known in one place and not in another
            return self.of_while(eqn, trip_count(eqn, given))
        if id(eqn) not in self.facts:
            self.facts[id(eqn)] = self.understand(eqn)
        return self.facts[id(eqn)]

    def understand(self, eqn: Any) -> _Facts:
        name, p = eqn.primitive.name, eqn.params
        common = _common(eqn)
        bodies = [] if name in costs.KNOWN else _bodies(eqn)
        if name in _CALLS and bodies and len(_inner(bodies[0]).invars) == len(eqn.invars):
            return _Facts(**common, kind="view", call=bodies[0])
        if bodies:
            return _Facts(**common, kind="kernel", **self.runs(name, p, bodies))
        flops = costs.flops_of(eqn)
        place = _place(eqn) if name == "device_put" else ""
        kind = "kernel" if place else costs.kind_of(eqn)
        return _Facts(
            **common,
            kind=kind,
            flops=flops or 0,
            moved=costs.bytes_of(eqn) if kind in ("kernel", "matmul") else (0, 0),
            dtype=costs.dtype_of(eqn),
            passes=costs.passes_of(eqn),
            place=place,
            known=flops is not None,
        )

    def runs(self, name: str, p: dict[str, Any], bodies: list[Any]) -> dict[str, Any]:
        """What an equation with bodies runs, and how often; a body of an unknown one counts once."""
        if name == "scan":
            return {"bodies": ((bodies[0], p["length"]),)}
        if name == "cond":
            return {"bodies": ((max(bodies, key=self.weight), 1),)}
        if name == "shard_map":
            axes = p["manual_axes"] if "manual_axes" in p else p["newly_manual_axes"]
            return {"bodies": ((bodies[0], math.prod(p["mesh"].shape[a] for a in axes)),)}
        if name == "custom_linear_solve":
            return {"bodies": ((p["jaxprs"].solve, 1),)}
        return {"bodies": tuple((b, 1) for b in bodies), "known": name in _CALLS}

    def of_while(self, eqn: Any, times: int | None) -> _Facts:
        steps = 1 if times is None else times
        bodies = ((eqn.params["cond_jaxpr"], steps + 1), (eqn.params["body_jaxpr"], steps))
        return _Facts(**_common(eqn), kind="kernel", bodies=bodies, known=times is not None)

    def weight(self, body: Any) -> tuple[int, int]:
        records = self.records(body, 0)
        return sum(r.flops * r.times for r in records), sum((r.read + r.written) * r.times for r in records)


def _common(eqn: Any) -> dict[str, Any]:
    scope = _compat.scope_path(eqn)
    return {"op": eqn.primitive.name, "scope": scope, "order": _ORDER.index(scopes.phase(scope))}


def _joined(outer: str, inner: str) -> str:
    return f"{outer}/{inner}" if outer and inner else outer or inner


def _size(flat: _Flat, atom: Any) -> int:
    return flat.sizes[atom] if isinstance(atom, int) else 0


def _within(r: Record, scope: str, times: int) -> Record:
    return Record(
        op=r.op,
        scope=_joined(scope, r.scope),
        phase=r.phase,
        flops=r.flops,
        read=r.read,
        written=r.written,
        fused=r.fused,
        times=r.times * times,
        dtype=r.dtype,
        passes=r.passes,
        place=r.place,
        known=r.known,
    )


def _place(eqn: Any) -> str:
    """Where a ``device_put`` between device and host memory goes; empty for every other one."""
    kinds = [getattr(d, "memory_kind", None) or "" for d in eqn.params["devices"]]
    spaces = [[v.aval.memory_space == jax.memory.Space.Host for v in vs] for vs in (eqn.invars, eqn.outvars)]
    to_host = any(spaces[1]) or any(k.endswith("_host") for k in kinds)
    return "host" if to_host and not all(spaces[0]) else "device" if any(spaces[0]) and not to_host else ""


def _inner(body: Any) -> Any:
    return getattr(body, "jaxpr", body)


def _bodies(eqn: Any) -> list[Any]:
    """The programs among an equation's parameters; those that it runs come first."""
    found = []
    for param in eqn.params.values():
        if isinstance(param, _PROGRAMS):
            found.append(param)
        elif isinstance(param, tuple | list):
            found += [p for p in param if isinstance(p, _PROGRAMS)]
    inside = getattr(
        eqn.params.get("_prim"), "jaxpr", None
    )  # jax_remat3's checkpoint is a primitive with a program in it
    return [*found, inside] if isinstance(inside, _PROGRAMS) else found


_PROGRAMS = (jex.Jaxpr, jex.ClosedJaxpr)  # pyright: ignore[reportPrivateImportUsage]
