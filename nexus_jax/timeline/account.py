"""Device bytes at every point of a compiled step, and what is live there."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from nexus_jax.families import families
from nexus_jax.scopes import Phase
from nexus_jax.timeline import texts
from nexus_jax.timeline.names import Names, Origin
from nexus_jax.timeline.texts import HOST, Allocation, Key, Schedule, Value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One instruction of the step, in the order in which they run; a loop's body stands once.

    Attributes:
        step: its position in the compiler's schedule.
        instruction: its name in the compiled program, ``"fusion.12"``.
        op: what JAX called it, ``"dot_general"``, or the compiler.
        phase: forward, backward or recompute; that of the instruction before it where its name tells none.
        path: the module, ``"GPT/blocks_0/attn"``.
        bytes: device bytes in use while it runs.
        in_loop: whether it runs once for each step of a loop.
    """

    step: int
    instruction: str
    op: str
    phase: Phase
    path: str
    bytes: int
    in_loop: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """Something that takes memory from step ``first`` to step ``last``, both included.

    Attributes:
        bytes: as allocated, with the padding of the layout.
        shape: ``"bf16[8,512]"``.
        path: the module that made it; of an argument, its place in the call, or the first module that reads it.
        op: what made it; ``"argument"`` for an argument.
        phase: when it was made; None for what was there before the step.
        kind: argument, output, temporary or constant.
        place: device or host.
        slot: ``(allocation, offset)``; of two buffers there at one time, one only passes on the other.
    """

    name: str
    bytes: int
    shape: str
    path: str
    op: str
    phase: Phase | None
    kind: Literal["argument", "output", "temporary", "constant"]
    place: Literal["device", "host"]
    first: int
    last: int
    slot: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Buffers of one layer family that are the same but for the layer."""

    pattern: str
    members: tuple[Buffer, ...]

    @property
    def each(self) -> Buffer:
        return self.members[0]

    @property
    def bytes(self) -> int:
        return sum(b.bytes for b in self.members)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """Bytes that the compiler sets aside in one memory for the whole step, by what they are for."""

    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    constants: int = 0
    thread_local: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """Device bytes over one step, from the compiler's own schedule and buffer assignment.

    Two sums are told apart. ``reserved`` is what the compiler sets aside for the whole step. ``peak_bytes`` is the most
    that is in use at any point of it. Between them are outputs that are not written yet and holes between buffers.

    ``device_bytes`` is the compiler's own figure, as ``memory_analysis()`` gives it for GPUs and CPUs: arguments +
    outputs - aliased + temporaries. libtpu gives more: to the temporaries it adds what it takes to be fragmentation,
    which is in them already. Against the memory of a TPU it checks ``reserved``, as here.

    Attributes:
        points: every instruction, in order.
        buffers: everything that takes device memory, in the order of the step.
        host_buffers: the same for host memory, which counts nowhere else.
        device, host: what is set aside in each.
        on_chip: bytes of a TPU's memories on the chip, which are not the device's.
    """

    points: tuple[Point, ...]
    buffers: tuple[Buffer, ...]
    host_buffers: tuple[Buffer, ...]
    device: Sums
    host: Sums
    on_chip: int

    @property
    def device_bytes(self) -> int:
        """Arguments + outputs - aliased + temporaries."""
        d = self.device
        return d.arguments + d.outputs - d.aliased + d.temporaries

    @property
    def reserved(self) -> int:
        """``device_bytes`` and the program's constants."""
        return self.device_bytes + self.device.constants

    @functools.cached_property
    def peak_step(self) -> int:
        """The step at which most device bytes are in use: the first of several."""
        return max(self.points, key=lambda p: (p.bytes, -p.step)).step

    @property
    def peak_bytes(self) -> int:
        """Device bytes in use at ``peak_step``."""
        return self.points[self.peak_step].bytes

    @functools.cached_property
    def at_peak(self) -> tuple[Buffer, ...]:
        """What is live there, largest first. Its bytes sum to ``peak_bytes``."""
        return self.live_at(self.peak_step)

    def live_at(self, step: int) -> tuple[Buffer, ...]:
        """The device buffers live at a step, largest first; their bytes sum to those of the point."""
        return _distinct(b for b in self.buffers if b.first <= step <= b.last)

    @property
    def unwritten(self) -> int:
        """Bytes of outputs that are set aside and not written yet at the peak."""
        live = sum(b.bytes for b in self.at_peak if b.kind == "output")
        return self.device.outputs - self.device.aliased - live

    @property
    def fragmentation(self) -> int:
        """Bytes of holes at the peak: set aside for temporaries, and used by none."""
        return self.reserved - self.peak_bytes - self.unwritten

    def host_temp_by_size(self) -> dict[int, int]:
        """Host bytes of temporaries by the size of one buffer; sizes are those of the arrays, without padding."""
        found: Counter[int] = Counter()
        runs: dict[tuple[int, int], int] = {}
        for b in self.host_buffers:
            if b.kind == "temporary":
                if b.first > runs.get(b.slot, -1):  # what touches the one before it only passes it on
                    size = texts.logical_bytes(b.shape)
                    size = b.bytes if size is None else size
                    found[size] += size
                runs[b.slot] = max(b.last, runs.get(b.slot, -1))
        return dict(found)


