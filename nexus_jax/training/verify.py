"""Whether a step computes with offloading what it computes without: run twice on the user's own arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nexus_jax import ambient


class OffloadMismatch(AssertionError):
    """A step gives other numbers with offloading than without."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of a step's results.

    Attributes:
        path: where in the results, ``"gradient['w']"``.
        difference: largest of ``|with - without|``, over the largest of ``|without|``; infinite where only one is finite.
        tolerance: what it may be.
    """

    path: str
    difference: float
    tolerance: float

    @property
    def differs(self) -> bool:
        return not self.difference <= self.tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Every array that a step returned, with and without offloading; all of them within their tolerance."""

    leaves: tuple[Leaf, ...]

    @property
    def largest(self) -> Leaf:
        """The leaf nearest to its tolerance."""
        return max(self.leaves, key=lambda leaf: leaf.difference / leaf.tolerance)

    def __str__(self) -> str:
        worst = self.largest
        return (
            f"{len(self.leaves)} arrays are equal with and without offloading; the largest difference, in "
            f"{worst.path}, is {worst.difference:.2g} of its largest value ({worst.tolerance:.2g} is allowed)"
        )


def verify(
    step: Callable[..., Any], args: tuple[Any, ...], offloading: Callable[[], Any], rtol: float | None
) -> Verification:
    """Run ``step(*args)`` in both ways; where it returns a scalar, its gradients by the first argument too.

    Args:
        offloading: makes the context in which offloading is in force.
        rtol: of a leaf's largest value; by default the square root of its precision.

    Raises:
        OffloadMismatch: names the first leaf that differs.
    """
    run = _with_gradients(step, args)
    with ambient.silenced():
        plain = run(*_copied(args))
    with offloading():
        ours = run(*_copied(args))
    theirs, mine = (jax.tree_util.tree_flatten_with_path(_pure(x)) for x in (plain, ours))
    if theirs[1] != mine[1]:
        raise OffloadMismatch(f"with offloading the step returns another tree: {mine[1]} instead of {theirs[1]}")
    pairs = zip(theirs[0], mine[0], strict=True)
    leaves = tuple(_leaf(path, a, b, rtol) for (path, a), (_, b) in pairs if hasattr(a, "dtype"))
    for leaf in leaves:
        if leaf.differs:
            raise OffloadMismatch(
                f"{leaf.path} is the first that differs with offloading: by {leaf.difference:.3g} of its largest "
                f"value, and {leaf.tolerance:.2g} is allowed. {len([x for x in leaves if x.differs])} of "
                f"{len(leaves)} arrays differ."
            )
    if not leaves:
        raise ValueError("the step returns no arrays, so that there is nothing to compare.")
    return Verification(leaves=leaves)


def _with_gradients(step: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """The step; for a loss, its value and gradients by the first argument, jitted."""
    module = bool(args) and isinstance(args[0], nnx.Module)
    shape = (nnx.eval_shape if module else jax.eval_shape)(step, *_copied(args))
    scalar = isinstance(shape, jax.ShapeDtypeStruct) and not shape.shape and jnp.issubdtype(shape.dtype, jnp.floating)
    if not scalar or not args:
        return step
    both = nnx.jit(nnx.value_and_grad(step)) if module else jax.jit(jax.value_and_grad(step))

    def run(*args):
        value, gradient = both(*args)
        return {"loss": value, "gradient": gradient}

    return run


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments that the step may donate or change."""

    def copy(x: Any) -> Any:
        if isinstance(x, nnx.Module):
            graph, state = nnx.split(x)
            return nnx.merge(graph, jax.tree.map(copy, state))
        return jnp.copy(x) if isinstance(x, jax.Array) else x

    return jax.tree.map(copy, args, is_leaf=lambda x: isinstance(x, nnx.Module))


def _pure(tree: Any) -> Any:
    pure = lambda x: nnx.to_pure_dict(nnx.state(x)) if isinstance(x, nnx.Module) else x
    tree = jax.tree.map(pure, tree, is_leaf=lambda x: isinstance(x, nnx.Module))
    plain = lambda x: nnx.to_pure_dict(x) if isinstance(x, nnx.State) else x
    return jax.tree.map(plain, tree, is_leaf=lambda x: isinstance(x, nnx.State))


def _leaf(path: Any, plain: Any, ours: Any, rtol: float | None) -> Leaf:
    name = jax.tree_util.keystr(path).replace("['loss']", "loss").replace("['gradient']", "gradient", 1) or "the result"
    if jnp.issubdtype(plain.dtype, jax.dtypes.prng_key):
        plain, ours = jax.random.key_data(plain), jax.random.key_data(ours)
    if not jnp.issubdtype(plain.dtype, jnp.inexact):
        same = plain.shape == ours.shape and bool(jnp.array_equal(plain, ours))
        return Leaf(path=name, difference=0.0 if same else float("inf"), tolerance=1e-30)
    tolerance = float(jnp.finfo(plain.dtype).eps) ** 0.5 if rtol is None else rtol
    a, b = (np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64) for x in (plain, ours))
    if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return Leaf(path=name, difference=float("inf"), tolerance=tolerance)
    finite = np.isfinite(a)
    scale = float(np.abs(a[finite]).max(initial=0.0)) or 1.0
    return Leaf(path=name, difference=float(np.abs(a - b)[finite].max(initial=0.0)) / scale, tolerance=tolerance)
