"""What the steps of a scan keep: as in layers that are written out, what is cheap to make again is not kept.

In the forward pass a scan stacks less, and a second scan right after it, which nobody runs there, makes the rest of it.
In the backward pass that second scan is taken into the steps that need what it makes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
from jax.extend import core as jex

from nexus_jax.flat import flatten, live
from nexus_jax.offloading import keep as keeping
from nexus_jax.offloading.loops import Loop, loop_of
from nexus_jax.offloading.stages import variables
from nexus_jax.policy.rules import nbytes


class _Renamed:
    """A program that is written anew, in which some variables are others now."""

    def __init__(self) -> None:
        self.eqns: list[Any] = []
        self.now: dict[Any, Any] = {}

    def read(self, atom: Any) -> Any:
        return atom if isinstance(atom, jex.Literal) else self.now.get(atom, atom)

    def see(self, eqn: Any) -> Any:
        """An equation of the old program, with the names of the new one."""
        return eqn.replace(invars=[self.read(v) for v in eqn.invars])

    def add(self, made: _Scan, results: Sequence[Any]) -> None:
        """An equation, and which variables of the old program its results are."""
        results = [(v, atom) for v, atom in zip(results, made.results, strict=True) if v is not atom]
        names: dict[Any, Any] = {}
        for v, atom in results:
            if not isinstance(atom, jex.Literal) and atom in made.eqn.outvars:
                names.setdefault(atom, v)
        self.eqns.append(made.eqn.replace(outvars=[names.get(v, v) for v in made.eqn.outvars]))
        for v, atom in results:
            now = atom if isinstance(atom, jex.Literal) else names.get(atom, atom)
            if now is not v:
                self.now[v] = now


def opened(
    jaxpr: Any, outs: Sequence[Any], leaves: Sequence[Any], fixed: Set[Any]
) -> tuple[Any, list[Any], list[Any], dict[Any, None]]:
    """The program with scans that keep less; its ``outs`` and ``leaves`` there; what must be kept to make the leaves again.

    Args:
        jaxpr: a flat forward program; ``outs`` and ``leaves`` are its results.
        outs: what is returned.
        leaves: the residuals of autodiff.
        fixed: those of its inputs that are there anyway: parameters, data.
    """
    wanted = dict.fromkeys(variables(leaves))
    used = {v for eqn in jaxpr.eqns for v in variables(eqn.invars)} | set(variables(outs))
    program, sources = _Renamed(), dict(wanted)
    for old in jaxpr.eqns:
        eqn = program.see(old)
        loop = loop_of(eqn)
        ours = [] if loop is None else [v for v in loop.stacked() if v in wanted and v not in used]
        less = _less(loop, ours, fixed) if loop is not None and ours else None
        if less is None:
            program.eqns.append(eqn)
            continue
        instead, results, remake, kept = less
        program.add(instead, results)
        program.add(remake, ours)
        sources = {v: None for v in sources if v not in ours} | dict.fromkeys(
            variables([program.read(v) for v in kept])
        )
    outs, leaves = ([program.read(v) for v in names] for names in (outs, leaves))
    needed = {program.read(v): None for v in sources}
    return jaxpr.replace(eqns=program.eqns, outvars=[*outs, *leaves]), outs, leaves, needed


def _less(loop: Loop, ours: Sequence[Any], fixed: Set[Any]) -> tuple[_Scan, list[Any], _Scan, list[Any]] | None:
    """The scan that keeps less instead of ``ours`` and what its results are; the one that makes ``ours`` of it; what is kept.

    None if that is not less.
    """
    body = flatten(loop.body)
    if body.consts:
        return None
    operands = dict(zip(body.jaxpr.invars, loop.eqn.invars, strict=True))
    shared, taken = list(operands)[: loop.constants], list(operands)[loop.constants + loop.carried :]
    there = {*shared, *(v for v in taken if operands[v] in fixed)}
    stacks = dict(zip(loop.stacked(), body.jaxpr.outvars[loop.carried :], strict=True))
    wanted = [stacks[v] for v in ours]
    kept = keeping.keep(body.jaxpr, [], wanted, there)
    away = [v for v in kept.variables if v not in there]
    if sum(nbytes(v.aval) for v in away) >= sum(nbytes(v.aval) for v in dict.fromkeys(variables(wanted))):
        return None
    new = [v for v in away if v not in taken]  # of what a step takes, the stack is there already
    others = [v for v in loop.stacked() if v not in ours]
    results = [*body.jaxpr.outvars[: loop.carried], *(stacks[v] for v in others), *new]
    instead = _scan(loop, _runs(body.jaxpr.replace(outvars=results)), loop.eqn.invars, loop.constants, loop.carried)
    made = [jex.Var(v.aval.update(shape=(loop.steps, *v.aval.shape))) for v in new]
    of = operands | dict(zip(new, made, strict=True))
    first, later = ([v for v in kept.variables if (v in shared) is flag] for flag in (True, False))

    def again(*values: Any) -> list[Any]:
        given = dict(zip([*first, *later], values, strict=True))
        return kept.residuals([given[v] for v in kept.variables])

    remake = _scan(loop, again, [of[v] for v in (*first, *later)], len(first), 0)
    if instead is None or remake is None:
        return None
    sources = [v for v in (of[v] for v in kept.variables) if isinstance(v, jex.Literal) or v not in fixed]
    return instead, [*loop.eqn.outvars[: loop.carried], *others, *made], remake, sources


def fused(jaxpr: Any) -> Any:
    """The program in which a scan that carries nothing, and makes cheaply what only other scans take, is part of these."""
    loops = {i: loop for i, eqn in enumerate(jaxpr.eqns) if (loop := loop_of(eqn))}
    makers = {i: loop for i, loop in loops.items() if loop.carried == 0 and keeping.is_cheap(loop.eqn)}
    uses = Counter(v for eqn in jaxpr.eqns for v in variables(eqn.invars))
    uses.update(variables(jaxpr.outvars))
    taken = Counter((v, loop.steps) for loop in loops.values() for _, v in loop.taken())
    source = {
        v: loop
        for loop in makers.values()
        if all(uses[v] == taken[v, loop.steps] for v in loop.stacked())
        for v in loop.stacked()
    }
    program = _Renamed()
    for eqn in map(program.see, jaxpr.eqns):
        loop = loop_of(eqn)
        takes = [] if loop is None else [v for _, v in loop.taken() if v in source]
        together = _together(loop, source) if loop is not None and takes else None
        if together is None:
            program.eqns.append(eqn)
        else:
            program.add(together, eqn.outvars)
    return live(jaxpr.replace(eqns=program.eqns, outvars=[program.read(v) for v in jaxpr.outvars]))


def _together(taker: Loop, source: dict[Any, Loop]) -> _Scan | None:
    """A scan whose steps make themselves what others made for them; None if it cannot be written."""
    first = taker.constants + taker.carried
    slices = [v for _, v in taker.taken()]
    makers = list({id(source[v]): source[v] for v in slices if v in source}.values())
    consts = [*taker.eqn.invars[: taker.constants], *(v for m in makers for v in m.eqn.invars[: m.constants])]
    taken = dict.fromkeys([*(v for v in slices if v not in source), *(v for m in makers for _, v in m.taken())])

    def run(*values: Any) -> list[Any]:
        shared, carry = values[: len(consts)], values[len(consts) : len(consts) + taker.carried]
        env = dict(zip(taken, values[len(consts) + taker.carried :], strict=True))
        at = taker.constants
        for m in makers:
            outs = _runs(m.body)(*shared[at : at + m.constants], *(env[v] for _, v in m.taken()))
            env.update(zip(m.eqn.outvars, outs, strict=True))
            at += m.constants
        return _runs(taker.body)(*shared[: taker.constants], *carry, *(env[v] for v in slices))

    operands = [*consts, *taker.eqn.invars[taker.constants : first], *taken]
    return _scan(taker, run, operands, len(consts), taker.carried)


def _runs(body: Any) -> Callable[..., list[Any]]:
    return jex.jaxpr_as_fun(body if hasattr(body, "consts") else jex.ClosedJaxpr(body, ()))


@dataclasses.dataclass(frozen=True, eq=False)
class _Scan:
    """A scan as JAX writes it.

    Attributes:
        eqn: with variables of its own for what it makes.
        results: what was asked for: of those, twice the same perhaps, or operands that it hands on.
    """

    eqn: Any
    results: list[Any]


def _scan(like: Loop, run: Callable[..., Any], operands: Sequence[Any], constants: int, carried: int) -> _Scan | None:
    """A scan in the order of ``like``; None where JAX adds other equations.

    Args:
        run: a step, of constants, what is carried, and slices; returns what is carried, and slices.
        operands: variables or literals.
    """

    def program(*values: Any) -> Any:
        def step(carry: Any, slices: Any) -> Any:
            outs = run(*values[:constants], *carry, *slices)
            return outs[:carried], outs[carried:]

        carry, taken = list(values[constants : constants + carried]), list(values[constants + carried :])
        order = {k: like.eqn.params[k] for k in ("length", "reverse", "unroll")}
        last, made = jax.lax.scan(step, carry, taken, **order)
        return [*last, *made]

    closed = jax.make_jaxpr(program)(*(v.aval for v in operands))
    if closed.consts or [e.primitive.name for e in closed.jaxpr.eqns] != ["scan"]:
        return None
    [eqn] = closed.jaxpr.eqns
    atoms = dict(zip(closed.jaxpr.invars, operands, strict=True)) | {v: jex.Var(v.aval) for v in eqn.outvars}
    read = lambda v: v if isinstance(v, jex.Literal) else atoms[v]
    new = like.eqn.replace(
        primitive=eqn.primitive,
        params=eqn.params,
        effects=eqn.effects,
        invars=[read(v) for v in eqn.invars],
        outvars=[atoms[v] for v in eqn.outvars],
    )
    return _Scan(new, [read(v) for v in closed.jaxpr.outvars])
