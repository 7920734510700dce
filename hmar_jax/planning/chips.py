"""Aliases until the integrator renames uses: see parallel/chips.py and planning/topology.py."""

from hmar_jax.parallel.chips import Chip  # noqa: F401
from hmar_jax.planning.topology import PLANNED_CHIPS as CHIPS  # noqa: F401
from hmar_jax.planning.topology import Topology, parse  # noqa: F401
