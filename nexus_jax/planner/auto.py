"""A budget as a policy: the plan of a model's call, made when it is first differentiated."""

from __future__ import annotations

import dataclasses
import tomllib
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tomli_w
from jax.extend import core as jex

from nexus_jax import _compat
from nexus_jax import flat as flats
from nexus_jax.boundary import Call
from nexus_jax.flat import is_floating
from nexus_jax.planner import files
from nexus_jax.planner.allocate import Path
from nexus_jax.planner.budget import budget_of, host_budget_of
from nexus_jax.planner.make import Planner
from nexus_jax.planner.plan import Infeasible, Plan
from nexus_jax.planner.rewrite import rewritten
from nexus_jax.targets import cache as caches
from nexus_jax.targets.compiler import find_target

_MADE: weakref.WeakKeyDictionary[type, dict[str, Plan]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a model's call may take; planned for each program that is differentiated, and kept on disk.

    The budget is that of the call and its gradient: what is differentiated and the other inputs, what the model keeps, the
    gradients. The loss after it is stood in for by the sum of squares of what the model returns, sows and changes. The
    state of an optimizer and what the loss itself keeps come on top.

    Args:
        memory_budget: bytes, ``"12GiB"``, or ``"90%"`` of what a program may take on the target.
        target: ``"v5e"``, ``"h200"``, ...; None is the local device.
        host_budget: bytes of host memory that the plan may use, as a number or ``"64GiB"``; 0 offloads nothing.

    Raises:
        ValueError, TypeError: no size, more than the target has, an unknown target, or one whose link to the host is not
            known.
    """

    memory_budget: int | str
    target: str | None = None
    host_budget: int | str = 0

    def __post_init__(self) -> None:
        target = find_target(self.target)
        limit = 2**63 if target.sheet is None else target.sheet.usable_bytes  # the local device is not asked yet
        budget_of(self.memory_budget, target, limit)
        host_budget_of(self.host_budget, target)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.document().items())

    def document(self) -> dict[str, Any]:
        """What a policy's file says of it."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, 0)}

    def program(self, call: Call) -> Callable[..., list[Any]]:
        """The call as its plan says.

        Raises:
            Infeasible: no plan fits; says what does.
            ValueError: the model is sharded or runs inside ``shard_map``.
        """
        _require_whole(call)
        planner = CallPlanner(call, self.target, self.host_budget)
        parts = ("plan", planner.subject.digest, call.differentiated, self.document(), files.FORMAT)
        key = caches.key_of(*parts, planner.target.versions())
        made = _MADE.setdefault(call.model, {})
        if key not in made:
            made[key] = _kept(key) or self._plan(planner, call, key)
        return made[key].rewritten(call.flat)

    def _plan(self, planner: CallPlanner, call: Call, key: str) -> Plan:
        try:
            made = planner.plan(self.memory_budget)
        except Infeasible as error:
            raise Infeasible(
                f"{call.model.__name__}, its call and gradient without loss and optimizer: {error}", error.smallest
            ) from None
        caches.Cache().put(key, {"plan": tomli_w.dumps(made.document())})
        return made


def plans_of(model: type) -> tuple[Plan, ...]:
    """The plans that were made for calls of a class of models, first one first."""
    return tuple(_MADE.get(model, {}).values())


def _kept(key: str) -> Plan | None:
    found = caches.Cache().get(key)
    try:
        return None if found is None else files.parsed(tomllib.loads(found["plan"]))
    except (KeyError, TypeError, ValueError) as error:
        warnings.warn(f"the cached plan {key[:8]} cannot be read ({error}); planning again.", stacklevel=2)
        return None


def _require_whole(call: Call) -> None:
    """Raise where the program is one of several devices: its bytes are not those of one compile without them."""
    collective = next(
        (e for e in call.flat.eqns if "axis_name" in e.params or ("axes" in e.params and _named(e))), None
    )
    sharded = any(_sharded(v.aval) for v in call.flat.jaxpr.invars)
    if collective is not None or sharded:
        what = "its arguments are sharded" if sharded else f"it communicates ({collective.primitive.name})"
        raise ValueError(
            f"memory_budget plans {call.model.__name__} for one device, and {what}: give the whole loss to nexus_jax.plan, "
            "with arguments that have their shardings, and apply the plan to it."
        )


def _named(eqn: Any) -> bool:
    return any(isinstance(axis, str) for axis in eqn.params["axes"])


def _sharded(aval: Any) -> bool:
    spec = getattr(getattr(aval, "sharding", None), "spec", ())
    return any(axis is not None for axis in spec) or bool(_compat.varying_axes(aval))


class CallPlanner(Planner):
    """Plans of a model's call, measured with a loss that stands in for the user's."""

    def __init__(self, call: Call, target: str | None, host_budget: int | str = 0):
        self.call = call
        program = jex.jaxpr_as_fun(jex.ClosedJaxpr(call.flat.jaxpr, ()))
        loss, avals = self._loss(program), flats.avals(call.flat)
        super().__init__(loss, avals, target=target, argnums=call.differentiated, host_budget=host_budget)
        inputs = set(call.flat.jaxpr.invars)  # a state that does not change is a result too
        made = [(i, v) for i, v in enumerate(call.flat.jaxpr.outvars) if isinstance(v, jex.Var) and v not in inputs]
        self.results = tuple(i for i, v in made if is_floating(v.aval))

    @property
    def flat(self) -> flats.Flat:
        return self.call.flat

    @property
    def differentiated(self) -> Sequence[int]:
        return self.call.differentiated

    def applied(self, path: Path) -> Callable[..., Any]:
        return self._loss(rewritten(self.flat, self.model.segments(path)))

    def _loss(self, program: Callable[..., list[Any]]) -> Callable[..., jax.Array]:
        def loss(*arrays: Any) -> jax.Array:
            outs = program(*arrays)
            return sum((jnp.sum(jnp.square(outs[i].astype(jnp.float32))) for i in self.results), jnp.float32(0))

        loss.__name__ = self.call.model.__name__
        return loss
