"""The largest batch, or sequence, that a target's memory holds under each policy: found by compiling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nexus_jax import report
from nexus_jax.compare import name_of
from nexus_jax.measure import Measurement, measurement
from nexus_jax.program import step_of
from nexus_jax.roofline import step_time
from nexus_jax.targets.compiler import TIMEOUT, Target, compile_all, find_target
from nexus_jax.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """The answer for one policy.

    Attributes:
        policy: its name.
        largest: the largest value of the parameter that fits; 0 where not even the smallest does.
        device_bytes: of the step there; of the smallest value tried where none fits.
        next_bytes: what the next value would take; None where the search ended at its upper bound.
        per_second: how many of the parameter's units a step of that size does in a second by the time model
            (:mod:`nexus_jax.roofline`, an optimistic bound); None for a target without a data sheet.
        compiles: how many compiles it took, cached ones among them.
    """

    policy: str
    largest: int
    device_bytes: int
    next_bytes: int | None
    per_second: float | None
    compiles: int


@dataclasses.dataclass(frozen=True)
class Fits(Sequence[Fit]):
    """One :class:`Fit` a policy. Prints as a table; throughput is relative to the first policy that fits at all."""

    vary: str
    target: str
    limit_bytes: int
    fits: tuple[Fit, ...]

    def __getitem__(self, index):
        return self.fits[index]

    def __len__(self) -> int:
        return len(self.fits)

    def as_dict(self) -> dict[str, Any]:
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "fits": [dataclasses.asdict(f) for f in self.fits],
        }

    def __str__(self) -> str:
        base = next((f for f in self.fits if f.largest), None)
        rows = []
        for f in self.fits:
            grown = f"{f.largest / base.largest:.2f}x" if base and f.largest else ""
            faster = f"{f.per_second / base.per_second:.2f}x" if base and f.per_second and base.per_second else ""
            following = "" if f.next_bytes is None else report.size(f.next_bytes)
            rows.append(
                (
                    f.policy or "as it is",
                    str(f.largest),
                    grown,
                    report.size(f.device_bytes),
                    following,
                    faster,
                    str(f.compiles),
                )
            )
        columns = (
            "policy",
            f"largest {self.vary}",
            "",
            "device bytes",
            "the next one",
            f"{self.vary}/s (model)",
            "compiles",
        )
        return report.table(f"{self.vary} within {report.size(self.limit_bytes)} of {self.target}", columns, rows)


def fit(
    workload: Callable[..., Any],
    vary: str = "batch",
    policies: Sequence[Any] = (None,),
    *,
    target: str | Target,
    limit_bytes: int | None = None,
    multiple: int = 1,
    at_most: int = 2**16,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    timeout: float = TIMEOUT,
) -> Fits:
    """The largest ``workload(policy=..., batch=n)`` whose compiled step fits, for each policy.

    Device bytes grow nearly as a line with a batch and as a parabola with a length, so a curve through two or three
    compiles lands close to the answer (mostly five or six compiles in all); the answer itself is always two compiles:
    ``n`` fits, ``n + multiple`` does not.

    Args:
        workload: returns ``(loss, arguments)``; takes ``policy`` and the parameter to vary.
        vary: that parameter; ``"batch"``, ``"length"``, any whole number.
        limit_bytes: device bytes to stay within; the target's own by default.
        multiple: try only multiples of this (8 for a batch spread over 8 devices).
        at_most: where to stop.

    Raises:
        ValueError: no such parameter, bounds that make no sense, a target whose memory is not known.
    """
    made = workload if isinstance(workload, Workload) else Workload(workload)
    made.require(vary)
    where = find_target(target)
    where.require_compiler()
    if multiple < 1 or at_most < multiple:
        raise ValueError(f"{multiple=}, {at_most=}: write whole numbers with 1 <= multiple <= at_most.")
    search = _Search(made, vary, where, limit_bytes, multiple, at_most, argnums, has_aux, timeout)
    fits = tuple(search.run(policy) for policy in policies)
    assert search.limit is not None
    return Fits(vary, where.name, search.limit, fits)


def _root(at: Sequence[int], values: Sequence[int], low: int, high: int) -> int | None:
    """Where a polynomial through these points crosses zero: a parabola between the bounds, else a line anywhere."""
    unit = max(map(abs, values)) or 1
    for n in range(len(at), 1, -1):
        roots = np.roots(np.polyfit(at[:n], [v / unit for v in values[:n]], n - 1))
        real = [r.real for r in roots if abs(r.imag) < 1e-9 and (n == 2 or low <= r.real < high)]
        if real:
            return int(min(max(min(real), low), high))
    return None


@dataclasses.dataclass
class _Search:
    workload: Workload
    vary: str
    target: Target
    limit: int | None
    multiple: int
    at_most: int
    argnums: Any
    has_aux: bool
    timeout: float

    def __post_init__(self):
        self.own = self.limit is None  # the target's

    def run(self, policy: Any) -> Fit:
        tried: dict[int, Measurement] = {}

        def fits(k: int) -> bool:  # k multiples
            if k not in tried:
                tried[k] = self._measure(policy, k * self.multiple)
            within = tried[k].device_bytes <= self._limit(tried[k])
            return tried[k].fits is True if self.own else within

        low, high = 0, self.at_most // self.multiple + 1  # low fits, high does not; neither has been tried
        k = min(max(1, self._start() // self.multiple), high - 1)
        run = 0  # compiles in a row that fitted (above 0) or did not (below)
        while high - low > 1:
            if fits(k):
                low, run = k, max(run, 0) + 1
            else:
                high, run = k, min(run, 0) - 1
            # Stairs (tiles, padding) lead a curve to the same side again and again: reach further each time.
            reach = (2 ** (abs(run) - 1) - 1) * (1 if run > 0 else -1)
            k = min(max(self._next(tried, low, high) + reach, low + 1), high - 1)
        best = tried.get(low) or tried[min(tried)]
        return Fit(
            policy=name_of(policy),
            largest=low * self.multiple,
            device_bytes=best.device_bytes,
            next_bytes=tried[low + 1].device_bytes if low + 1 in tried else None,
            per_second=self._per_second(policy, low * self.multiple) if low else None,
            compiles=len(tried),
        )

    def _start(self) -> int:
        default = self.workload.default(self.vary)
        if not isinstance(default, int) or isinstance(default, bool) or default < 1:
            raise ValueError(f"{self.vary}={default!r}: only a whole number above 0 can be varied.")
        return default

    def _next(self, tried: dict[int, Measurement], low: int, high: int) -> int:
        """Where a parabola (two compiles: a line) through the nearest compiles meets the limit, within the bounds.

        Bytes grow with a batch as a line does, with a length as a parabola.
        """
        near = sorted(tried, key=lambda k: (min(abs(k - low), abs(k - high)), k))[:3]
        over = [tried[k].device_bytes - self._limit(tried[k]) for k in near]
        guess = _root(near, over, low, high)
        if guess is None or high not in tried:  # far beyond what is known, a curve is no guide
            guess = min(guess or high, 8 * low) if low else high // 8
        return guess + 1 if guess == low else guess  # low is the answer, as it seems: the next one must not fit

    def _limit(self, m: Measurement) -> int:
        if self.limit is None:
            if m.limit_bytes is None:
                raise ValueError(
                    f"the memory of target={self.target.name!r} is not known: write limit_bytes=... (--limit)."
                )
            self.limit = m.limit_bytes
        return self.limit

    def _program(self, policy: Any, n: int):
        loss, args = self.workload(policy, **{self.vary: n})
        return step_of(loss, args, self.argnums, self.has_aux)

    def _measure(self, policy: Any, n: int) -> Measurement:
        program = self._program(policy, n)
        label = f"{name_of(policy) or self.workload.name} {self.vary}={n}"
        [answer] = compile_all([program.job(self.target, label)], timeout=self.timeout)
        return measurement(program, self.target, answer, flops=0)

    def _per_second(self, policy: Any, n: int) -> float | None:
        from nexus_jax import flops

        if self.target.sheet is None:
            return None
        program = self._program(policy, n)
        count = flops.count(program.fun, *program.arrays)
        return n / step_time(count, self.target.sheet, self.target.devices).seconds
