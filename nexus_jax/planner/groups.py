"""A scan that takes several of its steps at once, so that they need not all keep the same.

Stacked operands become stacks of stacks, which is another name for the same bytes; cutting the scan in two instead would
copy them. Inside, each step reads its slice where it needs it: what is read at the start would be kept for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from nexus_jax import flat as flats
from nexus_jax.flat import Flat, is_floating
from nexus_jax.offloading.gradient import fenced
from nexus_jax.offloading.loops import Loop

_MOST = 4  # steps at once: each is compiled


def sizes(steps: int) -> list[int]:
    """How many steps a scan is tried with at once: one, the fewest, and the most of a few."""
    found = [n for n in range(2, _MOST + 1) if steps % n == 0 and n < steps]
    return sorted({1, *found[:1], *found[-1:]})


def body_of(loop: Loop, group: int) -> Flat:
    """What a scan does in ``group`` steps: a program of its constants, what it carries, and stacks of what steps take.

    Raises:
        ValueError: it has no such number of steps.
    """
    if group < 1 or loop.steps % group:
        raise ValueError(f"a scan of {loop.steps} steps cannot take {group} at once: write a number that divides it.")
    one = flats.flatten(loop.body)
    return one if group == 1 else _unrolled(loop, one, group)


def in_turn(body: Flat, jaxpr: Any, stacks: Collection[Any]) -> Any:
    """A part of a body of several steps, whose gradients are all there before what it takes gets its own.

    A compiler leaves the gradients of weights for later otherwise, and keeps what they are made of for all the steps.

    Args:
        stacks: the inputs of the body of which steps read slices.
    """
    read = set(stacks)
    slices, rest = [], []
    for eqn in jaxpr.eqns:
        is_slice = eqn.primitive.name in ("slice", "squeeze") and eqn.invars[0] in read
        read.update(eqn.outvars if is_slice else ())
        (slices if is_slice else rest).append(eqn)
    program, ins = flats.part(body, rest, jaxpr.outvars)
    reads, stacked = flats.part(body, slices, [v for v in ins if v in read and v not in stacks])
    first = [v for v in ins if is_floating(v.aval) and v not in stacks]

    def run(*given: Any) -> list[Any]:
        env = dict(zip(jaxpr.invars, given, strict=True))
        made = jex.jaxpr_as_fun(jex.ClosedJaxpr(reads, ()))(*(env[v] for v in stacked))
        env.update(zip(reads.outvars, made, strict=True))
        env.update(zip(first, fenced([env[v] for v in first]), strict=True))
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(program, ()))(*(env[v] for v in ins))

    return jax.make_jaxpr(run)(*flats.like(jaxpr.invars)).jaxpr


def _unrolled(loop: Loop, one: Flat, group: int) -> Flat:
    first = loop.constants + loop.carried
    inputs = one.jaxpr.invars
    stacks = {v: jex.Var(_stack_of(v, group)) for v in inputs[first:]}
    eqns: list[Any] = []
    carry: list[Any] = inputs[loop.constants : first]
    made: list[list[Any]] = [[]] * group
    for k in reversed(range(group)) if loop.eqn.params["reverse"] else range(group):
        given = dict(zip(inputs[:first], [*inputs[: loop.constants], *carry], strict=True))

        def read(v: Any, k: int = k, given: dict[Any, Any] = given) -> Any:
            return (
                given[v]
                if v in given
                else _inserted(eqns, lambda x: jax.lax.index_in_dim(x, k, keepdims=False), stacks[v])
            )

        outs = flats.copied(one, read, eqns)
        carry, made[k] = outs[: loop.carried], outs[loop.carried :]
    ys = [_inserted(eqns, lambda *several: jnp.stack(several), *several) for several in zip(*made, strict=True)]
    ins = [*inputs[:first], *stacks.values()]
    return Flat(flats.live(one.jaxpr.replace(invars=ins, outvars=[*carry, *ys], eqns=eqns)), ())


def _stack_of(v: Any, group: int) -> Any:
    """The type of so many of what a variable stands for."""
    [stack] = jax.make_jaxpr(lambda x: jnp.stack([x] * group))(*flats.like([v])).out_avals
    return stack


def _inserted(eqns: list[Any], fun: Callable[..., Any], *atoms: Any) -> Any:
    """``fun`` of what the atoms stand for, added to the equations."""
    program = flats.flatten(jax.make_jaxpr(fun)(*flats.like(atoms)))
    [made] = flats.copied(program, dict(zip(program.jaxpr.invars, atoms, strict=True)).__getitem__, eqns)
    return made