def _distinct(live: Iterable[Buffer]) -> tuple[Buffer, ...]:
    """One for each slot: the largest, and of equal ones the latest."""
    kept: dict[tuple[int, int], Buffer] = {}
    for b in live:
        other = kept.get(b.slot)
        if other is None or (b.bytes, b.first) >= (other.bytes, other.first):
            kept[b.slot] = b
    return tuple(sorted(kept.values(), key=lambda b: -b.bytes))


def grouped(buffers: Iterable[Buffer]) -> tuple[Group, ...]:
    """Buffers by layer family, largest first: alike in all but the numbers of their path.

    Example:
        >>> from nexus_jax import timeline
        >>> make = lambda i: timeline.Buffer(
        ...     name=f"dot.{i}", bytes=64, shape="f32[16]", path=f"GPT/blocks_{i}", op="dot_general", phase="forward",
        ...     kind="temporary", place="device", first=i, last=9, slot=(0, 64 * i))
        >>> [group] = timeline.grouped(map(make, range(3)))
        >>> group.pattern, group.bytes
        ('GPT/blocks[0..2]', 192)
    """
    alike: dict[tuple[object, ...], dict[str, list[Buffer]]] = defaultdict(lambda: defaultdict(list))
    for b in buffers:
        alike[b.op, b.shape, b.bytes, b.kind, b.phase][b.path].append(b)
    groups = []
    for by_path in alike.values():
        # A layer that has two of them is no sibling of one that has one.
        for times in sorted({len(bs) for bs in by_path.values()}):
            for name, paths in families(p for p, bs in by_path.items() if len(bs) == times).items():
                groups.append(Group(pattern=name, members=tuple(b for p in paths for b in by_path[p])))
    return tuple(sorted(groups, key=lambda group: -group.bytes))


# --- from the texts ------------------------------------------------------------------------------------------------


