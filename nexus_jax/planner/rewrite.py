"""Run a flat program as a plan says: stretches as they are, and boundaries under `jax.checkpoint` with names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from nexus_jax import _compat
from nexus_jax import flat as flats
from nexus_jax.flat import Flat
from nexus_jax.offloading import marks, transfer
from nexus_jax.offloading.gradient import differentiated
from nexus_jax.offloading.loops import Loop, loop_of
from nexus_jax.offloading.stages import variables
from nexus_jax.planner import groups
from nexus_jax.planner.needs import name_equation, nameable
from nexus_jax.policy.places import OFFLOAD, SAVE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Equations ``start`` to ``stop`` of the flat program.

    Attributes:
        boundary: whether it is one; else it runs as the user wrote it.
        save, offload: results of its equations, by number among them, that a boundary keeps.
        inside: how each step is run, of a segment that is one scan and no boundary.
        group: how many steps of that scan are run as one; ``inside`` is how.
        carry: which of what that scan carries waits on the host from step to step, by number.
    """

    start: int
    stop: int
    boundary: bool
    save: tuple[int, ...] = ()
    offload: tuple[int, ...] = ()
    inside: tuple[Segment, ...] = ()
    group: int = 1
    carry: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a segment goes from start={self.start} to stop={self.stop}: write 0 <= start < stop.")
        if not self.boundary and (self.save or self.offload):
            raise ValueError(f"segment {self.start}: only a boundary keeps values; write boundary = true.")
        if self.inside and (self.boundary or self.stop != self.start + 1):
            raise ValueError(f"segment {self.start}: only a scan alone has segments inside, and it is no boundary.")
        if self.group < 1 or (self.group > 1 and not self.inside):
            raise ValueError(
                f"segment {self.start}: group = {self.group} is of steps of a scan; write 1 or more, and inside."
            )
        if self.carry and not self.inside:
            raise ValueError(f"segment {self.start}: carry = {list(self.carry)} is of a scan; it has segments inside.")
        both = sorted(set(self.save) & set(self.offload))
        if both:
            raise ValueError(f"segment {self.start}: value {both[0]} is both saved and offloaded.")

    @property
    def moves(self) -> bool:
        """Whether something in it waits on the host."""
        return bool(self.offload or self.carry) or any(s.moves for s in self.inside)


def numbered(flat: Flat, segment: Segment) -> list[Any]:
    """The results of a segment's equations, in order."""
    return [v for eqn in flat.eqns[segment.start : segment.stop] for v in eqn.outvars]


def check(flat: Flat, segments: Sequence[Segment]) -> None:
    """Raise a ``ValueError`` unless the segments are the whole program in order and name values that are there."""
    at = 0
    for s in segments:
        if s.start != at:
            raise ValueError(f"segment {s.start} should start at equation {at}: segments follow one another.")
        at = s.stop
        values = numbered(flat, s)
        for n in (*s.save, *s.offload):
            if not 0 <= n < len(values) or isinstance(values[n], jex.DropVar):
                raise ValueError(f"segment {s.start} keeps value {n}, which is not there: it has {len(values)} values.")
        if s.inside:
            loop = _loop(flat, s)
            body = groups.body_of(loop, s.group)
            check(body, s.inside)
            for n in s.carry:
                if not 0 <= n < loop.carried or not nameable(body.jaxpr.invars[loop.constants + n].aval):
                    raise ValueError(
                        f"segment {s.start}: carry {n} cannot wait on the host: the scan carries {loop.carried} values; "
                        "write numbers of those that are floating-point, from 0."
                    )
    if at != len(flat.eqns):
        raise ValueError(f"the segments end at equation {at}, and the program has {len(flat.eqns)}.")


def rewritten(flat: Flat, segments: Sequence[Segment]) -> Callable[..., list[Any]]:
    """The flat program as a function of its inputs (constants too) that runs as the segments say.

    Where one of them offloads, each is a stage, which what it sends to the host leaves beside the next one and comes back
    beside the one after it (:mod:`nexus_jax.offloading.transfer`).
    """
    check(flat, segments)
    if any(s.moves for s in segments):
        return _moving(flat, _run(flat, segments, marked=True))
    return _run(flat, segments)


