"""The documented import path of the gradient methods."""

from nexus_jax.training.config import CheckpointPolicy as CheckpointPolicy
from nexus_jax.training.config import SelectiveCheckpointConfig as SelectiveCheckpointConfig
from nexus_jax.training.estimates import (
    estimate_checkpointing_memory_savings as estimate_checkpointing_memory_savings,
)
from nexus_jax.training.estimates import estimate_offloading_memory_savings as estimate_offloading_memory_savings
from nexus_jax.training.offload import ActivationOffloader as ActivationOffloader
from nexus_jax.training.selective import SelectiveCheckpoint as SelectiveCheckpoint
from nexus_jax.training.selective import apply_selective_checkpointing as apply_selective_checkpointing
