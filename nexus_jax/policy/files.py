"""Policies as TOML: found by name in the wheel or a checkout, read, checked and written."""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
from typing import Any

import tomli_w

from nexus_jax.policy.rules import CheckpointRule, Policy, ResidualRule

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def _folder() -> pathlib.Path:
    installed = _PACKAGE / "policies"
    return installed if installed.is_dir() else _PACKAGE.parent / "policies"


def available_policies() -> tuple[str, ...]:
    """The names of the policies that ship with nexus_jax, sorted."""
    return tuple(sorted(p.stem for p in _folder().glob("*.toml")))


def load_policy(name_or_path: Any) -> Policy:
    """Load a shipped policy by name, or any policy from a TOML file.

    Args:
        name_or_path: ``"heavy_ops"``, or a path that ends in ``.toml``.

    Raises:
        ValueError: an unknown name (lists the choices), or a broken file (file, line or key, and what to write).
        FileNotFoundError: a path where no file is.

    Example:
        >>> import nexus_jax
        >>> nexus_jax.load_policy("all").summary
        'Recompute the inside of every layer.'
    """
    path = pathlib.Path(name_or_path)
    shipped = path.suffix != ".toml"
    if shipped:
        if str(name_or_path) not in available_policies():
            raise ValueError(
                f"no policy is called {str(name_or_path)!r}; the choices are {', '.join(available_policies())}, "
                "or the path of a .toml file."
            )
        path = _folder() / f"{name_or_path}.toml"
    text = path.read_text(encoding="utf-8")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path}: not valid TOML: {e}.") from None
    return _whole(path, data) or _parse(path, text, data, strict=not shipped)


def _whole(path: pathlib.Path, data: dict[str, Any]) -> Policy | None:
    """A file that decides for a model's whole call: a plan, or a budget."""
    from nexus_jax import planner

    given = {key: value for key, value in data.items() if key != "summary"}
    try:
        if planner.files.KEY in data:
            whole: Any = planner.files.parsed(given)
        elif "memory_budget" in data:
            others = sorted(set(given) - {"memory_budget", "target", "host_budget"})
            if others:
                known = "target, host_budget and summary"
                raise ValueError(f"a policy with a memory_budget has {known} beside it, not {others[0]}.")
            whole = planner.Budget(**given)
        else:
            return None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return Policy(name=path.stem, summary=str(data.get("summary", "A plan.")), whole=whole)


def _parse(path: pathlib.Path, text: str, data: dict[str, Any], *, strict: bool) -> Policy:
    unknown = set(data) - {"summary", "checkpoint", "residual"}
    if unknown:
        key = min(unknown)
        raise ValueError(
            f"{_at(path, text, key, 0)}: unknown key {key!r}; a policy has summary, [[checkpoint]] and [[residual]]."
        )
    summary = data.get("summary", "")
    if not isinstance(summary, str):
        raise ValueError(f"{_at(path, text, 'summary', 0)}: summary={summary!r}: write a string.")
    rules: dict[str, list[Any]] = {"checkpoint": [], "residual": []}
    for table, kind in (("checkpoint", CheckpointRule), ("residual", ResidualRule)):
        entries = data.get(table, [])
        if not isinstance(entries, list):
            raise ValueError(f"{_at(path, text, table, 0)}: write [[{table}]] with two brackets.")
        for i, entry in enumerate(entries):
            rules[table].append(_rule(path, text, table, i, kind, entry))
    return Policy(
        name=path.stem,
        summary=summary,
        checkpoint=tuple(rules["checkpoint"]),
        residual=tuple(rules["residual"]),
        strict=strict,
    )


def _rule(path: pathlib.Path, text: str, table: str, index: int, kind: type, entry: Any) -> Any:
    start = _table_line(text, table, index)
    if not isinstance(entry, dict):
        raise ValueError(f"{path}:{start + 1}: write [[{table}]] on a line of its own, and its keys below.")
    known = {f.name for f in dataclasses.fields(kind)} - {"where"}
    for key in entry:
        if key not in known:
            raise ValueError(
                f"{_at(path, text, key, start)}: unknown key {key!r} in [[{table}]]; it has {', '.join(sorted(known))}."
            )
    try:
        return kind(**entry)
    except (ValueError, TypeError) as e:
        message = str(e)
        key = next((k for k in entry if message.startswith(f"{k}=")), "")
        raise ValueError(f"{_at(path, text, key, start)}: in [[{table}]]: {message}") from None


def _table_line(text: str, table: str, index: int) -> int:
    lines = [i for i, line in enumerate(text.splitlines()) if line.replace(" ", "").startswith(f"[[{table}]]")]
    return lines[index] if index < len(lines) else 0


def _at(path: pathlib.Path, text: str, key: str, start: int) -> str:
    for i, line in enumerate(text.splitlines()[start:], start + 1):
        if key and line.strip().strip("[").startswith(key):
            return f"{path}:{i}"
    return f"{path}:{start + 1}"


def save(policy: Policy, path: Any) -> None:
    """Write ``policy`` as TOML; the parent folder must exist."""
    document: dict[str, Any] = {"summary": policy.summary}
    if policy.whole is not None:
        document |= policy.whole.document()
    for table, rules in (("checkpoint", policy.checkpoint), ("residual", policy.residual)):
        entries = []
        for rule in rules:
            if getattr(rule, "where", None) is not None:
                raise ValueError(
                    "a policy with a Python function (custom_policy) cannot be written to a file; "
                    "write the choice as type or path rules."
                )
            values = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
            if values.get("fallback") is False:
                del values["fallback"]
            entries.append({k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None})
        if entries:
            document[table] = entries
    pathlib.Path(path).write_text(tomli_w.dumps(document), encoding="utf-8")
