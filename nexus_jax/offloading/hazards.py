"""Compilers that are known to move what a program keeps, and to move it wrongly."""

from __future__ import annotations

import importlib.metadata
import warnings

import jax


class OffloadHazard(UserWarning):
    """This version of a compiler may compute wrong numbers with offloading; the message says how to find out."""


# In XLA's GPU compiler between a rewrite of its analysis of slices and its repair, of 2026-07-27. The compiler that
# jax 0.12.0.1 pins has the repair: a test reads the walk off the compiled step.
_REVERSED = (
    "on GPUs, jaxlib {version} may read what a scan keeps on the host back in the wrong order, which gives silently "
    "wrong gradients (https://github.com/openxla/xla/pull/46231, repaired in "
    "https://github.com/openxla/xla/pull/46308). Use jaxlib 0.12 or later, or compare with "
    "offloader.verify(step, *args) on this machine."
)
_REPAIRED = (0, 12)


def check_loops() -> None:
    """Say, once, that offloading from scans may be wrong here."""
    version = importlib.metadata.version("jaxlib")
    if jax.default_backend() == "gpu" and tuple(map(int, version.split(".")[:2])) < _REPAIRED:
        warnings.warn(_REVERSED.format(version=version), OffloadHazard, stacklevel=2)
