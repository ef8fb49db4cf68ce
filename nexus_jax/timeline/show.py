"""A :class:`Timeline` as text."""

from __future__ import annotations

from nexus_jax import report
from nexus_jax.timeline.model import Timeline, grouped

_ROWS = 15


def table(t: Timeline) -> str:
    """The sums of a step and what is live at its peak, for a terminal."""
    return f"{_sums(t)}\n{_peak(t)}"


def _sums(t: Timeline) -> str:
    d = t.device
    rows = [
        ("set aside", t.reserved, "by the compiler, for the whole step"),
        ("  arguments", d.arguments, ""),
        ("  outputs", d.outputs, ""),
        ("  aliased", -d.aliased, "outputs that take the memory of an argument"),
        ("  temporaries", d.temporaries, ""),
        ("  constants", d.constants, ""),
        ("  thread-local", d.thread_local, "scalars of nested computations"),
        ("in use at the peak", t.peak_bytes, "the sum of what is live"),
        ("  not written yet", t.unwritten, "outputs, set aside"),
        ("  fragmentation", t.fragmentation, "holes between temporaries"),
        ("host bytes", t.host.arguments + t.host.outputs - t.host.aliased + t.host.temporaries, "counted apart"),
        ("on the chip", t.on_chip, "a TPU's VMEM and the like, counted apart"),
    ]
    kept = [(name, report.size(n), about) for name, n, about in rows if n or name in ("set aside", "  fragmentation")]
    return report.table("one step", ("", "bytes", ""), kept)


def _peak(t: Timeline) -> str:
    groups = grouped(t.at_peak)
    rows = [
        (
            report.size(g.bytes),
            str(len(g.members)),
            g.each.shape,
            g.each.kind,
            g.each.phase or "before",
            g.pattern or "-",
            g.each.op,
        )
        for g in groups[:_ROWS]
    ]
    rest = groups[_ROWS:]
    if rest:
        count = sum(len(g.members) for g in rest)
        rows.append((report.size(sum(g.bytes for g in rest)), str(count), "smaller ones", "", "", "", ""))
    point = t.points[t.peak_step]
    where = f"{point.phase}, {point.path or '-'} {point.op}"
    title = f"live at the peak, {report.size(t.peak_bytes)} at step {t.peak_step} of {len(t.points)} ({where})"
    return report.table(title, ("bytes", "count", "type", "kind", "made in", "module", "op"), rows)
