"""Data sheets of the targets: what each device has and does, as data, each figure with its source."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from nexus_jax import report

_DATA = pathlib.Path(__file__).parent / "data"

FIGURES = {  # name: its unit
    "memory_bytes": "B",
    "usable_bytes": "B",
    "bf16_flops": "FLOP/s",
    "f32_flops": "FLOP/s",
    "memory_bandwidth": "B/s",
    "host_to_device_bandwidth": "B/s",
    "device_to_host_bandwidth": "B/s",
    "host_memory_bytes": "B",
}

GPU_FRACTION = 0.75  # of a GPU's memory, that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What XLA must know of a GPU to compile for it.

    Attributes:
        description: its name, as the driver gives it.
        compute_capability: ``"9.0"``.
        multiprocessors: how many.
        f32_lanes: float32 operations that one of them starts in a cycle.
        threads: how many one of them holds.
        shared_memory_bytes: of one of them, and ``shared_memory_block_bytes`` of it for one block.
        l2_bytes: second-level cache of the whole device.
        clock_hz: at most.
        reported_bytes: the memory that CUDA reports; less than what is installed.
    """

    description: str
    compute_capability: str
    multiprocessors: int
    f32_lanes: int
    threads: int
    shared_memory_bytes: int
    shared_memory_block_bytes: int
    l2_bytes: int
    clock_hz: float
    reported_bytes: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+\.\d", self.compute_capability):
            raise ValueError(f'gpu.compute_capability={self.compute_capability!r}: write it as "9.0".')
        for field in dataclasses.fields(self)[2:]:
            _require_positive(f"gpu.{field.name}", getattr(self, field.name), field.type == "int")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """One device, as JAX counts devices. ``print`` it for the figures with their sources.

    Attributes:
        name: ``"v5e"``.
        kind: ``"tpu"`` or ``"gpu"``.
        memory_bytes: what is installed.
        usable_bytes: what one program may take. TPU: the limit that libtpu compiles against. GPU: what JAX takes by
            default, 75 % of what CUDA reports; so a step that fits here runs with no setting at all. With
            ``XLA_PYTHON_CLIENT_MEM_FRACTION=0.95`` it may be 0.95 / 0.75 times as large.
        bf16_flops: dense bfloat16 matmuls, in FLOP/s.
        f32_flops: float32 matmuls at JAX's default precision, in FLOP/s: one bfloat16 pass on a TPU, TF32 on a GPU.
        memory_bandwidth: of device memory, in bytes/s.
        host_to_device_bandwidth, device_to_host_bandwidth: of the link to the host, each way, in bytes/s.
        host_memory_bytes: of the host, for each device of it: a TPU's virtual machine; of a GPU that of NVIDIA's own machine.
        topology: TPU: libtpu's name of the smallest slice that it describes; it is compiled for one device of it.
        max_chips: TPU: of the largest slice; ``max_side``: of its longest side, where that is limited too.
        devices_per_chip: TPU: how many devices JAX sees on one chip.
        chip_config: TPU: libtpu's configuration of a chip, where it is not its default.
        gpu: GPU: what XLA must know besides.
        sources: for each figure, where it is from.
        estimated: the figures that are derived or guessed because nobody publishes them.
    """

    name: str
    kind: str
    memory_bytes: int
    usable_bytes: int
    bf16_flops: float
    f32_flops: float
    memory_bandwidth: float
    host_to_device_bandwidth: float
    device_to_host_bandwidth: float
    host_memory_bytes: int
    topology: str = ""
    max_chips: int = 0
    max_side: int = 0
    devices_per_chip: int = 1
    chip_config: str = ""
    gpu: Gpu | None = None
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    estimated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("tpu", "gpu"):
            raise ValueError(f'kind={self.kind!r}: write "tpu" or "gpu".')
        for name in FIGURES:
            _require_positive(name, getattr(self, name), name.endswith("_bytes"))
        if self.usable_bytes > self.memory_bytes:
            raise ValueError(f"usable_bytes={self.usable_bytes} is more than memory_bytes={self.memory_bytes}.")
        _require_names("sources", self.sources, missing=True)
        _require_names("estimated", self.estimated)
        if self.kind == "gpu":
            if self.gpu is None:
                raise ValueError("gpu is missing: XLA needs it to compile.")
            return
        name, _, shape = self.topology.partition(":")
        if name != self.name or not re.fullmatch(r"\d+(x\d+)+", shape):
            raise ValueError(f'topology={self.topology!r}: write libtpu\'s name of a slice, "{self.name}:2x2".')
        _require_positive("max_chips", self.max_chips, True)
        _require_positive("devices_per_chip", self.devices_per_chip, True)

    def __str__(self) -> str:
        rows = [
            (
                name,
                report.size(getattr(self, name)) if unit == "B" else f"{getattr(self, name):.4g} {unit}",
                ("estimated: " if name in self.estimated else "") + self.sources[name],
            )
            for name, unit in FIGURES.items()
        ]
        return report.table(f"{self.name} ({self.kind.upper()}), one device", ("figure", "value", "source"), rows)


