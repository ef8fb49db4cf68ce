"""A boundary around a pure function: `jax.checkpoint` under a policy, or residuals moved to the host.

Both take a function of pytrees that may hold anything (flags, None, modules, dataclasses that JAX does not know):
only the `jax.Array` leaves are traced, everything else goes in and comes out as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from nexus_jax.flat import Flat, flatten, jvp_by
from nexus_jax.offloading import transfer
from nexus_jax.offloading.gradient import differentiated
from nexus_jax.offloading.window import Windows
from nexus_jax.policy.places import checkpoint_by_name
from nexus_jax.policy.rules import Policy, Whole, nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class _Like:
    """The class of a dataclass instance, and what the instance holds beside its fields; equal where these are."""

    cls: type
    others: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Like) or self.cls is not other.cls or self.others.keys() != other.others.keys():
            return False
        return all(value is other.others[name] for name, value in self.others.items())  # arrays have no ==

    def __hash__(self) -> int:
        return hash(self.cls)


class _Opened:
    """A dataclass instance that JAX does not know as a pytree, opened so that arrays in it are leaves."""

    def __init__(self, like: _Like, values: dict[str, Any]):
        self.like, self.values = like, values


jax.tree_util.register_pytree_with_keys(
    _Opened,
    lambda o: (tuple((jax.tree_util.GetAttrKey(k), v) for k, v in o.values.items()), (o.like, tuple(o.values))),
    lambda aux, values: _Opened(aux[0], dict(zip(aux[1], values, strict=True))),
)


def _open(leaf: Any) -> Any:
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type | jax.Array) or _is_module(leaf):
        return leaf
    names = [f.name for f in dataclasses.fields(leaf) if hasattr(leaf, f.name)]
    others = {name: value for name, value in getattr(leaf, "__dict__", {}).items() if name not in names}
    return _Opened(_Like(type(leaf), others), {n: jax.tree.map(_open, getattr(leaf, n)) for n in names})


def _close(node: Any) -> Any:
    if not isinstance(node, _Opened):
        return node
    result = object.__new__(node.like.cls)
    fields = {k: jax.tree.map(_close, v, is_leaf=lambda x: isinstance(x, _Opened)) for k, v in node.values.items()}
    for name, value in {**node.like.others, **fields}.items():
        object.__setattr__(result, name, value)
    return result


def _is_module(x: Any) -> bool:
    return any(c.__module__.startswith("flax.") and c.__name__ == "Module" for c in type(x).__mro__)


def split(tree: Any, kinds: tuple[type, ...] = (jax.Array,)) -> tuple[list[Any], _Rebuild]:
    """The leaves of ``tree`` of these kinds, and the function that puts others in their place."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(_open, tree))
    traced = tuple(isinstance(leaf, kinds) for leaf in leaves)
    static = tuple(None if t else leaf for leaf, t in zip(leaves, traced, strict=True))
    return [leaf for leaf, t in zip(leaves, traced, strict=True) if t], _Rebuild(treedef, traced, static)


@dataclasses.dataclass(frozen=True)
class _Rebuild:
    """Puts arrays back among the leaves that are none; equal, and one cache key, where all but the arrays is equal."""

    treedef: Any
    traced: tuple[bool, ...]
    static: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        # 1 == True == 1.0, but a flag, a count and a scale are not one another
        return (
            isinstance(other, _Rebuild)
            and (self.treedef, self.traced, self.static) == (other.treedef, other.traced, other.static)
            and [type(x) for x in self.static] == [type(x) for x in other.static]
        )

    def __hash__(self) -> int:
        return hash((self.treedef, self.traced, self.static))

    def paths(self) -> list[tuple[Any, ...]]:
        """Where each of the arrays is in the tree, as JAX's keys."""
        inside = jax.tree_util.tree_leaves_with_path(self.treedef.unflatten(range(self.treedef.num_leaves)))
        return [path for path, i in inside if self.traced[i]]

    def __call__(self, arrays: list[Any]) -> Any:
        it = iter(arrays)
        filled = [next(it) if t else leaf for leaf, t in zip(self.static, self.traced, strict=True)]
        return jax.tree.map(_close, self.treedef.unflatten(filled), is_leaf=lambda x: isinstance(x, _Opened))


class _Flat:
    """``fun(weights, rest)`` as a function of arrays that returns a list of arrays."""

    def __init__(self, fun: Callable[..., Any], weights: Any, rest: Any):
        self.fun = fun
        weight_arrays, self.rebuild_weights = split(weights)
        rest_arrays, self.rebuild_rest = split(rest)
        self.n_weights = len(weight_arrays)
        self.arrays = weight_arrays + rest_arrays
        self.is_weight = [True] * len(weight_arrays) + [False] * len(rest_arrays)
        self.body = _Body(fun, self.rebuild_weights, self.rebuild_rest, self.n_weights)

    def shared(self) -> _Flat:
        """Take the body of an earlier call that was the same in all but its arrays, so that JAX traces it once.

        Only for functions marked ``traced_once``: they live on, and hold nothing of one trace.
        """
        if getattr(self.fun, "traced_once", False):
            with contextlib.suppress(TypeError):  # a flag that cannot be hashed: traced again
                self.body = _shared_body(self.fun, self.rebuild_weights, self.rebuild_rest, self.n_weights)
        return self

    def result(self, leaves: list[Any]) -> Any:
        if self.body.rebuild_out is None:
            raise RuntimeError("a boundary's function was not traced: JAX answered from a cache it should not have.")
        return self.body.rebuild_out(list(leaves))


