"""A user's loss as a flat program of arrays, and its results put together again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from nexus_jax import adapters
from nexus_jax import flat as flats
from nexus_jax.boundary import split
from nexus_jax.flat import Flat, is_floating

_DATA = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)


@dataclasses.dataclass(eq=False)
class Loss:
    """``fn(*args)`` as a function of a flat list of arrays.

    An nnx module among the arguments stands for its state; what the call changes in it is returned too.

    Attributes:
        arrays: the arrays among the arguments, in order.
        counts: how many of them each argument holds.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]

    def __post_init__(self) -> None:
        self.arrays: list[Any] = []
        self.counts: list[int] = []
        self.rebuilds: list[Any] = []
        self.params: list[list[bool] | None] = []
        for x in self.args:
            state, is_param = adapters.nnx.state_of(x)
            found, rebuild = split(state, _DATA)
            self.arrays += found
            self.counts.append(len(found))
            self.rebuilds.append(rebuild)
            self.params.append(is_param)
        self._rebuild_out: Any = None

    def __call__(self, *given: Any) -> list[Any]:
        pieces = iter(given)
        states = [r([next(pieces) for _ in range(c)]) for r, c in zip(self.rebuilds, self.counts, strict=True)]
        models = [adapters.nnx.opened_state(x, s) for x, s in zip(self.args, states, strict=True)]
        out = self.fn(*models)
        changed = [adapters.nnx.changed_state(x, m) for x, m in zip(self.args, models, strict=True)]
        leaves, self._rebuild_out = split((out, changed))
        return leaves

    @functools.cached_property
    def flat(self) -> Flat:
        """The program; tracing it calls ``fn`` once."""
        return flats.flatten(jax.make_jaxpr(self)(*self.arrays))

    def differentiated(self, argnums: Sequence[int]) -> list[int]:
        """Which inputs of the flat program are differentiated: constants counted."""
        start = len(self.flat.consts)
        found: list[int] = []
        for n, (count, is_param) in enumerate(zip(self.counts, self.params, strict=True)):
            if n in {a % len(self.args) for a in argnums}:
                own = range(count) if is_param is None else [i for i, p in enumerate(is_param) if p]
                found += [start + i for i in own]
            start += count
        arrays = [None] * len(self.flat.consts) + self.arrays
        return [i for i in found if is_floating(arrays[i])]

    def result(self, leaves: Sequence[Any]) -> Any:
        """What ``fn`` returns, from the results of the flat program; the modules among the arguments are updated."""
        out, changed = self._rebuild_out(list(leaves))
        for x, new in zip(self.args, changed, strict=True):
            if isinstance(x, nnx.Module) and new:
                state = nnx.state(x, nnx.Not(nnx.Param))
                nnx.replace_by_pure_dict(state, new)
                nnx.update(x, state)
        return out
