"""A function of anything as jaxprs of the arrays among its arguments: alone, and with its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nexus_jax import _compat, adapters
from nexus_jax.boundary import is_floating, split

_DATA = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)
_BACKWARD = "nexus_jax_backward"


class Traced:
    """``fn(*args, **kwargs)``, opened: nnx modules are their state, and flags and the like are not traced.

    Args:
        fn: a function of pytrees and nnx modules.
        args, kwargs: what to call it with; arrays may be ``ShapeDtypeStruct``s.

    Raises:
        TypeError: no argument holds an array.
    """

    def __init__(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]):
        # JAX refuses a jitted function with options of its own inside another one
        self.options = _compat.jit_options(fn)
        inner = fn.__wrapped__ if self.options else fn  # pyright: ignore[reportFunctionMemberAccess]
        self.fun, inputs = adapters.nnx.opened(inner, args, kwargs)
        self.arrays, self.rebuild = split(inputs, _DATA)
        self.given = (tuple(args), dict(kwargs))
        if not self.arrays:
            name = getattr(fn, "__name__", "fn")
            raise TypeError(f"{name}(*args): no argument is an array or a jax.ShapeDtypeStruct.")

    def names(self) -> list[str]:
        """Where each array is among the arguments: ``"0/params/blocks_0/attn/kernel"``."""
        treedef = self.rebuild.treedef
        given = jax.tree_util.tree_leaves_with_path(self.given, is_leaf=adapters.nnx.accepts)
        inside = jax.tree_util.tree_leaves_with_path(treedef.unflatten(range(treedef.num_leaves)))
        paths = [given[path[0].idx][0][1:] + path[1:] for path, i in inside if self.rebuild.traced[i]]
        return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]

    def forward(self) -> Any:
        """The jaxpr of the call."""
        return jax.make_jaxpr(lambda *arrays: self._run(arrays))(*self.arrays).jaxpr

    def with_backward(self) -> tuple[Any, int, int]:
        """The call differentiated with respect to its floating-point arrays, and the backward pass as one equation.

        Returns:
            A jaxpr whose first results are the residuals, the index of the equation that is the backward pass and whose
            first operands they are, and their number.
        """

        def step(*arrays):
            wrt = [i for i, x in enumerate(arrays) if is_floating(x)]

            def forward(*floats):
                filled = list(arrays)
                for i, x in zip(wrt, floats, strict=True):
                    filled[i] = x
                return [x for x in self._run(filled) if is_floating(x)]

            out, vjp = jax.vjp(forward, *(arrays[i] for i in wrt))
            leaves, treedef = jax.tree.flatten(vjp)

            def backward(leaves, cotangents):
                return treedef.unflatten(leaves)(cotangents)

            backward.__name__ = _BACKWARD
            return leaves, jax.jit(backward)(leaves, out)

        with jax.disable_jit(False):
            jaxpr = jax.make_jaxpr(step)(*self.arrays).jaxpr
        at = max(i for i, eqn in enumerate(jaxpr.eqns) if eqn.params.get("name") == _BACKWARD)
        return jaxpr, at, len(jaxpr.outvars) - len(jaxpr.eqns[at].outvars)

    def _run(self, arrays: Sequence[Any]) -> list[Any]:
        return split(self.fun(self.rebuild(list(arrays))))[0]
