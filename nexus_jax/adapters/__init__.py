"""Open a Flax model at a boundary: linen and nnx behind the same names."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from nexus_jax.adapters import linen, nnx


def of(model: Any) -> ModuleType:
    """The adapter for a model; a ``TypeError`` for what is no Flax module."""
    for adapter in (linen, nnx):
        if adapter.accepts(model):
            return adapter
    hint = ""
    if isinstance(model, type):
        hint = f" {model.__name__} is a class: nnx classes are transformed as instances."
    raise TypeError(
        f"expected a flax.linen.Module (instance or class) or a flax.nnx.Module instance, got {type(model).__name__}: "
        f"{str(model)[:80]!r}.{hint}"
    )


def is_module(model: Any) -> bool:
    """Whether ``model`` is a Flax module that can be transformed."""
    return linen.accepts(model) or nnx.accepts(model)
