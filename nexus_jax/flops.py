"""FLOPs and bytes of a program, counted on its jaxpr: equation by equation, with loops multiplied out.

What an equation costs is a table in :mod:`nexus_jax.costs`; which bytes go through memory, a model in
:mod:`nexus_jax.fusion`. A scan's body counts once a step, a while loop's as often as its program says
(:mod:`nexus_jax.loops`), a cond's by its branch with the most FLOPs, a ``shard_map``'s once a device: counts are those of
all devices together. What no output needs is not counted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from nexus_jax import costs, report
from nexus_jax.records import PHASES as PHASES
from nexus_jax.records import Phase as Phase
from nexus_jax.records import Record as Record
from nexus_jax.records import records_of


@dataclasses.dataclass(frozen=True)
class Count:
    """What a program computes and moves. Prints as a table.

    Attributes:
        records: a :class:`Record` for each equation that costs anything, in program order.
    """

    records: tuple[Record, ...]

    @functools.cached_property
    def flops(self) -> int:
        """FLOPs of everything."""
        return sum(r.flops * r.times for r in self.records)

    @functools.cached_property
    def matmul_flops(self) -> int:
        """FLOPs of the matmuls and convolutions."""
        return sum(r.flops * r.times for r in self.records if r.op in costs.MATMULS)

    @functools.cached_property
    def matmuls(self) -> int:
        """How many matmuls and convolutions run."""
        return sum(r.times for r in self.records if r.op in costs.MATMULS)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes read from and written to device memory; transfers are not among them."""
        return sum((r.read + r.written) * r.times for r in self.records if r.phase != "transfer")

    @functools.cached_property
    def transfer_bytes(self) -> dict[str, int]:
        """Bytes moved to ``"host"`` and to ``"device"`` memory."""
        found = {"host": 0, "device": 0}
        for r in self.records:
            if r.phase == "transfer":
                found[r.place] += r.written * r.times
        return found

    @functools.cached_property
    def by_phase(self) -> dict[Phase, int]:
        """FLOPs of each phase."""
        found: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        for r in self.records:
            found[r.phase] += r.flops * r.times
        return found

    @functools.cached_property
    def unknown(self) -> dict[str, int]:
        """What is not known, and counts nothing, and how often it runs; ``while`` is a loop whose body counts once."""
        found: Counter[str] = Counter()
        for r in self.records:
            if not r.known:
                found[r.op] += r.times
        return dict(found)

    def __str__(self) -> str:
        rows = []
        for phase in PHASES:
            own = [r for r in self.records if r.phase == phase]
            matmul = sum(r.flops * r.times for r in own if r.op in costs.MATMULS)
            read, written = sum(r.read * r.times for r in own), sum(r.written * r.times for r in own)
            flops = (f"{self.by_phase[phase]:.4g}", f"{matmul:.4g}")
            rows.append((phase, *flops, report.size(read), report.size(written)))
        columns = ("phase", "FLOPs", "in matmuls", "bytes read", "bytes written")
        return report.table(f"{self.flops:.4g} FLOPs", columns, rows) + self.warning()

    def warning(self) -> str:
        """A line that names what is not known; empty if all is known."""
        if not self.unknown:
            return ""
        names = ", ".join(f"{op} (runs {n}x)" for op, n in sorted(self.unknown.items()))
        loop = " A while loop whose length is not in the program counts one step." if "while" in self.unknown else ""
        return f"\nnot counted, because their FLOPs are not known: {names}.{loop}"


def count(fn: Callable[..., Any], *args: Any) -> Count:
    """What ``fn(*args)`` computes and moves. Nothing is run.

    Args:
        fn: a function of pytrees of arrays and ``ShapeDtypeStruct``s.
        *args: what to call it with.

    Returns:
        :class:`Count`, of all devices together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
        >>> found = count(jax.grad(lambda a, b: jnp.sum(jnp.sin(a @ b.T))), x, x)
        >>> found.matmul_flops, found.matmuls, found.unknown
        (4096, 2, {})
    """
    return count_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def count_jaxpr(jaxpr: Any) -> Count:
    """As :func:`count`, of a program that is traced already."""
    return Count(records_of(jaxpr))


def matmul_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs (two per multiply-add) of every ``dot_general`` and convolution of ``fn(*args)``, loops multiplied out.

    Nothing is computed; arguments may be ``ShapeDtypeStruct``s.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
        >>> matmul_flops(lambda a, b: a @ b.T, x, x)
        2048
    """
    return count(fn, *args).matmul_flops


def count_matmuls(fn: Callable[..., Any], *args: Any) -> int:
    """How many times ``fn(*args)`` runs a ``dot_general`` or a convolution, loops multiplied out."""
    return count(fn, *args).matmuls
