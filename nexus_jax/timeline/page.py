"""Memory over time as one web page: a curve to hover over, with no network and no script but its own."""

from __future__ import annotations

import importlib.resources
import json
import os
import pathlib
from collections.abc import Hashable, Mapping
from typing import Any

from nexus_jax.timeline.model import Timeline

_SMALL = 5000  # buffers below this share of the peak are shown as one row, "smaller ones"


def write_html(lines: Mapping[str, Timeline], path: str | os.PathLike[str]) -> None:
    """Write a page that shows device bytes over a step: what runs at a point, and what is live there.

    It is one file that loads nothing, works with the keyboard, and follows the reader's light or dark mode.

    Args:
        lines: the timelines by the name of their policy.
        path: the file to write.

    Raises:
        ValueError: no timeline.
    """
    pathlib.Path(path).write_text(page(lines), encoding="utf-8")


def page(lines: Mapping[str, Timeline]) -> str:
    """The text of that page."""
    if not lines:
        raise ValueError("lines is empty: give at least one policy's timeline.")
    template = importlib.resources.files("nexus_jax.timeline").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps([_policy(name or "the step", t) for name, t in lines.items()], separators=(",", ":"))
    # Names are the user's text: nothing in them may end the element that holds them.
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace("{{data}}", data)


class _Words:
    """Each word once, and numbers for it."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}

    def __call__(self, word: Hashable) -> int:
        return self.numbers.setdefault(word, len(self.numbers))

    def all(self) -> list[Any]:
        return list(self.numbers)


def _policy(name: str, t: Timeline) -> dict[str, Any]:
    """One policy for the page's script; what repeats is a number into ``labels``, ``shapes`` or ``kinds``."""
    labels, shapes, kinds, slots = _Words(), _Words(), _Words(), _Words()
    buffers = [
        (b.first, b.last, b.bytes, slots(b.slot), labels((b.path, b.op)), shapes(b.shape), kinds((b.kind, b.phase)))
        for b in t.buffers
        if b.bytes * _SMALL >= t.peak_bytes
    ]
    return {
        "name": name,
        "reserved": t.reserved,
        "peak": t.peak_step,
        "unwritten": t.unwritten,
        "fragmentation": t.fragmentation,
        "host": t.host.arguments + t.host.outputs - t.host.aliased + t.host.temporaries,
        "bytes": [p.bytes for p in t.points],
        "instructions": [p.instruction for p in t.points],
        "where": [labels((p.path, p.op)) for p in t.points],
        "phases": "".join(p.phase[0] for p in t.points),
        "loops": "".join("01"[p.in_loop] for p in t.points),
        "buffers": buffers,
        "labels": labels.all(),
        "shapes": shapes.all(),
        "kinds": kinds.all(),
    }
