"""Policies side by side, on one step and any number of targets."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nexus_jax import report
from nexus_jax.measure import Measurement, measurement
from nexus_jax.program import Program, step_of
from nexus_jax.residuals import residuals
from nexus_jax.targets import cache as caches
from nexus_jax.targets.compiler import TIMEOUT, Target, compile_all, find_target
from nexus_jax.workload import Workload, WorkloadError

POLICIES = ("none", "all", "alternate", "heavy_ops")
JSON_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One policy: what it keeps by autodiff's account, and what the compilers make of it.

    Attributes:
        policy: its name; empty for a workload as it is.
        residual_device_bytes, residual_host_bytes: what is kept for the backward pass, exact, before any fusion.
        residuals: the same by what it is: ``{"blocks[0..11]/attn dot_general device": bytes}``.
        flops: of the step.
        measured: by target.
    """

    policy: str
    residual_device_bytes: int
    residual_host_bytes: int
    residuals: Mapping[str, int]
    flops: int
    measured: Mapping[str, Measurement]


@dataclasses.dataclass(frozen=True)
class Comparison(Sequence[Row]):
    """The rows of :func:`compare`. Prints as one table; the first row is what the others are compared with."""

    rows: tuple[Row, ...]

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.rows[0].measured)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, and for :func:`difference`."""
        rows = []
        for row in self.rows:
            found = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
            rows.append(
                {
                    **found,
                    "residuals": dict(row.residuals),
                    "measured": {t: m.as_dict() for t, m in row.measured.items()},
                }
            )
        return {"version": JSON_VERSION, "rows": rows}

    def __str__(self) -> str:
        first = self.rows[0]
        columns = ["policy", "residuals", "on the host", "FLOPs"]
        for target in self.targets:
            columns += [f"{target} device", "temp", "below", "host", "fits"]
        lines = []
        for row in self.rows:
            line = [
                row.policy or "as it is",
                report.size(row.residual_device_bytes),
                report.size(row.residual_host_bytes),
            ]
            line.append(f"{row.flops / first.flops:.3f}x" if first.flops else "0")
            for target in self.targets:
                line += _cells(row.measured[target], first.measured[target])
            lines.append(line)
        return report.table(
            f"value_and_grad; FLOPs and bytes against {first.policy or 'the workload as it is'}", columns, lines
        )


def _cells(m: Measurement, first: Measurement) -> list[str]:
    fits = {True: "yes", False: "no", None: "?"}[m.fits]
    if m.temp_bytes is None:
        return [report.size(m.device_bytes), "out of memory", "", "", fits]
    below = "" if first.temp_bytes is None else f"{100 * (1 - m.temp_bytes / max(first.temp_bytes, 1)):.0f} %"
    return [report.size(m.device_bytes), report.size(m.temp_bytes), below, report.size(m.host_bytes), fits]


def compare(
    workload: Callable[..., Any],
    policies: Any = POLICIES,
    *,
    targets: str | Target | Sequence[str | Target | None] | None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    compiler_options: Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT,
    schedules: bool = False,
) -> Comparison:
    """Compile one step under several policies for several targets, and set them side by side.

    Args:
        workload: ``workload(policy=...)`` returns ``(loss, arguments)``, with the model transformed under the policy.
        policies: names, files or :class:`nexus_jax.Policy` values, one or several; with none, the workload as it is.
            The first is what the others are compared with.
        targets: as in :func:`nexus_jax.measure`, one or several.
        schedules: have the compilers write down their schedules at once, for ``Measurement.timeline()``.

    Returns:
        A :class:`Comparison`, a sequence of rows in the order of ``policies``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`nexus_jax.measure`; the message names the policy.
    """
    made = workload if isinstance(workload, Workload) else Workload(workload)
    several = isinstance(targets, Sequence) and not isinstance(targets, str)
    where = [find_target(t) for t in (targets if several else [targets])]  # type: ignore[union-attr]
    if not where:
        raise ValueError(f"{targets=}: give at least one target, or None for the local device.")
    if isinstance(policies, str) or not isinstance(policies, Sequence):
        policies = (policies,)
    for target in where:
        target.require_compiler()
    programs, facts, jobs = [], [], []
    for policy in policies or (None,):
        name = name_of(policy)
        try:
            loss, args = made(policy)
            program = step_of(loss, args, argnums, has_aux)
            jobs += [program.job(t, name or made.name, dict(compiler_options or {}), schedules) for t in where]
        except (ValueError, TypeError, RuntimeError) as error:
            if name and name not in str(error):
                kind = next(k for k in (WorkloadError, ValueError, TypeError, RuntimeError) if isinstance(error, k))
                raise kind(f"policy {name}: {error}") from error
            raise
        programs.append((name, program))
        facts.append(_facts(program, loss, args))
    answers = iter(compile_all(jobs, timeout=timeout))
    rows = []
    for (name, program), fact in zip(programs, facts, strict=True):
        measured = {t.name: measurement(program, t, next(answers), flops=fact["flops"]) for t in where}
        rows.append(Row(policy=name, measured=measured, **fact))
    return Comparison(tuple(rows))


def name_of(policy: Any) -> str:
    """What a policy is called in tables."""
    return "" if policy is None else str(getattr(policy, "name", None) or getattr(policy, "value", None) or policy)


_FACTS = {"residual_device_bytes": int, "residual_host_bytes": int, "residuals": dict, "flops": int}


def _facts(program: Program, loss: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """What is known without a compiler; kept on disk too, since reading residuals takes as long as tracing."""
    from nexus_jax.measure import flops_of

    cache, key = caches.Cache(), caches.key_of("facts", program.digest)
    found = cache.get(key, _FACTS)
    if found is not None:
        return found
    kept = residuals(loss, *args)
    by_name: Counter[str] = Counter()
    for group in kept.groups():  # those of two source lines may have one name
        by_name[_named(group)] += group.nbytes
    found = {
        "residual_device_bytes": kept.device_bytes,
        "residual_host_bytes": kept.host_bytes,
        "residuals": dict(by_name),
        "flops": flops_of(program),
    }
    cache.put(key, found)
    return found


def _named(group: Any) -> str:
    each = group.each
    shape = ",".join(map(str, each.shape))
    return f"{group.pattern or '-'} {each.op} {each.dtype}[{shape}] {each.place}"


# --- two reports ---------------------------------------------------------------------------------------------------


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What changed from one report of :meth:`Comparison.as_dict` to another, in sentences, largest first.

    Raises:
        ValueError: one of them is no such report, or of another version.

    Example:
        >>> row = {"policy": "none", "residuals": {"blocks[0..1]/attn dot_general f32[8] device": 64}, "flops": 8,
        ...        "measured": {"v5e": {"device_bytes": 100}}}
        >>> more = {**row, "residuals": {}, "measured": {"v5e": {"device_bytes": 36}}}
        >>> for line in difference({"version": 1, "rows": [row]}, {"version": 1, "rows": [more]}): print(line)
        none on v5e: -64 B of device bytes (100 B -> 36 B)
        none: -64 B of residuals in blocks[0..1]/attn dot_general f32[8] device (64 B -> 0 B)
    """
    for report_ in (before, after):
        if not _is_report(report_):
            raise ValueError("not a report of `nexus-jax compare --json`.")
    old = {row["policy"]: row for row in before["rows"]}
    new = {row["policy"]: row for row in after["rows"]}
    lines = [f"{p or 'the workload'}: only in the first report" for p in old if p not in new]
    lines += [f"{p or 'the workload'}: only in the second report" for p in new if p not in old]
    for policy in (p for p in new if p in old):
        lines += _row_difference(policy or "the workload", old[policy], new[policy])
    return lines


