"""What a step may keep in host memory: what there is, and what a GPU's pool of pinned memory allows."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import jax

from nexus_jax.report import size
from nexus_jax.targets.compiler import Target

GPU_POOL = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
GPU_POOL_GIB = 64  # XLA's default


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostLimit:
    """Host memory for one device.

    Attributes:
        nbytes: how much.
        what: what sets the limit.
        write: what to write where it is too little.
    """

    nbytes: int
    what: str
    write: str

    def of_all(self, devices: int) -> HostLimit:
        """For a step on several devices, and the bytes of all of them."""
        return dataclasses.replace(self, nbytes=self.nbytes * devices)

    def refuse(self, wanted: int) -> str:
        """One sentence about a step that wants more; empty where it does not."""
        if wanted <= self.nbytes:
            return ""
        return f"{size(wanted)} go to the host, and there are {size(self.nbytes)}: {self.what}. {self.write}"


def host_limit(target: Target, environ: Mapping[str, str] = os.environ) -> HostLimit | None:
    """The least of what limits the host memory of one device of a target; None on a CPU, whose memory is the host's.

    Args:
        target: a target of several devices is one process: its GPUs share a pool of pinned memory.
        environ: of the process that trains.
    """
    limits = [limit for limit in (host_memory(target), _pool(target, environ)) if limit is not None]
    return min(limits, key=lambda limit: limit.nbytes) if limits and target.platform != "cpu" else None


def host_memory(target: Target) -> HostLimit | None:
    """The memory of the host for one device of a target; None where it is not known."""
    less = "Move less: a larger threshold, or recompute."
    if target.sheet is not None:
        what = f"the host memory of a {target.sheet.name}, by its data sheet"
        return HostLimit(nbytes=target.sheet.host_memory_bytes, what=what, write=less)
    there = available_memory()
    if there is None:
        return None
    share = there // jax.local_device_count()
    return HostLimit(nbytes=share, what="the memory of this machine that is free, for each of its devices", write=less)


def _pool(target: Target, environ: Mapping[str, str]) -> HostLimit | None:
    if target.platform not in ("cuda", "rocm"):
        return None
    pool = gpu_pool_bytes(environ)
    devices = target.devices if target.sheet is not None else jax.local_device_count()
    shared = f" for {devices} devices" * (devices > 1)
    what = f"the pool of pinned memory, {GPU_POOL}, {pool // 2**30}{shared}" + " by default" * (GPU_POOL not in environ)
    return HostLimit(nbytes=pool // devices, what=what, write=f"Set {GPU_POOL}, in GiB.")


def gpu_pool_bytes(environ: Mapping[str, str]) -> int:
    """Bytes of XLA's pool of pinned host memory, of all GPUs of a process; what it cannot read is its default."""
    given = environ.get(GPU_POOL, "")
    return (int(given) if given.isdigit() else GPU_POOL_GIB) * 2**30


def available_memory() -> int | None:
    """Bytes of this machine's memory that are free, or can be made free; None where that is not known."""
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # not Linux
        return None
