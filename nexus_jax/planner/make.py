"""`nexus_jax.plan`: the whole way from a loss and a budget to a plan whose compiled step fits."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from nexus_jax import peak, report
from nexus_jax.flat import Flat
from nexus_jax.measure import Measurement, measure
from nexus_jax.planner import loop, table
from nexus_jax.planner.allocate import Frontier, Path
from nexus_jax.planner.baselines import baselines
from nexus_jax.planner.budget import budget_of, host_budget_of
from nexus_jax.planner.graph import Graph
from nexus_jax.planner.loss import Loss
from nexus_jax.planner.model import Model, model_of, results
from nexus_jax.planner.plan import Infeasible, Plan, Subject
from nexus_jax.planner.prices import OBJECTIVES, Objective, Prices
from nexus_jax.planner.rewrite import Segment
from nexus_jax.planner.solve import Stairs
from nexus_jax.program import step_of
from nexus_jax.targets.compiler import Target, find_target

_DOUBT = 0.1  # a fixed policy is predicted to take so much more than it does, at most
_HARDLY = 1e-3  # less of the extra cost is not worth a compile
_FAR = 2  # the same, of the planner's own model, which is coarser and asked first: it knows no on-chip memory


def plan(
    fn: Callable[..., Any],
    *args: Any,
    memory_budget: int | str,
    target: str | Target | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    objective: Objective = "seconds",
    time_limit: float | None = None,
    host_budget: int | str = 0,
) -> Plan:
    """A fast way to run ``jax.value_and_grad(fn)`` within a budget of device memory.

    Each value that the backward pass needs is saved, made again or, with a ``host_budget``, offloaded, and how finely the
    program is cut into boundaries is chosen with it: each stretch exactly, in the planner's own model of memory and time. The step is compiled for the
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
        host_budget: bytes of host memory that the plan may use, in the forms of ``memory_budget`` but the share; 0, the
            default, offloads nothing. What is offloaded is paid for by the target's data sheet: a copy out is hidden as
            far as the link moves it during the forward pass of a stretch, a copy back during its backward pass, and the
            rest delays the step.

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
    if time_limit is not None and not (isinstance(time_limit, int | float) and time_limit > 0):
        raise ValueError(f"time_limit={time_limit!r}: write seconds, more than 0.")
    planner = Planner(
        fn, args, target=target, argnums=argnums, has_aux=has_aux, objective=objective, host_budget=host_budget
    )
    return planner.plan(memory_budget, time_limit)


