"""The planner: a budget in bytes in, the fastest plan that fits out."""

from nexus_jax.planner import files as files
from nexus_jax.planner.auto import Budget as Budget
from nexus_jax.planner.auto import plans_of as plans_of
from nexus_jax.planner.make import Planner as Planner
from nexus_jax.planner.make import plan as plan
from nexus_jax.planner.plan import Infeasible as Infeasible
from nexus_jax.planner.plan import Plan as Plan
from nexus_jax.planner.plan import PlanMismatch as PlanMismatch