def _require_positive(name: str, value: Any, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: write a positive {'whole number' if whole else 'number'}.")


def _require_names(name: str, given: Any, missing: bool = False) -> None:
    unknown = sorted(set(given) - set(FIGURES))
    if unknown:
        raise ValueError(f"{name} names {unknown[0]!r}, which is no figure: the figures are {', '.join(FIGURES)}.")
    absent = [figure for figure in FIGURES if figure not in given]
    if missing and absent:
        raise ValueError(f"{name} has nothing for {absent[0]}: say where that figure is from.")


# --- from files ----------------------------------------------------------------------------------------------------


def load_sheet(path: str | pathlib.Path) -> Sheet:
    """Read a data sheet from a TOML file; its name is the file's.

    Raises:
        ValueError: not TOML, a key missing or unknown, a figure that is no positive number; with the file and the key.
    """
    path = pathlib.Path(path)
    try:
        return _sheet_of(path.stem, tomllib.loads(path.read_text()))
    except (ValueError, TypeError) as error:  # tomllib's own error is a ValueError
        raise ValueError(f"{path}: {error}") from None


def _sheet_of(name: str, data: dict[str, Any]) -> Sheet:
    data = {"name": name, **data}
    if "gpu" in data:
        data["gpu"] = _made(Gpu, data["gpu"], "gpu.")
        data.setdefault("usable_bytes", int(GPU_FRACTION * data["gpu"].reported_bytes))
    data["estimated"] = tuple(data.get("estimated", ()))
    return _made(Sheet, data)


def _made(cls: type, data: Any, prefix: str = "") -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{prefix.rstrip('.')}={data!r}: write a table.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ValueError(f"unknown key {prefix}{key}: the keys are {', '.join(fields)}.")
    for key, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and key not in data:
            raise ValueError(f"key {prefix}{key} is missing.")
        if field.type == "str" and key in data and not isinstance(data[key], str):
            raise ValueError(f"{prefix}{key}={data[key]!r}: write a string.")
    return cls(**data)


@functools.cache
def names() -> tuple[str, ...]:
    """The names of the known targets.

    Example:
        >>> "v5e" in names(), "h200" in names()
        (True, True)
    """
    return tuple(sorted(path.stem for path in _DATA.glob("*.toml")))


@functools.cache
def sheet(name: str) -> Sheet:
    """The data sheet of a target.

    Raises:
        ValueError: an unknown name; lists the known ones.

    Example:
        >>> sheet("v5e").memory_bytes == 16 * 2**30, sheet("v5e").bf16_flops
        (True, 197000000000000.0)
    """
    if name not in names():
        raise ValueError(f"target={name!r} is unknown: write one of {', '.join(names())}, or local.")
    return load_sheet(_DATA / f"{name}.toml")


# --- from what a user writes ---------------------------------------------------------------------------------------


def parse_target(text: str) -> tuple[Sheet, tuple[int, ...] | None]:
    """The sheet that a target names, and the shape of the slice after the colon, or None.

    Args:
        text: ``"v5e"`` is one device; ``"v5p:4x4x4"`` a slice of 64 chips; ``"h100:8"`` eight GPUs.

    Raises:
        ValueError: an unknown name, or a shape that the target does not have; says what to write.

    Example:
        >>> parse_target("v5p:4x4x4")[1], parse_target("h100:8")[1], parse_target("v5e")[1]
        ((4, 4, 4), (8,), None)
    """
    if not isinstance(text, str):
        raise ValueError(f"target={text!r}: write a string, one of {', '.join(names())}, or local.")
    name, colon, rest = text.partition(":")
    if name not in names():
        raise ValueError(f"target={text!r} is unknown: write one of {', '.join(names())}, or local.")
    found = sheet(name)
    if not colon:
        return found, None
    return found, (_slice if found.kind == "tpu" else _count)(text, found, rest)


def _count(text: str, found: Sheet, rest: str) -> tuple[int]:
    if not re.fullmatch(r"[1-9]\d{0,3}", rest) or int(rest) > GPUS_PER_HOST:
        raise ValueError(
            f"target={text!r}: write how many GPUs of one host, {found.name}:1 to {found.name}:{GPUS_PER_HOST}."
        )
    return (int(rest),)


def _slice(text: str, found: Sheet, rest: str) -> tuple[int, ...]:
    dimensions = found.topology.rpartition(":")[2].count("x") + 1
    example = f"{found.name}:{'x'.join('4' * dimensions)}"
    if not re.fullmatch(r"[1-9]\d{0,3}" + r"x[1-9]\d{0,3}" * (dimensions - 1), rest):
        raise ValueError(
            f"target={text!r}: write {found.name} for one device, or a slice as {dimensions} positive numbers of chips, "
            f"{example}."
        )
    shape = tuple(map(int, rest.split("x")))
    if math.prod(shape) > found.max_chips or max(shape) > (found.max_side or found.max_chips):
        side = f", {found.max_side} a side" * bool(found.max_side)
        raise ValueError(
            f"target={text!r} is too large: a slice has at most {found.max_chips} chips{side}. Try {example}."
        )
    if math.prod(shape) > 1 and (shape[0] % 2 or shape[1] % 2):
        raise ValueError(
            f"target={text!r}: a host holds 2x2 chips, so the first two numbers must be even. Write {example}."
        )
    return shape


# --- for XLA -------------------------------------------------------------------------------------------------------


def gpu_target_config(sheet: Sheet) -> str:
    """XLA's description of a GPU (``GpuTargetConfigProto``), as text.

    Raises:
        ValueError: the sheet is no GPU's.
    """
    if sheet.gpu is None:
        raise ValueError(f"{sheet.name} is no GPU, so XLA has no GpuTargetConfigProto for it.")
    gpu = sheet.gpu
    major, minor = gpu.compute_capability.split(".")
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory_bytes}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.f32_lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(sheet.memory_bandwidth)}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_hz / 1e9:g}
  device_memory_size: {gpu.reported_bytes}
  shared_memory_per_block_optin: {gpu.shared_memory_block_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.description}"
"""
