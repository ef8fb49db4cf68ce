"""Compile a step for a device that nobody here owns, and know what that device has.

:mod:`~nexus_jax.targets.sheets` has the devices as data, :mod:`~nexus_jax.targets.compiler` compiles for them in
worker processes, :mod:`~nexus_jax.targets.cache` keeps the answers. The compilers come with extras:
``pip install "nexus-jax[tpu]"`` and ``"nexus-jax[gpu]"``.
"""

from nexus_jax.targets.compiler import Target as Target
from nexus_jax.targets.compiler import find_target as find_target
from nexus_jax.targets.compiler import target_mesh as target_mesh
from nexus_jax.targets.sheets import Sheet as Sheet
from nexus_jax.targets.sheets import names as names
from nexus_jax.targets.sheets import sheet as sheet
