"""How many bytes the link to the host moves behind a computation, at best: the time window of a transfer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from nexus_jax import flops, roofline
from nexus_jax.policy.rules import nbytes


@dataclasses.dataclass(frozen=True)
class Windows:
    """Time windows on one device.

    A copy out runs beside the forward pass of the next layer, a copy back beside the backward pass of an earlier one, which
    computes twice as long as its forward pass. The times are those of :mod:`nexus_jax.roofline`: at best, so that what
    is said to be hidden is hidden on a device that reaches its peak, and more on one that does not.
    """

    rates: roofline.Rates

    def seconds(self, program: Any) -> float:
        """How long a program computes."""
        return roofline.step_time(flops.count_jaxpr(program), self.rates).compute

    def out(self, beside: float) -> int:
        """Bytes that leave in the seconds of a forward pass."""
        return int(beside * (self.rates.device_to_host_bandwidth or 0.0))

    def back(self, beside: float) -> int:
        """Bytes that come back in the backward pass of what took these seconds forward."""
        return int(2 * beside * (self.rates.host_to_device_bandwidth or 0.0))


def largest(values: Iterable[Any], room: int) -> set[Any]:
    """Of these variables, the largest first, as many as there is room for."""
    found = set()
    for v in sorted(values, key=lambda v: -nbytes(v.aval)):
        if nbytes(v.aval) <= room:
            found.add(v)
            room -= nbytes(v.aval)
    return found