class Planner:
    """Plans of one step for several budgets: what is solved, predicted and compiled is so once.

    Args are those of :func:`plan`.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        *,
        target: str | Target | None = None,
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        objective: Objective = "seconds",
        host_budget: int | str = 0,
    ):
        if objective not in OBJECTIVES:
            raise ValueError(f'objective={objective!r}: write "seconds" or "flops".')
        self.fn, self.args, self.has_aux = fn, tuple(args), has_aux
        self.target = find_target(target)
        self.argnums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        self.objective: Objective = "flops" if self.target.sheet is None else objective
        self.host = host_budget_of(host_budget, self.target)
        self.results: tuple[int, ...] = (0,)  # of the flat program, which are differentiated: the loss
        self.deadline = math.inf
        self._stairs: dict[Graph, Stairs] = {}  # of stretches, solved
        self._predictions: dict[tuple[Segment, ...], int] = {}
        self._measurements: dict[tuple[Segment, ...], Measurement] = {}
        self._paths: dict[tuple[Segment, ...], Path] = {}
        self._tried: dict[tuple[Segment, ...], Path] = {}  # for the budget that is asked for

    def plan(self, memory_budget: int | str, time_limit: float | None = None) -> Plan:
        """The plan for a budget (:func:`plan`)."""
        sheet = self.target.sheet
        budget = budget_of(memory_budget, self.target, None if sheet is None else sheet.usable_bytes)
        self.deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        if self.before.device_bytes <= budget:
            return self._nothing(budget)
        compiles = loop.COMPILES - 1
        self._tried = {}
        self._search(budget, compiles - 1)  # the last one is for a fixed policy, if there is one to try
        if not self._fixed(budget, self._best(budget), compiles - len(self._tried)):
            self._search(budget, compiles)
        best = self._best(budget)
        if best is None:
            raise self._infeasible(budget)
        return self._written(best, budget)

    @functools.cached_property
    def loss(self) -> Loss:
        return Loss(self.fn, self.args)

    @functools.cached_property
    def flat(self) -> Flat:
        """The program that is planned."""
        return self.loss.flat

    @functools.cached_property
    def differentiated(self) -> Sequence[int]:
        """Which of its inputs are."""
        return self.loss.differentiated(self.argnums)

    @functools.cached_property
    def before(self) -> Measurement:
        """The step without a plan."""
        return self._measure(self.fn)

    @functools.cached_property
    def model(self) -> Model:
        """What the solver knows of the step."""
        return self._model(self.host, groups=True)

    @functools.cached_property
    def models(self) -> list[Model]:
        """The same, with what compilers are known best for first: every scan one step at a time, and nothing offloaded."""
        found = [self.model]
        if self.host:
            found.insert(0, self._model(0, groups=True))
        if any(group > 1 for _, group in self.model.bodies):
            found.insert(0, self._model(0, groups=False))
        return found

    def _model(self, host: int, groups: bool) -> Model:
        price = Prices(self.target, self.objective, host)
        return model_of(
            self.flat,
            self.differentiated,
            price,
            results=self.results,
            deadline=self.deadline,
            groups=groups,
            stairs=self._stairs,
        )

    @functools.cached_property
    def subject(self) -> Subject:
        return Subject.of(self.flat)

    @functools.cached_property
    def offset(self) -> int:
        """How much more the compiled step takes than predicted."""
        return self.before.device_bytes - self._predict(self.fn, self.model.plain)

    def applied(self, path: Path) -> Callable[..., Any]:
        """The loss, run as a path says."""
        return draft(self.subject, self.model.segments(path)).apply(self.fn)

    def predicted(self, path: Path) -> int:
        """Device bytes of a path, without a compile."""
        key = self.model.segments(path)
        if key not in self._predictions:
            # The model of the compiler knows no copies: what they free is known to the planner's own.
            stays = self.model.unmoved(path)
            self._predictions[key] = self._predict(self.applied(stays), stays.peak) + path.peak - stays.peak
        return self._predictions[key]

    def measured(self, path: Path) -> Measurement:
        """A path, compiled."""
        key = self.model.segments(path)
        if key not in self._measurements:
            self._measurements[key] = self._measure(self.applied(path))
            self._paths[key] = path
        self._tried.setdefault(key, path)
        return self._measurements[key]

    def compiled(self) -> list[tuple[Path, int]]:
        """Every path that was compiled, and its device bytes."""
        return [(self._paths[key], m.device_bytes) for key, m in self._measurements.items()]

    def _search(self, budget: int, compiles: int) -> None:
        """Compile paths to find the fastest that fits, until so many have been tried for this budget."""
        if self._tried:
            self._along(self.model.frontier, budget, compiles - len(self._tried), self._best(budget))
            return
        for model in self.models:
            left = compiles - len(self._tried)
            # To be allowed more must not be a loss: only what is faster than the best so far is compiled besides.
            best = self._best(budget) if self._tried else None
            self._along(model.frontier, budget, left if model is self.model else left - left // 2, best)

    def _along(self, frontier: Frontier, budget: int, compiles: int, best: Path | None = None) -> None:
        as_fast = lambda ticks: sum(t >= ticks * (1 - _HARDLY) for t in frontier.ticks) - 1
        loop.search(
            len(frontier.peaks),
            budget,
            lambda at: self.predicted(frontier.path(at)),
            lambda at: self.measured(frontier.path(at)).device_bytes,
            self.offset,
            compiles,
            -1 if best is None else as_fast(best.ticks),
            lambda at: self.model.segments(frontier.path(at)),
            lambda at: as_fast(frontier.ticks[at]),
        )

    def _best(self, budget: int) -> Path | None:
        """The fastest of all that was compiled and fits, for other budgets too."""
        fitting = [path for path, nbytes in self.compiled() if nbytes <= budget]
        return min(fitting, key=lambda path: path.ticks, default=None)

    def path_of(self, plan: Plan) -> Path:
        """The path of a plan of this planner.

        Raises:
            ValueError: it made no such plan.
        """
        if plan.segments not in self._paths:
            raise ValueError("this planner did not make that plan.")
        return self._paths[plan.segments]

    def _measure(self, fn: Callable[..., Any]) -> Measurement:
        return measure(fn, *self.args, target=self.target, argnums=self.argnums, has_aux=self.has_aux)

    def _predict(self, fn: Callable[..., Any], peak_bytes: int) -> int:
        """By the model of the compiler, where there is one; else by the planner's own."""
        if self.target.platform in ("tpu", "cuda"):
            program = step_of(fn, self.args, self.argnums, self.has_aux)
            if program.mesh is None:
                return peak.predict(program, self.target).device_bytes
        return peak_bytes + results(self.model.flat, self.model.spans_of.sizes)

    def _fixed(self, budget: int, best: Path | None, compiles: int) -> list[Path]:
        """Fixed policies that may fit and be faster, compiled: the model may be wrong about one. The last of them may fit.

        Those that are predicted to fit come first, the fastest first; then those that are predicted to need least.
        """
        pool = {p.path.ticks: p.path for p in baselines(self.model) if best is None or p.path.ticks < best.ticks}
        offset = min(self.offset, self._learned())
        fitting: list[Path] = []
        near: list[tuple[int, int, Path]] = []
        for _, path in sorted(pool.items()):
            if path.peak > budget * (1 + _FAR) or len(fitting) == compiles:
                continue
            expected = self.predicted(path) + offset
            if expected <= budget:
                fitting.append(path)
            elif expected <= budget * (1 + _DOUBT):
                near.append((expected, path.peak, path))
        tried = []
        for path in [*fitting, *(path for *_, path in sorted(near, key=lambda n: n[:2]))][:compiles]:
            tried.append(path)
            if self.measured(path).device_bytes <= budget:
                break
        return tried

    def _learned(self) -> int:
        """How much more a step takes than predicted, by the last one that was compiled for this budget."""
        for path in reversed(self._tried.values()):
            return self.measured(path).device_bytes - self.predicted(path)
        return self.offset

    def _nothing(self, budget: int) -> Plan:
        before = self.before
        return dataclasses.replace(
            draft(self.subject, (Segment(start=0, stop=len(self.flat.eqns), boundary=False),)),
            target=before.target,
            objective=self.objective,
            budget=budget,
            device_bytes=before.device_bytes,
            host_bytes=before.host_bytes,
            predicted_bytes=before.device_bytes,
            unplanned_bytes=before.device_bytes,
            step_flops=before.flops,
        )

    def _written(self, path: Path, budget: int) -> Plan:
        before, after = self.before, self.measured(path)
        bound = self.model.frontier.bound(path.peak) or 0
        return Plan(
            subject=self.subject,
            segments=self.model.segments(path),
            target=before.target,
            objective=self.objective,
            budget=budget,
            device_bytes=after.device_bytes,
            host_bytes=after.host_bytes,
            predicted_bytes=self.predicted(path),
            unplanned_bytes=before.device_bytes,
            extra_flops=after.flops - before.flops,
            step_flops=before.flops,
            gap=max(0.0, 1 - bound / path.ticks) if path.ticks else 0.0,
            cost=path.ticks * self.model.spans_of.unit,
            trials=tuple((self.predicted(p), self.measured(p).device_bytes) for p in self._tried.values()),
            rows=table.rows_of(self.model, path),
        )

    def _infeasible(self, budget: int) -> Infeasible:
        before = self.before.device_bytes
        smallest = min([before, *(m.device_bytes for m in self._measurements.values())])
        least = "and no plan takes less" if smallest == before else f"and {report.size(smallest)} at least"
        return Infeasible(
            f"memory_budget={budget} ({report.size(budget)}) is too small on {self.target.name}: the step takes "
            f"{report.size(before)} as it is {least}; write memory_budget={smallest} or more, or make the batch smaller.",
            smallest,
        )


def draft(subject: Subject, segments: tuple[Segment, ...]) -> Plan:
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
