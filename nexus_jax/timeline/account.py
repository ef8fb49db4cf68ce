"""From the compiler's texts to a :class:`Timeline`: bytes in use at every step, and a name for every buffer."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np

from nexus_jax.scopes import Phase
from nexus_jax.timeline import texts
from nexus_jax.timeline.model import Buffer, Point, Sums, Timeline
from nexus_jax.timeline.names import Names, Origin
from nexus_jax.timeline.texts import HOST, Allocation, Key, Schedule, Value


def parse(*, buffer_assignment: str, live_range: str, hlo: str, arguments: Sequence[str] = ()) -> Timeline:
    """A compiled step over time, from the three texts that XLA writes with ``xla_dump_to``.

    Args:
        buffer_assignment: ``*after_optimizations-buffer-assignment.txt``.
        live_range: ``*after_optimizations-live-range.txt``.
        hlo: ``*after_optimizations.txt``.
        arguments: what to call the program's arguments, in order; by the names in the texts where it is empty.

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
    called = _called(found, arguments)
    buffers = _buffers(on_device, plan, names, phases, "device", called)
    return Timeline(
        points=_points(_in_use(on_device, plan), plan, names, phases),
        buffers=buffers,
        host_buffers=_buffers(on_host, plan, names, phases, "host", called),
        device=_sums(on_device),
        host=_sums(on_host),
        on_chip=sum(a.bytes for a in found if a.color not in (0, HOST)) if _is_tpu(found) else 0,
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


def _called(found: Sequence[Allocation], arguments: Sequence[str]) -> dict[int, str]:
    """The arguments' names by number; JAX puts constants that it takes out of the program before them."""
    if not arguments:
        return {}
    count = 1 + max((a.parameter for a in found if a.parameter is not None), default=-1)
    if count < len(arguments):
        raise ValueError(f"buffer assignment: of a program with {count} arguments, and not with {len(arguments)}.")
    return dict(enumerate(("constant",) * (count - len(arguments)) + tuple(arguments)))


def _memories(found: Sequence[Allocation]) -> tuple[list[Allocation], list[Allocation]]:
    """Those of the device and of the host; a TPU's on-chip memories are left out."""
    tpu = _is_tpu(found)
    device = [a for a in found if a.color == 0 or (a.color != HOST and not tpu)]
    # What a nested computation keeps for itself takes device memory on a TPU only.
    return [a for a in device if tpu or a.kind != "thread-local"], [a for a in found if a.color == HOST]


def _is_tpu(found: Sequence[Allocation]) -> bool:
    """Layouts are tiled on TPUs only."""
    return any(":T(" in v.shape for a in found for v in a.values)


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
    called: dict[int, str],
) -> tuple[Buffer, ...]:
    buffers = []
    for a in found:
        if a.kind == "thread-local" or not a.values:
            continue
        if a.kind in ("argument", "constant"):
            v = next((v for v in a.values if not v.phi), a.values[0])
            path = called.get(-1 if a.parameter is None else a.parameter) or names.origin(*v.key).path
            origin = Origin(path, a.kind, None)
            buffers.append(_buffer(a, v, origin, place, (0, len(plan.order) - 1), a.kind))
            continue
        values = sorted(a.values, key=lambda v: plan.live[v.key])
        finals = _finals(values, plan) if a.kind == "output" else set()
        for v, origin in zip(values, _origins(values, plan, names), strict=True):
            live = plan.live[v.key]
            if origin.phase is None:
                origin = dataclasses.replace(origin, phase=phases[live[0]])
            buffers.append(_buffer(a, v, origin, place, live, "output" if v.key in finals else "temporary"))
    return tuple(sorted(buffers, key=lambda b: b.first))


def _finals(values: Sequence[Value], plan: Schedule) -> set[Key]:
    """Which values of an output's memory are the output: its last, and a loop's carry that becomes it.

    Before that the memory may serve a temporary.
    """
    last = max(values, key=lambda v: plan.live[v.key][1])
    found, phi, first = {last.key}, last.phi, plan.live[last.key][0]
    for v in reversed(values):
        touches = plan.live[v.key][1] >= first - 1 and (v.offset, v.bytes) == (last.offset, last.bytes)
        if v.key not in found and touches:
            if not (v.phi or phi):  # another value, in the place of what it was made of
                break
            found.add(v.key)
            phi, first = v.phi, plan.live[v.key][0]
    return found


def _buffer(
    a: Allocation,
    v: Value,
    origin: Origin,
    place: Literal["device", "host"],
    live: tuple[int, int],
    kind: Literal["argument", "output", "temporary", "constant"],
) -> Buffer:
    whole = kind in ("argument", "constant")
    return Buffer(
        name=v.key[0] + (f"{{{v.key[1]}}}" if v.key[1] else ""),
        bytes=a.bytes if whole else v.bytes,
        shape=texts.plain(v.shape),
        path=origin.path,
        op=origin.op,
        phase=origin.phase,
        kind=kind,
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


# What is written over: the beginning of a loop's carry, and a loop's own result.
_BLANK = {"broadcast_in_dim", "custom-call", "while"}


def _name_run(run: Sequence[int], origins: list[Origin]) -> None:
    """Name the nameless by what came before in the same memory, else by what comes after."""
    for blank in (set(), _BLANK):
        known: Origin | None = None
        for i in (*run, *reversed(run)):
            if origins[i].path and origins[i].op not in blank:
                known = origins[i]
            elif known is not None:
                origins[i] = known
