"""What the machine offers to a command: the current directory, devices, versions."""

import os
import platform

import hmar_jax
from hmar_jax.errors import InputError


def check_current_directory() -> None:
    """Raises InputError if the current directory was deleted; libraries crash in it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the current directory does not exist any more; cd to another") from None


def describe_missing_devices() -> str | None:
    """Why JAX has no device here, in one line; None if it has some."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # of a known platform, JAX raises the latter
        reason = " ".join(str(error).split()).split(" (set JAX_PLATFORMS")[0].rstrip(".")
        wanted = jax.config.jax_platforms
        cure = f"unset JAX_PLATFORMS, which is {wanted!r}" if wanted else "see its installation"
        hint = ', or install the extra: pip install "hmar_jax[gpu]"' if _is_gpu(wanted) else ""
        return f"JAX finds no device{f': {reason}' if reason else ''}; {cure}{hint}"
    return None


def _is_gpu(platforms: str | None) -> bool:
    return any(name in (platforms or "") for name in ("cuda", "gpu"))


def describe_versions() -> str:
    """Versions of the package, JAX and Python, and the devices."""
    import jax

    missing = describe_missing_devices()
    devices = missing or ", ".join(
        f"{sum(d.device_kind == kind for d in jax.devices())} x {kind}"
        for kind in sorted({d.device_kind for d in jax.devices()})
    )
    return (
        f"hmar_jax {hmar_jax.__version__}, jax {jax.__version__}, Python "
        f"{platform.python_version()}; devices: {devices}"
    )
