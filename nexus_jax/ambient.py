"""The offloader that is in force while something is traced: part of the key of every jit cache."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

# None, or (offloader, whether a call that it covers is already being traced, whether a context of the user's put it there).
_OFFLOADER = jax.make_user_context(None)
_NONE = (None, False, False)
_SILENCED = jax.make_user_context(False)


def current() -> Any:
    """The offloader that the next outermost call should run under, or None."""
    offloader, inside, _ = _OFFLOADER.value or _NONE
    return None if inside else offloader


def reaches(offloader: Any) -> bool:
    """Whether ``offloader`` is in force already: the next outermost call, or the one around this, runs under it."""
    return (_OFFLOADER.value or _NONE)[0] == offloader


def is_context() -> bool:
    """Whether what is in force is a context of the user's, which says on leaving what it did; else a wrapped model's."""
    return (_OFFLOADER.value or _NONE)[2]


def using(offloader: Any, *, context: bool = False) -> contextlib.AbstractContextManager:
    """Put ``offloader`` (None: no offloading) in force; the innermost wins."""
    context |= is_context() and reaches(offloader)
    return _OFFLOADER(None if offloader is None else (offloader, False, context))


def covered() -> contextlib.AbstractContextManager:
    """Mark that what is traced now is inside a call that the offloader already covers."""
    offloader, _, context = _OFFLOADER.value or _NONE
    return _OFFLOADER((offloader, True, context))


def silenced() -> contextlib.AbstractContextManager:
    """Run wrapped models and contexts as if nothing were offloaded."""
    return _SILENCED(True)


def is_silenced() -> bool:
    return _SILENCED.value
