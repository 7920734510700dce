"""The kind of device that a program is traced for."""

import re

import jax

# GPUs with the same multiprocessors as another one and a different memory. They use the tuning of
# that GPU, although it was not measured on them.
_SAME_MULTIPROCESSORS = {"H200": "H100", "GH200": "H100", "H800": "H100"}


def current_platform() -> str:
    """Returns "tpu", "gpu" or "cpu".

    An abstract mesh decides if one is set, since its devices need not exist on this machine;
    otherwise the default backend of this process does.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def nvidia_unsupported_reason() -> str | None:
    """Returns None if this process runs on an NVIDIA GPU, otherwise the reason in words."""
    if current_platform() != "gpu":
        return f"requires an NVIDIA GPU; this process runs on {current_platform()}"
    version = jax.local_devices()[0].client.platform_version
    if "cuda" not in version.lower():
        return f"requires an NVIDIA GPU; this process runs on a GPU of another vendor ({version})"
    return None


def gpu_name(device_kind: str) -> str:
    """Returns the short name of a GPU in the tuning tables.

    "NVIDIA H100 80GB HBM3" becomes "H100", and so does an H200 (`_SAME_MULTIPROCESSORS`). A kind
    that holds no such name is returned unchanged.
    """
    found = re.search(r"\bG?[ABHLV]\d\w*", device_kind)
    name = found.group() if found else device_kind
    return _SAME_MULTIPROCESSORS.get(name, name)
