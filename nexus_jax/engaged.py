"""Did it engage? A policy's intent, held against the compiled program.

What autodiff was told (the residuals, the recomputation in the jaxpr) is compared with what the compiler left of it:
XLA may cancel a copy to the host and back, or merge a recomputation with the forward pass that it repeats.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jex

from nexus_jax import _compat, report
from nexus_jax.measure import measurement
from nexus_jax.program import Program, step_of
from nexus_jax.residuals import residuals
from nexus_jax.scopes import module_path, phase
from nexus_jax.targets.compiler import TIMEOUT, Target, compile_all, find_target

_MATMULS = {"dot_general", "conv_general_dilated"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One intent, and what became of it.

    Attributes:
        intent: ``"offload"`` or ``"recompute"``.
        what: which values, or whose matmuls.
        meant, found: bytes on the host; matmuls recomputed.
        cause: the likely cause where less was found than meant, else empty.
    """

    intent: str
    what: str
    meant: int
    found: int
    cause: str = ""

    @property
    def engaged(self) -> bool:
        return not self.cause


@dataclasses.dataclass(frozen=True)
class Engagement(Sequence[Check]):
    """Every intent of a step. Prints as a table; ``.engaged`` is whether all of them held."""

    target: str
    checks: tuple[Check, ...]

    def __getitem__(self, index):
        return self.checks[index]

    def __len__(self) -> int:
        return len(self.checks)

    @property
    def engaged(self) -> bool:
        return all(c.engaged for c in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {"target": self.target, "engaged": self.engaged, "checks": [dataclasses.asdict(c) for c in self.checks]}

    def __str__(self) -> str:
        rows = []
        for c in self.checks:
            shown = report.size if c.intent == "offload" else (lambda n: f"{n} matmuls")
            rows.append((c.intent, c.what, shown(c.meant), shown(c.found), "yes" if c.engaged else f"NO: {c.cause}"))
        if not rows:
            return f"nothing is meant to be recomputed or offloaded ({self.target})"
        return report.table(f"did it engage on {self.target}?", ("intent", "of", "meant", "found", "engaged"), rows)


def engaged(
    fn: Callable[..., Any],
    *args: Any,
    target: str | Target | None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    timeout: float = TIMEOUT,
) -> Engagement:
    """Compile a step, and say whether what its policy wants happened. Arguments and errors as in ``measure``.

    Offloading: the bytes of residuals meant for the host, and the bytes of host memory in the compiled program, by
    shape. Recomputation: per module, the matmuls that the program repeats in the backward pass, and those of them that
    are still there; fused or merged ones count by the module whose name they kept.
    """
    where = find_target(target)
    where.require_compiler()
    program = step_of(fn, args, argnums, has_aux)
    [answer] = compile_all([program.job(where, getattr(fn, "__name__", "the step"), texts=True)], timeout=timeout)
    measured = measurement(program, where, answer, flops=0)
    found = measured.timeline()  # raises where the step ran out of memory: there is no program to look at
    hlo = answer.text("hlo") or ""
    checks = [*_offloads(residuals(fn, *args), found, where), *_recomputations(program, hlo)]
    return Engagement(where.name, tuple(checks))


# --- offloading ----------------------------------------------------------------------------------------------------


def _offloads(kept: Any, found: Any, target: Target) -> list[Check]:
    """Bytes on the host by type, meant and found; one check a type, since the compiler renames and fuses what made it."""
    meant: Counter[str] = Counter()
    makers: dict[str, dict[str, None]] = {}
    for group in kept.groups():
        if group.each.place == "host":
            kind = f"{group.each.dtype}[{','.join(map(str, group.each.shape))}]"
            meant[kind] += group.nbytes
            makers.setdefault(kind, {})[group.pattern] = None
    there = found.host_temp_by_size()
    checks = []
    for kind, nbytes in meant.items():
        each = next(r.nbytes for r in kept if r.place == "host" and f"{r.dtype}[{','.join(map(str, r.shape))}]" == kind)
        got = min(there.get(each, 0), nbytes)
        there[each] = there.get(each, 0) - got
        what = f"{kind} of {', '.join(makers[kind])}"
        checks.append(
            Check(intent="offload", what=what, meant=nbytes, found=got, cause=_offload_cause(nbytes, got, target))
        )
    return checks


def _offload_cause(meant: int, found: int, target: Target) -> str:
    if found >= meant:
        return ""
    if target.platform == "cpu":
        return "this device has no memory apart from the host's: nothing moves"
    return (
        "the compiler cancelled the copy to the host with the copy back, as it does where nothing ties them to the progress "
        "of the step (an unrolled model); layers in a scan keep them"
    )


# --- recomputation -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Matmuls:
    """How many matmuls a module repeats, and how many elements they make."""

    count: int = 0
    elements: int = 0


def _recomputations(program: Program, hlo: str) -> list[Check]:
    meant: dict[str, _Matmuls] = defaultdict(_Matmuls)
    _add_meant(meant, program.traced.jaxpr)
    found = _found(hlo)
    spare = _spare(meant, found)
    checks = []
    for path, matmuls in meant.items():
        got, cause = min(found[path].count, matmuls.count), ""
        if not got and spare[_parent(path)] >= matmuls.elements:
            # Matmuls of one input (queries, keys, values) are merged into one that bears one of their names.
            spare[_parent(path)] -= matmuls.elements
            got = matmuls.count
        elif not got:
            cause = "the compiler merged it with the forward pass, and keeps what it makes"
        checks.append(
            Check(intent="recompute", what=path or "(no module)", meant=matmuls.count, found=got, cause=cause)
        )
    return checks


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _spare(meant: dict[str, _Matmuls], found: dict[str, _Matmuls]) -> Counter[str]:
    """Elements that matmuls make beyond what the modules whose names they bear are meant to, by parent module."""
    spare: Counter[str] = Counter()
    for path, matmuls in found.items():
        spare[_parent(path)] += max(matmuls.elements - meant[path].elements, 0) if path in meant else 0
    return spare


def _add_meant(meant: dict[str, _Matmuls], jaxpr: Any, outer: str = "") -> None:
    """Matmuls that the backward pass repeats, by module."""
    for eqn in jaxpr.eqns:
        scope = "/".join(x for x in (outer, _compat.scope_path(eqn)) if x)
        if eqn.primitive.name in _MATMULS and phase(scope) == "recompute":
            made = meant[module_path(scope)]
            made.count += 1
            made.elements += math.prod(eqn.outvars[0].aval.shape)
        for value in eqn.params.values():
            for body in value if isinstance(value, tuple | list) else (value,):
                if isinstance(body, jex.Jaxpr | jex.ClosedJaxpr):
                    _add_meant(meant, getattr(body, "jaxpr", body), scope)


def _found(hlo: str) -> dict[str, _Matmuls]:
    """The same, in the text of a compiled program: each repeated matmul keeps the scope that it was written in."""
    found: dict[str, _Matmuls] = defaultdict(_Matmuls)
    for dimensions, opcode, name in _INSTRUCTION.findall(hlo):
        scope, _, op = name.rpartition("/")
        if opcode in _HLO_MATMULS and op in _MATMULS and phase(scope) == "recompute":
            made = found[module_path(scope)]
            made.count += 1
            made.elements += math.prod(int(n) for n in dimensions.split(",") if n)
    return found


# ``%dot.1 = f32[2,3]{1,0} dot(%a, %b), ..., metadata={op_name="..."``; a cuBLAS call is a custom call with a workspace.
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = \(?\w+\[([\d,]*)\].*? ([a-z-]+)\(.*metadata=\{[^}]*op_name=\"([^\"]*)\"", re.M
)
_HLO_MATMULS = {"dot", "convolution", "custom-call"}
