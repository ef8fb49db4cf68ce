"""A program whose gradient is taken in two passes of our own, and that JAX may still differentiate as it likes.

The tangents of the program are one linear function of what the forward pass kept. Its transpose is the backward pass, in
stages (:func:`nexus_jax.offloading.transfer.backward`); applied as it is, in forward mode, it is the plain tangents. And
where one of the passes is differentiated itself (a Hessian, a gradient penalty), it is differentiated as a plain program.
`jax.custom_vjp` has no forward mode, and `jax.custom_derivatives.linear_call` no `jax.vmap`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

from nexus_jax.flat import is_floating, jvp_by
from nexus_jax.offloading.transfer import Forward, WayBack, backward

_Copy = Callable[[Any], Any]
_Linear = Callable[[Sequence[Any], Sequence[Any]], list[Any]]  # of what it knows, and what it is linear in


def differentiated(
    plain: Callable[..., Sequence[Any]],
    staged: Callable[[Sequence[Any], Sequence[int]], Forward],
    to_host: _Copy,
    to_device: _Copy,
) -> Callable[..., list[Any]]:
    """A function of arrays, run ``plain`` where nobody differentiates it.

    Args:
        plain: the function; it returns arrays.
        staged: asked for the forward pass, with the arguments and the numbers of those that it is differentiated by.
        to_host, to_device: the copies.
    """
    call = jax.custom_jvp(lambda *arrays: list(plain(*arrays)))
    host, device = _both_ways(to_host, to_device)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        moves = lambda x, t: is_floating(x) and not isinstance(t, SymbolicZero)
        moving = [i for i, (x, t) in enumerate(zip(primals, tangents, strict=True)) if moves(x, t)]
        forward = staged(primals, moving)
        run = _run_as(lambda *args: forward(args, to_host), lambda *args: forward.plainly(args, host))
        args = [*forward.consts, *primals]
        out, kept = forward.split(args, run(*args))
        types = [jax.typeof(x).to_tangent_aval() for x in out if is_floating(x)]
        linear = _tangents_of(forward.way_back(), to_device, device)
        moved = iter(_linear(*linear, kept, [tangents[i] for i in moving], types))
        return out, [next(moved) if is_floating(x) else np.zeros(x.shape, jax.dtypes.float0) for x in out]

    call.defjvp(rule, symbolic_zeros=True)
    return call


def _tangents_of(way: WayBack, to_device: _Copy, device: _Copy) -> tuple[_Linear, _Linear]:
    """The tangents of a program, and its gradients; ``device`` is ``to_device`` as JAX can differentiate it."""
    home = lambda kept: [device(x) if m else x for x, m in zip(kept, way.moved, strict=True)]

    def tangents(kept: Sequence[Any], moving: Sequence[Any]) -> list[Any]:
        there = home(kept)
        outs = [o.to_tangent_aval() for o in way.outs if is_floating(o)]
        return jax.linear_transpose(lambda cotangents: way.plainly(there, cotangents), outs)(list(moving))[0]

    def gradients(kept: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        n = len(kept)
        return _run_as(
            lambda *args: backward(way, args[:n], args[n:], to_device),
            lambda *args: way.plainly(home(args[:n]), args[n:]),
        )(*kept, *cotangents)

    return tangents, gradients


def _run_as(fun: Callable[..., list[Any]], plain: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """``fun``, differentiated as ``plain``: JAX cannot take the derivative of a conditional with results on the host."""
    call = jax.custom_jvp(fun)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]
        return jvp_by(plain, primals, tangents, moving)

    call.defjvp(rule, symbolic_zeros=True)
    return call


def _both_ways(to_host: _Copy, to_device: _Copy) -> tuple[_Copy, _Copy]:
    """Two copies, each the other's transpose: that of JAX's ``device_put`` does not leave the memory it came to."""
    host, device = jax.custom_jvp(to_host), jax.custom_jvp(to_device)

    def derivative(there: Any, back: Any) -> None:
        def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
            out = there(*primals)
            transposable = (lambda _, moving: [there(*moving)]), (lambda _, cotangents: [back(*cotangents)])
            return out, _linear(*transposable, [], tangents, [jax.typeof(out).to_tangent_aval()])[0]

        there.defjvp(rule)

    derivative(host, device)
    derivative(device, host)
    return host, device


@jax.custom_jvp
def fenced(arrays: Sequence[Any]) -> list[Any]:
    """The same arrays; on the way back all their gradients are made before any of them is used."""
    return list(arrays)


@fenced.defjvp
def _fenced(primals: Any, tangents: Any) -> Any:
    [arrays], [moving] = primals, tangents
    back = lambda _, cotangents: list(jax.lax.optimization_barrier(tuple(cotangents)))
    types = [jax.typeof(x).to_tangent_aval() for x in arrays]
    return list(arrays), _linear(lambda _, same: list(same), back, [], moving, types)


# --- a linear function with a transpose of its own ------------------------------------------------------------------


def _linear(
    forward: _Linear, transpose: _Linear, known: Sequence[Any], moving: Sequence[Any], types: Sequence[Any]
) -> Any:
    """``forward(known, moving)``, whose transpose in ``moving`` is ``transpose(known, cotangents)``.

    Args:
        types: of the results.
    """
    return _LINEAR.bind(*known, *moving, forward=forward, transpose=transpose, n=len(known), types=tuple(types))


def _apply(*args: Any, forward: _Linear, n: int, **_: Any) -> list[Any]:
    return forward(list(args[:n]), list(args[n:]))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    return jvp_by(functools.partial(_apply, **params), primals, tangents, moving)


def _transposed(cotangents: Sequence[Any], *args: Any, transpose: _Linear, n: int, **_: Any) -> list[Any]:
    found = transpose(list(args[:n]), [ad.instantiate_zeros(c) for c in cotangents])
    return [None] * n + found


def _batched(
    axis: Any, args: Sequence[Any], dims: Sequence[Any], *, forward: _Linear, transpose: _Linear, n: int, **_: Any
) -> Any:
    over: dict[str, Any] = {"axis_size": axis.size, "axis_name": axis.name, "spmd_axis_name": axis.spmd_name}
    known, moving = list(dims[:n]), list(dims[n:])

    def back(values: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        found = jax.vmap(transpose, (known, 0), [0 if d is None else d for d in moving], **over)(values, cotangents)
        return [x.sum(0) if d is None else x for x, d in zip(found, moving, strict=True)]

    whole = jax.vmap(forward, (known, moving), 0, **over)
    types = jax.make_jaxpr(whole)(list(args[:n]), list(args[n:])).out_avals
    made = _linear(whole, back, args[:n], args[n:], types)
    return made, [0] * len(made)


_LINEAR = jex.Primitive("linear_function")
_LINEAR.multiple_results = True
_LINEAR.def_impl(_apply)
_LINEAR.def_abstract_eval(lambda *args, types, **params: list(types))
ad.primitive_jvps[_LINEAR] = _jvp
ad.primitive_transposes[_LINEAR] = _transposed
batching.fancy_primitive_batchers[_LINEAR] = _batched
mlir.register_lowering(_LINEAR, mlir.lower_fun(_apply, multiple_results=True))
