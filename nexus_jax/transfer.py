"""Move residuals to the host and back in step with the layers, so that the memory is really freed.

A compiler may start a copy as soon as its input is there and may end it when its output is wanted, and both compilers
do: copies back begin in the forward pass, copies out end in the backward pass, and everything is on the device
in between. `jax.lax.optimization_barrier` does not help, it is gone before instructions are put in order. What no
scheduler looks through is a conditional. So each layer, with the copies that shall overlap with it, becomes one branch
of a conditional whose predicate is always true and never known to the compiler.

It costs one scalar read for each layer, and layers are no longer fused with one another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend import core as jex

from nexus_jax.stages import Stage, layer_cuts, stages, use_cuts

HOST = jax.memory.Space.Host


class Forward:
    """A forward program in stages; what each makes for the backward pass leaves while the next one runs.

    Args:
        closed: the program, a ``ClosedJaxpr``.
        moved: which of its outputs go to the host.
        fixed: which of its inputs are parameters.
    """

    def __init__(self, closed: Any, moved: Sequence[bool], fixed: Sequence[bool]):
        self.closed, jaxpr = closed, closed.jaxpr
        self.moved = dict.fromkeys(v for v, m in zip(jaxpr.outvars, moved, strict=True) if m)
        self.outs = list(zip(jaxpr.outvars, moved, strict=True))
        there = {v for v, f in zip(jaxpr.invars, fixed, strict=True) if f}
        self.stages = stages(jaxpr, layer_cuts(jaxpr, there | set(jaxpr.constvars)) if self.moved else [])

    def groups(self) -> list[list[int]]:
        """For each stage, which of the outputs that go to the host its backward pass needs.

        What flows from one stage to the next is needed by the next one's, what stays inside a stage by its own.
        """
        of: dict[Any, int] = {}
        for k, stage in enumerate(self.stages):
            of |= dict.fromkeys(stage.made, k)
        for k, stage in reversed(list(enumerate(self.stages))):
            of |= dict.fromkeys(stage.ins, k)
        groups: list[list[int]] = [[] for _ in self.stages]
        for i, (v, m) in enumerate(self.outs):
            if m:
                groups[of.get(v, 0)].append(i)
        return groups

    def __call__(self, args: Sequence[Any], to_host: Callable[[Any], Any]) -> list[Any]:
        jaxpr = self.closed.jaxpr
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*self.closed.consts, *args], strict=True))
        leaving = [v for v in self.moved if v in env]
        host: dict[Any, Any] = {}
        *layers, head = self.stages
        for i, stage in enumerate(layers):
            made = [v for v in stage.outs if v in self.moved]
            # The last layer's own leave with it: where the head is largest, no room is lost to what waits to leave.
            last = made if i == len(layers) - 1 else []
            host.update(_run(stage, env, leaving, to_host, late=last))
            leaving = [] if last else made
        _run_plainly(head, env)
        host.update((v, to_host(env[v])) for v in self.moved if v not in host)
        return [v.val if isinstance(v, jex.Literal) else host[v] if m else env[v] for v, m in self.outs]


class Backward:
    """A backward program in stages; what a stage needs comes back while an earlier one runs.

    Args:
        closed: the program.
        groups: for each layer, first layer first, which inputs wait on the host.
        ahead: how many stages before its own a copy back runs; with 0 at the beginning of its own.
    """

    def __init__(self, closed: Any, groups: Sequence[Sequence[int]], ahead: int):
        self.closed, self.ahead = closed, ahead
        invars = closed.jaxpr.invars
        waiting = [[invars[i] for i in group] for group in groups]
        self.waiting = {v for group in waiting for v in group}
        self.stages = stages(closed.jaxpr, use_cuts(closed.jaxpr, waiting))
        seen: set[Any] = set()
        self.needs: list[list[Any]] = []
        for stage in self.stages:
            self.needs.append([v for v in stage.ins if v in self.waiting and v not in seen])
            seen |= set(self.needs[-1])

    def __call__(self, args: Sequence[Any], to_device: Callable[[Any], Any]) -> list[Any]:
        jaxpr = self.closed.jaxpr
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*self.closed.consts, *args], strict=True))
        start, done = 0, []
        if len(self.stages) > 1:
            # What follows the last layer is left open: its cotangents are the largest values of many models, and are
            # never made if they are fused with their use. But it must end before the last layer begins, or a
            # compiler keeps them to the end of the step for the gradients that nobody waits for.
            head = self.stages[0]
            env.update((v, to_device(env[v])) for v in self.needs[0])
            _run_plainly(head, env)
            start, done = 1, [v for v in head.outs if v not in self.stages[1].ins]
        fetched = start
        for i, stage in enumerate(self.stages[start:], start):
            coming = [v for need in self.needs[max(fetched, i + 1) : i + self.ahead + 1] for v in need]
            own = self.needs[i] if fetched <= i else []
            fetched = max(fetched, i + self.ahead + 1)
            env.update(_run(stage, env, coming, to_device, early=own, through=done if i == start else []))
        for v in self.waiting & set(jaxpr.outvars):  # returned as it is
            env[v] = to_device(env[v]) if _on_host(env[v]) else env[v]
        return [v.val if isinstance(v, jex.Literal) else env[v] for v in jaxpr.outvars]


def _run(
    stage: Stage,
    env: dict[Any, Any],
    beside: Sequence[Any],
    copy: Callable[[Any], Any],
    *,
    early: Sequence[Any] = (),
    late: Sequence[Any] = (),
    through: Sequence[Any] = (),
) -> dict[Any, Any]:
    """One stage and the copies that run with it; its results go to ``env``, the copies are returned.

    Args:
        beside: what is copied while it runs.
        early: which of its inputs are copied before they are used.
        late: which of its results are copied when they are made.
        through: values of earlier stages that must be there before it starts.
    """
    compute = jex.jaxpr_as_fun(jex.ClosedJaxpr(stage.program, ()))

    def body(ins, extra, through):
        outs = compute(*[copy(x) if v in early else x for v, x in zip(stage.ins, ins, strict=True)])
        own = [copy(x) for v, x in zip(stage.outs, outs, strict=True) if v in late]
        return outs, through, [copy(x) for x in extra], own

    values = [[env[v] for v in names] for names in (stage.ins, beside, through)]
    outs, passed, copies, own = fenced(body, *values)
    env.update(zip([*stage.outs, *through], [*outs, *passed], strict=True))
    return dict(zip([*beside, *(v for v in stage.outs if v in late)], [*copies, *own], strict=True))


def _run_plainly(stage: Stage, env: dict[Any, Any]) -> None:
    outs = jex.jaxpr_as_fun(jex.ClosedJaxpr(stage.program, ()))(*[env[v] for v in stage.ins])
    env.update(zip(stage.outs, outs, strict=True))


def fenced(fun: Callable[..., Any], ins: list[Any], *others: list[Any]) -> Any:
    """``fun(ins, *others)``, as one step of the program: nothing in it starts before all of its arguments are there."""
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(ins, *others)
    ties = [x for x in ins if _can_tie(x)]
    if not ties or closed.effects or not all(_can_be_zero(aval) for aval in closed.out_avals):
        return fun(ins, *others)
    # Of the largest, one element: activations are larger than scales, and made by the stage before.
    tie = max(ties, key=lambda x: x.size)
    outs = jax.lax.cond(
        _true(jax.lax.stop_gradient(jax.lax.slice(tie, (0,) * tie.ndim, (1,) * tie.ndim).reshape(()))),
        lambda *args: jex.jaxpr_as_fun(closed)(*args),
        lambda *_: [_zero(aval) for aval in closed.out_avals],
        *ins,
        *itertools.chain(*others),
    )
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


@custom_vmap
def _true(x: Any) -> Any:
    """True, of a number; no compiler knows, but the CPU's, where nothing moves and a branch only takes time."""

    if jnp.iscomplexobj(x):
        x = x.real
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jax.lax.platform_dependent(bits, cpu=lambda b: (b & 0) == 0, default=lambda b: (b & 3) != 7)


