"""A plan: what `nexus_jax.plan` returns, applied to a function, printed, and kept in a file."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import tomli_w

from nexus_jax import report
from nexus_jax.boundary import Call
from nexus_jax.flat import Flat
from nexus_jax.planner.loss import Loss
from nexus_jax.planner.rewrite import Segment, rewritten


class PlanMismatch(ValueError):
    """A plan applied to another program than the one that it was made for."""


class Infeasible(ValueError):
    """No plan fits the budget.

    Attributes:
        smallest: the smallest budget in bytes for which there is a plan.
    """

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The program that a plan is for: enough to recognise it, and to say how another differs.

    Attributes:
        digest: equal for equal programs.
        inputs: the types of its arrays.
        ops: how many equations of each kind.
        jax: the version that traced it.
    """

    digest: str
    inputs: tuple[str, ...]
    ops: tuple[tuple[str, int], ...]
    jax: str

    @classmethod
    def of(cls, flat: Flat) -> Subject:
        import jax

        inputs = tuple(str(v.aval) for v in flat.jaxpr.invars)
        ops = tuple(sorted(Counter(eqn.primitive.name for eqn in flat.eqns).items()))
        return cls(digest=flat.digest, inputs=inputs, ops=ops, jax=jax.__version__)

    def require(self, other: Subject) -> None:
        """Raise a :class:`PlanMismatch` that says how ``other`` differs, if it does."""
        if self.digest == other.digest:
            return
        found = []
        if len(self.inputs) != len(other.inputs):
            found.append(f"it takes {len(other.inputs)} arrays, planned for {len(self.inputs)}")
        changed = [(n, a, b) for n, (a, b) in enumerate(zip(self.inputs, other.inputs, strict=False)) if a != b]
        found += [f"array {n} is {b}, planned for {a}" for n, a, b in changed[:3]]
        if len(changed) > 3:
            found.append(f"{len(changed) - 3} more arrays differ")
        mine, theirs = dict(self.ops), dict(other.ops)
        for op in sorted({*mine, *theirs}):
            if mine.get(op, 0) != theirs.get(op, 0):
                found.append(f"it has {theirs.get(op, 0)} equations {op}, planned for {mine.get(op, 0)}")
        if self.jax != other.jax:
            found.append(f"it was traced by jax {other.jax}, planned with {self.jax}")
        what = "; ".join(found[:8]) or "the same equations have other parameters or another order"
        raise PlanMismatch(f"this plan is for another program: {what}. Plan again with nexus_jax.plan.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: what becomes of a value in every layer of a family, and why."""

    where: str
    count: int
    op: str
    kind: str
    nbytes: int
    cost: int
    decision: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What every equation's results become, so that a step fits a budget. Prints as the table that explains it.

    Attributes:
        subject: the program that it is for.
        segments: the program's equations in stretches: as they are, or under ``jax.checkpoint`` with what is kept.
        target, objective, budget: what was asked: the target's name, ``"seconds"`` or ``"flops"``, bytes.
        device_bytes, host_bytes: of the compiled step.
        predicted_bytes: of the same step before it was compiled.
        unplanned_bytes: of the compiled step without a plan.
        extra_flops: what is computed twice, counted on the step's program.
        step_flops: of the step without a plan.
        gap: how much of ``cost`` a better plan might save at most, as a share, in the planner's model; 0 is optimal.
        cost: what is computed twice in the units of the objective: picoseconds at best, or FLOPs.
        trials: (predicted, compiled) bytes of every plan that was compiled.
        rows: what the table says.
    """

    subject: Subject
    segments: tuple[Segment, ...]
    target: str
    objective: str
    budget: int
    device_bytes: int
    host_bytes: int
    predicted_bytes: int
    unplanned_bytes: int
    extra_flops: int
    step_flops: int
    gap: float
    cost: int
    trials: tuple[tuple[int, int], ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def does_nothing(self) -> bool:
        """Whether the step fits as it is."""
        return not any(s.boundary or s.inside for s in self.segments)

    def apply(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` with the same arguments and results, whose backward pass keeps what the plan says.

        It is traced once more when it is called; call it under ``jax.jit``.

        Raises:
            PlanMismatch: when called, if ``fn`` is another program than the one that was planned, or its arguments have
                other types.
        """

        @functools.wraps(fn)
        def planned(*args: Any, **kwargs: Any) -> Any:
            if kwargs:
                raise TypeError(f"{', '.join(kwargs)}: give a planned function its arguments by position, as to plan.")
            loss = Loss(fn, args)
            return loss.result(self.rewritten(loss.flat)(*loss.flat.consts, *loss.arrays))

        return planned

    def rewritten(self, flat: Flat) -> Callable[..., list[Any]]:
        """A flat program as the plan says, as a function of its inputs.

        Raises:
            PlanMismatch: it is another program.
        """
        self.subject.require(Subject.of(flat))
        return rewritten(flat, self.segments)

    def program(self, call: Call) -> Callable[..., list[Any]]:
        """The plan as a policy of a model: :class:`nexus_jax.policy.rules.Whole`.

        Raises:
            PlanMismatch: it was made for another call, or for a whole loss.
        """
        try:
            return self.rewritten(call.flat)
        except PlanMismatch as error:
            raise PlanMismatch(
                f"{call.model.__name__}: {error} What nexus_jax.plan made for a loss is applied to the loss, plan.apply(loss);"
                ' a plan for a model comes from policy="auto" with a memory_budget.'
            ) from None

    def save(self, path: str | pathlib.Path) -> None:
        """Write it as TOML."""
        pathlib.Path(path).write_text(tomli_w.dumps(self.document()), encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """What its file says."""
        from nexus_jax.planner import files

        return files.document(self)

    @staticmethod
    def load(path: str | pathlib.Path) -> Plan:
        """Read it from TOML.

        Raises:
            ValueError: the file is no plan, or was edited into one that makes no sense; says where.
        """
        from nexus_jax.planner import files

        return files.load(path)

    def __str__(self) -> str:
        size = report.size
        if self.does_nothing:
            return f"plan for {self.target}: nothing to do, the step takes {size(self.device_bytes)} of {size(self.budget)}"
        share = 100 * self.extra_flops / self.step_flops if self.step_flops else 0.0
        host = f" and {size(self.host_bytes)} on the host" if self.host_bytes else ""
        title = (
            f"plan for {size(self.budget)} on {self.target}: {size(self.device_bytes)} compiled{host} (predicted "
            f"{size(self.predicted_bytes)}, without a plan {size(self.unplanned_bytes)}), {share:.2f} % more FLOPs, "
            f"gap {100 * self.gap:.2g} %"
        )
        columns = ("where", "times", "value", "bytes each", self._unit(), "decision", "reason")
        rows = [
            (r.where, str(r.count), f"{r.op} {r.kind}", size(r.nbytes), f"{r.cost:.3g}", r.decision, r.reason)
            for r in self.rows
        ]
        return report.table(title, columns, rows)

    def _unit(self) -> str:
        return "FLOPs to make" if self.objective == "flops" else "ps to make"
