"""Which kind of device a program is traced for."""

import jax


def platform() -> str:
    """ "tpu", "gpu" or "cpu": that of the mesh around, which may be of devices that are not here, else of this process."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def why_not_nvidia():
    """None if this process runs on an NVIDIA GPU, otherwise the reason in words."""
    if platform() != "gpu":
        return f"it needs an NVIDIA GPU, this process runs on {platform()}"
    if "cuda" not in jax.local_devices()[0].client.platform_version.lower():
        return "it needs an NVIDIA GPU, this process runs on another kind"
    return None