@_true.def_vmap
def _(size, batched, x):
    # One predicate for the whole batch: with one each, both branches would run, and select between host arrays.
    del size, batched
    return _true(x[0]), False


def _on_host(x: Any) -> bool:
    return getattr(jax.typeof(x), "memory_space", None) == HOST


def _can_tie(x: Any) -> bool:
    """Whether one element of an array can be read: some JAX versions cannot slice what is sharded by type."""
    explicit = jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
    whole = not explicit or all(axis is None for axis in jax.typeof(x).sharding.spec)
    return not _on_host(x) and jnp.issubdtype(x.dtype, jnp.number) and x.size > 0 and whole


def _can_be_zero(aval: Any) -> bool:
    return not jax.numpy.issubdtype(aval.dtype, jax.dtypes.extended)


def _zero(aval: Any) -> Any:
    explicit = jax.sharding.AxisType.Explicit in aval.sharding.mesh.axis_types
    zero = jnp.zeros(aval.shape, aval.dtype, out_sharding=aval.sharding if explicit else None)
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.12; before, the axes themselves
    varying = tuple(kind.varying if kind is not None else getattr(aval, "vma", ()))
    if varying:  # inside shard_map
        zero = jax.lax.pcast(zero, varying, to="varying")
    return jax.device_put(zero, HOST) if aval.memory_space == HOST else zero
