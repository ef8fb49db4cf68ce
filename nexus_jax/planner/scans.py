"""A scan over layers as a stretch of its own: what its body keeps, it keeps for every step.

One choice holds for all steps: to let some layers keep more than others, the scan would have to be cut in two, and slices
of the stacked parameters are copies. Each step's carry is kept anyway; what one step makes again is there once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from nexus_jax import flat as flats
from nexus_jax.flat import Flat, is_floating
from nexus_jax.offloading.loops import Loop, loop_of
from nexus_jax.planner.allocate import Option, Path
from nexus_jax.planner.options import Way, Ways, undominated
from nexus_jax.planner.spans import Shape

_MOST = 256  # options of a scan


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """What a scan does at each step, as a program.

    Attributes:
        loop: the scan.
        differentiated: which of the body's inputs are.
        results: which of its results the backward pass starts from.
    """

    loop: Loop
    flat: Flat
    differentiated: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def carry(self) -> range:
        """Which of its inputs are carried."""
        return range(self.loop.constants, self.loop.constants + self.loop.carried)


def bodies(flat: Flat, differentiated: Sequence[int]) -> dict[int, Body]:
    """The scans of a program that can be opened, by the position of their equation."""
    active = {flat.jaxpr.invars[i] for i in differentiated}
    found = {}
    for i, eqn in enumerate(flat.eqns):
        ins = [not isinstance(v, jex.Literal) and v in active for v in eqn.invars]
        if any(ins):
            body = _body(eqn, ins)
            active.update(v for v in eqn.outvars if is_floating(v.aval))
            if body is not None:
                found[i] = body
    return found


def _body(eqn: Any, active: list[bool]) -> Body | None:
    loop = loop_of(eqn)
    if loop is None or eqn.effects:
        return None
    flat = flats.flatten(eqn.params["jaxpr"])
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
    return Body(loop, flat, ins, outs) if ins and outs else None


def ways(shape: Shape, plain: Option, body: Body, model: Any, unit: int) -> Ways:
    """The options of a scan.

    Args:
        shape, plain: of the stretch that is the scan alone.
        model: of its body, whose frontier is that of bytes kept and time (:func:`flattened`).
        unit: of the ticks outside.
    """
    steps, sizes, inner = body.loop.steps, model.spans_of.sizes, model.spans_of.unit
    carried = sum(sizes[i] for i in body.carry if i in body.differentiated)
    outside = shape.crossing + steps * carried
    frontier = model.frontier
    found, bounds = [plain], [plain]
    count = len(frontier.peaks)
    for at in sorted({round(k * (count - 1) / min(_MOST, count)) for k in range(min(_MOST, count) + 1)}):
        path = frontier.path(at)
        if not any(option.what.choice is not None for _, option in path.steps):
            continue
        kept, ticks = outside + steps * path.peak, -(-steps * path.ticks * inner // unit)
        found.append(
            Option(kept=kept, working=_working(model, path) + shape.transient, ticks=ticks, what=Way(None, inside=path))
        )
    for below, above in itertools.pairwise(frontier.peaks):
        least = frontier.bound(above - 1)
        bounds.append(_bound(outside + steps * below, steps * least * inner // unit))
    bounds.append(_bound(outside + steps * frontier.peaks[-1], 0))
    return Ways(undominated(found), undominated(bounds))


def _bound(kept: int, ticks: int) -> Option:
    return Option(kept=kept, working=0, ticks=ticks, what=Way(None))


def _working(model: Any, path: Path) -> int:
    """What the worst boundary of a step needs while it is differentiated."""
    return max(model.option(edge, option).working for edge, option in path.steps)


def flattened(options: Sequence[Option]) -> tuple[Option, ...]:
    """Options of a body's stretches, of which only bytes and time count."""
    return undominated([dataclasses.replace(o, working=0) for o in options])
