"""Run a flat program as a plan says: stretches as they are, and boundaries under `jax.checkpoint` with names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from nexus_jax import _compat
from nexus_jax import flat as flats
from nexus_jax.flat import Flat
from nexus_jax.planner.needs import name_equation, nameable
from nexus_jax.policy.places import OFFLOAD, SAVE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Equations ``start`` to ``stop`` of the flat program.

    Attributes:
        boundary: whether it is one; else it runs as the user wrote it.
        save, offload: results of its equations, by number among them, that a boundary keeps.
        inside: how each step is run, of a segment that is one scan and no boundary.
    """

    start: int
    stop: int
    boundary: bool
    save: tuple[int, ...] = ()
    offload: tuple[int, ...] = ()
    inside: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a segment goes from start={self.start} to stop={self.stop}: write 0 <= start < stop.")
        if not self.boundary and (self.save or self.offload):
            raise ValueError(f"segment {self.start}: only a boundary keeps values; write boundary = true.")
        if self.inside and (self.boundary or self.stop != self.start + 1):
            raise ValueError(f"segment {self.start}: only a scan alone has segments inside, and it is no boundary.")
        both = sorted(set(self.save) & set(self.offload))
        if both:
            raise ValueError(f"segment {self.start}: value {both[0]} is both saved and offloaded.")


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
            if flat.eqns[s.start].primitive.name != "scan":
                raise ValueError(
                    f"segment {s.start} has segments inside, and is {flat.eqns[s.start].primitive.name}, no scan."
                )
            check(_body(flat.eqns[s.start]), s.inside)
    if at != len(flat.eqns):
        raise ValueError(f"the segments end at equation {at}, and the program has {len(flat.eqns)}.")


def rewritten(flat: Flat, segments: Sequence[Segment]) -> Callable[..., list[Any]]:
    """The flat program as a function of its inputs (constants too) that runs as the segments say."""
    check(flat, segments)
    used = _used_after(flat, segments)
    parts = [_part(flat, s, outs) for s, outs in zip(segments, used, strict=True)]

    def run(*given: Any) -> list[Any]:
        env = dict(zip(flat.jaxpr.invars, given, strict=True))
        for segment, outs, (jaxpr, ins) in zip(segments, used, parts, strict=True):
            args = [env[v] for v in ins]
            if segment.boundary:
                made = _compat.bind_checkpoint(jaxpr, (), args, _offloading() if segment.offload else _SAVING)
            else:
                made = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*args)
            env.update(zip(outs, made, strict=True))
        return [v.val if isinstance(v, jex.Literal) else env[v] for v in flat.jaxpr.outvars]

    return run


_SAVING = jax.checkpoint_policies.save_only_these_names(SAVE)


@functools.cache
def _offloading() -> Any:
    _compat.require_offload_policies()
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[SAVE],
        names_which_can_be_offloaded=[OFFLOAD],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _used_after(flat: Flat, segments: Sequence[Segment]) -> list[list[Any]]:
    """What each segment makes that something after it takes."""
    wanted = {v for v in flat.jaxpr.outvars if not isinstance(v, jex.Literal)}
    found = []
    for s in reversed(segments):
        found.append([v for v in numbered(flat, s) if v in wanted])
        for eqn in flat.eqns[s.start : s.stop]:
            wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return found[::-1]


def _body(scan: Any) -> Flat:
    return flats.flatten(scan.params["jaxpr"])


def _scan(eqn: Any, inside: Sequence[Segment]) -> Any:
    """A scan whose steps run as the segments say."""
    old, body = eqn.params["jaxpr"], _body(eqn)
    closed = jax.make_jaxpr(rewritten(body, inside))(*flats.avals(body))
    return eqn.replace(params={**eqn.params, "jaxpr": closed if type(old) is type(closed) else closed.jaxpr})


def _part(flat: Flat, segment: Segment, outs: list[Any]) -> tuple[Any, list[Any]]:
    eqns = flat.eqns[segment.start : segment.stop]
    if segment.inside:
        eqns = [_scan(eqns[0], segment.inside)]
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
