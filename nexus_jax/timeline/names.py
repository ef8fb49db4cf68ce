"""Who made a buffer: the module path, op and phase of a compiled instruction, from the names that JAX wrote into it."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

from nexus_jax.scopes import Phase, module_path, phase

# Instructions that hand on what they are given, perhaps elsewhere or in another layout: named by what they hand on.
_MOVES = {"bitcast", "convert", "copy", "get-tuple-element", "reshape", "slice", "transpose"}
_FAR = 8  # how many hand-overs a name is carried


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One line of a compiled program's text; ``scope`` is the name that JAX gave it, or empty."""

    name: str
    opcode: str
    scope: str
    operands: tuple[str, ...]
    calls: str
    computation: str

    @property
    def moves(self) -> bool:
        return self.opcode in _MOVES or self.opcode.endswith(("-start", "-done"))


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from. ``phase`` is None where no instruction made it, as for an argument."""

    path: str
    op: str
    phase: Phase | None


class Names:
    """The instructions of a compiled program, and where each comes from.

    Args:
        hlo: the text of the optimised program, ``*after_optimizations.txt``.

    Raises:
        ValueError: it is no program.
    """

    def __init__(self, hlo: str):
        if not hlo.startswith("HloModule"):
            raise ValueError(f"no compiled program: it begins with {hlo[:40]!r}, and not with 'HloModule'.")
        self.instructions: dict[str, Instruction] = {}
        self.loops: set[str] = set()  # computations that are a loop's body or condition
        self._lines: dict[str, list[Instruction]] = defaultdict(list)
        self._roots: dict[str, Instruction] = {}
        self._users: dict[str, list[str]] = defaultdict(list)
        computation = ""
        for line in hlo.splitlines():
            found = _LINE.match(line)
            if found:
                self._add(_instruction(found[2], found[3], computation), found[3], root=bool(found[1]))
            else:
                head = _COMPUTATION.match(line)
                computation = head[1] if head else computation

    def _add(self, made: Instruction, text: str, root: bool) -> None:
        self.instructions[made.name] = made
        self._lines[made.computation].append(made)
        if root:
            self._roots[made.computation] = made
        for operand in made.operands:
            self._users[operand].append(made.name)
        if made.opcode == "while":
            self.loops.update(_LOOP.findall(text))

    def in_loop(self, name: str) -> bool:
        """Whether an instruction is a loop's own, and so runs once for each of its steps."""
        found = self.instructions.get(name)
        return found is not None and found.computation in self.loops

    def phase(self, name: str) -> Phase | None:
        """The phase that an instruction's own name tells, else None."""
        found = self.instructions.get(name)
        scope = self._scope(found, "") if found else ""
        return phase(scope) if _is_scope(scope) else None

    def origin(self, name: str, index: str = "") -> Origin:
        """Where a value comes from; the path is empty where nothing names a module."""
        found = self.instructions.get(name)
        if found is None:
            return Origin("", "", None)
        own = self._scope(found, index)
        scope = own if _names_module(own) else self._before(found, _FAR) or self._after(found, _FAR)
        op = _split(own)[1] if own else found.opcode
        told = own or scope
        return Origin(_split(scope)[0], op, phase(told) if _is_scope(told) else None)

    def _scope(self, made: Instruction, index: str) -> str:
        """What JAX called it; of a fusion with several results, what it called this one."""
        root = self._roots.get(made.calls)
        if root is not None and index and root.opcode == "tuple":
            part = int(index.split(",")[0])
            if part < len(root.operands):
                element = self.instructions[root.operands[part]]
                while not element.scope and element.moves and element.operands:
                    element = self.instructions[element.operands[0]]
                if element.scope:
                    return element.scope
        if made.scope:
            return made.scope
        return next((line.scope for line in reversed(self._lines.get(made.calls, [])) if line.scope), "")

    def _before(self, made: Instruction, far: int) -> str:
        """The name of what an instruction hands on."""
        if far == 0 or not (made.moves or made.opcode == "fusion"):
            return ""
        for operand in made.operands:
            source = self.instructions.get(operand)
            if source is None:
                continue
            scope = self._scope(source, "")
            found = scope if _names_module(scope) else self._before(source, far - 1)
            if found:
                return found
        return ""

    def _after(self, made: Instruction, far: int) -> str:
        """The name of the first module that reads it: for arguments, and for buffers that are filled later."""
        if far == 0:
            return ""
        readers = [self.instructions[user] for user in self._users.get(made.name, ())]
        for reader in readers:
            scope = self._scope(reader, "")
            if _names_module(scope) and _is_scope(scope):
                return scope
        return next(filter(None, (self._after(r, far - 1) for r in readers if r.moves)), "")


# --- scopes --------------------------------------------------------------------------------------------------------


def argument_path(scope: str) -> str:
    """Where an argument is in the pytrees of the call; empty for one that is only numbered.

    Example:
        >>> argument_path("p['params']['blocks_0']['kernel']"), argument_path("tokens"), argument_path("xs[3]")
        ('params/blocks_0/kernel', 'tokens', '')
    """
    if scope.isidentifier():
        return scope
    keys = re.findall(r"\['([^']*)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]", scope)
    return "/".join(a or b or c for a, b, c in keys) if any(a or b for a, b, _ in keys) else ""


def _is_scope(scope: str) -> bool:
    """Whether it is a stack of scopes, and not the place of an argument (whose keys may hold any character)."""
    return "/" in re.sub(r"\[.*?\]", "", scope)


def _names_module(scope: str) -> bool:
    return bool(_split(scope)[0]) if _is_scope(scope) else bool(argument_path(scope))


def _split(scope: str) -> tuple[str, str]:
    """The module path and the op."""
    if not _is_scope(scope):
        return argument_path(scope), "argument"
    above, _, op = scope.rpartition("/")
    return module_path(above), op


# --- the text ------------------------------------------------------------------------------------------------------

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\((.*?)(?:\), |\)$)")  # after the type, which may hold brackets of all kinds
_SCOPE = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_LOOP = re.compile(r"\b(?:body|condition)=%?([\w.\-]+)")


def _instruction(name: str, rest: str, computation: str) -> Instruction:
    found = _OPCODE.search(" " + rest)
    scope = _SCOPE.search(rest)
    calls = _CALLS.search(rest)
    return Instruction(
        name=name,
        opcode=found[1] if found else "",
        scope=re.sub(r"\\(.)", r"\1", scope[1]) if scope else "",
        operands=tuple(re.findall(r"%([\w.\-]+)", found[2])) if found else (),
        calls=calls[1] if calls else "",
        computation=computation,
    )
