"""Why each value is kept or made again: a plan's decisions by layer family, and what the opposite would do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from nexus_jax import _compat, report, scopes
from nexus_jax.planner.allocate import Option, Path
from nexus_jax.planner.graph import CannotRecompute, Choice, Graph, price
from nexus_jax.planner.model import Model
from nexus_jax.planner.plan import Row
from nexus_jax.planner.spans import Span

_VALUES = 8  # of a boundary, the largest
_STAYS = "keeping it on the device would take"


def rows_of(model: Model, path: Path) -> tuple[Row, ...]:
    """The lines of the table, in program order; equal layers with equal decisions are one line."""
    found: dict[tuple[Any, ...], Row] = {}
    for edge, option in path.steps:
        span = model.span(edge.start, edge.stop)
        inside = option.what.inside
        if inside is not None:
            group = option.what.group
            inner = model.bodies[span.start, group]
            rows = [_of_scan(model, span, group, row) for row in (*_carried(inner, option), *rows_of(inner, inside))]
        else:
            rows = _rows(model, span, option)
        for row in rows:
            key = (row.where, row.op, row.kind, row.decision, row.reason, row.cost)
            count = row.count + (found[key].count if key in found else 0)
            found[key] = Row(**{**_fields(row), "count": count})
    return tuple(found.values())


def _of_scan(model: Model, span: Span, group: int, row: Row) -> Row:
    """A line about the body of a scan: it holds for every step, or for every ``group`` of them."""
    eqn = model.flat.eqns[span.start]
    where = "/".join(part for part in (_path(eqn), row.where) if part and part != "outside modules")
    return dataclasses.replace(row, where=where or "outside modules", count=row.count * eqn.params["length"] // group)


def _carried(inner: Model, option: Option) -> list[Row]:
    """What a scan carries from step to step, and waits on the host."""
    found = []
    for n in option.what.carry:
        v = inner.flat.jaxpr.invars[inner.body.carry.start + n]
        kind, nbytes = report.short_type(str(v.aval.dtype), v.aval.shape), inner.spans_of.sizes[inner.flat.number[v]]
        reason = f"{_STAYS} {_signed(report.size, nbytes)}"
        found.append(
            Row(where="", count=1, op="carry", kind=kind, nbytes=nbytes, cost=0, decision="offload", reason=reason)
        )
    return found


def _fields(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Row.__dataclass_fields__}


def _rows(model: Model, span: Span, option: Option) -> list[Row]:
    if option.what.choice is None:
        reason = "nothing inside is worth making again here: it is needed while all this is alive"
        return [_row(model, span.start, span.stop, "-", "", option.kept, 0, "as it is", reason)]
    graph, choice = span.shape.graph, option.what.choice
    again = graph.again(choice.kept)
    made = {v for i in again for v in graph.ops[i].outs}
    shown = sorted((choice.kept | (made & graph.keepable)) - graph.free, key=lambda v: (-graph.sizes[v], v))[:_VALUES]
    rows = [_value_row(model, span, graph, choice, v) for v in shown]
    leaving = model.spans_of.leaving(span.start, span.stop) if option.what.away else ()
    return rows + [_handed_on(model, span, v) for v in sorted(leaving)]


def _handed_on(model: Model, span: Span, number: int) -> Row:
    """What flows on to later stretches, and waits on the host all the same."""
    at, kind = _made(model, span, number)
    nbytes = model.spans_of.sizes[number]
    reason = f"{_STAYS} {_signed(report.size, nbytes)}"
    return _row(model, at, at + 1, model.flat.eqns[at].primitive.name, kind, nbytes, 0, "offload", reason)


def _value_row(model: Model, span: Span, graph: Graph, choice: Choice, value: int) -> Row:
    number = span.values[value]
    at, kind = _made(model, span, number)
    eqn = model.flat.eqns[at]
    unit = model.spans_of.unit
    cost = graph.ops[graph.maker[value]].cost * unit
    decision = "save" if value in choice.saved else "offload" if value in choice.offloaded else "recompute"
    reason = _flipped(graph, choice, value, unit)
    return _row(model, at, at + 1, eqn.primitive.name, kind, graph.sizes[value], cost, decision, reason)


def _made(model: Model, span: Span, number: int) -> tuple[int, str]:
    """Which equation makes a value, and its type."""
    v = model.flat.variables[number]
    at = next(i for i in range(span.start, span.stop) if v in model.flat.eqns[i].outvars)
    return at, report.short_type(str(v.aval.dtype), v.aval.shape)


def _flipped(graph: Graph, choice: Choice, value: int, unit: int) -> str:
    now = price(graph, choice)
    flipped = Choice(saved=choice.saved ^ {value}, offloaded=choice.offloaded - {value})
    try:
        then = price(graph, flipped)
    except CannotRecompute:
        return "cannot be made again"
    more = "recomputing it" if value in choice.kept else "saving it"
    return (
        f"{more} would take {_signed(report.size, then.device - now.device)} and "
        f"{_signed(lambda n: f'{n:.3g}', (then.ticks - now.ticks) * unit)} of cost"
    )


def _signed(show: Any, n: int) -> str:
    return f"{'-' if n < 0 else '+'}{show(abs(n))}"


def _row(
    model: Model, start: int, stop: int, op: str, kind: str, nbytes: int, cost: int, decision: str, reason: str
) -> Row:
    where = _common([_path(model.flat.eqns[i]) for i in range(start, stop)])
    return Row(where=where, count=1, op=op, kind=kind, nbytes=nbytes, cost=cost, decision=decision, reason=reason)


def _path(eqn: Any) -> str:
    return re.sub(r"\d+", "*", scopes.module_path(_compat.scope_path(eqn)))


def _common(paths: Sequence[str]) -> str:
    parts = [p.split("/") for p in paths if p]
    if not parts:
        return "outside modules"
    first, last = parts[0], parts[-1]
    same = [a for a, *rest in zip(*parts, strict=False) if all(a == b for b in rest)]
    if same and len(parts) > 1 and first != last:
        return f"{'/'.join(same)} ({'/'.join(first[len(same) :]) or '.'} ... {'/'.join(last[len(same) :]) or '.'})"
    return "/".join(first)
