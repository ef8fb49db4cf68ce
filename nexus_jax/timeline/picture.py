"""Memory over time as a picture: one curve for each policy, what fills the peaks beside them."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from nexus_jax import report
from nexus_jax.timeline.model import Group, Timeline, grouped

_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#3a3a3a", "#56b4e9")
PHASES = {"forward": "#b7d3ea", "backward": "#f2c681", "recompute": "#bf4a3a"}
_WIDTH, _HEIGHT, _STRIP = 11.5, 5.2, 0.3  # inches; one strip more for each policy
_COLUMNS = 4  # of the legend
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def draw(lines: Mapping[str, Timeline], path: str | os.PathLike[str], capacity: int | None = None) -> None:
    """Draw device bytes in use over a step; several policies in one picture.

    Dashed is what the compiler sets aside for the whole step, a dot the peak of what is in use. The strips below say
    which instructions are of the forward pass, of the backward pass, or recompute.

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
    matplotlib, figure = _matplotlib()
    # Text stays text in an SVG, and the same step gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nexus-jax", "font.size": 9}):
        made = figure(figsize=(_WIDTH, _HEIGHT + _STRIP * len(lines)))
        _fill(made, {name or "the step": t for name, t in lines.items()}, capacity)
        dated = {"Date": None} if path.suffix.lower() == ".svg" else {}
        made.savefig(path, dpi=150, metadata=dated)


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no window, no state that outlives the picture
    except ImportError:
        raise RuntimeError('pictures need matplotlib: pip install "nexus-jax[pictures]".') from None
    return matplotlib, Figure


def _fill(figure: Any, lines: Mapping[str, Timeline], capacity: int | None) -> None:
    tall = _HEIGHT + _STRIP * len(lines)
    foot, wide = 0.66 / tall, 0.56  # of the figure: below the strips, and the curves' width
    height = _STRIP * len(lines) / tall
    curves = figure.add_axes((0.075, foot + height + 0.02, wide, 1 - foot - height - 0.02 - 0.62 / tall))
    strips = figure.add_axes((0.075, foot, wide, height), sharex=curves)
    beside = figure.add_axes((0.66, 0.02, 0.335, 0.96))
    unit, scale = _unit(max(t.reserved for t in lines.values()))
    for (name, t), color in zip(lines.items(), itertools.cycle(_LINES), strict=False):
        _curve(curves, name, t, color, scale, few=len(lines))
    _capacity(curves, capacity, max(t.reserved for t in lines.values()) / scale, scale)
    curves.set_ylabel(f"device memory, {unit}")
    curves.set_xlim(0, max(len(t.points) for t in lines.values()))
    curves.tick_params(labelbottom=False)
    curves.grid(axis="y", color="#dddddd", linewidth=0.6)
    curves.set_axisbelow(True)
    curves.spines[["top", "right"]].set_visible(False)
    columns = min(len(lines) + (capacity is not None), _COLUMNS)
    style = dict(loc="lower left", bbox_to_anchor=(-0.01, 1), fontsize=8, frameon=False, borderaxespad=0.2)
    _plain(curves.legend(ncols=columns, columnspacing=1.4, **style).texts)
    _strips(strips, lines)
    _largest(beside, lines)


def _unit(most: float) -> tuple[str, int]:
    return next((name, size) for name, size in _UNITS if most >= size or size == 1)


def _curve(axes: Any, name: str, t: Timeline, color: str, scale: int, few: int) -> None:
    steps = [p.step for p in t.points] + [len(t.points)]
    used = [p.bytes / scale for p in t.points] + [t.points[-1].bytes / scale]
    axes.plot(steps, used, drawstyle="steps-post", color=color, linewidth=1.3, label=f"{name}: in use")
    if few <= 2:
        axes.fill_between(steps, used, step="post", color=color, alpha=0.12, linewidth=0)
    # Named in the legend where there is room.
    label = f"{name}: set aside, {report.size(t.reserved)}" if few < _COLUMNS else None
    axes.axhline(t.reserved / scale, color=color, linewidth=1, linestyle=(0, (5, 3)), label=label)
    axes.plot([t.peak_step + 0.5], [t.peak_bytes / scale], "o", color=color, markersize=6, markeredgecolor="white")


def _capacity(axes: Any, capacity: int | None, most: float, scale: int) -> None:
    top = most
    if capacity is not None and capacity / scale <= 1.6 * most:
        top = max(most, capacity / scale)
        label = f"the device's memory, {report.size(capacity)}"
        axes.axhline(capacity / scale, color="black", linewidth=1.4, label=label)
    elif capacity is not None:
        note = f"the device's memory, {report.size(capacity)}, is above this picture"
        axes.text(0.995, 0.985, note, transform=axes.transAxes, ha="right", va="top", fontsize=8, color="#444444")
        top *= 1.06
    axes.set_ylim(0, 1.05 * top)


def _strips(axes: Any, lines: Mapping[str, Timeline]) -> None:
    """Which instruction is of which phase, one row for each policy."""
    for row, t in enumerate(lines.values()):
        for phase, color in PHASES.items():
            spans = [(first, last - first) for kind, first, last in runs(t) if kind == phase]
            axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=color, linewidth=0, label=phase if row == 0 else None)
    axes.set_yticks(range(len(lines)), list(lines))
    _plain(axes.get_yticklabels())
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("instruction of the compiled step; a loop's body once", loc="left")
    style = dict(loc="upper right", borderaxespad=0, handlelength=1.2, columnspacing=1.2, fontsize=8.5, frameon=False)
    axes.legend(bbox_to_anchor=(1, -0.27 / (_STRIP * len(lines))), ncols=3, **style)


def runs(t: Timeline) -> list[tuple[str, int, int]]:
    """Stretches of one phase: ``(phase, first step, the step after the last)``."""
    found = []
    for phase, points in itertools.groupby(t.points, key=lambda p: p.phase):
        steps = [p.step for p in points]
        found.append((phase, steps[0], steps[-1] + 1))
    return found


def _largest(axes: Any, lines: Mapping[str, Timeline]) -> None:
    """The largest things at each peak, as text: beside the curves, where it can cover none of them."""
    axes.axis("off")
    axes.set_xlim(0, 1)
    each = max(2, 12 // len(lines) - 1)
    rows = len(lines) * (2 * each + 2.6)
    axes.set_ylim(rows, 0)
    y = 0.0
    for (name, t), color in zip(lines.items(), itertools.cycle(_LINES), strict=False):
        point = t.points[t.peak_step]
        axes.plot([0.012], [y + 0.55], "o", color=color, markersize=6, clip_on=False)
        _text(axes, 0.045, y, f"{name}: {report.size(t.peak_bytes)} at the peak", weight="bold")
        where = f"instruction {t.peak_step}, {point.phase}" + (f", in {point.path}" if point.path else "")
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
    most = int(445 / size)  # characters that fit this column
    shown = text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
    axes.text(x, y, shown, fontsize=size, va="top", parse_math=False, **style)


def _plain(texts: Iterable[Any]) -> None:
    for text in texts:  # a policy's name may hold a $
        text.set_parse_math(False)
