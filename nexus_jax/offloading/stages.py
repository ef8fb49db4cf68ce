"""Cut a program into stages at its waists: the layers of a model, found without knowing the model.

Where one layer ends and the next begins, few bytes are alive: what flows from layer to layer, and not what a layer
makes for itself. Between such cuts the same operations repeat, which tells a layer from a half of one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from jax.extend import core as jex

from nexus_jax.policy.rules import nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive equations of a program.

    Attributes:
        program: the equations, as a jaxpr of what they use and do not make, and of what they make and others use.
    """

    program: Any

    @property
    def ins(self) -> list[Any]:
        return self.program.invars

    @property
    def outs(self) -> list[Any]:
        return self.program.outvars

    @property
    def made(self) -> set[Any]:
        return {v for eqn in self.program.eqns for v in eqn.outvars}


def stages(jaxpr: Any, cuts: Sequence[int]) -> list[Stage]:
    """The program as stages that begin at equation 0 and at each of ``cuts``."""
    edges = [0, *cuts, len(jaxpr.eqns)]
    last = _last_uses(jaxpr)
    found = []
    for start, stop in itertools.pairwise(edges):
        eqns = jaxpr.eqns[start:stop]
        made = {v for eqn in eqns for v in eqn.outvars}
        ins = dict.fromkeys(v for eqn in eqns for v in variables(eqn.invars) if v not in made)
        outs = [v for eqn in eqns for v in eqn.outvars if last.get(v, -1) >= stop]
        effects = set().union(*(eqn.effects for eqn in eqns))
        found.append(
            Stage(program=jaxpr.replace(constvars=(), invars=[*ins], outvars=outs, eqns=[*eqns], effects=effects))
        )
    return found


def layer_cuts(jaxpr: Any, fixed: Set[Any]) -> list[int]:
    """Where the layers of a forward program begin, the first and what is before it left out.

    Args:
        jaxpr: the program; equations in the order in which the model wrote them.
        fixed: variables that are there all the time (parameters), and do not count.
    """
    alive = _crossing(jaxpr, fixed)
    kinds = [(eqn.primitive.name, *(str(v.aval) for v in eqn.outvars)) for eqn in jaxpr.eqns]
    repeated = _repeated(kinds)
    if repeated is None:
        return _waists(alive)
    start, stop, period = repeated
    widths = [max(alive[i : stop + 1 : period]) for i in range(start, start + period)]
    # Within a layer there may be other waists as narrow, but for some scales: the first is where it begins.
    phase = next(i for i, width in enumerate(widths, start) if width <= 1.05 * min(widths))
    # What is before the first layer goes with it.
    return [i for i in range(phase + period, stop + 1, period) if i < len(jaxpr.eqns)]


def use_cuts(jaxpr: Any, groups: Sequence[Sequence[Any]]) -> list[int]:
    """Where a backward program begins to use each group of variables but the last, in the order of its equations.

    Args:
        groups: those of the stages, first stage first. The backward pass begins with the last one.
    """
    first: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for v in variables(eqn.invars):
            first.setdefault(v, i)
    cuts: list[int] = []
    for group in reversed(groups[:-1]):
        used = [first[v] for v in group if v in first]
        if used and min(used) > (cuts[-1] if cuts else 0):
            cuts.append(min(used))
    return cuts


def variables(atoms: Sequence[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, jex.Literal)]


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in variables(eqn.invars)}
    return last | dict.fromkeys(variables(jaxpr.outvars), len(jaxpr.eqns))


def _crossing(jaxpr: Any, fixed: Set[Any]) -> list[int]:
    """Bytes that an equation at or after each position uses, and one before it made; weights and views of them apart."""
    made = dict.fromkeys(fixed, -1)
    last: dict[Any, int] = {}
    weights = set(fixed)
    for i, eqn in enumerate(jaxpr.eqns):
        used = variables(eqn.invars)
        last |= dict.fromkeys(used, i)
        made |= dict.fromkeys(eqn.outvars, i)
        if all(v in weights for v in used):
            weights |= set(eqn.outvars)
    change = [0] * (len(jaxpr.eqns) + 2)
    for v, i in made.items():
        if v not in weights and last.get(v, -1) > i:
            change[i + 1] += nbytes(v.aval)
            change[last[v] + 1] -= nbytes(v.aval)
    alive = [change[0]]
    for step in change[1 : len(jaxpr.eqns)]:
        alive.append(alive[-1] + step)
    return alive


_WINDOW = 8  # equations on either side in which a waist is the narrowest place


def _waists(alive: Sequence[int]) -> list[int]:
    found: list[int] = []
    for i in range(1, len(alive)):
        near = alive[max(1, i - _WINDOW) : i + _WINDOW + 1]
        if 0 < alive[i] == min(near) and max(near) > alive[i] and (not found or i - found[-1] > _WINDOW):
            found.append(i)
    return found


def _repeated(kinds: Sequence[Any]) -> tuple[int, int, int] | None:
    """Start, stop and period of the longest run in which things repeat at least once; of the shortest period."""
    numbers: dict[Any, int] = {}
    ids = np.array([numbers.setdefault(kind, len(numbers)) for kind in kinds])
    best: tuple[int, int, int] | None = None
    for period in range(1, len(ids) // 2 + 1):
        differ = np.flatnonzero(np.append(ids[:-period] != ids[period:], True))
        lengths = np.diff(differ, prepend=-1) - 1
        run = int(lengths.argmax())
        length = int(lengths[run])
        if length >= period and (best is None or length + period > best[1] - best[0]):
            start = int(differ[run]) - length
            best = (start, start + length + period, period)
    return best
