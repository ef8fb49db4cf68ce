"""Compile a step for a device that nobody here owns; what a compiled program takes of its memory.

The compilers come with extras: ``pip install "nexus-jax[tpu]"`` and ``"nexus-jax[gpu]"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from nexus_jax import _compat

KNOWN = ("v5e", "h200")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledBytes:
    """Bytes of a compiled program, by kind; device memory but for ``host_temp``."""

    argument: int
    output: int
    alias: int
    temp: int
    host_temp: int

    @property
    def device(self) -> int:
        """Arguments + outputs - aliased + temporaries."""
        return self.argument + self.output - self.alias + self.temp


def compile_for(target: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Compile ``fn(*args)`` for a target with its own compiler; no device is needed, nothing runs.

    Args:
        target: ``"v5e"`` or ``"h200"``, one device.
        fn: a function of arrays or ``ShapeDtypeStruct``s in pytrees.

    Raises:
        ValueError: an unknown target; lists the known ones.
        RuntimeError: the target's compiler is not installed; says what to install.
    """
    if target not in KNOWN:
        raise ValueError(f"target={target!r} is unknown: write one of {', '.join(KNOWN)}.")
    device = (_compat.tpu_devices("v5e:2x2") if target == "v5e" else _compat.gpu_devices(_H200))[0]
    place = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    options: dict[str, str | bool] = {} if target == "v5e" else {"xla_gpu_autotune_level": "0"}
    return jax.jit(fn).lower(*placed).compile(compiler_options=options)


def compiled_bytes(compiled: Any) -> CompiledBytes:
    """What a compiled program takes, from the compiler's own buffer assignment."""
    m = compiled.memory_analysis()
    return CompiledBytes(
        argument=m.argument_size_in_bytes,
        output=m.output_size_in_bytes,
        alias=m.alias_size_in_bytes,
        temp=m.temp_size_in_bytes,
        host_temp=m.host_temp_size_in_bytes,
    )


# XLA's GpuTargetConfigProto, as text. Facts: NVIDIA H200 data sheet and CUDA C++ Programming Guide, compute capability 9.0.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
