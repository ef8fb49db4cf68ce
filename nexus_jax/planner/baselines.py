"""The fixed policies as plans in the planner's own model: what a plan must not be worse than."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from nexus_jax.planner.allocate import Edge, Option, Path, price_of
from nexus_jax.planner.model import Model
from nexus_jax.planner.options import fixed, of_choice, plain
from nexus_jax.planner.spans import Shape


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A fixed policy around every ``group`` stretches."""

    name: str
    group: int
    path: Path


def baselines(model: Model) -> Iterator[Baseline]:
    """Every fixed policy that the program has: as it is, and each of JAX's around groups of every size, and around every
    other group. The groups of about the square root of the number of stretches are those of Chen et al. 2016.
    """
    last = len(model.cuts) - 1
    yield Baseline("as it is", 1, path_of(model, 1, lambda n, shape: plain(shape)))
    sizes = sorted({stop - start for start, stop in model.spans})
    for group in sizes:
        if any((i, min(i + group, last)) not in model.spans for i in range(0, last, group)):
            continue
        for name in ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"):
            for every in (1, 2):
                pick = _every(model, name, every)
                suffix = " of every other" if every == 2 else ""
                yield Baseline(name + suffix, group, path_of(model, group, pick))


def _every(model: Model, name: str, every: int) -> Callable[[int, Shape], Option]:
    def pick(n: int, shape: Shape) -> Option:
        choices = fixed(shape)
        if n % every or name not in choices or shape.effects:
            return plain(shape)
        return of_choice(shape, choices[name])

    return pick


def path_of(model: Model, group: int, pick: Callable[[int, Shape], Option]) -> Path:
    last = len(model.cuts) - 1
    steps = []
    for n, start in enumerate(range(0, last, group)):
        stop = min(start + group, last)
        option = pick(n, model.span(start, stop).shape)
        steps.append((Edge(start, stop, (option,)), option))
    peak, ticks = price_of([option for _, option in steps])
    return Path(peak, ticks, tuple(steps))
