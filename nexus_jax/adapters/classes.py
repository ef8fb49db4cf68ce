"""Transformed classes: a memoised subclass that remembers what was asked of it, equal for equal settings.

A model is transformed by giving it such a class. The class keeps the name of the one it was made from, so automatic
names, parameter paths and printing do not change; it is pickled as "this base with these settings".
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

from nexus_jax.policy.rules import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a transformed class does.

    Args:
        policy: the policy whose boundaries it opens (linen: at trace time, below the root).
        boundary: the policy under which its own call runs (nnx: at a boundary).
        offloader: the ``ActivationOffloader`` that its calls run in.
        scope: the ``jax.named_scope`` that its calls open (nnx: while residuals are being read).
    """

    policy: Policy | None = None
    boundary: Policy | None = None
    offloader: Any = None
    scope: str | None = None


_CLASSES: dict[tuple[type, Settings], type] = {}


def settings_of(cls: type) -> Settings:
    """The settings of a class; empty for a plain one."""
    return cls.__dict__.get("__nexus_jax_settings__", Settings())


def base_of(cls: type) -> type:
    """The plain class that a transformed class was made from."""
    return cls.__dict__.get("__nexus_jax_base__", cls)


def transformed(base: type, settings: Settings, members: Callable[[type], dict[str, Any]]) -> type:
    """The subclass of ``base`` with ``settings``, made once; ``base`` itself for empty settings."""
    if settings == Settings():
        return base
    key = (base, settings)
    if key not in _CLASSES:
        body = {
            **members(base),
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__nexus_jax_settings__": settings,
            "__nexus_jax_base__": base,
            "__nexus_jax_members__": staticmethod(members),
        }
        _CLASSES[key] = _metaclass(type(base))(base.__name__, (base,), body)
    return _CLASSES[key]


@functools.cache
def _metaclass(meta: type) -> type:
    made = type(meta.__name__, (meta,), {"__module__": meta.__module__})
    copyreg.pickle(made, _reduce)  # type: ignore[arg-type]
    return made


def _reduce(cls: type) -> Any:
    if "__nexus_jax_base__" not in cls.__dict__:
        return cls.__qualname__  # a user's subclass of a transformed class: found by its name, as any class
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is cls:  # a decorated class is the one its name leads to
        return cls.__qualname__
    return transformed, (base_of(cls), settings_of(cls), cls.__nexus_jax_members__)  # type: ignore[attr-defined]