class _Body:
    """What JAX traces: equal bodies are one object, and nothing in it belongs to one call."""

    def __init__(self, fun: Callable[..., Any], rebuild_weights: _Rebuild, rebuild_rest: _Rebuild, n_weights: int):
        self.fun, self.n_weights = fun, n_weights
        self.rebuild_weights, self.rebuild_rest = rebuild_weights, rebuild_rest
        self.rebuild_out: _Rebuild | None = None

    def __call__(self, *arrays: Any) -> list[Any]:
        n = self.n_weights
        out = self.fun(self.rebuild_weights(list(arrays[:n])), self.rebuild_rest(list(arrays[n:])))
        leaves, self.rebuild_out = split(out)
        return leaves


_shared_body = functools.lru_cache(maxsize=1024)(_Body)


def checkpointed(policy: Policy) -> Callable[..., Any]:
    """``run(fun, weights, rest)``: ``fun(weights, rest)`` under ``jax.checkpoint`` with the policy's residual rules.

    Frees every residual inside that the policy does not keep, and costs what recomputing them costs.
    """

    def run(fun: Callable[..., Any], weights: Any, rest: Any) -> Any:
        flat = _Flat(fun, weights, rest).shared()
        if policy.recomputes_everything:
            return flat.result(jax.checkpoint(flat.body)(*flat.arrays))
        return flat.result(checkpoint_by_name(flat.body, flat.arrays, flat.is_weight, policy))

    return run


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call of a model that is about to be differentiated, as a program of arrays.

    Attributes:
        flat: the program; its first inputs are what the call closes over.
        differentiated: which of its inputs are.
        model: its class.
    """

    flat: Flat
    differentiated: tuple[int, ...]
    model: type


def planned(whole: Whole, model: type) -> Callable[..., Any]:
    """``run(fun, weights, rest)``: ``fun(weights, rest)``, differentiated as ``whole`` says.

    A call that nobody differentiates runs as it is, and nothing is asked.
    """

    def run(fun: Callable[..., Any], weights: Any, rest: Any) -> Any:
        given = _Flat(fun, weights, rest)
        closed = jax.make_jaxpr(given.body)(*given.arrays)
        flat = flatten(closed)
        call = jax.custom_jvp(lambda *arrays: jex.jaxpr_as_fun(jex.ClosedJaxpr(flat.jaxpr, ()))(*arrays))

        def rule(primals: Any, tangents: Any) -> Any:
            moving = tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))
            program = whole.program(Call(flat, moving, model))
            return jvp_by(program, primals, tangents, moving)

        call.defjvp(rule, symbolic_zeros=True)
        return given.result(call(*flat.consts, *given.arrays))

    return run


def offloaded(
    wanted: Callable[[Any], bool],
    to_host: Callable[[Any], Any],
    to_device: Callable[[Any], Any],
    ahead: int = 0,
    traced: Callable[[int], None] = lambda moved: None,
    windows: Windows | None = None,
) -> Callable[..., Any]:
    """``run(fun, weights, rest)``: ``fun(weights, rest)`` whose residuals wait on the host where ``wanted`` says so.

    The residuals are the leaves of ``jax.vjp``: exactly what autodiff keeps after any checkpointing inside
    ``fun``; but what is cheap to make again is made again (:mod:`nexus_jax.offloading.keep`). The function's own
    arguments (parameters, data) are never moved, but for those in ``rest`` where ``run(..., inputs=True)`` says that
    they are activations too; a value kept twice is moved once.

    Args:
        wanted: asked once of the type of each residual that may leave.
        ahead: how many layers before its own a residual comes back (:mod:`nexus_jax.offloading.transfer`).
        traced: called when a gradient is traced, with how many bytes leave.
        windows: if given, only what is hidden behind the computing leaves.
    """

    def run(fun: Callable[..., Any], weights: Any, rest: Any, inputs: bool = False) -> Any:
        flat = _Flat(fun, weights, rest)
        # Values that fun closes over must be arguments: JAX's custom rules do not differentiate closures.
        converted, closed_over = jax.closure_convert(flat.body, *flat.arrays)
        n_own, end = flat.n_weights, len(flat.arrays)

        def staged(arrays: Sequence[Any], moving: Sequence[int]) -> transfer.Forward:
            fixed = [not inputs or i < n_own or i >= end for i in range(len(arrays))]
            weight = [i < n_own or i >= end for i in range(len(arrays))]
            forward = transfer.Forward(
                converted,
                arrays,
                moving=moving,
                fixed=fixed,
                weights=weight,
                wanted=wanted,
                ahead=ahead,
                windows=windows,
            )
            traced(sum(nbytes(v.aval) for v in forward.moved))
            return forward

        call = differentiated(converted, staged, to_host, to_device)
        return flat.result(call(*flat.arrays, *closed_over))

    return run
