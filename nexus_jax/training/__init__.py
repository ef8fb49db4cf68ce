"""The documented API."""

from nexus_jax.training.gradient_methods import ActivationOffloader as ActivationOffloader
from nexus_jax.training.gradient_methods import CheckpointPolicy as CheckpointPolicy
from nexus_jax.training.gradient_methods import SelectiveCheckpoint as SelectiveCheckpoint
from nexus_jax.training.gradient_methods import SelectiveCheckpointConfig as SelectiveCheckpointConfig
from nexus_jax.training.gradient_methods import apply_selective_checkpointing as apply_selective_checkpointing
from nexus_jax.training.gradient_methods import (
    estimate_checkpointing_memory_savings as estimate_checkpointing_memory_savings,
)
from nexus_jax.training.gradient_methods import (
    estimate_offloading_memory_savings as estimate_offloading_memory_savings,
)
