"""The documented estimates: arithmetic on numbers that the caller has; `nexus_jax.residuals` measures instead."""

from __future__ import annotations

import math


def _megabytes(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r}: write a finite number of MB, from 0 up.")
    return float(value)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r}: write a whole number of layers, from 0 up.")
    return value


def estimate_checkpointing_memory_savings(
    activation_memory_mb: float, num_checkpointed_layers: int, total_layers: int
) -> dict[str, float]:
    """What checkpointing some of equal layers would free, were a checkpointed layer to keep nothing.

    Args:
        activation_memory_mb: activations of one layer, MB.
        num_checkpointed_layers: layers under a checkpoint, at most ``total_layers``.
        total_layers: at least one.

    Returns:
        ``without_checkpointing_mb``, ``with_checkpointing_mb``, ``savings_mb``, ``savings_percent`` (of 100),
        ``checkpointed_layers`` and ``total_layers``.

    Raises:
        ValueError: negative, non-finite or inconsistent numbers.

    Example:
        >>> estimate_checkpointing_memory_savings(100.0, 24, 32)["savings_mb"]
        2400.0
    """
    layer = _megabytes("activation_memory_mb", activation_memory_mb)
    some, total = _count("num_checkpointed_layers", num_checkpointed_layers), _count("total_layers", total_layers)
    if total == 0:
        raise ValueError("total_layers=0: write at least one layer.")
    if some > total:
        raise ValueError(f"num_checkpointed_layers={some} is more than total_layers={total}.")
    return {
        "without_checkpointing_mb": layer * total,
        "with_checkpointing_mb": layer * (total - some),
        "savings_mb": layer * some,
        "savings_percent": 100.0 * some / total if layer else 0.0,
        "checkpointed_layers": some,
        "total_layers": total,
    }


def estimate_offloading_memory_savings(activation_memory_gpu_mb: float, offload_ratio: float = 0.5) -> dict[str, float]:
    """What moving a share of the activations to the host would free.

    Args:
        activation_memory_gpu_mb: activations on the device, MB.
        offload_ratio: the share that is moved, 0 to 1.

    Returns:
        ``gpu_memory_mb`` (before), ``gpu_savings_mb``, ``cpu_usage_mb``, ``offload_ratio`` and ``savings_percent``
        (of 100).

    Raises:
        ValueError: a negative or non-finite number, or a ratio outside 0 to 1.

    Example:
        >>> estimate_offloading_memory_savings(8000.0)["gpu_savings_mb"]
        4000.0
    """
    memory = _megabytes("activation_memory_gpu_mb", activation_memory_gpu_mb)
    ratio = offload_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise ValueError(f"offload_ratio={ratio!r}: write a share from 0 to 1.")
    return {
        "gpu_memory_mb": memory,
        "gpu_savings_mb": memory * ratio,
        "cpu_usage_mb": memory * ratio,
        "offload_ratio": ratio,
        "savings_percent": 100.0 * ratio,
    }
