"""A budget in bytes, as people write it."""

from __future__ import annotations

import re

from nexus_jax import report
from nexus_jax.targets.compiler import Target

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


def budget_of(given: int | str, target: Target, limit: int | None) -> int:
    """Bytes of ``16_000_000_000``, ``"16GB"``, ``"12GiB"`` or ``"90%"`` of what a program may take on the target.

    Args:
        limit: what a program may take; None where that is not known.

    Raises:
        TypeError: neither a whole number nor text.
        ValueError: not a size, zero or less, more than the target has, a share of an unknown memory.

    Example:
        >>> from nexus_jax.targets.compiler import find_target
        >>> v5e = find_target("v5e")
        >>> budget_of("12GiB", v5e, 16 * 2**30) == 12 * 2**30, budget_of("50%", v5e, 16 * 2**30) == 8 * 2**30
        (True, True)
    """
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise TypeError(f'memory_budget={given!r}: write bytes as a whole number, "12GiB", "16GB" or "90%".')
    found = given if isinstance(given, int) else _parsed(given, target, limit)
    if found <= 0:
        raise ValueError(f"memory_budget={given!r}: write more than 0 bytes.")
    if limit is not None and found > limit:
        raise ValueError(
            f"memory_budget={given!r} is {report.size(found)}, and a program may take {report.size(limit)} on "
            f'{target.name}: write "100%" or less.'
        )
    return found


def host_budget_of(given: int | str, target: Target) -> int:
    """Bytes of host memory that a plan may use: 0, ``16_000_000_000``, ``"16GB"``, ``"64GiB"``.

    Raises:
        TypeError: neither a whole number nor text.
        ValueError: not a size, less than zero; or the target's link to the host is not known.
    """
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise TypeError(f'host_budget={given!r}: write bytes as a whole number, or "64GiB".')
    found = given if isinstance(given, int) else _size("host_budget", given, '"64GiB"')
    if found < 0:
        raise ValueError(f"host_budget={given!r}: write 0 bytes or more.")
    sheet = target.sheet
    if found and (sheet is None or not (sheet.device_to_host_bandwidth and sheet.host_to_device_bandwidth)):
        raise ValueError(
            f"host_budget={given!r}: how fast {target.name} reaches its host is not known; name a target with a data sheet, "
            'target="h200", or write host_budget=0.'
        )
    return found


def _parsed(text: str, target: Target, limit: int | None) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        return _size("memory_budget", text, '"12GiB", "16GB" or "90%"')
    if limit is None:
        raise ValueError(f'memory_budget={text!r}: the memory of {target.name} is not known; write a size, "12GiB".')
    if not 0 < float(match.group(1)) <= 100:
        raise ValueError(f'memory_budget={text!r}: write more than 0 % and at most "100%".')
    return int(float(match.group(1)) / 100 * limit)


def _size(name: str, text: str, forms: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    if match is None or match.group(2).upper() not in _UNITS:
        raise ValueError(f"{name}={text!r} is no size: write bytes as a whole number, {forms}.")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])
