"""Which module calls become boundaries: rules against a tree of modules, without Flax and without JAX.

Select, then act: an adapter describes a model as :class:`ModuleNode` values, :func:`select` answers with the paths
that become boundaries, and the adapter opens the model there.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable

from nexus_jax.policy.rules import CheckpointRule, Policy, parse_slice

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleNode:
    """One module below the root.

    Args:
        path: names from the root down; containers (lists, dicts) are part of the path, not nodes.
        type: class name.
        params: ``(name, shape, dtype)`` of every parameter below it; of one layer, where a scan steps over layers.
        size: number of parameters below it.
        single_op: a lone matmul, convolution, lookup or the like, of Flax's own: its only residuals are its
            inputs, so a boundary around it frees nothing.
        leaf_layer: one of Flax's own layers without submodules (also norms): not what is meant by a layer of a family.
        scanned: one step of a scan over layers.
        remat: already under the user's own ``remat``.
        answers: what CUSTOM's function said of it, by function.
    """

    path: Path
    type: str
    params: tuple = ()
    size: int = 0
    single_op: bool = False
    leaf_layer: bool = False
    scanned: bool = False
    remat: bool = False
    where: bool = False

    @property
    def printed(self) -> str:
        return "/".join(self.path)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The boundaries of one policy in one model, with what was left out and why.

    Attributes:
        boundaries: paths that run under ``jax.checkpoint``.
        dropped: ``(path, reason)`` of modules that a rule chose and that are left alone.
        unmatched: rules that chose nothing at all.
        scanned_alike: paths of scanned layers, where a rule with a slice could not tell the layers apart.
    """

    boundaries: frozenset[Path]
    dropped: tuple[tuple[Path, str], ...] = ()
    unmatched: tuple[CheckpointRule, ...] = ()
    scanned_alike: tuple[Path, ...] = ()

    def __str__(self) -> str:
        lines = [f"boundaries: {len(self.boundaries)}"]
        lines += [f"  {line}" for line in _grouped(self.boundaries)]
        reasons = defaultdict(list)
        for path, reason in self.dropped:
            reasons[reason].append(path)
        for reason, paths in reasons.items():
            lines.append(f"dropped: {len(paths)} ({reason})")
            lines += [f"  {line}" for line in _grouped(paths)]
        return "\n".join(lines)


def _grouped(paths: Iterable[Path]) -> list[str]:
    groups: dict[str, int] = defaultdict(int)
    for path in sorted(paths, key=_natural):
        groups[re.sub(r"\d+", "*", "/".join(path))] += 1
    return [f"{count} x {name}" if count > 1 else name for name, count in groups.items()]


def _natural(path: Path) -> tuple:
    return tuple(tuple(int(x) if x.isdigit() else x for x in re.split(r"(\d+)", part)) for part in path)


class _Tree:
    """Parents, depths and families of a set of nodes."""

    def __init__(self, nodes: Iterable[ModuleNode]):
        self.nodes = {node.path: node for node in nodes}
        self.parent: dict[Path, Path] = {}
        self.children: dict[Path, list[Path]] = defaultdict(list)
        for path in self.nodes:
            parent = next((path[:i] for i in range(len(path) - 1, 0, -1) if path[:i] in self.nodes), ())
            self.parent[path] = parent
            self.children[parent].append(path)
        families: dict[tuple, list[Path]] = defaultdict(list)
        for path, node in self.nodes.items():
            if node.scanned:
                families[("scan", path)].append(path)
            elif node.params and not node.leaf_layer:
                families[(self.parent[path], node.type, node.params)].append(path)
        self.place_in_family: dict[Path, tuple[int, int]] = {}
        for key, members in families.items():
            if len(members) > 1 or key[0] == "scan":
                for i, path in enumerate(members):
                    self.place_in_family[path] = (i, len(members))
        self.around_family = {
            path[:i] for path in self.place_in_family for i in range(len(path)) if path[:i] in self.nodes
        }

    def depth(self, path: Path) -> int:
        return 1 if self.parent[path] == () else 1 + self.depth(self.parent[path])

    def in_layer(self, path: Path) -> bool:
        return path in self.place_in_family or (self.parent.get(path, ()) != () and self.in_layer(self.parent[path]))

    def matches(self, rule: CheckpointRule, path: Path) -> bool:
        node = self.nodes[path]
        checks = (
            rule.type is None or re.fullmatch(rule.type, node.type),
            rule.path is None or re.fullmatch(rule.path, node.printed),
            rule.min_params is None or node.size >= rule.min_params,
            rule.depth is None or self.depth(path) == rule.depth,
            rule.family is None or (self.in_layer(path) or path in self.around_family) == rule.family,
            rule.where is None or node.where,
            rule.layers is None or self._in_slice(rule, path),
        )
        return all(checks)

    def _in_slice(self, rule: CheckpointRule, path: Path) -> bool:
        if path not in self.place_in_family:
            return False
        if rule.type is None and rule.path is None and self.in_layer(self.parent[path]):
            return False  # self- and cross-attention inside a layer that is left alone are no layers
        index, count = self.place_in_family[path]
        return self.nodes[path].scanned or index in range(count)[parse_slice(rule.layers or "::")]


