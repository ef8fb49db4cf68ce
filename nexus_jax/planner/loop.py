"""From the model's frontier to a compiled step that fits: predict, compile, correct, a few times.

The frontier orders plans by the model's peak. What a compiler makes of a plan differs from that by what it fuses and
when it runs things; :mod:`nexus_jax.peak` predicts most of that without a compile, and compiling settles the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping

COMPILES = 6  # at most, the step without a plan among them
NEAR = 0.98  # of the budget: nearer is not looked for
_MARGIN = 0.01  # of the budget, after two plans that did not fit; four times as much after three


@dataclasses.dataclass(frozen=True)
class Trial:
    """A plan that was compiled: its place on the frontier, what was predicted, and what it takes."""

    at: int
    predicted: int
    compiled: int


@dataclasses.dataclass(frozen=True)
class Found:
    """The best plan that fits (None if none does), and every plan that was compiled."""

    best: Trial | None
    trials: tuple[Trial, ...]


def search(
    count: int,
    budget: int,
    predict: Callable[[int], int],
    compiled: Callable[[int], int],
    offset: int = 0,
    compiles: int = COMPILES - 1,
    above: int = -1,
    key: Callable[[int], Hashable] = lambda at: at,
    as_fast: Callable[[int], int] = lambda at: at,
) -> Found:
    """The fastest of ``count`` plans, least memory first, whose compiled step is within the budget.

    Args:
        predict: bytes of a plan, without a compile.
        compiled: bytes of a plan.
        offset: how much more a compiled step takes than predicted, as far as is known before one is compiled; then it is
            taken from the plans that were, between two of them in proportion.
        compiles: of how many different plans ``compiled`` may be asked.
        above: only plans after this one are worth a compile: something that fits is as fast as it.
        key: equal for plans that are the same step.
        as_fast: the last plan that is hardly faster than a given one: no compile is spent on it once that one fits.

    Returns:
        Plan 0 has been compiled where nothing else fits, unless there is something ``above``.

    Example:
        >>> search(100, 250, predict=lambda at: 3 * at, compiled=lambda at: 3 * at + 20).best
        Trial(at=76, predicted=228, compiled=248)
    """
    trials: dict[int, Trial] = {}
    low, high = above, count  # the last that fits, the first that does not
    while (asked := len({key(at) for at in trials})) < compiles and high - low > 1:
        last = asked == compiles - 1
        over = len({key(t.at) for t in trials.values() if t.compiled > budget})
        aim = budget * (1 - _MARGIN * max(0, over - 1) ** 2)
        expected = lambda i: predict(i) + _offset(trials, i, offset)
        at = 0 if last and low < 0 else _largest(low + 1, high - 1, lambda i: expected(i) <= aim)
        if at is None:
            if low >= 0:
                break  # nothing faster is predicted to fit
            at = 0
        trials[at] = Trial(at, predict(at), compiled(at))
        if trials[at].compiled <= budget:
            low = as_fast(at)
            if trials[at].compiled >= NEAR * budget:
                break
        else:
            high = at
    fitting = [t for t in trials.values() if t.compiled <= budget]
    return Found(max(fitting, key=lambda t: t.at, default=None), tuple(trials.values()))


def _offset(trials: Mapping[int, Trial], at: int, unknown: int) -> float:
    """How much more a plan will take than predicted, by the compiled ones next to it."""
    off = lambda t: t.compiled - t.predicted
    below = max((t for t in trials.values() if t.at <= at), key=lambda t: t.at, default=None)
    beyond = min((t for t in trials.values() if t.at > at), key=lambda t: t.at, default=None)
    if below is None or beyond is None:
        near = below or beyond
        return unknown if near is None else off(near)
    return off(below) + (off(beyond) - off(below)) * (at - below.at) / (beyond.at - below.at)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number from ``low`` to ``high`` that fits, if smaller ones do too.

    Where ``low`` does not, though more is only predicted to take more, those a power of two beyond it are asked; None if
    none of them fits.
    """
    found = next((at for at in _beyond(low, high) if fits(at)), None)
    if found is None:
        return None
    low = found
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _beyond(low: int, high: int) -> Iterator[int]:
    """``low``, and what is 1, 2, 4, ... beyond it, up to ``high``."""
    step = 0
    while low + step <= high:
        yield low + step
        step = 2 * step or 1
