"""Matmul and convolution FLOPs of a program, counted on its jaxpr with loops multiplied out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex


def matmul_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs (two per multiply-add) of every ``dot_general`` and convolution of ``fn(*args)``.

    A scan's body counts once per step, a cond's by its largest branch, a while loop's once (its length is not in the
    program). Nothing is computed; arguments may be ``ShapeDtypeStruct``s.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
        >>> matmul_flops(lambda a, b: a @ b.T, x, x)
        2048
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr, _equation_flops)


def count_matmuls(fn: Callable[..., Any], *args: Any) -> int:
    """How many times ``fn(*args)`` runs a ``dot_general`` or a convolution, loops multiplied out."""
    return _count(jax.make_jaxpr(fn)(*args).jaxpr, lambda eqn: int(eqn.primitive.name in _FLOPS))


def _equation_flops(eqn: Any) -> int:
    return _FLOPS[eqn.primitive.name](eqn) if eqn.primitive.name in _FLOPS else 0


def _dot(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracting)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * inner


def _conv(eqn: Any) -> int:
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // out_features


_FLOPS = {"dot_general": _dot, "conv_general_dilated": _conv}


def _count(jaxpr: Any, of: Callable[[Any], int]) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        total += of(eqn)
        bodies = [getattr(b, "jaxpr", b) for p in eqn.params.values() for b in _bodies(p)]
        counts = [_count(b, of) for b in bodies]
        if eqn.primitive.name == "cond":
            total += max(counts, default=0)
        else:
            total += sum(counts) * eqn.params.get("length", 1)
    return total


def _bodies(param: Any) -> list[Any]:
    if isinstance(param, jex.Jaxpr | jex.ClosedJaxpr):
        return [param]
    if isinstance(param, tuple | list):
        return [p for p in param if isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)]
    return []
