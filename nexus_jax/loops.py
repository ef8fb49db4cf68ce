"""How often a while loop runs, where its program says so."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

_COMPARISONS = {"lt", "le", "gt", "ge"}


def trip_count(eqn: Any, operands: Sequence[Any]) -> int | None:
    """Steps of a ``while`` that counts: ``i < n`` with ``i = i + k``, where the first ``i``, ``n`` and ``k`` are literals.

    That is what ``fori_loop`` makes; and what a hand-written counting loop looks like.

    Args:
        eqn: the ``while`` equation.
        operands: its operands; a ``Literal`` where the value is known.

    Returns:
        How often the body runs; None where the program does not say it.
    """
    p = eqn.params
    cond, body = (getattr(j, "jaxpr", j) for j in (p["cond_jaxpr"], p["body_jaxpr"]))
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    start = n_cond + n_body
    test = next((e for e in cond.eqns if cond.outvars[0] in e.outvars), None)
    if test is None or test.primitive.name not in _COMPARISONS:
        return None

    def value(atom: Any) -> tuple[int | None, int]:
        """A side of the comparison: its value at first, and what a step adds to it."""
        if isinstance(atom, jex.Literal):
            return _integer(atom), 0
        if atom not in cond.invars:
            return None, 0
        at = cond.invars.index(atom)
        if at < n_cond:
            return _integer(operands[at]), 0
        step = _step(body, at - n_cond, n_body)
        return (None, 0) if step is None else (_integer(operands[start + at - n_cond]), step)

    (left, left_step), (right, right_step) = map(value, test.invars)
    if left is None or right is None:
        return None
    return _steps(test.primitive.name, left - right, left_step - right_step)


def _steps(comparison: str, distance: int, step: int) -> int | None:
    """How often ``distance < 0`` (or ``<=``, ...) holds, while ``distance`` grows by ``step`` each time."""
    if comparison in ("gt", "ge"):
        distance, step = -distance, -step
    if comparison in ("le", "ge"):
        distance -= 1
    if distance >= 0:
        return 0
    return -(distance // step) if step > 0 else None


def _step(body: Any, at: int, n_consts: int) -> int | None:
    """What a step adds to an element of the carry; None where that is not a constant."""
    before, after = body.invars[n_consts + at], body.outvars[at]
    if after is before:
        return 0
    made = next((e for e in body.eqns if after in e.outvars), None)
    if made is None or made.primitive.name not in ("add", "sub"):
        return None
    left, right = made.invars
    if right is before and made.primitive.name == "add":
        left, right = right, left
    if left is not before or not isinstance(right, jex.Literal):
        return None
    added = _integer(right)
    return -added if added is not None and made.primitive.name == "sub" else added


def _integer(atom: Any) -> int | None:
    if (
        not isinstance(atom, jex.Literal)
        or np.ndim(atom.val)
        or not np.issubdtype(np.asarray(atom.val).dtype, np.integer)
    ):
        return None
    return operator.index(np.asarray(atom.val).item())