def _is_report(found: Any) -> bool:
    if (
        not isinstance(found, Mapping)
        or found.get("version") != JSON_VERSION
        or not isinstance(found.get("rows"), list)
    ):
        return False
    kinds = {"policy": str, "residuals": Mapping, "flops": int, "measured": Mapping}
    return all(
        isinstance(row, Mapping)
        and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(m, Mapping) and isinstance(m.get("device_bytes"), int) for m in row["measured"].values())
        for row in found["rows"]
    )


def _row_difference(policy: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    lines = []
    for target in (t for t in new["measured"] if t in old["measured"]):
        for key, about in (("device_bytes", "device bytes"), ("host_bytes", "host bytes")):
            a, b = (r["measured"][target].get(key, 0) for r in (old, new))
            if a != b:
                lines.append(f"{policy} on {target}: {_change(a, b)} of {about} ({report.size(a)} -> {report.size(b)})")
    if old["flops"] != new["flops"]:
        lines.append(f"{policy}: {100 * (new['flops'] / max(old['flops'], 1) - 1):+.2f} % FLOPs")
    groups = {
        g: (old["residuals"].get(g, 0), new["residuals"].get(g, 0)) for g in {**old["residuals"], **new["residuals"]}
    }
    for group, (a, b) in sorted(groups.items(), key=lambda item: -abs(item[1][1] - item[1][0])):
        if a != b:
            lines.append(f"{policy}: {_change(a, b)} of residuals in {group} ({report.size(a)} -> {report.size(b)})")
    return lines


def _change(a: int, b: int) -> str:
    return ("+" if b > a else "-") + report.size(abs(b - a))
