"""Alias until the integrator renames uses: see io/images.py."""

from hmar_jax.io.images import make_grid as draw  # noqa: F401