def _moving(flat: Flat, run: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A program that marks its stages, differentiated with the copies that they ask for."""

    def staged(arrays: Sequence[Any], moving: Sequence[int]) -> transfer.Forward:
        all_of_them = [True] * len(arrays)
        return transfer.Forward(
            run, arrays, moving=moving, fixed=all_of_them, weights=all_of_them, ahead=_AHEAD, marked=True
        )

    plain = lambda *given: jex.jaxpr_as_fun(jex.ClosedJaxpr(flat.jaxpr, ()))(*given)
    return differentiated(plain, staged, _to_host, _to_device)


def _to_host(x: Any) -> Any:
    return jax.device_put(x, jax.memory.Space.Host)


def _to_device(x: Any) -> Any:
    return jax.device_put(x, jax.memory.Space.Device)


def _run(
    flat: Flat, segments: Sequence[Segment], marked: bool = False, stacks: Collection[Any] | None = None
) -> Callable[..., list[Any]]:
    """The program as a function.

    Args:
        marked: the segments are stages.
        stacks: inputs of which each segment reads slices; its gradients are then made before those of the one before it.
    """
    used = _used_after(flat, segments)
    parts = [_part(flat, s, outs) for s, outs in zip(segments, used, strict=True)]
    if stacks is not None:
        parts = [(groups.in_turn(flat, jaxpr, stacks), ins) for jaxpr, ins in parts]
    ends = [_ends(flat, s, outs) if marked else None for s, outs in zip(segments, used, strict=True)]

    def run(*given: Any) -> list[Any]:
        env = dict(zip(flat.jaxpr.invars, given, strict=True))
        for segment, outs, end, (jaxpr, ins) in zip(segments, used, ends, parts, strict=True):
            args = [env[v] for v in ins]
            if segment.boundary:
                made = _compat.bind_checkpoint(jaxpr, (), args, _KEEPING)
            else:
                made = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*args)
            if end is not None:
                made = end(made)
            env.update(zip(outs, made, strict=True))
        return [v.val if isinstance(v, jex.Literal) else env[v] for v in flat.jaxpr.outvars]

    return run


_KEEPING = jax.checkpoint_policies.save_only_these_names(SAVE, OFFLOAD)
_AHEAD = 1  # what leaves beside the next stage comes back beside it


def _ends(flat: Flat, segment: Segment, outs: Sequence[Any]) -> Callable[[Sequence[Any]], list[Any]]:
    """Marks what a segment hands on."""
    values = numbered(flat, segment)
    away = {values[n] for n in segment.offload}

    def mark(v: Any, x: Any) -> Any:
        if not nameable(v.aval):
            return x
        x = checkpoint_name(x, OFFLOAD) if v in away else x
        return checkpoint_name(x, marks.END)

    return lambda made: [mark(v, x) for v, x in zip(outs, made, strict=True)]


def _used_after(flat: Flat, segments: Sequence[Segment]) -> list[list[Any]]:
    """What each segment makes that something after it takes."""
    wanted = {v for v in flat.jaxpr.outvars if not isinstance(v, jex.Literal)}
    found = []
    for s in reversed(segments):
        found.append([v for v in numbered(flat, s) if v in wanted])
        for eqn in flat.eqns[s.start : s.stop]:
            wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return found[::-1]


def _loop(flat: Flat, segment: Segment) -> Loop:
    eqn = flat.eqns[segment.start]
    loop = loop_of(eqn)
    if loop is None:
        raise ValueError(
            f"segment {segment.start} has segments inside, and is {eqn.primitive.name}, no scan of two steps."
        )
    return loop


def _scan(flat: Flat, segment: Segment, outs: list[Any]) -> tuple[Any, list[Any]]:
    """A scan whose steps run as its segment says."""
    loop = _loop(flat, segment)
    body = groups.body_of(loop, segment.group)
    stacks = body.jaxpr.invars[loop.constants + loop.carried :] if segment.group > 1 else None
    run = _run(body, segment.inside, marked=segment.moves, stacks=stacks)
    away = {loop.constants + n for n in segment.carry}
    step = lambda *given: run(*(checkpoint_name(x, OFFLOAD) if i in away else x for i, x in enumerate(given)))
    eqn = loop.eqn
    ins = list(dict.fromkeys(variables(eqn.invars)))

    def wanted(*given: Any) -> list[Any]:
        env = dict(zip(ins, given, strict=True))
        values = [v.val if isinstance(v, jex.Literal) else env[v] for v in eqn.invars]
        results = loop.run(step, values, segment.group)
        return [x for v, x in zip(eqn.outvars, results, strict=True) if v in outs]

    jaxpr = flats.flatten(jax.make_jaxpr(wanted)(*flats.like(ins))).jaxpr
    return jaxpr.replace(eqns=[e.replace(source_info=eqn.source_info) for e in jaxpr.eqns]), ins


def _part(flat: Flat, segment: Segment, outs: list[Any]) -> tuple[Any, list[Any]]:
    if segment.inside:
        return _scan(flat, segment, outs)
    eqns = flat.eqns[segment.start : segment.stop]
    if segment.boundary:
        values = numbered(flat, segment)
        names = {values[n]: OFFLOAD for n in segment.offload}
        names |= {values[n]: SAVE for n in segment.save}
        names |= {v: SAVE for v in outs if v not in names}  # alive anyway: what a later segment takes
        eqns = [new for eqn in eqns for new in _with_names(eqn, names)]
    return flats.part(flat, eqns, outs)


def _with_names(eqn: Any, names: dict[Any, str]) -> list[Any]:
    outs, extra = [], []
    for v in eqn.outvars:
        if v not in names or not nameable(v.aval):
            outs.append(v)
            continue
        raw = jex.Var(v.aval)
        outs.append(raw)
        extra.append(name_equation(raw, v, names[v], eqn))
    return [eqn.replace(outvars=outs), *extra]
