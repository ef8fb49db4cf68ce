"""What one training step takes on a device, owned or not: compiled, never run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nexus_jax import flops, report
from nexus_jax.program import Program, step_of
from nexus_jax.targets.compiler import TIMEOUT, Answer, Target, compile_all, find_target
from nexus_jax.targets.host import host_limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One step on one target. Prints as a table.

    Attributes:
        target: its name, ``"v5e"``.
        device_bytes: arguments + outputs - aliased + temporaries in device memory; what it wanted when it ran out.
        host_bytes: the same in host memory.
        temp_bytes, argument_bytes, output_bytes, alias_bytes: the parts, as the compiler gives them; None when it ran out.
        host_temp_bytes: temporaries in host memory; None when it ran out.
        limit_bytes: what a program may take on the target; None where that is not known (a local CPU).
        host_limit_bytes: what its host has for one device, by its data sheet or of this machine, and no more than a GPU's pool
            of pinned memory allows; None where that is not known, and on a CPU, which has no memory apart from the host's.
        fits: whether ``device_bytes`` and ``host_bytes`` are within them; on a TPU libtpu's own answer stands for the
            former (its temporaries count holes twice, so that a step it takes may seem too large); None where the device's
            limit is not known.
        flops: of the whole step on all devices, loops multiplied out; see :mod:`nexus_jax.flops`.
        message: what the compiler said when it ran out of memory, or that the host is too small; else empty.
        seconds: how long the compiler took; ``cached`` says whether it did now or earlier.
    """

    target: str
    device_bytes: int
    host_bytes: int
    temp_bytes: int | None
    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    host_temp_bytes: int | None
    limit_bytes: int | None
    host_limit_bytes: int | None
    flops: int
    message: str
    seconds: float = dataclasses.field(compare=False)
    cached: bool = dataclasses.field(compare=False)
    texts: Callable[[str], str | None] = dataclasses.field(repr=False, compare=False)
    parameters: Callable[[], Sequence[str]] = dataclasses.field(repr=False, compare=False)

    @property
    def fits(self) -> bool | None:
        if self.host_limit_bytes is not None and self.host_bytes > self.host_limit_bytes:
            return False
        if self.limit_bytes is None:
            return None
        if self.temp_bytes is None:  # it ran out
            return False
        return find_target(self.target).platform == "tpu" or self.device_bytes <= self.limit_bytes

    def timeline(self) -> Any:
        """Device bytes at every point of the step: :class:`nexus_jax.timeline.Timeline`.

        Also of a step that does not fit: libtpu lays its buffers out before it refuses them, and the compilers of GPUs
        refuse none.

        Raises:
            ValueError: the compiler wrote no schedule down.
        """
        from nexus_jax import timeline

        texts = {name: self.texts(name) for name in ("buffer_assignment", "live_range", "hlo")}
        if None in texts.values():
            raise ValueError(
                f"no timeline: the compiler of {self.target} wrote no schedule of this step down; "
                f"nexus_jax.predict_peak says what to expect at its peak. {self.message}".strip()
            )
        return timeline.parse(**texts, arguments=self.parameters())  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every field but what :meth:`timeline` reads, and ``fits``."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del found["texts"], found["parameters"]
        return {**found, "fits": self.fits}

    def __str__(self) -> str:
        rows = [
            ("device bytes", report.size(self.device_bytes)),
            *(
                (f"  {name}", report.size(value))
                for name, value in (
                    ("arguments", self.argument_bytes),
                    ("outputs", self.output_bytes),
                    ("aliased", self.alias_bytes),
                    ("temporaries", self.temp_bytes),
                )
                if value is not None
            ),
            ("host bytes", report.size(self.host_bytes)),
            ("memory of the target", "unknown" if self.limit_bytes is None else report.size(self.limit_bytes)),
            *(
                [("memory of its host", report.size(self.host_limit_bytes))]
                if self.host_limit_bytes and self.host_bytes
                else []
            ),
            ("fits", {True: "yes", False: "no", None: "unknown"}[self.fits]),
            ("FLOPs of a step", f"{self.flops:.4g}"),
        ]
        shown = report.table(f"value_and_grad on {self.target}", ("", ""), rows)
        too_small = self.host_limit_bytes is not None and self.host_bytes > self.host_limit_bytes
        return f"{shown}\n{self.message}" if too_small else shown


