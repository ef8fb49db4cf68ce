"""Why a residual is kept: what the backward pass does with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from nexus_jax.dataflow import MOVED, VIEWS, Flow, Node
from nexus_jax.scopes import module_path, phase


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Use:
    """One thing that the backward pass does with a residual.

    Attributes:
        role: what it is there: ``"operand"``, ``"factor"``, ``"mask"``, ``"indices"``, ``"key"``, ...; ``"input"`` of a
            recomputation; ``"gradient"`` where it is handed out as it is.
        op: the primitive that reads it, or ``"recomputation"``: then a boundary starts from it.
        path: the module of which that is the backward pass, or the boundary.
    """

    role: str
    op: str
    path: str

    def __str__(self) -> str:
        return why([self])


def why(uses: Iterable[Use]) -> str:
    """Uses in words, alike ones together.

    Example:
        >>> why(Use(role="operand", op="dot_general", path=f"GPT/blocks_0/attn/{name}") for name in "qk")
        'operand of dot_general in the backward of GPT/blocks_0/attn/q, GPT/blocks_0/attn/k'
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for use in uses:
        alike.setdefault((use.role, use.op), []).append(use.path)
    return "; ".join(_sentence(*what, ", ".join(paths)) for what, paths in alike.items()) or UNREAD


UNREAD = "nothing reads it: compilers drop it"


def _sentence(role: str, op: str, where: str) -> str:
    if role == "gradient":
        return "the gradient itself"
    if op == "recomputation":
        return f"input of the recomputation of {where or 'a function'}"
    return f"{role} of {op} in the backward of {where or 'the function'}"


# A residual may pass through these on its way to the equation that needs it.
_PASSED = VIEWS | MOVED | {"convert_element_type"}


class Reasons:
    """The backward pass, asked what it does with a residual."""

    def __init__(self, flow: Flow):
        self.flow, self.live = flow, flow.live()

    def uses(self, values: Iterable[int]) -> tuple[Use, ...]:
        """The equations that read an input of the backward pass, past views and conversions; none that are for nothing."""
        found: set[Use] = set()
        pending = [(self.flow, value) for value in values]
        seen = {value for _, value in pending}
        while pending:
            flow, value = pending.pop()
            onward = _handed_out(flow, value)
            if flow is self.flow and value in flow.outputs:
                found.add(Use(role="gradient", op="", path=""))
            for node, i in flow.readers.get(value, ()):
                if node not in self.live:
                    continue
                further = _further(flow, node, i)
                if not further:
                    found.add(_use(node, i))
                onward += further
            pending += [pair for pair in onward if pair[1] not in seen]
            seen.update(v for _, v in onward)
        return tuple(sorted(found))


def _further(flow: Flow, node: Node, i: int) -> list[tuple[Flow, int]]:
    """Where a value goes on to, from an equation that does not itself compute with it."""
    if node.op in _PASSED:
        return [(flow, node.outs[i if node.op == "optimization_barrier" else 0])]
    if node.op == "scan":
        return [(node.bodies[0], node.bodies[0].inputs[i])]
    if node.op == "cond" and i:
        return [(body, body.inputs[i - 1]) for body in node.bodies]
    return []


def _handed_out(flow: Flow, value: int) -> list[tuple[Flow, int]]:
    """Where a value goes on to that is a result of a loop's or a branch's body."""
    if flow.outside is None or value not in flow.outputs:
        return []
    outer, node = flow.outside
    positions = [i for i, out in enumerate(flow.outputs) if out == value]
    found = [(outer, node.outs[i]) for i in positions]
    if node.op == "scan":
        found += [(flow, flow.inputs[node.first_carried + i]) for i in positions if i < node.carried]
    return found


_ROLES = {"mul": "factor", "dot_general": "operand", "select_n": "case", "cond": "operand"}


def _use(node: Node, i: int) -> Use:
    if phase(node.scope) == "recompute":
        boundary = node.scope.rpartition("rematted_computation")[0]
        return Use(role="input", op="recomputation", path=module_path(boundary))
    role = _ROLES.get(node.op, "operand")
    if node.op.startswith("random_") or node.op == "threefry2x32":
        role = "key"
    elif node.op in ("select_n", "cond") and i == 0:
        role = "mask" if node.op == "select_n" else "branch"
    elif (node.op.startswith(("gather", "scatter")) and i == 1) or (node.op.startswith("dynamic_") and i):
        role = "indices"
    elif node.op == "div" and i == 1:
        role = "divisor"
    op = "select" if node.op == "select_n" else node.op
    return Use(role=role, op=op, path=module_path(node.scope))
