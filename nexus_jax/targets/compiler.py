"""Compile programs for targets: worker processes, several at a time, answers kept on disk."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nexus_jax import _compat
from nexus_jax.targets import cache as caches
from nexus_jax.targets.sheets import Sheet, gpu_target_config, parse_target
from nexus_jax.targets.worker import BYTES, TEXTS, bytes_of, dump_options, failure, keep_texts

TIMEOUT = 1800.0  # seconds for one program; GPT-3 175B on 64 chips takes 30


class CompileError(RuntimeError):
    """A step that does not compile for its target, for another reason than memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a program is compiled for.

    Attributes:
        name: as the user wrote it, ``"v5p:4x4x4"``; ``"local"`` for the default device of this process.
        sheet: its data sheet; None for a local device that has none.
        devices: how many devices one program runs on.
        topology: libtpu's name of the slice, for a TPU.
    """

    name: str
    sheet: Sheet | None
    devices: int = 1
    topology: str = ""

    @property
    def platform(self) -> str:
        """JAX's name of the platform that a program is lowered for."""
        if self.sheet is None:
            return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        return "tpu" if self.sheet.kind == "tpu" else "cuda"

    def versions(self) -> dict[str, str]:
        """The versions that an answer depends on."""
        names = ["jax", "jaxlib"]
        if self.sheet is not None:
            names += ["libtpu"] if self.sheet.kind == "tpu" else ["jax-cuda13-pjrt"]
        found = {}
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found

    def require_compiler(self) -> None:
        """Raise a ``RuntimeError`` with the line to run where the target's compiler is not installed."""
        if self.sheet is not None and not _compat.has_compiler(self.sheet.kind):
            raise RuntimeError(
                f"target={self.name!r} needs a compiler that is not installed: {_compat.install_line(self.sheet.kind)}."
            )

    def job(self) -> dict[str, Any]:
        """The target as the worker is told."""
        assert self.sheet is not None
        if self.sheet.kind == "tpu":
            return {"kind": "tpu", "topology": self.topology, "chip_config": self.sheet.chip_config}
        return {"kind": "gpu", "config": gpu_target_config(self.sheet), "count": self.devices}


def find_target(name: str | Target | None) -> Target:
    """The target of a name: ``"v5e"``, ``"v5p:4x4x4"``, ``"h200"``, ``"h100:8"``; None or ``"local"`` is this process's device.

    Raises:
        ValueError: an unknown name (lists the known), or a malformed topology.
    """
    if isinstance(name, Target):
        return name
    if name is None or name == "local":
        return Target(name="local", sheet=None)
    sheet, shape = parse_target(name)
    if sheet.kind == "gpu":
        return Target(name=name, sheet=sheet, devices=math.prod(shape or (1,)))
    if shape is None:
        return Target(name=name, sheet=sheet, topology=sheet.topology)
    topology = f"{sheet.name}:{'x'.join(map(str, shape))}"
    return Target(name=name, sheet=sheet, devices=math.prod(shape) * sheet.devices_per_chip, topology=topology)


def target_mesh(name: str, **axes: int) -> AbstractMesh:
    """A mesh over all devices of a target, to shard abstract arguments over; no device is needed.

    Its axes are ``jax.sharding.AxisType.Auto``: XLA chooses the shardings in between. For a step that is written with
    explicit shardings make the ``AbstractMesh`` of the step's own mesh.

    Args:
        name: a target of several devices, ``"v5p:4x4x4"``.
        axes: their sizes by name; one axis ``data`` over all devices by default.

    Raises:
        ValueError: sizes that do not multiply to the number of devices.

    Example:
        >>> mesh = target_mesh("v5e:4x4", data=4, model=4)
        >>> mesh.axis_names, mesh.axis_sizes
        (('data', 'model'), (4, 4))
    """
    devices = find_target(name).devices
    axes = axes or {"data": devices}
    if math.prod(axes.values()) != devices:
        raise ValueError(f"target={name!r} has {devices} devices, and {axes} multiply to {math.prod(axes.values())}.")
    # without the types, their default depends on the version of JAX
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One program for one target.

    Attributes:
        key: names what is compiled, whatever process asks; from the program, the target and the versions.
        serialized: makes the program to be sent to a worker; only called when the cache has no answer.
        lowered: the program for a local target, which this process compiles.
        mesh: ``(axis names, axis sizes)`` of a program for several devices.
        label: for the progress bar and for errors.
        texts: whether the compiler shall write down its schedule and buffers, which doubles the time of libtpu.
    """

    key: str
    target: Target
    label: str
    texts: bool = False
    serialized: Callable[[], bytes] | None = None
    lowered: Callable[[], Any] | None = None
    mesh: tuple[tuple[str, ...], tuple[int, ...]] | None = None
    compiler_options: tuple[tuple[str, Any], ...] = ()

    def prepare(self) -> Any:
        """What is compiled: bytes for a worker, or a lowered program for this process."""
        made = self.lowered if self.target.sheet is None else self.serialized
        assert made is not None
        return made()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a job: bytes, or out of memory.

    ``text`` gives the compiler's own, compiling again if it must; None where the compiler wrote none.
    """

    bytes: dict[str, int] | None
    out_of_memory: dict[str, Any] | None
    seconds: float
    cached: bool
    text: Callable[[str], str | None]


