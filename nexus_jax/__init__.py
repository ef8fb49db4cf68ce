"""Save, recompute or offload: activation memory for Flax models, by policy and with proof."""

from nexus_jax import checkpoint_policies as checkpoint_policies
from nexus_jax import timeline as timeline
from nexus_jax.calibration import Calibration as Calibration
from nexus_jax.calibration import calibrate as calibrate
from nexus_jax.compare import Comparison as Comparison
from nexus_jax.compare import compare as compare
from nexus_jax.doctor import doctor as doctor
from nexus_jax.engaged import engaged as engaged
from nexus_jax.fit import fit as fit
from nexus_jax.measure import Measurement as Measurement
from nexus_jax.measure import measure as measure
from nexus_jax.offloading.hazards import OffloadHazard as OffloadHazard
from nexus_jax.peak import predict_peak as predict_peak
from nexus_jax.planner import Infeasible as Infeasible
from nexus_jax.planner import Plan as Plan
from nexus_jax.planner import PlanMismatch as PlanMismatch
from nexus_jax.planner import plan as plan
from nexus_jax.policy import CheckpointRule as CheckpointRule
from nexus_jax.policy import Policy as Policy
from nexus_jax.policy import ResidualRule as ResidualRule
from nexus_jax.policy import available_policies as available_policies
from nexus_jax.policy import load_policy as load_policy
from nexus_jax.residuals import Residual as Residual
from nexus_jax.residuals import Residuals as Residuals
from nexus_jax.residuals import residuals as residuals
from nexus_jax.targets.compiler import CompileError as CompileError
from nexus_jax.targets.compiler import target_mesh as target_mesh
from nexus_jax.training import ActivationOffloader as ActivationOffloader
from nexus_jax.training import CheckpointPolicy as CheckpointPolicy
from nexus_jax.training import SelectiveCheckpoint as SelectiveCheckpoint
from nexus_jax.training import SelectiveCheckpointConfig as SelectiveCheckpointConfig
from nexus_jax.training import apply_selective_checkpointing as apply_selective_checkpointing
from nexus_jax.training import estimate_checkpointing_memory_savings as estimate_checkpointing_memory_savings
from nexus_jax.training import estimate_offloading_memory_savings as estimate_offloading_memory_savings
from nexus_jax.training.offload import OffloadWarning as OffloadWarning
from nexus_jax.training.selective import policy_of as policy_of
from nexus_jax.training.verify import OffloadMismatch as OffloadMismatch

__version__ = "0.1.0"