def measure(
    fn: Callable[..., Any],
    *args: Any,
    target: str | Target | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    compiler_options: Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT,
) -> Measurement:
    """Compile ``jax.value_and_grad(fn, argnums, has_aux)`` for a target with the target's own compiler.

    Nothing runs and no device is needed but for the compile. Answers are kept on disk (``$NEXUS_JAX_CACHE``).

    Args:
        fn: a loss: returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
        args: what to call it with: pytrees of arrays or ``ShapeDtypeStruct``s, nnx modules, flags.
        target: ``"v5e"``, ``"v5p:4x4x4"``, ``"h200"``, ...; None is the local device.
        argnums: which arguments to differentiate.
        compiler_options: options of XLA for this compile, ``{"xla_gpu_enable_latency_hiding_scheduler": False}``.
        timeout: seconds that the compiler may take.

    Returns:
        A :class:`Measurement`. A step that runs out of memory is an answer: ``fits`` is False, ``device_bytes`` are
        those it wanted (to the hundredth of a GiB that libtpu reports).

    Raises:
        ValueError: an unknown target, a malformed topology, shardings that do not suit the target.
        TypeError: integers among what is differentiated, a loss that is no scalar.
        RuntimeError: the target's compiler is not installed (says what to install), or it fails (says how).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((256, 128), jnp.float32)
        >>> found = measure(lambda w, x: jnp.sum(jnp.tanh(x @ w)), jax.ShapeDtypeStruct((128, 128), jnp.float32), x)
        >>> found.argument_bytes == (256 + 128) * 128 * 4, found.target, found.flops > 2 * 2 * 256 * 128 * 128
        (True, 'local', True)
    """
    where = find_target(target)
    where.require_compiler()
    argnums = argnums if isinstance(argnums, int) else tuple(argnums)
    program = step_of(fn, args, argnums, has_aux)
    label = getattr(fn, "__name__", "the step")
    [answer] = compile_all([program.job(where, label, dict(compiler_options or {}))], timeout=timeout)
    return measurement(program, where, answer)


def measurement(program: Program, target: Target, answer: Answer, flops: int | None = None) -> Measurement:
    """A program and the compiler's answer as a :class:`Measurement`; counts the FLOPs where they are not given."""
    limit, host = _limit(target), host_limit(target)
    common: dict[str, Any] = dict(
        target=target.name,
        host_limit_bytes=None if host is None else host.nbytes,
        flops=flops_of(program) if flops is None else flops,
        seconds=answer.seconds,
        cached=answer.cached,
        texts=answer.text,
        parameters=program.parameters,
    )
    if answer.bytes is None:
        assert answer.out_of_memory is not None
        found = answer.out_of_memory
        parts = ("temp_bytes", "argument_bytes", "output_bytes", "alias_bytes", "host_temp_bytes")
        return Measurement(
            device_bytes=found["wanted"],
            host_bytes=0,
            limit_bytes=min(limit, found["limit"]) if limit else found["limit"],
            message=found["message"],
            **dict.fromkeys(parts),
            **common,
        )
    b = answer.bytes
    host_bytes = b["host_argument"] + b["host_output"] - b["host_alias"] + b["host_temp"]
    return Measurement(
        device_bytes=b["argument"] + b["output"] - b["alias"] + b["temp"],
        host_bytes=host_bytes,
        temp_bytes=b["temp"],
        argument_bytes=b["argument"],
        output_bytes=b["output"],
        alias_bytes=b["alias"],
        host_temp_bytes=b["host_temp"],
        limit_bytes=limit,
        message="" if host is None else host.refuse(host_bytes),
        **common,
    )


def flops_of(program: Program) -> int:
    """FLOPs of a step."""
    return flops.count(program.fun, *program.arrays).flops


@functools.cache
def _limit(target: Target) -> int | None:
    if target.sheet is not None:
        return target.sheet.usable_bytes
    import jax

    stats = jax.devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None
