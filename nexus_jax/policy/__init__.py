"""Rules and their TOML; a policy's meaning for a tree of modules, and as names for ``jax.checkpoint``."""

from nexus_jax.policy.files import available_policies as available_policies
from nexus_jax.policy.files import load_policy as load_policy
from nexus_jax.policy.rules import CheckpointRule as CheckpointRule
from nexus_jax.policy.rules import Policy as Policy
from nexus_jax.policy.rules import ResidualRule as ResidualRule