def select(policy: Policy, nodes: Iterable[ModuleNode]) -> Selection:
    """The boundaries that ``policy`` makes among ``nodes``; outermost only, first matching rule wins."""
    tree = _Tree(nodes)
    main = [r for r in policy.checkpoint if not r.fallback]
    selection, matched = _outermost(tree, main)
    if not matched:
        fallback = [r for r in policy.checkpoint if r.fallback]
        selection, matched = _outermost(tree, fallback)
        unmatched = () if matched else tuple(policy.checkpoint)
    else:
        unmatched = tuple(r for r in main if r not in matched)
    alike = tuple(
        path
        for path in selection.boundaries
        if tree.nodes[path].scanned
        and any(r.layers not in (None, ":", "::") and tree.matches(r, path) for r in policy.checkpoint)
    )
    return dataclasses.replace(selection, unmatched=unmatched, scanned_alike=alike)


def _outermost(tree: _Tree, rules: list[CheckpointRule]) -> tuple[Selection, set[CheckpointRule]]:
    matched = {r for r in rules for path in tree.nodes if tree.matches(r, path)}
    boundaries: set[Path] = set()
    dropped: list[tuple[Path, str]] = []

    def visit(path: Path) -> None:
        node = tree.nodes[path]
        if any(tree.matches(rule, path) for rule in rules):
            if node.single_op:
                dropped.append((path, f"a lone {node.type} keeps only its input: nothing to free"))
                return
            if node.remat:
                dropped.append((path, "already under the model's own remat"))
                return
            boundaries.add(path)
            return
        for child in tree.children[path]:
            visit(child)

    for child in tree.children[()]:
        visit(child)
    return Selection(frozenset(boundaries), tuple(dropped)), matched


def check_selection(policy: Policy, selection: Selection, nodes: Iterable[ModuleNode]) -> None:
    """Raise for a user's rule that selects nothing; warn where a documented policy selects nothing."""
    nodes = list(nodes)
    if policy.strict:
        for rule in selection.unmatched:
            if not rule.fallback:
                raise ValueError(_unmatched_message(policy, rule, nodes))
    if selection.scanned_alike:
        alike = "/".join(selection.scanned_alike[0])
        warnings.warn(
            f"policy {policy.name!r}: the layers of a scan run one program, so {alike} is "
            "treated alike in every step: all of its layers are checkpointed. Unroll the scan to treat them apart.",
            stacklevel=2,
        )
    if policy.checkpoint and not selection.boundaries:
        warnings.warn(_nothing_message(policy, selection, nodes), stacklevel=2)


def _nothing_message(policy: Policy, selection: Selection, nodes: list[ModuleNode]) -> str:
    message = f"policy {policy.name!r} checkpoints nothing in this model"
    if selection.dropped:
        path, reason = selection.dropped[0]
        message += f" ({len(selection.dropped)} dropped, as {'/'.join(path)}: {reason})"
    largest = max((n for n in nodes if not n.single_op), key=lambda n: n.size, default=None)
    if largest is None:
        return f"{message}: it has no submodule whose inside could be recomputed."
    return (
        f"{message}. Its largest submodule is {largest.printed} ({largest.type}, {largest.size:,} parameters): "
        f'policy="all", a lower auto_wrap_min_params, or a rule with path="{re.escape(largest.printed)}" selects some.'
    )


def _unmatched_message(policy: Policy, rule: CheckpointRule, nodes: list[ModuleNode]) -> str:
    said = ", ".join(
        f"{f.name}={getattr(rule, f.name)!r}"
        for f in dataclasses.fields(rule)
        if getattr(rule, f.name) not in (None, False)
    )
    paths = [n.printed for n in nodes]
    types = sorted({n.type for n in nodes})
    close = difflib.get_close_matches(rule.path or "", paths, n=5, cutoff=0.0) or paths[:5]
    near = difflib.get_close_matches(rule.type or "", types, n=5, cutoff=0.0) or types[:5]
    return (
        f"policy {policy.name!r}: the rule [{said}] matches no module. "
        f"The closest paths are {', '.join(close) or '(none)'}; the closest types are {', '.join(near) or '(none)'}."
    )
