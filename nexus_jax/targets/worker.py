"""The process that compiles: ``python -m nexus_jax.targets JOB``, started by :mod:`nexus_jax.targets.compiler`.

No plugin, lock file or environment variable of a target's compiler reaches the user's process. A job is a folder:
``job.json`` and ``program`` (a serialised ``jax.export.Exported``) go in; ``result.json`` and the compiler's own texts
come out.
"""

from __future__ import annotations

import json
import pathlib
import re
import time
from typing import Any

# What the compiler writes beside the program, by the end of the file's name, and what we call it.
TEXTS = {
    "after_optimizations-buffer-assignment.txt": "buffer_assignment",
    "after_optimizations-live-range.txt": "live_range",
    "after_optimizations.txt": "hlo",
}
BYTES = ("argument", "output", "alias", "temp", "host_argument", "host_output", "host_alias", "host_temp")
_SIZE = r"([\d.]+)([KMGT]?)"
# libtpu says the first before it assigns buffers, the second after.
_WANTED = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(folder: pathlib.Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    start = time.perf_counter()
    try:
        result: dict[str, Any] = {"bytes": compile_job(job, (folder / "program").read_bytes(), folder)}
    except Exception as error:  # every failure is an answer for the process that waits
        result = failure(error)
    result["seconds"] = round(time.perf_counter() - start, 3)
    (folder / "result.part").write_text(json.dumps(result))
    (folder / "result.part").rename(folder / "result.json")


def failure(error: Exception) -> dict[str, Any]:
    """What became of a program that does not compile: out of memory with the bytes wanted, or the message."""
    message = str(error)
    found = next(filter(None, (pattern.search(message) for pattern in _WANTED)), None)
    if found:
        wanted, unit, limit, limit_unit = found.groups()
        most = int(float(limit) * _UNITS[limit_unit])
        return {
            "out_of_memory": {
                "wanted": max(int(float(wanted) * _UNITS[unit]), most + 1),  # equal where both are rounded
                "limit": most,
                "message": message.splitlines()[0],
            }
        }
    return {"error": f"{type(error).__name__}: {message}"}


def compile_job(job: dict[str, Any], program: bytes, folder: pathlib.Path) -> dict[str, int]:
    import jax
    from jax import export

    exported = export.deserialize(bytearray(program))
    devices = _devices(job["target"])
    shardings = _shardings(exported, devices, job["mesh"])
    arguments = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in zip(exported.in_avals, shardings, strict=True)
    ]
    dump = folder / "dump"
    options = {**job["compiler_options"], **(dump_options(dump) if job["texts"] else {})}
    lowered = jax.jit(lambda *xs: exported.call(*xs)).lower(*arguments)
    try:
        return bytes_of(lowered.compile(compiler_options=options))
    finally:
        keep_texts(dump, folder)  # libtpu lays the buffers out, writes that down, and then refuses


def dump_options(folder: pathlib.Path) -> dict[str, Any]:
    """Options of one compile that make XLA write down its schedule and its buffers; they change no program."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def bytes_of(compiled: Any) -> dict[str, int]:
    """The compiler's own account of a program, in bytes."""
    found = compiled.memory_analysis()
    return {field: getattr(found, f"{field}_size_in_bytes") for field in BYTES}


def _devices(target: dict[str, Any]) -> list[Any]:
    from nexus_jax import _compat

    if target["kind"] == "tpu":
        return _compat.tpu_devices(target["topology"], target["chip_config"])
    return _compat.gpu_devices(target["config"], target["count"])


def _shardings(exported: Any, devices: list[Any], mesh: Any) -> list[Any]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

    if mesh is None:
        return [SingleDeviceSharding(devices[0])] * len(exported.in_avals)
    names, sizes = mesh
    types = next(s.mesh.axis_types for s in exported.in_shardings_jax(None) if s is not None and s.mesh.size > 1)
    real = jax.make_mesh(sizes, names, devices=devices, axis_types=types)
    everywhere = NamedSharding(real, PartitionSpec())
    return [everywhere if s is None else s for s in exported.in_shardings_jax(real)]


def keep_texts(dump: pathlib.Path, folder: pathlib.Path) -> None:
    for path in sorted(dump.glob("*")):
        for ending, name in TEXTS.items():
            # the step is the largest of what was compiled
            kept = folder / name
            if path.name.endswith(ending) and (not kept.exists() or kept.stat().st_size < path.stat().st_size):
                path.replace(kept)
