"""Compiled results on disk: a compile takes half a minute, its answer fits in a kilobyte and never changes.

An entry is a folder ``<key[:2]>/<key>/`` with ``result.json`` and, where the compiler wrote them, its own texts (the
schedule and the buffer assignment), compressed. Writing is atomic, so that several processes can share one cache.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

FORMAT = 1  # of an entry; another number is another key
LIMIT_BYTES = 2 * 2**30
VARIABLE = "NEXUS_JAX_CACHE"


def folder() -> pathlib.Path:
    """``$NEXUS_JAX_CACHE``, or ``nexus_jax`` in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    if os.environ.get(VARIABLE):
        return pathlib.Path(os.environ[VARIABLE])
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "nexus_jax"


def key_of(*parts: Any) -> str:
    """A name for what was asked: equal parts, equal name, in every process and on every machine."""
    text = json.dumps([FORMAT, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """A folder of results.

    A cache that cannot be written, or an entry that cannot be read, costs a compile and a warning, never a result.
    """

    def __init__(self, root: pathlib.Path | None = None):
        self.root = folder() if root is None else root

    def _entry(self, key: str) -> pathlib.Path:
        return self.root / key[:2] / key

    def get(self, key: str, kinds: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What was put under ``key``, or None.

        Args:
            kinds: what a result must hold, ``{"flops": int, "bytes": {"temp": int}}``; one that does not is corrupt.
        """
        path = self._entry(key) / "result.json"
        try:
            found = json.loads(path.read_text())
            if not _is_like(found, kinds or {}):
                raise ValueError("it holds something else")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            warnings.warn(f"{path}: not a cached result ({error}); compiling again.", stacklevel=2)
            return None
        with contextlib.suppress(OSError):  # a cache that is read-only
            os.utime(path)  # the entries unused for longest go first
        return found

    def has_text(self, key: str, name: str) -> bool:
        """Whether a text was put beside a result."""
        return (self._entry(key) / f"{name}.gz").exists()

    def text(self, key: str, name: str) -> str | None:
        """A text that was put beside a result, or None."""
        path = self._entry(key) / f"{name}.gz"
        try:
            return gzip.decompress(path.read_bytes()).decode()
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError) as error:
            warnings.warn(f"{path}: not a compressed text ({error}).", stacklevel=2)
            return None

    def put(self, key: str, result: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> None:
        """Keep a result, replacing the one that was there."""
        entry = self._entry(key)
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            made = pathlib.Path(tempfile.mkdtemp(dir=entry.parent, prefix=".new-"))
            try:
                for name, text in (texts or {}).items():
                    (made / f"{name}.gz").write_bytes(gzip.compress(text.encode(), 6))
                (made / "result.json").write_text(json.dumps(dict(result)))
                if entry.exists():
                    shutil.rmtree(entry)
                made.rename(entry)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        except OSError as error:
            warnings.warn(
                f"the cache {self.root} cannot be written ({error.strerror or error}): this result is not kept. "
                f"Set {VARIABLE} to a folder that can be.",
                stacklevel=2,
            )
            return
        self.trim()

    def trim(self, limit: int = LIMIT_BYTES) -> None:
        """Remove the entries unused for longest until the cache is within ``limit`` bytes."""
        sizes = {
            path.parent: (path.stat().st_mtime, sum(f.stat().st_size for f in path.parent.iterdir()))
            for path in self.root.glob("*/*/result.json")
        }
        total = sum(size for _, size in sizes.values())
        for entry, (_, size) in sorted(sizes.items(), key=lambda item: item[1][0]):
            if total <= limit:
                return
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def _is_like(found: Any, kinds: Any) -> bool:
    if not isinstance(kinds, Mapping):
        return isinstance(found, kinds)
    return isinstance(found, Mapping) and all(k in found and _is_like(found[k], kind) for k, kind in kinds.items())
