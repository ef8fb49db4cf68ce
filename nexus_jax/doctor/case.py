"""What the doctor looks at, and what it says."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from nexus_jax.dataflow import moves_to_host
from nexus_jax.policy.rules import nbytes
from nexus_jax.targets.host import HostLimit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        check: the check that found it.
        found: what was found.
        matters: why that matters.
        write: what to write instead.
        source: where that is known from.
    """

    check: str
    found: str
    matters: str
    write: str
    source: str = ""

    def __str__(self) -> str:
        lines = [f"{self.check}: {self.found}", f"why it matters: {self.matters}", f"write: {self.write}"]
        return "\n".join([*lines, *([f"source: {self.source}"] if self.source else [])])


@dataclasses.dataclass(frozen=True)
class Report(Sequence[Finding]):
    """What the doctor found: a sequence of findings, in the order of the checks. Prints what to do.

    Attributes:
        findings: empty where all is well.
        target: what it was about.
        checked, skipped: the checks that ran, and those that need a step and got none.
    """

    findings: tuple[Finding, ...]
    target: str
    checked: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __getitem__(self, index):
        return self.findings[index]

    def __len__(self) -> int:
        return len(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.findings:
            without = f"; not without a step: {', '.join(self.skipped)}" if self.skipped else ""
            return f"doctor: nothing found for {self.target}; checked: {', '.join(self.checked)}{without}"
        width = min(shutil.get_terminal_size((110, 24)).columns, 110)
        lines = [f"doctor: {len(self.findings)} finding{'s' * (len(self.findings) > 1)} for {self.target}"]
        for finding in self.findings:
            first, *rest = str(finding).splitlines()
            lines += textwrap.wrap(first, width, initial_indent="* ", subsequent_indent="  ")
            for line in rest:
                wrap = textwrap.wrap(line, width, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
                lines += wrap
        return "\n".join(lines)


class Place(tuple[Any, ...]):
    """The equations around another one, outermost first."""

    @property
    def times(self) -> int:
        """How often what is inside runs."""
        times = 1
        for eqn in self:
            times *= eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        return times

    @property
    def in_loop(self) -> bool:
        """Whether it is in a loop that stays one: XLA unrolls a loop of one step."""
        return any(
            eqn.primitive.name == "while" or (eqn.primitive.name == "scan" and eqn.params["length"] > 1) for eqn in self
        )

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return tuple(found for eqn in self if (found := checkpoint_of(eqn)) is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """The flags, the environment and the step that are looked at; nothing in it has run.

    Attributes:
        platform: what the step runs on, as JAX names it: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``.
        environ: environment variables.
        config: ``jax.config`` by name.
        version: of JAX, ``(0, 12, 0)``.
        options: the ``compiler_options`` of the step's own ``jax.jit``.
        forward: the step's jaxpr; None without a step.
        step: the same with its backward pass.
        host: the host memory for all of its devices; None where it is not known, or is the device's own.
    """

    platform: str
    environ: Mapping[str, str]
    config: Mapping[str, Any]
    version: tuple[int, ...]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    forward: Any = None
    step: Any = None
    host: HostLimit | None = None

    @property
    def on_gpu(self) -> bool:
        return self.platform in ("cuda", "rocm", "gpu")

    def flag(self, name: str) -> str | None:
        """The value of an XLA flag, the last where it is given several times; ``jax.jit``'s own options win."""
        given = f"{self.environ.get('XLA_FLAGS', '')} {self.environ.get('LIBTPU_INIT_ARGS', '')}"
        found = None
        for word in given.split():
            key, _, value = word.removeprefix("--").partition("=")
            if key == name and word.startswith("--"):
                found = value or "true"
        return self.options.get(name, found)

    def flag_is(self, name: str, default: bool) -> bool:
        value = self.flag(name)
        return default if value is None else value.lower() not in ("false", "0")

    @functools.cached_property
    def to_host(self) -> tuple[tuple[int, Place], ...]:
        """What the step moves to host memory: bytes over all runs, and where."""
        moves = [(eqn, place) for eqn, place in walk(self.step) if moves_to_host(eqn)] if self.step is not None else []
        return tuple((sum(nbytes(v.aval) for v in eqn.outvars) * place.times, place) for eqn, place in moves)

    @property
    def host_bytes(self) -> int:
        return sum(n for n, _ in self.to_host)

    @functools.cached_property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every ``jax.checkpoint`` of the step, before differentiation."""
        found = (checkpoint_of(eqn) for eqn, _ in walk(self.forward)) if self.forward is not None else ()
        return tuple(c for c in found if c is not None)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """One ``jax.checkpoint``: its program, and its policy (None: recompute everything)."""

    jaxpr: Any
    policy: Any
    eqn: Any


def walk(jaxpr: Any, outer: Place | None = None) -> Iterator[tuple[Any, Place]]:
    """Every equation of a program, bodies too, with the equations around it."""
    outer = outer or Place()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn, outer
        for param in _parameters(eqn).values():
            for body in param if isinstance(param, tuple | list) else (param,):
                if isinstance(body, jex.Jaxpr | jex.ClosedJaxpr):  # pyright: ignore[reportPrivateImportUsage]
                    yield from walk(body, Place((*outer, eqn)))


def _parameters(eqn: Any) -> Mapping[str, Any]:
    """An equation's parameters; under ``jax_remat3`` they are those of an object that it holds."""
    return getattr(eqn.params.get("_prim"), "params", eqn.params)


def checkpoint_of(eqn: Any) -> Checkpoint | None:
    """The ``jax.checkpoint`` that an equation is; None for any other."""
    params = _parameters(eqn)
    if "policy" not in params or "jaxpr" not in params or params.get("differentiated"):
        return None
    return Checkpoint(jaxpr=params["jaxpr"], policy=params["policy"], eqn=eqn)


def name_of(eqn: Any) -> str | None:
    """The name that a ``checkpoint_name`` equation gives; None for any other equation."""
    if eqn.primitive.name == "name" or type(eqn.params.get("_prim")).__name__ == "CheckpointName":
        return _parameters(eqn)["name"]
    return None


CONFIG = (
    "jax_remat3",
    "jax_disable_jit",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_disable_most_optimizations",
    "jax_compiler_enable_remat_pass",
    "jax_memory_fitting_level",
)


def config() -> dict[str, Any]:
    """What of ``jax.config`` the checks read."""
    return {name: getattr(jax.config, name) for name in CONFIG if hasattr(jax.config, name)}
