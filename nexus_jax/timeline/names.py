"""Who made a buffer: the module path, op and phase of a compiled instruction, from the names that JAX wrote into it."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

from nexus_jax.scopes import STEP, Phase, module_path, phase

# Instructions that hand on what they are given, perhaps elsewhere or in another layout: named by what they hand on.
# (Calls without a name are the TPU compiler's own, such as ConcatBitcast.)
_MOVES = {"bitcast", "convert", "copy", "get-tuple-element", "reshape", "slice", "transpose"}
_STACKS = {"dynamic_slice", "dynamic_update_slice"}
_CALLS_OF_JAX = {"body", "checkpoint", "closed_call", "while"}  # say nothing of what runs inside
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
    parameter: int  # which one of its computation's it is, if it is one


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
        self._callers: dict[str, Instruction] = {}
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
        if made.calls:
            self._callers[made.calls] = made
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
        path, op = _split(own)
        if _stacks(own):  # a scan writes its own name on what its steps stack up and take back
            path = max((path, *map(_module, self._around(found))), key=len)
        if path or (_is_scope(own) and not self._moves(found)):
            return Origin(path or _function(own), op, phase(own) if _is_scope(own) else None)
        scope = self._before(found, _FAR) or self._after(found, _FAR)
        path, what = _split(scope)
        does = op or self._does(found)
        handed_on = what and what != does and self._moves(found)
        # Where it stands in the schedule tells when it is made; what it hands on was made at another time.
        return Origin(path, f"{does} of {what}" if handed_on else does, phase(own) if _is_scope(own) else None)

    def _does(self, made: Instruction) -> str:
        root = self._roots.get(made.calls) if made.opcode == "fusion" else None
        return re.sub("-(start|done)$", "", (root or made).opcode)

    def _moves(self, made: Instruction) -> bool:
        """Whether it hands on what it is given; an unnamed fusion by what it ends with."""
        if made.opcode == "fusion" and not self._scope(made, ""):
            root = self._roots.get(made.calls)
            return root is not None and root.opcode in _MOVES
        unnamed_call = made.opcode == "custom-call" and not made.scope
        return made.opcode in _MOVES or unnamed_call or made.opcode.endswith(("-start", "-done"))

    def _around(self, made: Instruction) -> list[str]:
        """The scopes inside a fusion, of what it is given and of what reads it."""
        given = [self.instructions[name] for name in made.operands if name in self.instructions]
        inside = [line.scope for line in self._lines.get(made.calls, ())]
        return [*inside, *(self._named(g, _FAR) for g in given), self._after(made, _FAR)]

    def _scope(self, made: Instruction, index: str) -> str:
        """What JAX called it; of a fusion with several results, what it called this one."""
        root = self._roots.get(made.calls)
        if root is not None and index and root.opcode == "tuple":
            part = int(index.split(",")[0])
            if part < len(root.operands):
                element = self.instructions[root.operands[part]]
                while not element.scope and self._moves(element) and element.operands:
                    element = self.instructions[element.operands[0]]
                if element.scope:
                    return element.scope
        if made.scope:
            return made.scope
        return next((line.scope for line in reversed(self._lines.get(made.calls, [])) if line.scope), "")

    def _before(self, made: Instruction, far: int) -> str:
        """The name of what an instruction hands on."""
        caller = self._callers.get(made.computation)
        if made.opcode == "parameter" and caller is not None:
            sources = caller.operands[made.parameter : made.parameter + 1]
        else:
            sources = made.operands if self._moves(made) else ()
        given = (self.instructions[name] for name in sources if name in self.instructions)
        return next(filter(None, (self._named(source, far - 1) for source in given)), "")

    def _named(self, source: Instruction, far: int) -> str:
        scope = self._scope(source, "")
        path, op = _split(scope)
        if path and op not in _CALLS_OF_JAX and not _stacks(scope):
            return scope
        return (self._before(source, far) if far else "") or (scope if path and not _stacks(scope) else "")

    def _after(self, made: Instruction, far: int) -> str:
        """The name of the first module that reads it: for arguments, and for buffers that are filled later."""
        readers = [self.instructions[user] for user in self._users.get(made.name, ())]
        if self._roots.get(made.computation) is made and made.computation in self._callers:
            readers.append(self._callers[made.computation])
        for reader in readers:
            scope = self._scope(reader, "")
            if _module(scope) and not _stacks(scope):
                return scope
        further = [r for r in readers if self._moves(r) or _stacks(self._scope(r, ""))]
        return next(filter(None, (self._after(r, far - 1) for r in further)), "") if far else ""


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


def _split(scope: str) -> tuple[str, str]:
    """The module path, or the place of an argument, and the op."""
    if not scope or not _is_scope(scope):
        return (argument_path(scope), "argument") if scope else ("", "")
    above, _, op = scope.rpartition("/")
    return module_path(above), op


def _stacks(scope: str) -> bool:
    """Whether it is a scan's own: stacking up what its steps keep, and taking it back."""
    return _split(scope)[1] in _STACKS or "index_in_dim)" in scope


def _module(scope: str) -> str:
    return _split(scope)[0] if _is_scope(scope) else ""


def _function(scope: str) -> str:
    """The innermost function that was jitted by itself, for what is in no module: ``"log_softmax()"``."""
    found = re.findall(r"\bp?jit\(([^()]*)\)", scope)[1:]
    return f"{found[-1]}()" if found and found[-1] != STEP else ""


# --- the text ------------------------------------------------------------------------------------------------------

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\((.*?)(?:\),|\)$)")  # after the type, which may hold brackets of all kinds
_SCOPE = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_JOINED = re.compile(r";\w+\(.*$")  # of instructions made one: "jit(f)/a/mul;jit(f)/b/broadcast_in_dim"; likewise
_MERGED = re.compile(r"(?<=/)\(([^:]*):.*\)$")  # of collectives made one: "jit(f)/(a/tanh:b/mul)"; named by the first
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_LOOP = re.compile(r"\b(?:body|condition)=%?([\w.\-]+)")


def _instruction(name: str, rest: str, computation: str) -> Instruction:
    found = _OPCODE.search(" " + rest)
    scope = _SCOPE.search(rest)
    calls = _CALLS.search(rest)
    return Instruction(
        name=name,
        opcode=found[1] if found else "",
        scope=_MERGED.sub(r"\1", _JOINED.sub("", re.sub(r"\\(.)", r"\1", scope[1]))) if scope else "",
        operands=tuple(re.findall(r"%([\w.\-]+)", found[2])) if found else (),
        calls=calls[1] if calls else "",
        computation=computation,
        parameter=int(found[2]) if found and found[1] == "parameter" else -1,
    )
