"""Tables for a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def size(n: float) -> str:
    """Bytes for people: ``"1.50 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], width: int = 160) -> str:
    """A table as text; columns that hold numbers are on the right."""
    shown = Table(title=title, title_justify="left")
    rows = [tuple(map(str, row)) for row in rows]
    for i, column in enumerate(columns):
        numeric = all(re.match(r"^[-+]?[\d.]", row[i]) or not row[i] for row in rows)
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(shown)
    return out.getvalue().rstrip()


def residuals_table(found: Any) -> str:
    """Residuals by layer family, largest first."""
    rows = []
    for group in found.groups():
        r = group.each
        kind = f"{r.dtype}{list(r.shape)}"
        rows.append((size(group.nbytes), str(group.count), kind, r.place, group.pattern or "-", r.op, _short(r.source)))
    title = (
        f"residuals: {size(found.device_bytes)} on the device, {size(found.host_bytes)} on the host "
        f"({len(found.arguments)} arguments are kept anyway)"
    )
    return table(title, ("bytes", "count", "type", "place", "module", "op", "source"), rows)


def _short(source: str) -> str:
    return source.rpartition("/")[2]