def parse(*, buffer_assignment: str, live_range: str, hlo: str) -> Timeline:
    """A compiled step over time, from the three texts that XLA writes with ``xla_dump_to``.

    Args:
        buffer_assignment: ``*after_optimizations-buffer-assignment.txt``.
        live_range: ``*after_optimizations-live-range.txt``.
        hlo: ``*after_optimizations.txt``.

    Raises:
        ValueError: one of them is something else, is cut short, or belongs to another program; says which.

    Example:
        >>> t = parse(
        ...     buffer_assignment='''BufferAssignment:
        ... allocation 0: size 64, parameter 0, shape |f32[16]| at ShapeIndex {}:
        ...  value: <0 x @0> (size=64,offset=0): f32[16]{0}
        ... allocation 1: size 64, maybe-live-out:
        ...  value: <2 y @0> (size=64,offset=0): f32[16]{0}
        ... allocation 2: size 128, preallocated-temp:
        ...  value: <1 h @0> (size=64,offset=64): f32[16]{0}
        ... ''',
        ...     live_range='''HloLiveRange (max 3):
        ...   InstructionSequence:
        ...     0:x
        ...     1:h
        ...     2:y
        ...   BufferLiveRange:
        ...     x{}:0-3
        ...     h{}:1-2
        ...     y{}:2-3
        ... ''',
        ...     hlo='''HloModule f
        ... ENTRY %f (x: f32[16]) -> f32[16] {
        ...   %x = f32[16]{0} parameter(0), metadata={op_name="x"}
        ...   %h = f32[16]{0} tanh(%x), metadata={op_name="jit(f)/jvp(GPT)/mlp/tanh"}
        ...   ROOT %y = f32[16]{0} sine(%h), metadata={op_name="jit(f)/transpose(jvp(GPT))/mlp/sin"}
        ... }''',
        ... )
        >>> [p.bytes for p in t.points], t.peak_bytes, t.reserved, t.fragmentation
        ([64, 128, 192], 192, 256, 64)
        >>> [(b.path, b.op, b.kind) for b in t.at_peak]
        [('x', 'argument', 'argument'), ('GPT/mlp', 'tanh', 'temporary'), ('GPT/mlp', 'sin', 'output')]
    """
    found = texts.allocations(buffer_assignment)
    plan = texts.schedule(live_range)
    names = Names(hlo)
    _check(buffer_assignment, found, plan, names)
    on_device, on_host = _memories(found)
    phases = _phases(plan, names)
    buffers = _buffers(on_device, plan, names, phases, "device")
    return Timeline(
        points=_points(_in_use(on_device, plan), plan, names, phases),
        buffers=buffers,
        host_buffers=_buffers(on_host, plan, names, phases, "host"),
        device=_sums(on_device),
        host=_sums(on_host),
        on_chip=sum(a.bytes for a in found) - sum(a.bytes for a in (*on_device, *on_host)),
    )


def _check(text: str, found: Sequence[Allocation], plan: Schedule, names: Names) -> None:
    for color, total in texts.totals(text).items():
        mine = sum(a.bytes for a in found if a.color == color)
        if mine != total:
            raise ValueError(
                f"buffer assignment: its allocations of color {color} sum to {mine} bytes, and it says {total}: cut short?"
            )
    for a in found:
        for v in a.values:
            if a.kind not in ("thread-local", "argument", "constant") and v.key not in plan.live:
                raise ValueError(f"live ranges: none for {v.key[0]}{{{v.key[1]}}}, which the buffer assignment places.")
    if not any(name in names.instructions for name in plan.order):
        raise ValueError("the compiled program has none of the scheduled instructions: the texts are of two programs.")


def _memories(found: Sequence[Allocation]) -> tuple[list[Allocation], list[Allocation]]:
    """Those of the device and of the host; a TPU's on-chip memories are left out."""
    # Layouts are tiled on TPUs only; elsewhere every color but the host's is device memory.
    tiled = any(":T(" in v.shape for a in found for v in a.values)
    device = [a for a in found if a.color == 0 or (a.color != HOST and not tiled)]
    return device, [a for a in found if a.color == HOST]


def _sums(found: Sequence[Allocation]) -> Sums:
    by_kind = Counter()
    for a in found:
        by_kind[a.kind] += a.bytes
        by_kind["aliased"] += a.bytes * a.aliased
    return Sums(
        arguments=by_kind["argument"],
        outputs=by_kind["output"] + by_kind["aliased"],
        aliased=by_kind["aliased"],
        temporaries=by_kind["temporary"],
        constants=by_kind["constant"],
        thread_local=by_kind["thread-local"],
    )


# --- bytes in use --------------------------------------------------------------------------------------------------


def _in_use(found: Sequence[Allocation], plan: Schedule) -> np.ndarray:
    """Bytes in use at every step."""
    steps = len(plan.order)
    total = np.zeros(steps, np.int64)
    for a in found:
        if a.kind in ("argument", "constant"):  # there before the step and after it
            total += a.bytes
        elif a.kind != "thread-local":
            total += _occupied(a.values, plan, steps)
    return total


