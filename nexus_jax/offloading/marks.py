"""Names by which a program says, through differentiation, where its stages end and what of it waits on the host.

What leaves bears the name that a policy's residual rules give it, also inside the steps of a scan; what a stage hands on
bears :data:`END`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex

from nexus_jax.flat import flatten
from nexus_jax.offloading.loops import loop_of
from nexus_jax.policy.places import OFFLOAD

END = "nexus_jax.end"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Marked:
    """A program without its marks, and what they said.

    Attributes:
        jaxpr: without the names, so that a value is one variable.
        atoms: those that were asked after, in it.
        cuts: where its stages begin, but for the first.
        leaving: its variables that wait on the host.
    """

    jaxpr: Any
    atoms: list[Any]
    cuts: list[int]
    leaving: set[Any]


def read(jaxpr: Any, atoms: Sequence[Any]) -> Marked:
    """Take a program's marks away.

    ``jax.checkpoint`` puts a ``reduce_precision`` that changes nothing behind what it saves; it goes with the name.

    Args:
        atoms: variables and literals of the program.
    """
    same: dict[Any, Any] = {}
    now = lambda v: v if isinstance(v, jex.Literal) else same.get(v, v)
    eqns: list[Any] = []
    cuts: dict[int, None] = {}
    leaving: set[Any] = set()
    for eqn in jaxpr.eqns:
        name = eqn.params.get("name") if eqn.primitive.name == "name" else None
        source = now(eqn.invars[0]) if eqn.invars else None
        again = _changes_nothing(eqn) and not isinstance(source, jex.Literal) and source in leaving
        if name not in (OFFLOAD, END) and not again:
            leaving.update(_stacks(eqn))
            eqns.append(eqn.replace(invars=[now(v) for v in eqn.invars]))
            continue
        same[eqn.outvars[0]] = source
        if name == END:
            cuts[len(eqns)] = None
        elif not isinstance(source, jex.Literal):
            leaving.add(source)
    found = jaxpr.replace(eqns=eqns, outvars=[now(v) for v in jaxpr.outvars])
    return Marked(
        jaxpr=found, atoms=[now(v) for v in atoms], cuts=[i for i in cuts if 0 < i < len(eqns)], leaving=leaving
    )


def _stacks(eqn: Any) -> list[Any]:
    """Of what the steps of a scan stack, what waits on the host. Names in it are left as they are."""
    loop = loop_of(eqn)
    if loop is None:
        return []
    body = flatten(loop.body).jaxpr
    maker = {v: e for e in body.eqns for v in e.outvars}

    def leaves(v: Any) -> bool:
        while not isinstance(v, jex.Literal) and (eqn := maker.get(v)) is not None:
            if eqn.params.get("name") == OFFLOAD:
                return True
            if eqn.primitive.name != "name" and not _changes_nothing(eqn):
                return False
            [v] = eqn.invars
        return False

    return [v for v, made in zip(loop.stacked(), body.outvars[loop.carried :], strict=True) if leaves(made)]


def _changes_nothing(eqn: Any) -> bool:
    """Whether an equation rounds to the precision that its operand has."""
    if eqn.primitive.name != "reduce_precision":
        return False
    kind = jnp.finfo(eqn.invars[0].aval.dtype)
    return (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) == (kind.nexp, kind.nmant)
