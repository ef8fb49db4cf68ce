"""A function of anything as jaxprs of the arrays among its arguments: alone, and with its backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nexus_jax import _compat, adapters
from nexus_jax.boundary import split
from nexus_jax.flat import filling, is_floating

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
        """Where each array is among the arguments: see :func:`argument_names`."""
        given = jax.tree_util.tree_leaves_with_path(self.given, is_leaf=adapters.nnx.accepts)
        return argument_names([given[path[0].idx][0][1:] + path[1:] for path in self.rebuild.paths()])

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

            forward = filling(lambda *whole: [x for x in self._run(whole) if is_floating(x)], arrays, wrt)
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


def argument_names(paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """Where arrays are in the arguments of a call, for people to read.

    Args:
        paths: JAX's keys of each array; the first is the argument's number (or keyword), the others lead on inside it.

    Example:
        >>> import jax
        >>> args = ({"params": {"blocks_0": {"kernel": 0}}}, 1, [2, {"k": 3}])
        >>> argument_names([path for path, _ in jax.tree_util.tree_leaves_with_path(args)])
        ['params/blocks_0/kernel', 'args[1]', 'args[2]/0', 'args[2]/1/k']

        Of two arguments that hold the same path, both say which they are:

        >>> argument_names([path for path, _ in jax.tree_util.tree_leaves_with_path(({"k": 0}, {"k": 1}))])
        ['args[0]/k', 'args[1]/k']
    """
    read = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    inside = [read(path[1:]) for path in paths]
    count = Counter(inside)
    names = []
    for path, name in zip(paths, inside, strict=True):
        argument = f"args[{path[0].idx}]" if isinstance(path[0], jax.tree_util.SequenceKey) else read(path[:1])
        numbered = len(path) > 1 and isinstance(path[1], jax.tree_util.SequenceKey)
        alone = name and count[name] == 1 and not numbered
        names.append(name if alone else f"{argument}/{name}" if name else argument)
    return names