def _occupied(values: Sequence[Value], plan: Schedule, steps: int) -> np.ndarray:
    """Bytes of one allocation that some live value covers; several may cover the same (a loop's carry)."""
    edges = np.unique([edge for v in values for edge in (v.offset, v.offset + v.bytes)])
    lengths, cover = np.diff(edges), np.zeros(max(len(edges) - 1, 0), np.int64)
    changes: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for v in values:
        first, last = plan.live[v.key]
        low, high = np.searchsorted(edges, (v.offset, v.offset + v.bytes))
        changes[first].append((low, high, 1))
        changes[last + 1].append((low, high, -1))
    occupied, now = np.zeros(steps, np.int64), 0
    for step in range(steps):
        for low, high, sign in changes.get(step, ()):
            cover[low:high] += sign
        if step in changes:
            now = lengths[cover > 0].sum()
        occupied[step] = now
    return occupied


# --- points and buffers --------------------------------------------------------------------------------------------


def _phases(plan: Schedule, names: Names) -> list[Phase]:
    phases: list[Phase] = []
    for name in plan.order:
        phases.append(names.phase(name) or (phases[-1] if phases else "forward"))
    return phases


def _points(in_use: np.ndarray, plan: Schedule, names: Names, phases: Sequence[Phase]) -> tuple[Point, ...]:
    points = []
    for step, (name, bytes_, phase) in enumerate(zip(plan.order, in_use.tolist(), phases, strict=True)):
        origin = names.origin(name)
        loop = names.in_loop(name)
        op = origin.op or name.partition(".")[0]
        points.append(
            Point(step=step, instruction=name, op=op, phase=phase, path=origin.path, bytes=bytes_, in_loop=loop)
        )
    return tuple(points)


def _buffers(
    found: Sequence[Allocation],
    plan: Schedule,
    names: Names,
    phases: Sequence[Phase],
    place: Literal["device", "host"],
) -> tuple[Buffer, ...]:
    buffers = []
    for a in found:
        if a.kind == "thread-local" or not a.values:
            continue
        if a.kind in ("argument", "constant"):
            v = next((v for v in a.values if not v.phi), a.values[0])
            origin = names.origin(*v.key)
            origin = Origin(origin.path, a.kind, None)
            buffers.append(_buffer(a, v, origin, place, (0, len(plan.order) - 1), whole=True))
            continue
        values = sorted(a.values, key=lambda v: plan.live[v.key])
        for v, origin in zip(values, _origins(values, plan, names), strict=True):
            live = plan.live[v.key]
            if origin.phase is None:
                origin = dataclasses.replace(origin, phase=phases[live[0]])
            buffers.append(_buffer(a, v, origin, place, live))
    return tuple(sorted(buffers, key=lambda b: b.first))


def _buffer(
    a: Allocation,
    v: Value,
    origin: Origin,
    place: Literal["device", "host"],
    live: tuple[int, int],
    whole: bool = False,
) -> Buffer:
    return Buffer(
        name=v.key[0] + (f"{{{v.key[1]}}}" if v.key[1] else ""),
        bytes=a.bytes if whole else v.bytes,
        shape=texts.plain(v.shape),
        path=origin.path,
        op=origin.op,
        phase=origin.phase,
        kind=a.kind,  # type: ignore[arg-type]
        place=place,
        first=live[0],
        last=live[1],
        slot=(a.number, 0 if whole else v.offset),
    )


def _origins(values: Sequence[Value], plan: Schedule, names: Names) -> list[Origin]:
    """Where each value comes from; one that only passes memory on, or has no name, is named by its neighbours in it."""
    origins = [Origin("", "", None) if v.phi else names.origin(*v.key) for v in values]
    runs: dict[tuple[int, int], list[int]] = defaultdict(list)  # the same memory, handed on without a pause
    ends: dict[tuple[int, int], int] = {}
    for i, v in enumerate(values):
        slot = (v.offset, v.bytes)
        first, last = plan.live[v.key]
        if slot in ends and first > ends[slot] + 1:
            _name_run(runs.pop(slot), origins)
        runs[slot].append(i)
        ends[slot] = max(last, ends.get(slot, 0))
    for run in runs.values():
        _name_run(run, origins)
    return origins


def _name_run(run: Sequence[int], origins: list[Origin]) -> None:
    known: Origin | None = None
    for i in (*run, *reversed(run)):  # from what came before, else from what comes after
        if origins[i].path:
            known = origins[i]
        elif known is not None:
            origins[i] = known
