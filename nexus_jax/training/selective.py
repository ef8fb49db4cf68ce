"""Selective checkpointing: the entry points."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from jax.extend.core import get_opaque_trace_state

from nexus_jax import adapters, ambient
from nexus_jax.boundary import checkpointed
from nexus_jax.planner import Plan, plans_of
from nexus_jax.policy import Policy
from nexus_jax.policy.select import ModuleNode, Selection, _Tree
from nexus_jax.training.config import CheckpointPolicy, SelectiveCheckpointConfig, as_config


def apply_selective_checkpointing(model: Any, config: Any = None) -> Any:
    """The model, with some module calls under ``jax.checkpoint``: less memory, some recomputation, nothing else.

    Parameter tree, initial values, random streams, mutable collections, sown values and checkpoints are those of the
    plain model. The model given is not changed; applying again replaces.

    Args:
        model: a linen module (instance, or class: it decorates) or an nnx module. An nnx result has Variables of
            its own that share the arrays.
        config: a :class:`SelectiveCheckpointConfig`, or anything its ``policy`` takes; AUTO by default.

    Raises:
        TypeError: no Flax module.
        ValueError: a user's rule that matches nothing (nnx: here; linen: when the model is first traced).

    Example:
        >>> import flax.linen as nn
        >>> block = apply_selective_checkpointing(nn.Dense(4), "all")
        >>> type(block).__name__
        'Dense'
    """
    return adapters.of(model).transform(model, policy=as_config(config).resolve())


@dataclasses.dataclass(frozen=True)
class AppliedPolicy:
    """The policy of a transformed model, and its boundaries as far as they are known; made to be printed."""

    policy: Policy
    selection: Selection | None
    plans: tuple[Plan, ...] = ()
    """Of a policy with a memory budget: the plan of each program that was differentiated so far."""

    def __str__(self) -> str:
        if self.policy.whole is not None:
            known = "plans: made once the model is first differentiated"
            return f"{self.policy}\n{known if not self.plans else chr(10).join(map(str, self.plans))}"
        known = "boundaries: known once the model is traced (init, or a first call)"
        return f"{self.policy}\n{known if self.selection is None else self.selection}"


def policy_of(model: Any) -> AppliedPolicy:
    """What a transformed model does: its policy, its boundaries, and what was dropped and why."""
    adapter = adapters.of(model)
    policy = adapter.settings(model).policy
    plans = plans_of(model if isinstance(model, type) else type(model))
    return AppliedPolicy(policy if policy is not None else Policy(name="none"), adapter.selection_of(model), plans)


class SelectiveCheckpoint:
    """Selective checkpointing inside a model's own forward, and the question what would be checkpointed.

    Args:
        config: a :class:`SelectiveCheckpointConfig`; or keywords of one, as ``policy="heavy_ops"``.

    Example:
        >>> from flax import nnx
        >>> SelectiveCheckpoint(policy="heavy_ops").should_checkpoint(nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0)))
        True
    """

    def __init__(self, config: Any = None, **kwargs: Any):
        self.config: SelectiveCheckpointConfig = as_config(config, **kwargs)
        self.policy = self.config.resolve()
        if self.policy.whole is not None:
            raise ValueError("a memory budget or a plan is for a whole model: use apply_selective_checkpointing.")
        self._counts: dict[Any, int] = {}
        self._trace: Any = None

    def __repr__(self) -> str:
        return f"SelectiveCheckpoint({self.config!r})"

    def should_checkpoint(self, module: Any) -> bool:
        """Whether the policy names this module: by its class, its size, its turn (ALTERNATE) or CUSTOM's answer.

        The whole model is not known here, so families of layers are not: ALL says yes to every module, AUTO to
        every one of more than ``auto_wrap_min_params`` parameters, and ALTERNATE to every other one of a class (the
        number at the end of a linen module's name, otherwise the order of asking within one trace).

        Raises:
            ValueError: a size is needed and the linen module is unbound.
        """
        adapter = adapters.of(module)
        match self.config.policy:
            case CheckpointPolicy.NONE:
                return False
            case CheckpointPolicy.ALL:
                return True
            case CheckpointPolicy.ALTERNATE:
                return self._turn(adapter, module) % 2 == 0
        node = self._node(adapter, module)
        tree = _Tree([node])
        return any(
            tree.matches(
                dataclasses.replace(rule, layers=None, family=None, depth=None, type=rule.type or ".*"), node.path
            )
            for rule in self.policy.checkpoint
        )

    def _node(self, adapter: Any, module: Any) -> ModuleNode:
        name = adapter.type_of(module).__name__
        size = adapter.count_params(module)
        if size is None:
            size = 0
            needs = [r for r in self.policy.checkpoint if r.min_params and (r.type is None or _names(r, name))]
            others = [r for r in self.policy.checkpoint if not r.min_params and r.type and _names(r, name)]
            if needs and not others:
                raise ValueError(
                    f"{self.policy.name} asks for the parameter count of {name}, which is unbound and has none yet: "
                    "bind it (module.bind(variables)), or list a whole model with "
                    "print(nexus_jax.policy_of(model)) after its init."
                )
        where = adapters.linen.ask_where(self.policy, module, name)
        return ModuleNode(path=(name,), type=name, size=size, where=where)

    def _turn(self, adapter: Any, module: Any) -> int:
        index = adapter.index_of(module) if hasattr(adapter, "index_of") else None
        if index is not None:
            return index
        trace = get_opaque_trace_state(convention="flax")
        if trace != self._trace:  # a new trace counts from the start, so that it equals the last one
            self._trace, self._counts = trace, {}
        key = adapter.type_of(module)
        seen = self._counts.get(key, 0)
        self._counts[key] = seen + 1
        return seen

    def __call__(self, module_or_function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``module_or_function(*args, **kwargs)``, under ``jax.checkpoint`` if the policy says so and it frees anything.

        Arguments may be anything: flags, None, pytrees, dataclasses, nnx modules. A function, or a method of a module,
        has no class or size to ask about: it is checkpointed unless the policy is NONE, or CUSTOM says no. An nnx
        module that a function changes must be its argument, or the method's own. Inside an ``offload_context``, what
        the policy keeps is offloaded.

        Raises:
            TypeError: neither a module nor a function.
        """
        run = self._run(module_or_function)
        offloader = ambient.current()
        with contextlib.ExitStack() as stack:
            if offloader is not None:
                stack.enter_context(ambient.covered())
                run = _chained(offloader.run, run)
            if run is None:
                return module_or_function(*args, **kwargs)
            if adapters.is_module(module_or_function):
                return adapters.of(module_or_function).call(run, module_or_function, args, kwargs)
            owner = getattr(module_or_function, "__self__", None)
            if adapters.is_module(owner):
                return adapters.of(owner).call(run, owner, args, kwargs, method=module_or_function.__func__)
            return adapters.nnx.call_function(run, module_or_function, args, kwargs)

    checkpoint_fn = __call__

    def _run(self, module_or_function: Any) -> Any:
        """The boundary to run under, or None."""
        if adapters.is_module(module_or_function):
            if adapters.linen.is_initializing(module_or_function):
                return None
            if adapters.of(module_or_function).is_single_op(module_or_function):
                return None
            return checkpointed(self.policy) if self.should_checkpoint(module_or_function) else None
        if not callable(module_or_function):
            raise TypeError(f"checkpoint_fn takes a module or a function, got {type(module_or_function).__name__}.")
        if adapters.linen.is_initializing(getattr(module_or_function, "__self__", None)):
            return None
        name = getattr(module_or_function, "__name__", "")
        match self.config.policy:
            case CheckpointPolicy.NONE:
                return None
            case CheckpointPolicy.CUSTOM if not adapters.linen.ask_where(self.policy, module_or_function, name):
                return None
        return checkpointed(self.policy)


def _chained(outer: Callable[..., Any], inner: Callable[..., Any] | None) -> Callable[..., Any]:
    """One boundary inside another: offload what checkpointing keeps, which is first of all the input."""
    if inner is None:
        return lambda fun, weights, rest: outer(fun, weights, rest, inputs=True)
    return lambda fun, weights, rest: outer(lambda w, r: inner(fun, w, r), weights, rest, inputs=True)


def _names(rule: Any, name: str) -> bool:
    return re.fullmatch(rule.type, name) is not None
