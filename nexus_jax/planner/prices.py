"""What an equation costs and what a value takes, for one target: the only place where the planner asks about devices."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
from jax.extend import core as jex

from nexus_jax import costs, flops
from nexus_jax.flat import is_floating
from nexus_jax.peak import rules
from nexus_jax.planner.graph import GIGA, Link
from nexus_jax.policy.rules import nbytes
from nexus_jax.targets.compiler import Target

Objective = Literal["seconds", "flops"]
OBJECTIVES: tuple[Objective, ...] = ("seconds", "flops")
_SMALL = 2**20  # bytes
_LOOPS = {"scan", "while", "cond"}


@dataclasses.dataclass(frozen=True)
class Prices:
    """Bytes, FLOPs and seconds on a target.

    Attributes:
        target: where the step runs.
        objective: what a plan has least of: ``"seconds"`` by the target's data sheet, or ``"flops"``. A target
            without a sheet has FLOPs only.
        host: bytes of host memory that a plan may use; with none, nothing is offloaded.
    """

    target: Target
    objective: Objective
    host: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f'objective={self.objective!r}: write "seconds" or "flops".')

    @property
    def is_tpu(self) -> bool:
        return self.target.platform == "tpu"

    def bytes_of(self, aval: Any) -> int:
        """Bytes of a value in the target's memory: on a TPU, with the padding of its tiles."""
        size = nbytes(aval)
        shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
        if self.is_tpu and size > 4096 and isinstance(getattr(dtype, "itemsize", None), int):
            return rules.padded(tuple(shape), dtype)
        return size

    @functools.cached_property
    def like(self) -> Any:
        """A jaxpr to make others of: only JAX makes one from nothing without a warning."""
        return jax.make_jaxpr(lambda x: x)(0.0).jaxpr

    def flops_of(self, eqn: Any) -> int:
        """FLOPs of an equation, loops inside multiplied out."""
        found = costs.flops_of(eqn)
        if found is not None and eqn.primitive.name not in _LOOPS:
            return found
        inputs = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal)))
        return flops.count_jaxpr(self.like.replace(invars=inputs, outvars=eqn.outvars, eqns=[eqn])).flops

    def link(self, picoseconds: int, unit: int) -> Link | None:
        """What moving bytes costs a stretch whose forward pass takes so long; its backward pass takes twice as long.

        Seconds by which a copy is late cost FLOPs, where these are counted, as many as the target's peak makes of them.

        Args:
            unit: of a tick, in picoseconds or FLOPs.
        """
        sheet = self.target.sheet
        if not self.host or sheet is None:
            return None
        second = (sheet.bf16_flops if self.objective == "flops" else 1e12) / unit  # in ticks
        a_byte = lambda bandwidth: round(GIGA * second / bandwidth) if bandwidth else GIGA * GIGA
        beside = int(second * picoseconds / 1e12)
        return Link(
            out=a_byte(sheet.device_to_host_bandwidth),
            back=a_byte(sheet.host_to_device_bandwidth),
            hidden_out=beside,
            hidden_back=2 * beside,
            touch=2 * a_byte(sheet.memory_bandwidth),
        )

    def is_movable(self, aval: Any) -> bool:
        """Whether a value may wait on the host: floating-point, and not so small that the link takes longer to start."""
        return bool(self.host) and is_floating(aval) and nbytes(aval) >= _SMALL

    def picoseconds_of(self, eqn: Any) -> int:
        """Time of an equation at best: its FLOPs, or its way through memory if it is a kernel of its own.

        What is fused has no such way: the kernel that it is made in reads where it would have read what was kept.
        """
        sheet = self.target.sheet
        count = self.flops_of(eqn)
        if sheet is None:
            return count
        wide = any(getattr(v.aval, "dtype", None) is not None and v.aval.dtype.itemsize > 2 for v in eqn.invars)
        seconds = count / (sheet.f32_flops if wide else sheet.bf16_flops)
        if not is_fused(eqn):
            moved = sum(nbytes(v.aval) for v in (*eqn.invars, *eqn.outvars))
            seconds = max(seconds, moved / sheet.memory_bandwidth)
        return math.ceil(seconds * 1e12)

    def cost_of(self, eqn: Any) -> int:
        """What running an equation again costs the plan: picoseconds or FLOPs."""
        return self.flops_of(eqn) if self.objective == "flops" else self.picoseconds_of(eqn)

    def sum_of(self, aval: Any) -> int:
        """What adding two values of a type costs."""
        return self.cost_of(_addition(aval.shape, aval.dtype))


@functools.cache
def _addition(shape: tuple[int, ...], dtype: Any) -> Any:
    like = jax.ShapeDtypeStruct(shape, dtype)
    [eqn] = jax.make_jaxpr(jax.lax.add)(like, like).eqns
    return eqn


def is_view(eqn: Any) -> bool:
    """Whether an equation is another name for the same bytes."""
    return costs.kind_of(eqn) == "view"


def is_fused(eqn: Any, keeps_expensive: bool = False) -> bool:
    """Whether a compiler makes what an equation makes where it is used, instead of writing it to memory."""
    name = eqn.primitive.name
    return is_view(eqn) or (name in rules.FUSIBLE and not (keeps_expensive and name in rules.EXPENSIVE))
