"""The compiler's own texts: its buffer assignment, its schedule with live ranges, and the names of its instructions."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

Kind = Literal["argument", "output", "temporary", "constant", "thread-local"]
Key = tuple[str, str]  # an instruction, and which part of its result: ("fusion.3", "1")

HOST = 5  # the color of host memory, on TPUs and GPUs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """One value in an allocation: ``bytes`` from ``offset`` on, for as long as it is live.

    Attributes:
        key: what defines it.
        phi: whether it only passes on what others defined (a loop's carry).
        shape: with layout, ``"bf16[8,512]{1,0:T(8,128)}"``.
    """

    key: Key
    phi: bool
    color: int
    bytes: int
    offset: int
    shape: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """One stretch of memory that the compiler asks for.

    Attributes:
        color: its memory space: 0 is the device's, 5 the host's; a TPU has more, on the chip.
        aliased: an argument whose memory also takes an output (it was donated).
        parameter: the number of the argument, else None.
    """

    number: int
    bytes: int
    color: int
    kind: Kind
    aliased: bool
    parameter: int | None
    values: tuple[Value, ...]


_ALLOCATION = re.compile(r"allocation (\d+): size (\d+),(.*):$")
_VALUE = re.compile(r"value: <\d+ (\S+?)(?:\{([\d,]*)\})?( \(phi\))? @(\d+)> \(size=(\d+),offset=(\d+)\): (.*)$")


def allocations(text: str) -> list[Allocation]:
    """What ``*-buffer-assignment.txt`` says.

    Raises:
        ValueError: it is no buffer assignment, or a line of it is not understood; quotes the line.

    Example:
        >>> text = '''BufferAssignment:
        ... allocation 0: size 64, parameter 0, shape |f32[16]| at ShapeIndex {}:
        ...  value: <0 w.1 @0> (size=64,offset=0): f32[16]{0}
        ... '''
        >>> [a] = allocations(text)
        >>> a.kind, a.bytes, a.values[0].key
        ('argument', 64, ('w.1', ''))
    """
    if not text.startswith("BufferAssignment"):
        raise ValueError(f"no buffer assignment: it begins with {text[:40]!r}, and not with 'BufferAssignment'.")
    heads: list[re.Match[str]] = []
    values: list[list[Value]] = []
    for line in text.splitlines()[1:]:
        line = line.strip()
        if line.startswith("allocation "):
            heads.append(_matched(_ALLOCATION, line, "buffer assignment"))
            values.append([])
        elif line.startswith("value: "):
            found = _matched(_VALUE, line, "buffer assignment")
            if not heads:
                raise ValueError(f"buffer assignment: a value before any allocation: {line[:120]!r}.")
            values[-1].append(_value(found))
    if not heads:
        raise ValueError("buffer assignment: it holds no allocation.")
    return [_allocation(head, tuple(held)) for head, held in zip(heads, values, strict=True)]


def _matched(pattern: re.Pattern[str], line: str, where: str) -> re.Match[str]:
    found = pattern.match(line)
    if found is None:
        raise ValueError(f"{where}: this line is not understood: {line.strip()[:160]!r}.")
    return found


def _value(found: re.Match[str]) -> Value:
    name, index, phi, color, size, offset, shape = found.groups()
    key = (name, index or "")
    return Value(key=key, phi=bool(phi), color=int(color), bytes=int(size), offset=int(offset), shape=shape)


def _allocation(head: re.Match[str], values: tuple[Value, ...]) -> Allocation:
    number, size, about = int(head[1]), int(head[2]), head[3]
    parameter = re.search(r" parameter (\d+)", about)
    color = re.search(r" color (\d+)", about)
    about = re.sub(r"\|.*\|", "", about)  # shapes
    kind: Kind
    if parameter:
        kind = "argument"
    elif "maybe-live-out" in about:
        kind = "output"
    elif "constant" in about:
        kind = "constant"
    elif "thread-local" in about:
        kind = "thread-local"
    else:
        kind = "temporary"
    for v in values:
        if v.offset + v.bytes > size:
            raise ValueError(
                f"buffer assignment: value {v.key[0]} ends at byte {v.offset + v.bytes} of allocation {number}, "
                f"which has {size}."
            )
    return Allocation(
        number=number,
        bytes=size,
        color=int(color[1]) if color else 0,
        kind=kind,
        aliased=kind == "argument" and "maybe-live-out" in about,
        parameter=int(parameter[1]) if parameter else None,
        values=values,
    )


def totals(text: str) -> dict[int, int]:
    """The compiler's own sums by color, where it wrote them down (libtpu of jax 0.12 does)."""
    found = re.findall(r"^Memory Space: .*\(color=(\d+)\)\nTotal bytes: (\d+)", text, re.M)
    return {int(color): int(total) for color, total in found}


# --- live ranges ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The order of the instructions, loops' bodies in their places, and when each value is live: first and last step."""

    order: tuple[str, ...]
    live: dict[Key, tuple[int, int]]


_STEP = re.compile(r"\s*(\d+):(\S+)$")
_RANGE = re.compile(r"\s*(\S+?)\{([\d,]*)\}:(\d+)-(\d+)$")


def schedule(text: str) -> Schedule:
    """What ``*-live-range.txt`` says.

    Raises:
        ValueError: it is none, or a line of it is not understood; quotes the line.
    """
    head, found, rest = text.partition("InstructionSequence:\n")
    steps, found_too, ranges = rest.partition("BufferLiveRange:\n")
    if not (head.startswith("HloLiveRange") and found and found_too):
        raise ValueError(f"no live ranges: the text begins with {text[:40]!r}, and needs 'HloLiveRange' and its parts.")
    order: list[str] = []
    for line in filter(str.strip, steps.splitlines()):
        step = _matched(_STEP, line, "live ranges")
        if int(step[1]) != len(order):
            raise ValueError(f"live ranges: step {len(order)} of the schedule is missing before {line.strip()!r}.")
        order.append(step[2])
    if not order:
        raise ValueError("live ranges: the schedule is empty.")
    live: dict[Key, tuple[int, int]] = {}
    for line in filter(str.strip, ranges.splitlines()):
        if "Live ranges at" in line:  # the compiler's guess at the peak, which counts a loop's carry several times
            break
        found_range = _matched(_RANGE, line, "live ranges")
        first, last = int(found_range[3]), int(found_range[4])
        if first > last:
            raise ValueError(f"live ranges: {line.strip()!r} ends before it begins.")
        live[found_range[1], found_range[2]] = (first, min(last, len(order) - 1))
    return Schedule(order=tuple(order), live=live)


# --- shapes --------------------------------------------------------------------------------------------------------

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_ODD = {"pred": 8, "token": 0}


def plain(shape: str) -> str:
    """A type without its layout.

    Example:
        >>> plain("(f32[8,2]{1,0:T(8,128)S(1)}, s32[])")
        '(f32[8,2], s32[])'
    """
    return re.sub(r"/\*.*?\*/", "", _LAYOUT.sub("", shape))


def logical_bytes(shape: str) -> int | None:
    """Bytes of an array without the padding of its layout; None for a tuple.

    Example:
        >>> logical_bytes("bf16[8,100]{1,0:T(8,128)(2,1)}"), logical_bytes("pred[]"), logical_bytes("(f32[2])")
        (1600, 1, None)
    """
    found = _ARRAY.match(shape)
    if found is None:
        return None
    dtype, dims = found.groups()
    bits = _ODD.get(dtype) or re.search(r"\d+", dtype)
    count = math.prod(int(d) for d in dims.split(",") if d)
    return math.ceil(count * (bits if isinstance(bits, int) else int(bits[0]) if bits else 0) / 8)
