"""What a device at hand really does in a second, measured; a file of it stands where a data sheet does."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import pathlib
import statistics
import time
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import tomli_w
from jax.sharding import SingleDeviceSharding

from nexus_jax import report

_RATES = {
    "bf16_flops": "FLOP/s",
    "f32_flops": "FLOP/s",
    "memory_bandwidth": "B/s",
    "host_to_device_bandwidth": "B/s",
    "device_to_host_bandwidth": "B/s",
}
_OPTIONAL = ("host_to_device_bandwidth", "device_to_host_bandwidth")
_TEXTS = ("name", "kind", "date")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured rates of one device. Prints as a table; goes wherever a data sheet goes in :mod:`nexus_jax.roofline`.

    Attributes:
        name: what the device calls itself.
        kind: its platform, ``"gpu"``, ``"tpu"``, ``"cpu"``.
        bf16_flops, f32_flops: of a large matmul, at JAX's default precision, in FLOP/s.
        memory_bandwidth: reading and writing a large array, in bytes/s.
        host_to_device_bandwidth, device_to_host_bandwidth: of copies from and to pinned host memory, in bytes/s; None
            where the device has none.
        date: when, ``"2026-01-31"``.
        versions: of what measured it.
        notes: what is not there, and why.
    """

    name: str
    kind: str
    bf16_flops: float
    f32_flops: float
    memory_bandwidth: float
    host_to_device_bandwidth: float | None = None
    device_to_host_bandwidth: float | None = None
    date: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in _TEXTS:
            if not isinstance(getattr(self, key), str):
                raise ValueError(f"{key}={getattr(self, key)!r}: write a string.")
        for key in _RATES:
            _require_rate(key, getattr(self, key))
        if not isinstance(self.versions, Mapping) or not all(isinstance(v, str) for v in self.versions.values()):
            raise ValueError(f"versions={self.versions!r}: write a table of strings.")
        if not isinstance(self.notes, list | tuple) or not all(isinstance(note, str) for note in self.notes):
            raise ValueError(f"notes={self.notes!r}: write a list of strings.")
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "versions", dict(self.versions))

    def __str__(self) -> str:
        rates = {name: getattr(self, name) for name in _RATES}
        rows = [(name, "-" if n is None else f"{n:.4g} {_RATES[name]}") for name, n in rates.items()]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        title = f"{self.name} ({self.kind}), measured {self.date}" + (f" with {versions}" if versions else "")
        return "\n".join([report.table(title, ("figure", "measured"), rows), *self.notes])

    def save(self, path: str | pathlib.Path) -> None:
        """Write a TOML file that :meth:`load` reads, to keep and to share."""
        data = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        pathlib.Path(path).write_text(tomli_w.dumps(data))

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Calibration:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no TOML, a key missing, unknown or wrong; names the file and the key.
        """
        try:
            data = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            known = {f.name: f for f in dataclasses.fields(cls)}
            for key in data:
                if key not in known:
                    raise ValueError(f"unknown key {key}: the keys are {', '.join(known)}.")
            for key in (*_TEXTS, *_RATES):
                if key not in data and key not in _OPTIONAL:
                    raise ValueError(f"key {key} is missing.")
            return cls(**data)
        except ValueError as error:  # tomllib's own errors and those of a bad encoding are such, too
            raise ValueError(f"{path}: {error}") from None


def _require_rate(key: str, value: Any) -> None:
    if value is None and key in _OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r}: write a positive number of {_RATES[key]}.")


# --- measuring -----------------------------------------------------------------------------------------------------


def calibrate(
    device: Any = None,
    *,
    matmul_size: int | None = None,
    memory_bytes: int | None = None,
    host_bytes: int | None = None,
    repeats: int = 7,
) -> Calibration:
    """Measure a device: matmuls, memory, and the link to the host each way.

    Each figure is the median of ``repeats`` runs after one that does not count. Nothing else should use the device
    meanwhile. A few seconds on an accelerator.

    Args:
        device: a ``jax.Device``; the default one if None.
        matmul_size: of the square matrices; 8192, on a CPU 1024.
        memory_bytes: of the array that is read and written; 1 GiB, on a CPU 256 MiB.
        host_bytes: of the array that is copied to the host and back; 256 MiB.
        repeats: how often.

    Raises:
        ValueError: a size or ``repeats`` that is no positive number.

    Example:
        >>> found = calibrate(matmul_size=64, memory_bytes=2**16, host_bytes=2**16, repeats=1)
        >>> found.f32_flops > 0, found.date != ""
        (True, True)
    """
    device = device or jax.devices()[0]
    small = device.platform == "cpu"
    sizes = {
        "matmul_size": (1024 if small else 8192) if matmul_size is None else matmul_size,
        "memory_bytes": (2**28 if small else 2**30) if memory_bytes is None else memory_bytes,
        "host_bytes": 2**28 if host_bytes is None else host_bytes,
        "repeats": repeats,
    }
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value!r}: write a positive whole number.")
    to_host, to_device, notes = _host_link(device, sizes["host_bytes"], repeats)
    return Calibration(
        name=device.device_kind,
        kind=device.platform,
        bf16_flops=_matmul(device, sizes["matmul_size"], jnp.bfloat16, repeats),
        f32_flops=_matmul(device, sizes["matmul_size"], jnp.float32, repeats),
        memory_bandwidth=_memory(device, sizes["memory_bytes"], repeats),
        host_to_device_bandwidth=to_device,
        device_to_host_bandwidth=to_host,
        date=datetime.date.today().isoformat(),
        versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        notes=notes,
    )


_IN_A_ROW = 8  # runs between two looks at the clock, so that starting one hides behind the one before


def _matmul(device: Any, n: int, dtype: Any, repeats: int) -> float:
    with jax.default_device(device):
        key = jax.random.key(0)  # random numbers: a GPU draws less power on zeros, and clocks higher
        x, w = (jax.random.normal(k, (n, n), dtype) / math.sqrt(n) ** i for i, k in enumerate(jax.random.split(key)))
        dot = jax.jit(jnp.dot)
        return 2 * n**3 / _median(lambda x: dot(x, w), x, repeats)


def _memory(device: Any, nbytes: int, repeats: int) -> float:
    with jax.default_device(device):
        x = jnp.ones(max(nbytes // 4, 1), jnp.float32)
        axpy = jax.jit(lambda x: 0.5 * x + 0.5, donate_argnums=0)  # in place: a new array would be paged in first
        return 2 * x.nbytes / _median(axpy, x, repeats)


def _host_link(device: Any, nbytes: int, repeats: int) -> tuple[float | None, float | None, tuple[str, ...]]:
    """``(to the host, to the device, notes)``."""
    if device.platform == "cpu":
        return None, None, ("no host link: this device is the host.",)
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        return None, None, (f"no host link: the device reaches no pinned_host memory, only {', '.join(kinds)}.",)
    host = SingleDeviceSharding(device, memory_kind="pinned_host")
    here = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
    x = jax.device_put(jnp.ones(max(nbytes // 4, 1), jnp.float32), here)
    out, back = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        away = jax.block_until_ready(jax.device_put(x, host))
        between = time.perf_counter()
        jax.block_until_ready(jax.device_put(away, here))
        out.append(between - start)
        back.append(time.perf_counter() - between)
    return x.nbytes / statistics.median(out[1:]), x.nbytes / statistics.median(back[1:]), ()


def _median(run: Callable[[Any], Any], x: Any, repeats: int) -> float:
    """Seconds of a run, each on the result of the one before."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(_IN_A_ROW):
            x = run(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - start) / _IN_A_ROW)
    return statistics.median(times[1:])
