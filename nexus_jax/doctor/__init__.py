"""A doctor for the flags, the environment and the step: what would keep a policy from doing what it says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from nexus_jax import _compat
from nexus_jax.doctor import environment, program
from nexus_jax.doctor.case import Case, Report, config, walk
from nexus_jax.doctor.case import Finding as Finding
from nexus_jax.scopes import phase
from nexus_jax.targets.compiler import Target, find_target
from nexus_jax.targets.host import host_memory
from nexus_jax.traced import Traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing to look at.

    Attributes:
        name: as the report says it.
        run: gives the findings on a case.
        of_step: whether there is nothing to look at without a step.
    """

    name: str
    run: Callable[[Case], Iterator[Finding]]
    of_step: bool = False


CHECKS = (
    Check(name="unrolled offload", run=environment.unrolled_offload, of_step=True),
    Check(name="offload on a CPU", run=environment.offload_on_cpu, of_step=True),
    Check(name="pinned memory", run=environment.pinned_memory),
    Check(name="host memory", run=environment.host_memory, of_step=True),
    Check(name="XLA's offloading flags", run=environment.xla_offloading),
    Check(name="XLA's rematerialization", run=environment.xla_remat),
    Check(name="GPU memory", run=environment.gpu_memory),
    Check(name="JAX's settings", run=environment.jax_config),
    Check(name="versions", run=environment.versions),
    Check(name="scan of length one", run=program.scan_of_one, of_step=True),
    Check(name="nested remat", run=program.nested_remat, of_step=True),
    Check(name="policy names", run=program.policy_names, of_step=True),
    Check(name="unused names", run=program.unused_names, of_step=True),
    Check(name="offloaded names", run=program.unmoved_names, of_step=True),
    Check(name="kernels under a policy", run=program.unknown_kernels, of_step=True),
)


def doctor(fn: Callable[..., Any] | None = None, *args: Any, target: str | Target | None = None) -> Report:
    """What in the flags, the environment and the step would keep a policy from doing what it says.

    Nothing is compiled or run: a step is traced, and its backward pass with it, unless it computes gradients itself.

    Args:
        fn: the loss, or the whole training step; without it, flags and environment only.
        *args: what to call it with: arrays, ``ShapeDtypeStruct``s, nnx modules.
        target: what it is for, as in :func:`nexus_jax.measure`; the local device by default. Flags and environment are
            those of this process.

    Returns:
        A :class:`Report`: a sequence of findings, which prints what was found, why it matters and what to write.

    Raises:
        ValueError: an unknown target.
        TypeError: no argument holds an array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.ad_checkpoint import checkpoint_name
        >>> keep = jax.checkpoint_policies.save_only_these_names("contxt")
        >>> f = jax.checkpoint(lambda x: jnp.sin(checkpoint_name(jnp.sin(x), "context")), policy=keep)
        >>> for finding in doctor(lambda x: jnp.sum(f(x)), jnp.ones(8), target="v5e"):
        ...     print(finding.found, "->", finding.write)
        a policy goes by the name 'contxt', and no value in its boundaries bears it -> 'context', which is borne
        1 checkpoint_name that no policy asks for: 'context' -> a policy with these names, as jax.checkpoint_policies.save_only_these_names or name = ... in a policy file
    """
    where = find_target(target)
    case = case_of(fn, args, where.platform)
    host = None if where.platform == "cpu" else host_memory(where)
    if host is not None:
        case = dataclasses.replace(case, host=host.of_all(where.devices if where.sheet else jax.device_count()))
    return examine(case, where.name)


def case_of(fn: Callable[..., Any] | None, args: Sequence[Any], platform: str) -> Case:
    """This process and, if one is given, a step, on a platform."""
    forward = step = None
    options: dict[str, str] = {}
    if fn is not None:
        traced = Traced(fn, args, {})
        options, forward = traced.options, traced.forward()
        differentiates = any(phase(_compat.scope_path(eqn)) != "forward" for eqn, _ in walk(forward))
        step = forward if differentiates else traced.with_backward()[0]
    return Case(
        platform=platform,
        environ=dict(os.environ),
        config=config(),
        version=jax.__version_info__,
        options=options,
        forward=forward,
        step=step,
    )


def examine(case: Case, target: str) -> Report:
    """The report on a case."""
    checks = [check for check in CHECKS if case.forward is not None or not check.of_step]
    findings = tuple(finding for check in checks for finding in check.run(case))
    return Report(
        findings,
        target,
        checked=tuple(check.name for check in checks),
        skipped=tuple(check.name for check in CHECKS if check not in checks),
    )
