"""Which values of a forward pass are kept for the backward pass, so that all that it needs is there or cheap to make.

Autodiff keeps what is convenient: the same numbers in two precisions, a scale repeated over rows, a causal mask of
literals, `1 - tanh(x)**2` beside `tanh(x)`. Compilers make those again rather than keep them, where they see both
passes; where a value leaves for the host they see one. So it is decided here: what elementwise operations, views and
slices make of arguments, of literals, and of what the same layer keeps, is made again in the backward pass.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from typing import Any

from jax.extend import core as jex

from nexus_jax import costs
from nexus_jax.offloading.loops import loop_of
from nexus_jax.offloading.stages import Stage, variables
from nexus_jax.policy.rules import nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What a forward program keeps.

    Attributes:
        variables: kept values, arguments that the backward pass needs among them.
        remake: a jaxpr from those to ``leaves``.
        leaves: the residuals of autodiff, as variables of the program or literals.
    """

    variables: list[Any]
    remake: Any
    leaves: list[Any]

    def residuals(self, kept: Sequence[Any]) -> list[Any]:
        """The values of ``leaves`` from those of ``variables``."""
        made = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.remake, ()))(*kept)
        env = dict(zip(self.remake.outvars, made, strict=True))
        return [v.val if isinstance(v, jex.Literal) else env[v] for v in self.leaves]


def keep(
    jaxpr: Any,
    stages: Sequence[Stage],
    leaves: Sequence[Any],
    fixed: Set[Any],
    needed: dict[Any, None] | None = None,
) -> Kept:
    """Choose what is kept.

    Args:
        jaxpr: a flat forward program (:func:`nexus_jax.flat.flatten`).
        stages: its layers; what is kept in one is not made again from what another keeps.
        leaves: the residuals of autodiff, among its variables.
        fixed: those of its inputs that are there anyway: parameters, data.
        needed: variables that make the residuals, to begin with; the residuals themselves if it is not given.
    """
    needed = dict.fromkeys(variables(leaves)) if needed is None else dict(needed)
    while True:
        sweep = _Sweep(stages or [_whole(jaxpr)], needed, fixed)
        better = sweep.better()
        if not better.keys() - needed.keys():
            break
        needed |= better
    kept = [*dict.fromkeys([*(v for v in jaxpr.invars if v in fixed), *sweep.kept])]
    remake = _between(jaxpr, kept, dict.fromkeys(variables(leaves)))
    used = {v for eqn in remake.eqns for v in variables(eqn.invars)} | set(variables(remake.outvars))
    kept = [v for v in kept if v in used]
    return Kept(variables=kept, remake=remake.replace(invars=kept), leaves=list(leaves))


def _whole(jaxpr: Any) -> Stage:
    return Stage(program=jaxpr)


class _Sweep:
    """One pass over a program: what is there in the backward pass if ``needed`` must be.

    Attributes:
        kept: of ``needed``, what nothing cheap makes, and what a later stage takes in.
    """

    def __init__(self, stages: Sequence[Stage], needed: dict[Any, None], fixed: Set[Any]):
        self.kept: dict[Any, None] = {}
        self.missing: dict[Any, Any] = {}  # what is not there -> the one value that would make it, if one would
        self.stage: dict[Any, int] = {}
        self.always = set(fixed)
        self.crossing = {v for stage in stages[1:] for v in stage.ins}
        self.kept.update((v, None) for v in stages[0].ins if v in needed and v not in fixed)
        for number, stage in enumerate(stages):
            there = {v for v in stage.ins if v in self.kept or v in self.always}
            for eqn in stage.program.eqns:
                self._visit(eqn, there, needed, number)

    def _visit(self, eqn: Any, there: set[Any], needed: dict[Any, None], stage: int) -> None:
        ins = variables(eqn.invars)
        absent = [v for v in dict.fromkeys(ins) if v not in there and v not in self.always]
        cheap = is_cheap(eqn)
        for v in eqn.outvars:
            self.stage[v] = stage
            if cheap and all(i in self.always for i in ins):
                self.always.add(v)
                continue
            if not cheap or absent:
                self.missing[v] = absent[0] if cheap and len(absent) == 1 else None
            if v in needed and (v in self.missing or v in self.crossing):
                self.kept[v] = None
            if v not in self.missing or v in self.kept:
                there.add(v)

    def better(self) -> dict[Any, None]:
        """Values to keep instead: smaller ones that kept ones are made of, and those that several are made of."""
        chains = {v: self._chain(v) for v in self.kept}
        times = Counter(source for chain in chains.values() for source in chain)
        found = {}
        for v, chain in chains.items():
            best = v
            for source in chain:
                smaller, equal = (op(nbytes(source.aval), nbytes(best.aval)) for op in (operator.lt, operator.eq))
                if smaller or (equal and times[source] > 1):
                    best = source
            if best is not v:
                found[best] = None
        return found

    def _chain(self, v: Any) -> list[Any]:
        """What a value is made of, each of the one before, cheaply and of nothing else that is not there.

        Of what the stages before made, only what flows into its own.
        """
        chain, stage = [], self.stage.get(v)
        while self.stage.get(v) == stage and (before := self.missing.get(v)) is not None:
            chain.append(v := before)
        return chain


def is_cheap(eqn: Any) -> bool:
    """Whether an equation costs the backward pass nothing but its time in a kernel that runs anyway."""
    if (loop := loop_of(eqn)) is not None:
        return not eqn.effects and loop.carried == 0 and all(is_cheap(e) for e in loop.body.jaxpr.eqns)
    return not eqn.effects and costs.kind_of(eqn) in ("view", "fused", "slice")


def _between(jaxpr: Any, ins: list[Any], outs: Iterable[Any]) -> Any:
    """The equations of a program that make ``outs`` of ``ins``, as a jaxpr."""
    outs = list(outs)
    used, found = {v for v in outs if v not in set(ins)}, []
    there = set(ins)
    for eqn in reversed(jaxpr.eqns):
        if any(v in used for v in eqn.outvars):
            found.append(eqn)
            used.update(v for v in variables(eqn.invars) if v not in there)
    return jaxpr.replace(constvars=(), invars=ins, outvars=outs, eqns=found[::-1], effects=set())


def latest(jaxpr: Any, late: Iterable[Any]) -> Any:
    """The same program, in which whatever depends on none of the inputs ``late`` runs right before its first use."""
    depends = set(late)
    early: dict[Any, Any] = {}
    eqns: list[Any] = []

    def emit(eqn: Any) -> None:
        pending = [eqn]
        while pending:
            now = pending[-1]
            before = [early[v] for v in variables(now.invars) if v in early]
            if before:
                pending += before
                continue
            pending.pop()
            if any(v in early for v in now.outvars) or now is eqn:
                for v in now.outvars:
                    early.pop(v, None)
                eqns.append(now)

    for eqn in jaxpr.eqns:
        if eqn.effects or any(v in depends for v in variables(eqn.invars)):
            depends.update(eqn.outvars)
            emit(eqn)
        else:
            early.update((v, eqn) for v in eqn.outvars)
    for v in variables(jaxpr.outvars):
        if v in early:
            emit(early[v])
    return jaxpr.replace(eqns=eqns)
