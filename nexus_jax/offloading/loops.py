"""Scans over layers: what a step keeps leaves inside the step, and comes back inside the step that needs it.

A loop is its own clock: no compiler moves a copy from one step to another, so nothing ties copies here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loop:
    """A scan: operands are constants, what is carried, and what steps take in; results what is carried, and stacks."""

    eqn: Any
    constants: int
    carried: int

    @property
    def steps(self) -> int:
        return self.eqn.params["length"]

    @property
    def body(self) -> Any:
        """What a step does."""
        return self.eqn.params["jaxpr"]

    def taken(self) -> list[tuple[int, Any]]:
        """The operands of which each step takes one slice, with their positions."""
        return list(enumerate(self.eqn.invars))[self.constants + self.carried :]

    def stacked(self) -> list[Any]:
        """The results that steps make one slice each of."""
        return self.eqn.outvars[self.carried :]

    def __call__(
        self,
        values: Sequence[Any],
        *,
        leaving: Container[Any] = (),
        to_host: Callable[[Any], Any] | None = None,
        coming: Container[Any] = (),
        to_device: Callable[[Any], Any] | None = None,
    ) -> list[Any]:
        """The scan's results.

        Args:
            values: of its operands; those of ``coming`` are on the host.
            leaving: which of its stacked results go to the host, slice by slice.
            coming: which of its taken operands come back, slice by slice.
        """
        body = jex.jaxpr_as_fun(self.body)
        first = self.constants + self.carried
        takes = [to_device if v in coming and to_device else _same for _, v in self.taken()]
        gives = [to_host if v in leaving and to_host else _same for v in self.stacked()]

        def step(*given: Any) -> list[Any]:
            taken = [take(x) for take, x in zip(takes, given[first:], strict=True)]
            outs = body(*given[:first], *taken)
            return [*outs[: self.carried], *(give(y) for give, y in zip(gives, outs[self.carried :], strict=True))]

        return self.run(step, values, unroll=1)  # some compilers do not take several steps at once that move something

    def run(
        self, body: Callable[..., Sequence[Any]], values: Sequence[Any], group: int = 1, unroll: int | None = None
    ) -> list[Any]:
        """The scan's results, if each step does as ``body``.

        Args:
            values: of its operands.
            group: how many steps ``body`` is: it takes and makes stacks of so many.
            unroll: how many of them are written out; None is as the scan says.
        """
        first = self.constants + self.carried
        params = {name: self.eqn.params[name] for name in _KEPT if name in self.eqn.params}

        def step(carry: Sequence[Any], taken: Sequence[Any]) -> tuple[Any, Any]:
            outs = body(*values[: self.constants], *carry, *taken)
            return list(outs[: self.carried]), list(outs[self.carried :])

        carry, made = jax.lax.scan(
            step,
            list(values[self.constants : first]),
            [x if group == 1 else x.reshape(self.steps // group, group, *x.shape[1:]) for x in values[first:]],
            length=self.steps // group,
            unroll=unroll or max(1, self.eqn.params["unroll"] // group),
            **params,
        )
        return [*carry, *(y if group == 1 else y.reshape(self.steps, *y.shape[2:]) for y in made)]


_KEPT = ("reverse", "_split_transpose")  # parameters of a scan, whatever its steps do


def _same(x: Any) -> Any:
    return x


def loop_of(eqn: Any) -> Loop | None:
    """A scan of more than one step; None for any other equation."""
    if eqn.primitive.name != "scan" or eqn.params["length"] < 2:
        return None
    body = eqn.params["jaxpr"].jaxpr
    carried = _of_one_rank(body.outvars, eqn.outvars)
    constants = _of_one_rank(body.invars, eqn.invars) - carried
    return Loop(eqn=eqn, constants=constants, carried=carried)


def _of_one_rank(inner: Sequence[Any], outer: Sequence[Any]) -> int:
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(inner, outer, strict=True))


def loops_that_keep(jaxpr: Any, moved: Container[Any], outs: Sequence[Any]) -> dict[int, Loop]:
    """The scans, by the position of their equation, of whose stacked results some are moved and used by nothing else.

    Args:
        outs: what the program returns to its user, on the device.
    """
    used = {v for atoms in (*(eqn.invars for eqn in jaxpr.eqns), outs) for v in atoms if not isinstance(v, jex.Literal)}
    found = {}
    for i, eqn in enumerate(jaxpr.eqns):
        loop = loop_of(eqn)
        if loop and any(v in moved and v not in used for v in loop.stacked()):
            found[i] = loop
    return found


def loops_that_take(jaxpr: Any, waiting: Container[Any]) -> dict[int, Loop]:
    """The scans of whose operands steps take slices of what waits, and nothing else does."""
    uses: dict[Any, int] = {}
    for v in itertools.chain(*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars):
        if not isinstance(v, jex.Literal):
            uses[v] = uses.get(v, 0) + 1
    found = {}
    for i, eqn in enumerate(jaxpr.eqns):
        loop = loop_of(eqn)
        if loop and any(v in waiting and uses[v] == 1 for _, v in loop.taken() if not isinstance(v, jex.Literal)):
            found[i] = loop
    return found


def loop_alone(jaxpr: Any, loops: Mapping[int, Loop]) -> Loop | None:
    """The one of ``loops`` that a stage's program is; None if it is none of them."""
    return next((loop for loop in loops.values() if len(jaxpr.eqns) == 1 and jaxpr.eqns[0] is loop.eqn), None)


def cuts_around(loops: Container[int], n: int) -> list[int]:
    """Where a program is cut so that each loop is a stage of its own."""
    return [i for i in range(1, n) if i in loops or i - 1 in loops]
