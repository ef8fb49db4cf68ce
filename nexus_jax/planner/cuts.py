"""Where a program may be cut into boundaries: where little crosses, and something heavy lies between.

What crosses a cut is kept by construction. So the good places are the narrow ones: between the halves of a transformer
layer, where only the residual stream crosses; between the layers of a perceptron, where it is not wide.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jax.extend import core as jex

from nexus_jax.flat import Flat
from nexus_jax.planner.prices import is_fused

_HEAVY = 1 / 50  # of the heaviest equation
_NARROWER = 2 / 3  # a cut is not worth having between two that are so much narrower
_NEAR = 150  # equations


def crossing(flat: Flat, sizes: Sequence[int]) -> list[int]:
    """Bytes alive before each equation and after the last; inputs, and what is fused from them alone, not counted."""
    given = set(range(len(flat.jaxpr.invars)))
    for eqn in flat.eqns:
        if is_fused(eqn) and all(isinstance(v, jex.Literal) or flat.number[v] in given for v in eqn.invars):
            given.update(flat.number[v] for v in eqn.outvars)
    last: dict[int, int] = {}
    for i, eqn in enumerate(flat.eqns):
        for v in eqn.invars:
            if not isinstance(v, jex.Literal):
                last[flat.number[v]] = i
    for v in flat.jaxpr.outvars:
        if not isinstance(v, jex.Literal):
            last[flat.number[v]] = len(flat.eqns)
    change = [0] * (len(flat.eqns) + 2)
    for i, eqn in enumerate(flat.eqns):
        for v in eqn.outvars:
            n = flat.number[v]
            if n not in given and n in last:
                change[i + 1] += sizes[n]
                change[last[n] + 1] -= sizes[n]
    found, now = [], 0
    for step in change[: len(flat.eqns) + 1]:
        now += step
        found.append(now)
    return found


def cuts(flat: Flat, sizes: Sequence[int], costs: Sequence[int]) -> list[int]:
    """Positions to cut at, 0 and the end among them.

    Args:
        sizes: bytes of each value.
        costs: of each equation.
    """
    end = len(flat.eqns)
    enough = max(costs, default=0) * _HEAVY
    heavy = [cost > 0 and cost >= enough for cost in costs]
    width = crossing(flat, sizes)
    narrow = _prominent([p for p in _narrow(width, heavy) if 0 < p < end], width)
    found, last = [0], 0
    for p in narrow:
        if any(heavy[last:p]):
            found.append(p)
            last = p
    while len(found) > 1 and not any(heavy[found[-1] :]):
        found.pop()
    return [*found, end]


def _prominent(narrow: Sequence[int], width: Sequence[int]) -> list[int]:
    """The cuts, without those that have a much narrower one near on both sides."""
    found = []
    for i, p in enumerate(narrow):
        enough = width[p] * _NARROWER
        before, after = (narrow[j] for j in range(i - 1, -1, -1)), (narrow[j] for j in range(i + 1, len(narrow)))
        near = lambda places, p=p: itertools.takewhile(lambda q: abs(q - p) <= _NEAR, places)
        left = next((q for q in near(before) if width[q] <= enough), None)
        right = next((q for q in near(after) if width[q] <= enough), None)
        if left is None or right is None or right - left > _NEAR:
            found.append(p)
    return found


def _narrow(width: Sequence[int], heavy: Sequence[bool]) -> list[int]:
    """The ends of local minima of the width, and in every flat stretch the places right before something heavy."""
    found, start = [], 0
    for p in range(1, len(width) + 1):
        if p < len(width) and width[p] == width[start]:
            continue
        falls = start == 0 or width[start - 1] > width[start]
        rises = p == len(width) or width[p] > width[start]
        found += [q for q in range(start + 1, p - 1) if heavy[q]]
        if falls and rises:
            found.append(p - 1)
        start = p
    return found
