"""Plans as TOML files, read with suspicion."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import tomllib
from typing import Any

from nexus_jax.planner.plan import Plan, Row, Subject
from nexus_jax.planner.rewrite import Segment

FORMAT = 1
KEY = "nexus_jax_plan"  # the first of a plan's file


def document(plan: Plan) -> dict[str, Any]:
    """A plan as what TOML can hold."""
    found = dataclasses.asdict(plan)
    found["subject"]["ops"] = dict(plan.subject.ops)
    segments = [_segment(s) for s in found.pop("segments")]
    rows = found.pop("rows")
    return {KEY: FORMAT, **found, "segment": segments, "row": list(rows)}


def _segment(segment: dict[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in segment.items() if v != () and (k, v) != ("group", 1)}
    return {**found, "inside": [_segment(s) for s in found["inside"]]} if "inside" in found else found


def load(path: str | pathlib.Path) -> Plan:
    """Read a plan.

    Raises:
        ValueError: with the file, the key, and what to write.
    """
    path = pathlib.Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}.") from None
    try:
        return parsed(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def parsed(data: dict[str, Any]) -> Plan:
    """A plan from what its file says.

    Raises:
        ValueError, TypeError: it says nonsense; the key, and what to write.
    """
    data = {key: value for key, value in data.items() if key != "summary"}
    if data.pop(KEY, None) != FORMAT:
        raise ValueError(f"no plan of this version: its first line should be {KEY} = {FORMAT}.")
    subject = dict(_required(data, "subject", dict))
    subject["inputs"] = tuple(_required(subject, "inputs", list))
    subject["ops"] = tuple(sorted(_required(subject, "ops", dict).items()))
    data["subject"] = _made(Subject, subject, "subject.")
    data["segments"] = _segments(_pop(data, "segment"), "segment")
    data["rows"] = tuple(_made(Row, r, f"row {n}: ") for n, r in enumerate(_pop(data, "row")))
    data["trials"] = tuple(tuple(t) for t in data.get("trials", ()))
    return _made(Plan, data, "")


def _segments(tables: list[dict[str, Any]], prefix: str) -> tuple[Segment, ...]:
    found = []
    for n, table in enumerate(tables):
        where = f"{prefix} {n}"
        inside = _segments(_pop(table, "inside"), f"{where}, inside")
        found.append(_made(Segment, {**_numbers(table), "inside": inside}, f"{where}: "))
    for before, after in zip([None, *found], found, strict=False):
        start = before.stop if before else 0
        if after.start != start:
            raise ValueError(f"{prefix} {after.start} should start at equation {start}: segments follow one another.")
    return tuple(found)


def _pop(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = data.pop(key, [])
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise ValueError(f"{key}: write [[{key}]] tables.")
    return found


def _numbers(segment: dict[str, Any]) -> dict[str, Any]:
    found = dict(segment)
    for key in ("save", "offload", "carry"):
        values = found.get(key, [])
        if not isinstance(values, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise ValueError(f"{key} = {values!r}: write a list of value numbers.")
        found[key] = tuple(values)
    return found


def _required(data: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(data.get(key), kind):
        raise ValueError(f"{key} = {data.get(key)!r}: write a {'table' if kind is dict else kind.__name__}.")
    return data[key]


_KINDS = {"int": int, "float": float, "str": str, "bool": bool}


def _made(cls: type, data: dict[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ValueError(f"{prefix}unknown key {key}: the keys are {', '.join(fields)}.")
    for key, field in fields.items():
        if key not in data:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"{prefix}{key} is missing.")
            continue
        kind = _KINDS.get(str(field.type))
        value = data[key]
        if kind is float and isinstance(value, int):
            value = float(value)
        if kind and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise ValueError(f"{prefix}{key} = {value!r}: write a value of type {field.type}.")
        if kind in (int, float) and not (math.isfinite(value) and (value >= 0 or key in _SIGNED)):
            raise ValueError(f"{prefix}{key} = {value!r}: write 0 or more.")
    return cls(**data)


_SIGNED = {"extra_flops"}
