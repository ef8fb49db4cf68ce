"""Our policies under names that mirror ``jax.checkpoint_policies``, for ``jax.checkpoint(f, policy=...)``.

Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from nexus_jax import checkpoint_policies
    >>> f = jax.checkpoint(lambda w, x: jnp.sin(x @ w), policy=checkpoint_policies.heavy_ops)
"""

import dataclasses

from nexus_jax.policy import Policy, load_policy

none = load_policy("none")
all = load_policy("all")
auto = load_policy("auto")
alternate = load_policy("alternate")
heavy_ops = load_policy("heavy_ops")
heavy_ops_offload = load_policy("heavy_ops_offload")


def offload(*, min_mb: float = 10.0) -> Policy:
    """Offload every weight matmul's output of at least ``min_mb`` MB (2**20 bytes), save smaller ones, recompute the rest."""
    policy = load_policy("offload")
    rules = tuple(r if r.min_mb is None else dataclasses.replace(r, min_mb=min_mb) for r in policy.residual)
    return dataclasses.replace(policy, residual=rules)
