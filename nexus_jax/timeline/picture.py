"""Memory over time as a picture: one curve for each policy, what fills the peaks beside them."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nexus_jax import report
from nexus_jax.timeline.model import Group, Timeline, grouped

_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#3a3a3a", "#56b4e9")
PHASES = {"forward": "#b7d3ea", "backward": "#f2c681", "recompute": "#bf4a3a"}
_WIDTH, _HEIGHT, _STRIP = 11.5, 5.2, 0.3  # inches; one strip more for each policy
_DASHED = (0, (5, 3))
_NAME = 24  # characters of a policy's name
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def draw(lines: Mapping[str, Timeline], path: str | os.PathLike[str], capacity: int | None = None) -> None:
    """Draw device bytes in use over a step; several policies in one picture.

    Dashed is what the compiler sets aside for the whole step, a dot the peak of what is in use; beside it, the largest
    things live there. The strips below say which instructions are of the forward pass, of the backward pass, or
    recompute. A loop's body is drawn once.

    Args:
        lines: the timelines by the name of their policy.
        path: a file to write, ``.png`` or ``.svg``.
        capacity: bytes of the device's memory, drawn as a line where it is near.

    Raises:
        ValueError: no timeline, another kind of file, a capacity that is not positive.
        RuntimeError: matplotlib is not installed (says what to install).
    """
    path = pathlib.Path(path)
    if not lines:
        raise ValueError("lines is empty: give at least one policy's timeline.")
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path={str(path)!r}: write a name that ends in .png or .svg.")
    if capacity is not None and not capacity > 0:
        raise ValueError(f"{capacity=} must be a positive number of bytes, or None.")
    matplotlib, figure = report.matplotlib()
    # Text stays text in an SVG, and the same step gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nexus-jax", "font.size": 9}):
        tall = _HEIGHT + _STRIP * len(lines) + 0.6 * max(0, len(lines) - 6)
        made = figure(figsize=(_WIDTH, tall))
        _fill(made, {name or "the step": t for name, t in lines.items()}, capacity)
        dated = {"Date": None} if path.suffix.lower() == ".svg" else {}
        made.savefig(path, dpi=150, metadata=dated)


def _fill(figure: Any, lines: Mapping[str, Timeline], capacity: int | None) -> None:
    wide, tall = figure.get_size_inches()
    names = [_shortened(name, _NAME) for name in lines]
    left, foot, strip = max(0.8, 0.3 + 0.075 * max(map(len, names))), 0.66, _STRIP * len(lines)
    right = 0.645 * wide  # inches, all of them
    place = lambda low, height: (left / wide, low / tall, (right - left) / wide, height / tall)
    curves = figure.add_axes(place(foot + strip + 0.12, tall - foot - strip - 0.12 - 0.4))
    strips = figure.add_axes(place(foot, strip), sharex=curves)
    unit, scale = _unit(max(t.reserved for t in lines.values()))
    for t, color in zip(lines.values(), itertools.cycle(_LINES), strict=False):
        _curve(curves, t, color, scale, fill=len(lines) <= 2)
    _capacity(curves, capacity, max(t.reserved for t in lines.values()) / scale, scale)
    curves.set_ylabel(f"device memory, {unit}")
    curves.set_xlim(0, max(len(t.points) for t in lines.values()))
    curves.tick_params(labelbottom=False)
    curves.grid(axis="y", color="#dddddd", linewidth=0.6)
    curves.set_axisbelow(True)
    curves.spines[["top", "right"]].set_visible(False)
    curves.text(0, 1.02, "dashed: set aside for the whole step", transform=curves.transAxes, fontsize=8)
    _strips(strips, names, lines.values())
    _largest(figure.add_axes((0.66, 0.02, 0.335, 0.96)), names, lines.values())


def _unit(most: float) -> tuple[str, int]:
    return next((name, size) for name, size in _UNITS if most >= size or size == 1)


def _curve(axes: Any, t: Timeline, color: str, scale: int, fill: bool) -> None:
    changes = [b for a, b in itertools.pairwise((None, *t.points)) if a is None or a.bytes != b.bytes]
    steps = [p.step for p in changes] + [len(t.points)]
    used = [p.bytes / scale for p in (*changes, t.points[-1])]
    axes.plot(steps, used, drawstyle="steps-post", color=color, linewidth=1.3)
    if fill:
        axes.fill_between(steps, used, step="post", color=color, alpha=0.12, linewidth=0)
    axes.axhline(t.reserved / scale, color=color, linewidth=1, linestyle=_DASHED)
    axes.plot([t.peak_step + 0.5], [t.peak_bytes / scale], "o", color=color, markersize=6, markeredgecolor="white")


def _capacity(axes: Any, capacity: int | None, most: float, scale: int) -> None:
    top = most
    if capacity is not None:
        near = capacity / scale <= 1.6 * most
        top = max(most, capacity / scale) if near else most
        note = f"the device has {report.size(capacity)}" + ("" if near else ", above this picture")
        if near:
            axes.axhline(capacity / scale, color="black", linewidth=1.4)
        axes.text(1, 1.02, note, transform=axes.transAxes, ha="right", fontsize=8, weight="bold" if near else "normal")
    axes.set_ylim(0, 1.05 * top)


def _strips(axes: Any, names: Sequence[str], lines: Collection[Timeline]) -> None:
    """Which instruction is of which phase, one row for each policy."""
    for row, t in enumerate(lines):
        for phase, color in PHASES.items():
            spans = [(first, last - first) for kind, first, last in runs(t) if kind == phase]
            axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=color, linewidth=0, label=phase if row == 0 else None)
    axes.set_yticks(range(len(lines)), names)
    for label, color in zip(axes.get_yticklabels(), itertools.cycle(_LINES), strict=False):
        label.set(color=color, weight="bold", parse_math=False)  # a name may hold a $
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("instruction of the compiled step", loc="left")
    style = dict(loc="upper right", borderaxespad=0, handlelength=1.2, columnspacing=1.2, fontsize=8.5, frameon=False)
    axes.legend(bbox_to_anchor=(1, -0.27 / (_STRIP * len(lines))), ncols=3, **style)


def runs(t: Timeline) -> list[tuple[str, int, int]]:
    """Stretches of one phase: ``(phase, first step, the step after the last)``."""
    found = []
    for phase, points in itertools.groupby(t.points, key=lambda p: p.phase):
        steps = [p.step for p in points]
        found.append((phase, steps[0], steps[-1] + 1))
    return found


def _largest(axes: Any, names: Sequence[str], lines: Collection[Timeline]) -> None:
    """The largest things at each peak, as text: beside the curves, where it can cover none of them."""
    axes.axis("off")
    axes.set_xlim(0, 1)
    each = max(2, 12 // len(lines) - 1)
    rows = len(lines) * (2 * each + 2.6)
    axes.set_ylim(rows, 0)
    y = 0.0
    for name, t, color in zip(names, lines, itertools.cycle(_LINES), strict=False):
        point = t.points[t.peak_step]
        axes.plot([0.012], [y + 0.4], "o", color=color, markersize=6, clip_on=False)
        _text(axes, 0.045, y, f"{name}: {report.size(t.peak_bytes)} at the peak", weight="bold")
        where = f"of {report.size(t.reserved)} set aside; instruction {t.peak_step}, {point.phase}"
        _text(axes, 0.045, y + 1, where, color="#555555", size=8)
        y += 2.2
        for group in grouped(t.at_peak)[:each]:
            _text(axes, 0.045, y, f"{report.size(group.bytes)}  {group.pattern or group.each.name}", size=8.5)
            _text(axes, 0.045, y + 0.95, about(group), color="#555555", size=7.5)
            y += 2
        y += 0.4


def about(group: Group) -> str:
    """``"12 x bf16[8,1024,1024], dot_general, forward"``."""
    each, count = group.each, len(group.members)
    op = "" if each.op in ("", each.kind) else f", {each.op}"
    return f"{count} x {each.shape}{op}, {each.phase or each.kind}"


def _text(axes: Any, x: float, y: float, text: str, size: float = 9, **style: Any) -> None:
    axes.text(x, y, _shortened(text, int(445 / size)), fontsize=size, va="top", parse_math=False, **style)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
