"""A compiled step over time: points, buffers, and the sums that hold them together."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal

from nexus_jax.families import families
from nexus_jax.scopes import Phase
from nexus_jax.timeline import texts


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
        path: the module that made it; of an argument, its place in the call, ``"params/blocks_0/attn/kernel"``, or, in
            texts of a program whose arguments are numbered only, the first module that reads it.
        op: what made it; ``"argument"`` for an argument.
        phase: when it was made; None for what was there before the step.
        kind: argument, output, temporary (though it be in an output's memory, before that is written) or constant.
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

    ``reserved`` is the compiler's own total, which jax 0.12 gives as ``memory_analysis().total_allocation_bytes``; on a
    TPU it is what is held against the memory of the chip. ``device_bytes`` is the part of it without constants, arguments +
    outputs - aliased + temporaries, as ``memory_analysis()`` sums up to on GPUs and CPUs. The temporaries that libtpu
    gives there are another figure: they hold the fragmentation twice, or not at all.

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
        """The compiler's total: ``device_bytes``, the program's constants and a TPU's thread-local scalars."""
        return self.device_bytes + self.device.constants + self.device.thread_local

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
        """Bytes set aside for outputs that hold nothing at the peak."""
        outputs = {b.slot[0] for b in self.buffers if b.kind == "output"}
        live = sum(b.bytes for b in self.at_peak if b.slot[0] in outputs)
        return self.device.outputs - self.device.aliased - live

    @property
    def fragmentation(self) -> int:
        """Bytes of holes at the peak: set aside for temporaries, and used by none."""
        return self.device_bytes + self.device.constants - self.peak_bytes - self.unwritten

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