def compile_all(
    jobs: Sequence[Job],
    *,
    timeout: float = TIMEOUT,
    workers: int | None = None,
    progress: bool | None = None,
    fresh: bool = False,
) -> list[Answer]:
    """Compile every job, or read its answer from the cache; in the order of ``jobs``.

    Args:
        timeout: seconds for one program.
        workers: how many processes at a time; one for each core (a compiler uses one, and up to 2 GB), at most 8.
        progress: whether to show a bar on standard error; by default in a terminal.
        fresh: compile whatever the cache has, and replace it.

    Raises:
        CompileError: a program that does not compile: the compiler's message, shortened, with the job's label.
    """
    cache = caches.Cache()
    answers: dict[str, Answer] = {}
    todo: dict[str, Job] = {}
    for job in jobs:
        found = None if fresh else _kept(job, cache)
        if found is not None:
            answers[job.key] = _answer(job, found, None, timeout, cached=True)
        else:
            job.target.require_compiler()
            todo[job.key] = job
    count = workers or min(os.cpu_count() or 1, 8)
    with _bar(len(todo), progress) as advance, concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures: dict[concurrent.futures.Future, Job] = {}
        try:
            for job in todo.values():  # lowered in this thread: what is traced may depend on its contexts
                futures[pool.submit(_compile, job, job.prepare(), timeout)] = job
            for future in concurrent.futures.as_completed(futures):
                job = futures[future]
                result, texts = future.result()
                if "error" in result:
                    raise CompileError(_message(job, result["error"]))
                cache.put(job.key, result, texts)
                answers[job.key] = _answer(job, result, texts, timeout, cached=False)
                advance(job.label)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    return [answers[job.key] for job in jobs]


def _kept(job: Job, cache: caches.Cache) -> dict[str, Any] | None:
    """What the cache answers, if that is enough."""
    found = cache.get(job.key)
    if found is None or (job.texts and not all(cache.has_text(job.key, name) for name in TEXTS.values())):
        return None
    return cache.get(job.key, _OUT_OF_MEMORY if "out_of_memory" in found else _FITS)


_FITS = {"bytes": dict.fromkeys(BYTES, int)}
_OUT_OF_MEMORY = {"out_of_memory": {"wanted": int, "limit": int, "message": str}}


def _answer(job: Job, result: dict[str, Any], texts: dict[str, str] | None, timeout: float, cached: bool) -> Answer:
    @functools.cache
    def again() -> Answer:
        return compile_all([dataclasses.replace(job, texts=True)], timeout=timeout, fresh=True)[0]

    def text(name: str) -> str | None:
        found = (texts or {}).get(name) or caches.Cache().text(job.key, name)
        asked = job.texts and not cached  # then there is no more to be had
        return found if found is not None or asked else again().text(name)

    return Answer(
        bytes=result.get("bytes"),
        out_of_memory=result.get("out_of_memory"),
        seconds=result.get("seconds", 0.0),
        cached=cached,
        text=text,
    )


def _message(job: Job, error: str) -> str:
    lines = [line for line in error.splitlines() if line.strip()]
    short = " ".join(lines[:3])
    return f"{job.label} does not compile for {job.target.name}: {short[:600]}"


@contextlib.contextmanager
def _bar(total: int, wanted: bool | None) -> Iterator[Callable[[str], None]]:
    console = Console(stderr=True)
    if total == 0 or not (console.is_terminal if wanted is None else wanted):
        yield lambda label: None
        return
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda label: bar.update(task, advance=1, description=label)


# --- one job -------------------------------------------------------------------------------------------------------


def _compile(job: Job, prepared: Any, timeout: float) -> tuple[dict[str, Any], dict[str, str]]:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nexus_jax-"))
    try:
        run = _compile_here if job.target.sheet is None else _compile_in_worker
        result = run(job, prepared, folder, timeout)
        texts = {name: (folder / name).read_text() for name in TEXTS.values() if (folder / name).exists()}
        return result, texts
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile_here(job: Job, lowered: Any, folder: pathlib.Path, timeout: float) -> dict[str, Any]:
    """The local device belongs to this process: another one could not open it."""
    del timeout  # a compile in this process cannot be stopped
    start = time.perf_counter()
    options = {**dict(job.compiler_options), **(dump_options(folder / "dump") if job.texts else {})}
    try:
        result: dict[str, Any] = {"bytes": bytes_of(lowered.compile(compiler_options=options))}
    except jax.errors.JaxRuntimeError as error:
        result = failure(error)
    finally:
        keep_texts(folder / "dump", folder)
    return {**result, "seconds": time.perf_counter() - start}


def _compile_in_worker(job: Job, program: bytes, folder: pathlib.Path, timeout: float) -> dict[str, Any]:
    (folder / "program").write_bytes(program)
    (folder / "job.json").write_text(
        json.dumps(
            {
                "target": job.target.job(),
                "mesh": job.mesh,
                "compiler_options": dict(job.compiler_options),
                "texts": job.texts,
            }
        )
    )
    package = str(pathlib.Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "nexus_jax.targets", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {timeout:g} s; give it longer with timeout=..."}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = folder / "result.json"
    if found.exists():
        return json.loads(found.read_text())
    tail = log.read_text(errors="replace").strip().splitlines()[-3:]
    return {"error": f"its compiler ended with status {process.returncode}: {' '.join(tail)}"}
