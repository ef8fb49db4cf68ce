"""`nexus_jax.plan`: the whole way from a loss and a budget to a plan whose compiled step fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from nexus_jax import peak, report
from nexus_jax.measure import Measurement, measure
from nexus_jax.planner import loop, table
from nexus_jax.planner.budget import budget_of
from nexus_jax.planner.loss import Loss
from nexus_jax.planner.model import Model, model_of, results
from nexus_jax.planner.plan import Infeasible, Plan, Subject
from nexus_jax.planner.prices import OBJECTIVES, Objective, Prices
from nexus_jax.planner.rewrite import Segment
from nexus_jax.program import step_of
from nexus_jax.targets.compiler import Target, find_target


def plan(
    fn: Callable[..., Any],
    *args: Any,
    memory_budget: int | str,
    target: str | Target | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    objective: Objective = "seconds",
    time_limit: float | None = None,
) -> Plan:
    """A fast way to run ``jax.value_and_grad(fn)`` within a budget of device memory.

    Each value that the backward pass needs is saved or made again, and how finely the program is cut into boundaries is
    chosen with it: each stretch exactly, in the planner's own model of memory and time. The step is compiled for the
    target, at most six times, and what is returned fits as compiled; nothing is run.

    Args:
        fn: a loss: returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
        args: what to call it with: pytrees of arrays or ``ShapeDtypeStruct``s, nnx modules, flags.
        memory_budget: device bytes of the step (arguments, results and temporaries): ``16_000_000_000``, ``"12GiB"``,
            ``"16GB"``, or ``"90%"`` of what a program may take on the target.
        target: ``"v5e"``, ``"h200"``, ...; None is the local device.
        argnums: which arguments are differentiated.
        objective: what to have least of, ``"seconds"`` by the target's data sheet, or ``"flops"``. FLOPs where the
            target has no sheet.
        time_limit: seconds for the solver. When they are over, the plan is the best so far and its ``gap`` says how far
            from the best it may be.

    Returns:
        A :class:`Plan`. A step that fits as it is gets a plan that does nothing.

    Raises:
        Infeasible: no plan fits; ``smallest`` is a budget for which there is one.
        ValueError: a budget that is no size, zero, or more than the target has; an unknown target or objective.
        TypeError: integers among what is differentiated, a loss that is no scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(ws, x):
        ...     for w in ws:
        ...         x = jnp.sin(x @ w)
        ...     return jnp.mean(x)
        >>> x, w = jax.ShapeDtypeStruct((4096, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
        >>> found = plan(loss, [w] * 8, x, memory_budget="1GiB")  # fits as it is
        >>> found.does_nothing, found.device_bytes == found.unplanned_bytes
        (True, True)
    """
    where = find_target(target)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if objective not in OBJECTIVES:
        raise ValueError(f'objective={objective!r}: write "seconds" or "flops".')
    if time_limit is not None and not (isinstance(time_limit, int | float) and time_limit > 0):
        raise ValueError(f"time_limit={time_limit!r}: write seconds, more than 0.")
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    budget = budget_of(memory_budget, where, None if where.sheet is None else where.sheet.usable_bytes)
    measured = lambda f: measure(f, *args, target=where, argnums=argnums, has_aux=has_aux)
    before = measured(fn)
    loss = Loss(fn, args)
    if before.device_bytes <= budget:
        return _nothing(loss, before, budget, objective)
    price = Prices(where, "flops" if where.sheet is None else objective)
    model = model_of(loss.flat, loss.differentiated(numbers), price, deadline=deadline)
    maker = _Maker(fn, args, numbers, has_aux, where, model, measured)
    maker.base = before.device_bytes - model.plain
    offset = before.device_bytes - maker.predicted_of(fn, model.plain)
    found = loop.search(len(model.frontier.peaks), budget, maker.predict, maker.compiled, offset)
    if found.best is None:
        raise _infeasible(budget, where, found, before)
    return _plan(loss, model, maker, found, budget, before)


class _Maker:
    """Plans of a frontier by number: predicted and compiled, each once."""

    def __init__(self, fn: Any, args: Any, argnums: Any, has_aux: bool, target: Target, model: Model, measured: Any):
        self.fn, self.args, self.argnums, self.has_aux = fn, args, argnums, has_aux
        self.target, self.model, self.measured = target, model, measured
        self.subject = Subject.of(model.flat)
        self.base = results(model.flat, model.spans_of.sizes)
        self.predictions: dict[int, int] = {}
        self.measurements: dict[int, Measurement] = {}

    def applied(self, at: int) -> Callable[..., Any]:
        return _draft(self.subject, self.segments(at)).apply(self.fn)

    def segments(self, at: int) -> tuple[Segment, ...]:
        return self.model.segments(self.model.frontier.path(at))

    def predicted_of(self, fn: Callable[..., Any], peak_bytes: int) -> int:
        """By the model of the compiler, where there is one; else by the planner's own."""
        if self.target.platform not in ("tpu", "cuda"):
            return peak_bytes + self.base
        program = step_of(fn, self.args, self.argnums, self.has_aux)
        if program.mesh is not None:
            return peak_bytes + self.base
        return peak.predict(program, self.target).device_bytes

    def predict(self, at: int) -> int:
        if at not in self.predictions:
            self.predictions[at] = self.predicted_of(self.applied(at), self.model.frontier.peaks[at])
        return self.predictions[at]

    def compiled(self, at: int) -> int:
        if at not in self.measurements:
            self.measurements[at] = self.measured(self.applied(at))
        return self.measurements[at].device_bytes


def _draft(subject: Subject, segments: tuple[Segment, ...]) -> Plan:
    numbers = ("budget", "device_bytes", "host_bytes", "predicted_bytes", "unplanned_bytes", "extra_flops")
    return Plan(
        subject=subject,
        segments=segments,
        target="",
        objective="flops",
        step_flops=0,
        gap=0.0,
        cost=0,
        **dict.fromkeys(numbers, 0),
    )


def _nothing(loss: Loss, before: Measurement, budget: int, objective: str) -> Plan:
    flat = loss.flat
    return Plan(
        subject=Subject.of(flat),
        segments=(Segment(start=0, stop=len(flat.eqns), boundary=False),),
        target=before.target,
        objective=objective,
        budget=budget,
        device_bytes=before.device_bytes,
        host_bytes=before.host_bytes,
        predicted_bytes=before.device_bytes,
        unplanned_bytes=before.device_bytes,
        extra_flops=0,
        step_flops=before.flops,
        gap=0.0,
        cost=0,
    )


def _plan(loss: Loss, model: Model, maker: _Maker, found: loop.Found, budget: int, before: Measurement) -> Plan:
    best = found.best
    if best is None:
        raise ValueError("there is no plan to write down.")
    path = model.frontier.path(best.at)
    after = maker.measurements[best.at]
    bound = model.frontier.bound(path.peak) or 0
    return Plan(
        subject=maker.subject,
        segments=model.segments(path),
        target=before.target,
        objective=model.spans_of.price.objective,
        budget=budget,
        device_bytes=after.device_bytes,
        host_bytes=after.host_bytes,
        predicted_bytes=best.predicted,
        unplanned_bytes=before.device_bytes,
        extra_flops=after.flops - before.flops,
        step_flops=before.flops,
        gap=max(0.0, 1 - bound / path.ticks) if path.ticks else 0.0,
        cost=path.ticks * model.spans_of.unit,
        trials=tuple((t.predicted, t.compiled) for t in found.trials),
        rows=table.rows_of(model, path),
    )


def _infeasible(budget: int, target: Target, found: loop.Found, before: Measurement) -> Infeasible:
    smallest = next(t.compiled for t in found.trials if t.at == 0)
    return Infeasible(
        f"memory_budget={budget} ({report.size(budget)}) is too small on {target.name}: the step takes "
        f"{report.size(before.device_bytes)} as it is and {report.size(smallest)} at least; write memory_budget={smallest} "
        "or more, or make the batch smaller.",
        smallest,
    )
