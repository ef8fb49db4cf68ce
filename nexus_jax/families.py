"""Layers counted together: which paths differ only in numbers, and one pattern that names all of them."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"\d+")


def families(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Paths that differ only in their numbers, under patterns that name exactly those paths.

    A pattern is a product: ``"stage[0..1]/block[0..2]"`` stands for six paths. Paths that make no product, as blocks
    of stages of different depth, get several patterns. A number that all paths of a family share stays as it is.

    Args:
        paths: printed module paths, such as ``"GPT/blocks_3/attn"`` (linen) or ``"GPT/blocks/3/attn"`` (nnx).

    Returns:
        The members of each pattern, in the order of their numbers.

    Example:
        >>> families(["blocks_0/attn", "blocks_2/attn", "blocks_1/attn", "head"])
        {'blocks[0..2]/attn': ('blocks_0/attn', 'blocks_1/attn', 'blocks_2/attn'), 'head': ('head',)}
        >>> list(families(["stage/0/block/0", "stage/0/block/1", "stage/1/block/0"]))
        ['stage/0/block[0..1]', 'stage/1/block/0']
    """
    alike: dict[tuple[str, ...], dict[tuple[str, ...], str]] = defaultdict(dict)
    for path in paths:
        alike[tuple(_NUMBER.split(path))][tuple(_NUMBER.findall(path))] = path
    found = {}
    for words, members in alike.items():
        for axes in _products(members):
            found[_pattern(words, axes)] = tuple(members[numbers] for numbers in itertools.product(*axes))
    return found


def pattern(paths: Iterable[str]) -> str:
    """The patterns of some paths in one line.

    Example:
        >>> pattern([f"blocks_{i}/attn" for i in (0, 2, 4)]), pattern(["norm", "blocks_1"])
        ('blocks[0,2,4]/attn', 'norm, blocks_1')
    """
    return ", ".join(families(paths))


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers, with runs and long even steps shortened.

    Example:
        >>> ranges([0, 1, 2, 3, 7]), ranges([0, 2, 4]), ranges(range(1, 96, 2))
        ('0..3,7', '0,2,4', '1..95 by 2')
    """
    numbers = list(numbers)
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 4 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}..{numbers[-1]} by {steps.pop()}"
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _products(members: Iterable[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """A set of number tuples as few disjoint products: equal rows are merged, the last number first."""
    boxes = {tuple((n,) for n in numbers) for numbers in members}
    for axis in reversed(range(len(next(iter(boxes))))):
        rows = defaultdict(list)
        for box in boxes:
            rows[box[:axis] + box[axis + 1 :]].append(box[axis])
        boxes = {
            (*rest[:axis], tuple(sorted(itertools.chain(*along), key=int)), *rest[axis:])
            for rest, along in rows.items()
        }
    return sorted(boxes, key=lambda axes: [list(map(int, axis)) for axis in axes])


def _pattern(words: Sequence[str], axes: Sequence[Sequence[str]]) -> str:
    text = words[0]
    for word, numbers in zip(words[1:], axes, strict=True):
        if len(numbers) == 1:
            text += numbers[0] + word
        else:  # "blocks_3" and "blocks/3" are both a number of "blocks"
            text = f"{text.rstrip('_/')}[{ranges([*map(int, numbers)])}]{word}"
    return text
