"""Which kind of device a program is traced for."""

import jax


def platform() -> str:
    """ "tpu", "gpu" or "cpu": that of the mesh around, which may be of devices that are not here, else of this process."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()
