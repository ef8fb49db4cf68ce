"""The documented configuration, and the policy that it means."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable
from typing import Any

from nexus_jax.planner import Budget, Plan
from nexus_jax.policy import CheckpointRule, Policy, load_policy

DEFAULT_HEAVY_OPS = (
    "MultiheadAttention",
    "Attention",
    "SelfAttention",
    "CrossAttention",
    "FlashAttention",
    "Linear",
    "Conv2d",
    "MultiHeadDotProductAttention",
    "MultiHeadAttention",
    "Dense",
    "DenseGeneral",
    "Einsum",
    "Conv",
)
_MATMUL_LAYERS = ("Linear", "Dense", "Einsum", "Conv")


class CheckpointPolicy(enum.Enum):
    """The documented policies; wherever one is taken, its string is too."""

    NONE = "none"
    ALL = "all"
    AUTO = "auto"
    CUSTOM = "custom"
    ALTERNATE = "alternate"
    HEAVY_OPS = "heavy_ops"


@dataclasses.dataclass(frozen=True)
class SelectiveCheckpointConfig:
    """What to checkpoint.

    Args:
        policy: a :class:`CheckpointPolicy` or its string; also any :class:`nexus_jax.Policy`, the name of a shipped
            policy, or the path of a ``.toml`` file.
        custom_policy: ``custom_policy(module) -> bool``, for CUSTOM.
        heavy_ops: parts of class names, for HEAVY_OPS; the documented ones and Flax's spellings by default.
        preserve_rng_state: must be True: JAX replays random keys by construction.
        use_reentrant: must be False: JAX has no reentrant autograd.
        auto_wrap_min_params: parameters, for AUTO (more than) and for the matmul layers of HEAVY_OPS (from).
        memory_budget: for AUTO: what the model's call and its gradient may take on the device, in bytes, as ``"12GiB"``
            or as ``"90%"`` of what a program may take there. The plan is made when the model is first differentiated
            (:class:`nexus_jax.planner.Budget`).
        target: the device of the budget, ``"v5e"``, ``"h200"``, ...; None is the local one.
        host_budget: bytes of host memory that the plan may use beside it, as a number or ``"64GiB"``; 0 offloads nothing.

    Raises:
        ValueError, TypeError: one sentence that says what is wrong and what to write.

    Example:
        >>> SelectiveCheckpointConfig(policy="heavy_ops").policy
        <CheckpointPolicy.HEAVY_OPS: 'heavy_ops'>
    """

    policy: CheckpointPolicy | str | Policy = CheckpointPolicy.AUTO
    custom_policy: Callable[[Any], bool] | None = None
    heavy_ops: tuple[str, ...] | list[str] | None = None
    preserve_rng_state: bool = True
    use_reentrant: bool = False
    auto_wrap_min_params: int = 1_000_000
    memory_budget: int | str | None = None
    target: str | None = None
    host_budget: int | str = 0

    def __post_init__(self):
        if self.preserve_rng_state is not True:
            raise ValueError(
                f"preserve_rng_state={self.preserve_rng_state!r}: JAX replays random keys by construction, so a "
                "recomputed dropout mask is always the same; leave it True."
            )
        if self.use_reentrant is not False:
            raise ValueError(f"use_reentrant={self.use_reentrant!r}: JAX has no reentrant autograd; leave it False.")
        if isinstance(self.policy, str) and self.policy in {p.value for p in CheckpointPolicy}:
            object.__setattr__(self, "policy", CheckpointPolicy(self.policy))
        if isinstance(self.policy, str):
            object.__setattr__(self, "policy", _load(self.policy))
        if isinstance(self.policy, Plan):
            object.__setattr__(self, "policy", Policy(name="plan", summary="A plan.", whole=self.policy))
        if not isinstance(self.policy, CheckpointPolicy | Policy):
            raise TypeError(f"policy={self.policy!r}: write one of {_choices()}, or a nexus_jax.Policy.")
        n = self.auto_wrap_min_params
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"auto_wrap_min_params={n!r}: write a whole number of parameters, from 0 up.")
        custom = self.policy is CheckpointPolicy.CUSTOM
        if custom and not callable(self.custom_policy):
            raise ValueError(
                f"policy=CUSTOM with custom_policy={self.custom_policy!r}: "
                "give a function of one module that returns True or False."
            )
        if not custom and self.custom_policy is not None:
            raise ValueError('custom_policy is only asked with policy="custom"; write that, or leave it out.')
        self._check_heavy_ops()
        self._check_budget()

    def _check_budget(self) -> None:
        if self.memory_budget is None:
            if self.target is not None:
                raise ValueError(f"target={self.target!r} is the device of a memory_budget: give one, or leave it out.")
            if self.host_budget != 0:
                raise ValueError(
                    f"host_budget={self.host_budget!r} goes with a memory_budget: give one, or leave it out."
                )
            return
        if self.policy is not CheckpointPolicy.AUTO:
            raise ValueError(f'memory_budget={self.memory_budget!r} is planned for with policy="auto"; write that.')
        self._budget(self.memory_budget)

    def _budget(self, memory_budget: int | str) -> Budget:
        return Budget(memory_budget=memory_budget, target=self.target, host_budget=self.host_budget)

    def _check_heavy_ops(self) -> None:
        ops = self.heavy_ops
        if ops is None:
            return
        if isinstance(ops, str) or not all(isinstance(op, str) and op for op in ops) or not ops:
            raise ValueError(f'heavy_ops={ops!r}: write a list of parts of class names, as ["Attention"].')
        object.__setattr__(self, "heavy_ops", tuple(ops))

    def resolve(self) -> Policy:
        """The policy this configuration means."""
        match self.policy:
            case Policy():
                return self.policy
            case CheckpointPolicy.HEAVY_OPS:
                return self._heavy_ops()
            case CheckpointPolicy.CUSTOM:
                rule = CheckpointRule(where=self.custom_policy)
                return Policy(name="custom", checkpoint=(rule,), strict=False)
            case CheckpointPolicy.AUTO if self.memory_budget is not None:
                whole = self._budget(self.memory_budget)
                return Policy(name="auto", summary="The fastest plan within a budget.", whole=whole)
            case CheckpointPolicy.AUTO:
                return _with_min_params(load_policy("auto"), self.auto_wrap_min_params + 1)
        return load_policy(CheckpointPolicy(self.policy).value)

    def _heavy_ops(self) -> Policy:
        policy = load_policy("heavy_ops")
        if self.heavy_ops is None:
            return _with_min_params(policy, self.auto_wrap_min_params)
        matmuls = [op for op in self.heavy_ops if any(part in op for part in _MATMUL_LAYERS)]
        rules = []
        for ops, least in (
            ([o for o in self.heavy_ops if o not in matmuls], None),
            (matmuls, self.auto_wrap_min_params),
        ):
            if ops:
                rules.append(CheckpointRule(type=f".*({'|'.join(map(re.escape, ops))}).*", min_params=least))
        return dataclasses.replace(policy, checkpoint=tuple(rules))


def _with_min_params(policy: Policy, least: int) -> Policy:
    rules = tuple(r if r.min_params is None else dataclasses.replace(r, min_params=least) for r in policy.checkpoint)
    return dataclasses.replace(policy, checkpoint=rules)


def _choices() -> str:
    return ", ".join(repr(p.value) for p in CheckpointPolicy)


def _load(name: str) -> Policy:
    try:
        return load_policy(name)
    except ValueError as e:
        if name.endswith(".toml"):
            raise
        raise ValueError(f"policy={name!r} is unknown: write one of {_choices()}. Otherwise, {e}") from None


def as_config(config: Any = None, **kwargs: Any) -> SelectiveCheckpointConfig:
    """A configuration from what the documented calls take: a config, a policy, a string, or keywords."""
    if config is None:
        return SelectiveCheckpointConfig(**kwargs)
    if kwargs:
        raise TypeError(f"give a config or keywords, not both: got {config!r} and {sorted(kwargs)}.")
    if isinstance(config, SelectiveCheckpointConfig):
        return config
    return SelectiveCheckpointConfig(policy=config)
