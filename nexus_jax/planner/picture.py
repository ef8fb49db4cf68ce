"""What memory buys, as a picture: time over device bytes, every plan of the frontier and the fixed policies."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from nexus_jax import report
from nexus_jax.planner.baselines import baselines
from nexus_jax.planner.make import Planner
from nexus_jax.planner.plan import Plan

_FRONTIER, _FIXED, _CHOSEN, _BUDGET = "#0072b2", "#8a8a8a", "#d55e00", "#3a3a3a"
_NAMED, _APART = 4, 0.05  # fixed policies with a name beside them, so far apart


def draw(planner: Planner, plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw the frontier of a step, the fixed policies, the knee and the chosen plan.

    Bytes are those of the planner's model, moved by a constant so that the chosen plan is where its compiled step is;
    hollow marks are compiled steps.

    Args:
        planner: who made the plan.
        path: a file to write, ``.png`` or ``.svg``.

    Raises:
        ValueError: another kind of file, or a plan that does nothing: there is nothing to draw.
        RuntimeError: matplotlib is not installed (says what to install).
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path={str(path)!r}: write a name that ends in .png or .svg.")
    if plan.does_nothing:
        raise ValueError("the step fits as it is: there is no frontier to draw.")
    matplotlib, figure = report.matplotlib()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nexus-jax", "font.size": 9}):
        made = figure(figsize=(8.5, 4.8), layout="constrained")
        _fill(made.subplots(), planner, plan)
        made.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else {})


def knee(peaks: list[int], ticks: list[int]) -> int:
    """The point of a falling frontier that is farthest below the line between its ends, both axes as shares.

    Example:
        >>> knee([0, 1, 2, 10], [10, 4, 1, 0])
        2
    """
    wide, high = max(peaks[-1] - peaks[0], 1), max(ticks[0] - ticks[-1], 1)
    below = [1 - (p - peaks[0]) / wide - (t - ticks[-1]) / high for p, t in zip(peaks, ticks, strict=True)]
    return max(range(len(below)), key=below.__getitem__)


def _fill(axes: Any, planner: Planner, plan: Plan) -> None:
    model, chosen = planner.model, planner.path_of(plan)
    frontier, seconds = model.frontier, plan.objective == "seconds"
    size = lambda nbytes: nbytes / 2**30
    cost = lambda ticks: ticks * model.spans_of.unit / (1e9 if seconds else max(plan.step_flops, 1) / 100)
    shift = plan.device_bytes - chosen.peak
    end = plan.unplanned_bytes
    shown = [(p + shift, t) for p, t in zip(frontier.peaks, frontier.ticks, strict=True) if p + shift <= 1.05 * end]
    label = f"{len(frontier.peaks)} plans, fastest for their bytes"
    axes.step(
        *_columns([(size(p), cost(t)) for p, t in shown]), where="post", color=_FRONTIER, linewidth=1.6, label=label
    )
    fixed = [(b, size(b.path.peak + shift), cost(b.path.ticks)) for b in baselines(model)]
    fixed = [f for f in fixed if f[1] <= size(1.05 * end)]
    if fixed:
        axes.scatter(*_columns([f[1:] for f in fixed]), s=14, color=_FIXED, label="fixed policies", zorder=2)
    best = [
        f for f in fixed if not any((g[1] <= f[1] and g[2] < f[2]) or (g[1] < f[1] and g[2] <= f[2]) for g in fixed)
    ]
    named: list[float] = []
    for policy, x, y in sorted(best, key=lambda f: -f[2]):
        if len(named) < _NAMED and all(abs(y - other) > _APART * max(f[2] for f in best) for other in named):
            named.append(y)
            text = f"{policy.name} x{policy.group}"
            axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, color=_FIXED)
    if len(shown) > 2:
        at = knee(*map(list, zip(*shown, strict=True)))
        x, y = size(shown[at][0]), cost(shown[at][1])
        axes.plot([x], [y], marker="D", color=_FRONTIER, linestyle="", label="knee", zorder=3)
    axes.scatter(
        [size(plan.device_bytes)],
        [cost(chosen.ticks)],
        s=90,
        marker="*",
        color=_CHOSEN,
        label="this plan, compiled",
        zorder=4,
    )
    others = [
        (size(nbytes), cost(p.ticks)) for p, nbytes in planner.compiled() if p is not chosen and nbytes <= 1.05 * end
    ]
    if others:
        axes.scatter(*_columns(others), s=30, facecolors="none", edgecolors=_CHOSEN, label="others compiled", zorder=3)
    axes.scatter([size(end)], [0], s=40, marker="s", color=_BUDGET, label="as it is, compiled", zorder=3)
    axes.axvline(size(plan.budget), color=_BUDGET, linestyle=(0, (5, 3)), linewidth=1)
    axes.annotate(
        f" budget {report.size(plan.budget)}",
        (size(plan.budget), axes.get_ylim()[1]),
        va="top",
        fontsize=8,
        color=_BUDGET,
    )
    axes.set_xlabel("device bytes of the step, GiB")
    axes.set_ylabel("ms more, at best" if seconds else "more FLOPs, % of the step")
    axes.set_title(f"What memory buys on {plan.target}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=8)


def _columns(points: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    return list(zip(*points, strict=True))
