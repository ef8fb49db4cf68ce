"""A scan over layers as a stretch of its own: what its body keeps, it keeps for every step.

One choice holds for all steps, of one layer or of a few at once (:mod:`groups`), some of which may keep more than others.
Each step's carry is kept anyway, on the device or on the host; what one step makes again is there once, and so is a copy
of what it has kept. What leaves and comes back does so within its step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from nexus_jax.flat import Flat, is_floating
from nexus_jax.offloading.loops import Loop, loop_of
from nexus_jax.planner import groups
from nexus_jax.planner.allocate import Option, Path, price_of
from nexus_jax.planner.options import Way, Ways, undominated
from nexus_jax.planner.spans import Shape

_MOST = 256  # options of a scan, for each number of steps at once
_FEW = 3  # values of a carry
_BOUNDS = 64  # the same of bounds, each a linear program


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """What a scan does at each step, or at a few, as a program.

    Attributes:
        loop: the scan.
        group: how many of its steps are taken at once.
        differentiated: which of the body's inputs are.
        results: which of its results the backward pass starts from.
    """

    loop: Loop
    group: int
    flat: Flat
    differentiated: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def carry(self) -> range:
        """Which of its inputs are carried."""
        return range(self.loop.constants, self.loop.constants + self.loop.carried)

    @property
    def stacks(self) -> list[Any]:
        """The types of what its steps read slices of, and have gradients of: a sum of one for each step."""
        inputs = self.flat.jaxpr.invars
        return [inputs[i].aval for i in self.differentiated if i >= self.carry.stop]

    @property
    def steps(self) -> int:
        """How often it runs."""
        return self.loop.steps // self.group


def bodies(flat: Flat, differentiated: Sequence[int], grouped: bool = True) -> dict[int, list[Body]]:
    """The scans of a program that can be opened, by the position of their equation; one step and, ``grouped``, several."""
    active = {flat.jaxpr.invars[i] for i in differentiated}
    found = {}
    for i, eqn in enumerate(flat.eqns):
        ins = [not isinstance(v, jex.Literal) and v in active for v in eqn.invars]
        if any(ins):
            several = _bodies(eqn, ins, grouped)
            active.update(v for v in eqn.outvars if is_floating(v.aval))
            if several:
                found[i] = several
    return found


def _bodies(eqn: Any, active: list[bool], grouped: bool) -> list[Body]:
    loop = loop_of(eqn)
    if loop is None or eqn.effects:
        return []
    one = _body(loop, 1, active)
    if one is None:
        return []
    several = (_body(loop, n, active) for n in groups.sizes(loop.steps) if n > 1 and grouped)
    return [one, *(body for body in several if body is not None)]


def _body(loop: Loop, group: int, active: list[bool]) -> Body | None:
    flat = groups.body_of(loop, group)
    if flat.consts or any(e.effects for e in flat.eqns) or not flat.eqns:
        return None
    # what is carried is active as soon as anything is
    carry = range(loop.constants, loop.constants + loop.carried)
    ins = tuple(
        i
        for i, v in enumerate(flat.jaxpr.invars)
        if is_floating(v.aval) and (active[i] or (i in carry and any(active)))
    )
    outs = tuple(i for i, v in enumerate(flat.jaxpr.outvars) if not isinstance(v, jex.Literal) and is_floating(v.aval))
    return Body(loop, group, flat, ins, outs) if ins and outs else None


def ways(shape: Shape, plain: Option, several: Sequence[Any], unit: int) -> Ways:
    """The options of a scan.

    Args:
        shape, plain: of the stretch that is the scan alone.
        several: models of its body, of one step and of several at once.
        unit: of the ticks outside.
    """
    found, bounds = [plain], [plain]
    for model in several:
        for carry in _subsets(_movable(model)):
            found += _options(shape, model, unit, carry)
            bounds += _bounds(shape, model, unit, carry)
    return Ways(undominated(found), undominated(bounds))


def of_path(shape: Shape, model: Any, path: Path, unit: int, carry: tuple[int, ...] = ()) -> Option:
    """A scan whose steps run as a path of its body's model; ``carry`` is what of it waits on the host."""
    body, spans = model.body, model.spans_of
    away = _bytes_of(model, carry)
    summed = (body.group - 1) * sum(map(spans.price.sum_of, body.stacks))
    ticks = path.ticks + _late(model, away, path)
    return Option(
        kept=_outside(shape, model) + body.steps * (path.peak - away),
        working=shape.transient + price_of([option for _, option in path.steps])[0] + away,
        ticks=-(-body.steps * (ticks * spans.unit + summed) // unit),
        what=Way(None, inside=path, group=body.group, carry=carry),
        host=body.steps * (path.host + away),
    )


def _options(shape: Shape, model: Any, unit: int, carry: tuple[int, ...]) -> list[Option]:
    paths = [model.frontier.path(at) for at in _some(len(model.frontier.peaks), _MOST)]
    chosen = lambda path: carry or any(option.what.choice is not None for _, option in path.steps)
    found = [of_path(shape, model, path, unit, carry) for path in paths if chosen(path)]
    return [option for option in found if option.host <= model.spans_of.price.host]


def _bounds(shape: Shape, model: Any, unit: int, carry: tuple[int, ...]) -> list[Option]:
    steps, frontier, away = model.body.steps, model.frontier, _bytes_of(model, carry)
    outside, late = _outside(shape, model) - steps * away, _late(model, away)
    # all that a step keeps is there before its backward pass begins
    working = lambda kept: shape.transient + max(model.least, kept) + away
    found = []
    for below, above in itertools.pairwise(frontier.peaks[at] for at in _some(len(frontier.peaks), _BOUNDS)):
        least = frontier.bound(above - 1) + late
        found.append(_bound(outside + steps * below, working(below), steps * least * model.spans_of.unit // unit))
    most = frontier.peaks[-1]
    return [*found, _bound(outside + steps * most, working(most), steps * late * model.spans_of.unit // unit)]


def _outside(shape: Shape, model: Any) -> int:
    """Bytes that a scan keeps whatever its steps do: its results, and the carry of each step."""
    return shape.crossing + model.body.steps * sum(model.spans_of.sizes[i] for i in model.carried)


def _subsets(carry: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What of the carry may leave together: any of a few, and all or nothing of many."""
    counts = range(len(carry) + 1) if len(carry) <= _FEW else (0, len(carry))
    return [some for n in counts for some in itertools.combinations(carry, n)]


def _movable(model: Any) -> tuple[int, ...]:
    """Which of what the steps carry can wait on the host."""
    body, price = model.body, model.spans_of.price
    inputs = body.flat.jaxpr.invars
    return tuple(i - body.carry.start for i in model.carried if price.is_movable(inputs[i].aval))


def _bytes_of(model: Any, carry: tuple[int, ...]) -> int:
    return sum(model.spans_of.sizes[model.body.carry.start + n] for n in carry)


def _late(model: Any, away: int, path: Path | None = None) -> int:
    """Ticks that a step loses to its carry's way to the host and back, beside what else moves; at least, without a path.

    It leaves as the step begins. It comes back beside the backward pass of all but the first stretch, which needs it.
    """
    spans = model.spans_of
    whole = spans.price.link(sum(spans.picoseconds), spans.unit) if away else None
    if whole is None:
        return 0
    if path is None:
        return max(0, whole.ticks(away) - 1)  # of what else moves, a part of a tick may have been paid for
    edge = path.steps[0][0]
    after = spans.price.link(sum(spans.picoseconds[model.span(edge.start, edge.stop).stop :]), spans.unit)
    link = dataclasses.replace(whole, hidden_back=after.hidden_back, already=path.host)
    return link.ticks(away) - link.ticks(0)


def _some(count: int, most: int) -> list[int]:
    """Numbers below ``count``, evenly; the first and the last among them."""
    return sorted({round(k * (count - 1) / min(most, count)) for k in range(min(most, count) + 1)})


def _bound(kept: int, working: int, ticks: int) -> Option:
    return Option(kept=kept, working=working, ticks=ticks, what=Way(None))


def flattened(options: Sequence[Option]) -> tuple[Option, ...]:
    """Options of which only what they keep and time count."""
    return undominated([dataclasses.replace(o, working=0) for o in options])
