"""Tables for a terminal."""

from __future__ import annotations

import io
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from nexus_jax.recompute import flop


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


# --- residuals -----------------------------------------------------------------------------------------------------

_COLUMNS = ("bytes", "share", "count", "type", "place", "module", "op", "kept for", "to recompute", "source")
_SHORT = {"convert_element_type": "convert", "broadcast_in_dim": "broadcast", "conv_general_dilated": "conv"}
_SHORT |= {
    "dot_general": "dot",
    "select_n": "select",
    "one_minus_square": "1 - x^2",
    "integer_pow": "x^n",
    "pallas_call": "pallas",
}
_SMALL = 0.001  # of all bytes: smaller groups share the last row


def residuals_table(found: Any, width: int | None = None) -> str:
    """Residuals by layer family, largest first; one line each if that fits, else two. The root's name is left out.

    Args:
        found: :class:`nexus_jax.Residuals`.
        width: columns; by default those of the terminal, and at most 160.
    """
    width = width or min(shutil.get_terminal_size((160, 24)).columns, 160)
    groups = found.groups()
    root = _root([r.path for r in found])
    rows = [_residual_row(g, found.nbytes, root) for g in groups if g.nbytes >= _SMALL * found.nbytes]
    rest = groups[len(rows) :]
    if rest:
        nbytes, count = sum(g.nbytes for g in rest), sum(g.count for g in rest)
        less = f"{len(rest)} groups of less than {_SMALL:.1%} each"
        rows.append((size(nbytes), f"{nbytes / found.nbytes:.1%}", str(count), less, *[""] * (len(_COLUMNS) - 4)))
    places = f"{size(found.device_bytes)} on the device, {size(found.host_bytes)} on the host"
    title = f"residuals{root and f' in {root[:-1]}'}: {places}"
    return "\n".join([title, *(_laid_out(rows, width) if rows else []), *_kept_anyway(found.arguments)])


def _residual_row(group: Any, total: int, root: str) -> tuple[str, ...]:
    r = group.each
    return (
        size(group.nbytes),
        f"{group.nbytes / max(total, 1):.1%}",
        str(group.count),
        short_type(r.dtype, r.shape),
        r.place,
        group.pattern.removeprefix(root) or "-",
        _short(r.op),
        _short_why(group),
        _to_recompute(*group.recompute) if group.recompute else "",
        r.source.rpartition("/")[2].partition(" ")[0],
    )


def _short(op: str) -> str:
    return _SHORT.get(op, op)


def short_type(dtype: str, shape: Sequence[int]) -> str:
    """A type as XLA writes it.

    Example:
        >>> short_type("bfloat16", (8, 1024)), short_type("uint32", (2,)), short_type("float8_e4m3fn", ())
        ('bf16[8,1024]', 'u32[2]', 'f8_e4m3fn[]')
    """
    short = re.sub(r"^(b?)(?:(f)loat|(u)?(i)nt)(?=\d)", lambda m: m[1] + (m[2] or m[3] or m[4]), dtype)
    return f"{short}[{','.join(map(str, shape))}]"


def _root(paths: Sequence[str]) -> str:
    """``"GPT/"`` where all paths are in one module."""
    roots = {path.partition("/")[0] for path in paths if path}
    return f"{roots.pop()}/" if len(roots) == 1 and any("/" in path for path in paths) else ""


def _short_why(group: Any) -> str:
    """As ``why``, with modules as they are seen from the group's own."""
    alike: dict[tuple[str, str], list[str]] = {}
    for use in group.uses:
        alike.setdefault((use.role, use.op), []).append(_seen_from(group.pattern, use.path))
    said = []
    for (role, op), paths in alike.items():
        named = _braced([path for path in paths if path])
        if role == "gradient":
            said.append("is the gradient")
        elif op == "recomputation":
            said.append(f"recomputes {named or 'from it'}")
        else:
            what = _short(op) if role in ("operand", "factor") else f"{role} of {_short(op)}"
            here = " here and" if "" in paths else ""
            said.append(f"{what}{here} in {named}" if named else what)
    return ", ".join(said) or "nothing: dropped"


def _seen_from(own: str, path: str) -> str:
    """A module without what it shares with another; empty for itself."""
    if own == path:
        return ""
    parts, shared = path.split("/"), 0
    while shared < len(parts) - 1 and own.split("/")[shared : shared + 1] == [parts[shared]]:
        shared += 1
    return "/".join(parts[shared:])


def _braced(paths: Sequence[str]) -> str:
    """``attn/q, attn/k`` as ``attn/{q,k}``."""
    parents = {path.rpartition("/")[0] for path in paths}
    if len(paths) > 1 and len(parents) == 1 and (parent := parents.pop()):
        return f"{parent}/{{{','.join(path.rpartition('/')[2] for path in paths)}}}"
    return ", ".join(paths)


def _to_recompute(least: Any, most: Any) -> str:
    if most.matmuls:
        text = f"{' + '.join(f'{n} {_short(op)}' for op, n in most.matmuls)}, {flop(most.flops)}"
        return text if least.flops == most.flops else f"up to {text}"
    return str(most).partition(",")[0]


def _laid_out(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Rows as lines: in columns, or where that is too wide with the module last and the reasons below."""
    table = [list(_COLUMNS), *map(list, rows)]
    lines = _columns(table)
    if max(map(len, lines)) > width:
        order = [_COLUMNS.index(c) for c in ("bytes", "share", "count", "type", "place", "op", "source", "module")]
        upper = _columns([[row[i] for i in order] for row in table])
        lines = [upper[0]]
        for line, row in zip(upper[1:], rows, strict=True):
            lines.append(line)
            if row[8]:
                lines += textwrap.wrap(
                    f"for {row[7]}; to recompute: {row[8]}",
                    width - 12,
                    initial_indent=" " * 12,
                    subsequent_indent=" " * 12,
                )
    return [lines[0], "─" * min(max(map(len, lines)), width), *lines[1:]]


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns two spaces apart, the first three on the right. A cell with nothing after it may be long."""
    widths = [max(len(row[i]) for row in table if any(row[i + 1 :]) or row is table[0]) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [c.rjust(w) if i < 3 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _kept_anyway(arguments: Sequence[Any]) -> list[str]:
    kinds: dict[str, list[Any]] = {"argument": [], "view": [], "constant": []}
    for r in arguments:
        kinds["argument" if r.op == "argument" else "constant" if "constant" in r.op else "view"].append(r)
    about = {
        "argument": "of parameters and inputs that the backward pass reads again: they are there anyway",
        "view": "of views of parameters and inputs: compilers read those instead",
        "constant": "of constants: compilers fold them, or make them again",
    }
    return [f"not counted: {size(sum(r.nbytes for r in rs))} {about[kind]}" for kind, rs in kinds.items() if rs]


def matplotlib() -> tuple[Any, Any]:
    """matplotlib, and its Figure.

    Raises:
        RuntimeError: it is not installed (says what to install).
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no window, no state that outlives the picture
    except ImportError:
        raise RuntimeError('pictures need matplotlib: pip install "nexus-jax[pictures]".') from None
    return matplotlib, Figure
