"""The time of a step on a device, at its best: a roofline over the equations of the program.

An equation takes ``max(FLOPs / peak, bytes / memory bandwidth)`` (Williams, Waterman and Patterson, Roofline: an insightful
visual performance model, CACM 52(4), 2009); a step, the sum. What that assumes:

- The bytes are those of :mod:`nexus_jax.fusion`: of a chain of elementwise equations, only what enters and leaves it. On
  a TPU matmuls are fused with what is around them.
- The peak is that of the widest type that an equation takes: float32 runs at ``f32_flops``, which is one bfloat16 pass on
  a TPU and TF32 on a GPU, as at JAX's default precision; with ``Precision.HIGH`` it takes three such passes and with
  ``HIGHEST`` six. 16 bits and less run at ``bf16_flops``. Wider than 32 bits counts as float32, which is too fast; 8 bits
  as 16, which is too slow.
- Copies to and from the host run beside the computation and beside each other, each at the bandwidth of its direction.
- Several devices share FLOPs and bytes evenly. The network costs nothing; parameters that every device has a copy of are
  read once, not once a device.

So a step takes longer than this: the time is an optimistic bound, and ratios of times, between policies or batches, say
more than the times themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Literal, Protocol

from nexus_jax import report
from nexus_jax.flops import Count, Record


class Rates(Protocol):
    """What a device does in a second: a data sheet, or a :class:`nexus_jax.calibration.Calibration`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def bf16_flops(self) -> float: ...
    @property
    def f32_flops(self) -> float: ...
    @property
    def memory_bandwidth(self) -> float: ...
    @property
    def host_to_device_bandwidth(self) -> float | None: ...
    @property
    def device_to_host_bandwidth(self) -> float | None: ...


Bound = Literal["FLOPs", "bytes", "host link"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EquationTime:
    """How long the runs of one equation take, and by what they are bound."""

    record: Record
    seconds: float
    bound: Bound

    @property
    def path(self) -> str:
        return self.record.path


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of a step, at its best. Prints as a table.

    Attributes:
        name: of the device.
        devices: how many share the step.
        forward, backward, recompute: seconds of computing, each.
        to_host, to_device: seconds of copying, each way.
        equations: each with its seconds on one device, longest first.
        unknown: a line that names what is not in it; empty if nothing is missing.
    """

    name: str
    devices: int
    forward: float
    backward: float
    recompute: float
    to_host: float
    to_device: float
    equations: tuple[EquationTime, ...] = dataclasses.field(repr=False)
    unknown: str = ""

    @property
    def compute(self) -> float:
        """Seconds of computing."""
        return self.forward + self.backward + self.recompute

    @property
    def transfer(self) -> float:
        """Seconds of copying, one copy after the other."""
        return self.to_host + self.to_device

    @property
    def seconds(self) -> float:
        """The step, with all copying hidden behind the computing or the other way round: the optimistic bound."""
        return max(self.compute, self.to_host, self.to_device)

    @property
    def seconds_without_overlap(self) -> float:
        """The step, with no copying hidden."""
        return self.compute + self.transfer

    def __str__(self) -> str:
        parts = {p: getattr(self, p) for p in ("forward", "backward", "recompute", "to_host", "to_device")}
        share = lambda seconds: f"{100 * seconds / self.seconds:.0f} %" if self.seconds else ""
        rows = [(p.replace("_", " "), duration(s), share(s), "", "", "") for p, s in parts.items() if s]
        for (path, op, phase, bound), (seconds, times) in self._groups()[:12]:
            rows.append((phase, duration(seconds), share(seconds), f"{path or '-'} {op}", str(times), bound))
        name = self.name if self.devices == 1 else f"{self.devices} x {self.name}"
        title = f"{duration(self.seconds)} a step on {name}, at best; below, its parts and its longest equations"
        columns = ("part", "time", "of the step", "equation", "runs", "bound by")
        return report.table(title, columns, rows) + self.unknown

    def _groups(self) -> list[tuple[tuple[str, ...], tuple[float, int]]]:
        """Equations of equal layers together, longest first."""
        groups: dict[tuple[str, ...], tuple[float, int]] = {}
        for e in self.equations:
            key = (re.sub(r"\d+", "*", e.path), e.record.op, e.record.phase, e.bound)
            seconds, times = groups.get(key, (0.0, 0))
            groups[key] = seconds + e.seconds, times + e.record.times
        return sorted(groups.items(), key=lambda item: -item[1][0])


def step_time(count: Count, sheet: Rates, devices: int = 1) -> StepTime:
    """How long a program takes at best.

    Args:
        count: what it computes and moves, on all devices together (:func:`nexus_jax.flops.count`).
        sheet: what one device does in a second.
        devices: how many share the program evenly.

    Raises:
        ValueError: ``devices`` is no positive number; the program copies over a host link that ``sheet`` says nothing of.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from nexus_jax import flops
        >>> from nexus_jax.targets.sheets import sheet
        >>> x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
        >>> found = step_time(flops.count(jnp.dot, x, x), sheet("v5e"))
        >>> found.seconds == 2 * 4096**3 / 197e12, found.equations[0].bound
        (True, 'FLOPs')
    """
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"{devices=}: write how many devices share the program, 1 or more.")
    found = [EquationTime(record=r, seconds=s / devices, bound=b) for r in count.records for s, b in [_time(r, sheet)]]
    parts: dict[str, float] = dict.fromkeys(("forward", "backward", "recompute", "host", "device"), 0.0)
    for e in found:
        parts[e.record.place or e.record.phase] += e.seconds
    return StepTime(
        name=sheet.name,
        devices=devices,
        forward=parts["forward"],
        backward=parts["backward"],
        recompute=parts["recompute"],
        to_host=parts["host"],
        to_device=parts["device"],
        equations=tuple(sorted(found, key=lambda e: -e.seconds)),
        unknown=count.warning(),
    )


def seconds(record: Record, sheet: Rates) -> float:
    """How long all runs of one equation take on one device, at best.

    Raises:
        ValueError: it copies over a host link that ``sheet`` says nothing of.
    """
    return _time(record, sheet)[0]


def _time(record: Record, sheet: Rates) -> tuple[float, Bound]:
    if record.place:
        return record.times * record.written / _link(record.place, sheet), "host link"
    computing = record.flops / peak(record, sheet)
    moved = sum(record.fused) if sheet.kind == "tpu" else record.read + record.written
    moving = moved / sheet.memory_bandwidth
    return record.times * max(computing, moving), "FLOPs" if computing > moving else "bytes"


def peak(record: Record, sheet: Rates) -> float:
    """FLOP/s of a device on an equation of this type and precision."""
    return sheet.f32_flops / record.passes if _is_wide(record.dtype) else sheet.bf16_flops


@functools.cache
def _is_wide(dtype: str) -> bool:
    bits = re.search(r"\d+", dtype)
    return bits is None or int(bits.group()) > 16


def _link(place: str, sheet: Rates) -> float:
    name = "device_to_host_bandwidth" if place == "host" else "host_to_device_bandwidth"
    found = getattr(sheet, name)
    if found is None:
        raise ValueError(
            f"the program copies to {place} memory, and {sheet.name} has no {name}: give a sheet with one, such as "
            "dataclasses.replace(sheet, ...)."
        )
    return found


def duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> duration(0.0123), duration(2e-6), duration(75.0)
        ('12.3 ms', '2 us', '75 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
