"""Arguments of the pipeline's methods, as users and notebooks give them: checked, and made uniform.

Letters: B images, h w sides of an image in pixels.
"""

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.data.record_spec import RecordSpec
from hmar_jax.errors import InputError
from hmar_jax.io import crops

_ROUNDING = 1e-4  # of float images: what resizing and rounding add to 0 and 1
_CALLER = 4  # of `edit`, for warnings: between them is what documents the model's options
_COARSE = 2  # how many times new content is enlarged before it is reported


def as_key(rng: Any) -> jax.Array:
    """A random key: as it is, also one of the older kind (uint32 of shape (2,)), or from a seed.

    Raises:
      InputError: it is neither, or several keys.
    """
    if isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        if rng.shape == ():
            return rng
    elif isinstance(rng, jax.Array | np.ndarray) and rng.dtype == np.uint32 and rng.ndim == 1:
        if rng.shape == jax.random.key_data(jax.random.key(0)).shape:
            return jax.random.wrap_key_data(jnp.asarray(rng))
    elif not isinstance(rng, bool | np.bool_):
        try:
            seed = operator.index(rng)
        except TypeError:  # a float, a text, an array
            seed = -1
        if 0 <= seed < 2**32:
            return jax.random.key(seed)
    got = f"{rng.dtype} of shape {rng.shape}" if hasattr(rng, "shape") and rng.shape else repr(rng)
    raise InputError(
        f"rng must be a random key, such as jax.random.key(0), or a seed, an integer in "
        f"[0, {2**32 - 1}]; got {got}"
    )


def as_devices(devices: Any) -> list[jax.Device]:
    """Devices as a list, from one or several; the first one of the process for None.

    Raises:
      InputError: something else was given.
    """
    if devices is None:
        return jax.devices()[:1]
    found = [devices] if isinstance(devices, jax.Device) else devices
    try:
        found = list(np.ravel(found))
    except (TypeError, ValueError):
        found = []
    if not found or not all(isinstance(device, jax.Device) for device in found):
        raise InputError(f"devices must be a list such as jax.devices(); got {devices!r}")
    return found


def as_integer(what: str, given: Any, at_least: int = 0, at_most: int | None = None) -> int:
    """An integer of a range, of any library's type.

    Raises:
      InputError: it is none, also True and 1.0; or it is out of the range.
    """
    try:
        number = at_least - 1 if isinstance(given, bool | np.bool_) else operator.index(given)
    except TypeError:
        number = at_least - 1
    if number < at_least or (at_most is not None and number > at_most):
        where = f"of at least {at_least}" if at_most is None else f"in [{at_least}, {at_most}]"
        raise InputError(f"{what} must be an integer {where}; got {given!r}")
    return number


def as_array(what: str, given: Any) -> np.ndarray:
    """Anything that numpy reads as an array.

    Raises:
      InputError: it reads none: rows of several lengths, or a tensor that is not on the host.
    """
    try:
        return np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{what} must be an array; numpy makes none of it: {reason}") from None


def as_float(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) or (B, h, w, 3), uint8 or float in [0, 1] -> (B, h, w, 3) float32."""
    images = image[None] if image.ndim == 3 else image
    if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise InputError(f"image must have shape (h, w, 3) or (B, h, w, 3); got {image.shape}")
    if images.dtype == np.uint8:
        return images / np.float32(255)
    if not jnp.issubdtype(images.dtype, jnp.floating):  # also bfloat16
        raise InputError(f"image must be uint8, or float in [0, 1]; got {images.dtype}")
    images = images.astype(np.float32)
    if not (images.min() >= -_ROUNDING and images.max() <= 1 + _ROUNDING):
        raise InputError(
            f"float images must lie in [0, 1]; got values in [{images.min():g}, {images.max():g}]"
        )
    return images.clip(0, 1)


def as_mask(mask, image_shape) -> tuple[np.ndarray, bool]:
    """(B, h, w) bool, and whether one mask was given."""
    mask = as_array("mask", mask)
    single = mask.ndim == 2
    rows = mask[None] if single else mask
    if rows.ndim != 3 or rows.shape[1:] != tuple(image_shape[-3:-1]):
        raise InputError(
            f"mask must have shape (h, w) or (B, h, w) of the image, {tuple(image_shape)}; "
            f"got {mask.shape}"
        )
    if rows.dtype == np.uint8:
        white = 1 if rows.max() == 1 else 128  # a mask of 0 and 1 is one of numbers, not of grays
        selected = rows >= white
        if rows.any() and not selected.any():
            raise InputError(
                f"mask selects 0 of {rows.size:,} pixels: its values lie in [{rows.min()}, "
                f"{rows.max()}]; give bool, or uint8 with at least 128 where new content goes"
            )
        rows = selected
    elif rows.dtype != bool:
        raise InputError(
            "mask must be bool, or uint8 with at least 128 where new content goes; "
            f"got {mask.dtype}"
        )
    return rows, single


def check_latents(given: Any, record: RecordSpec) -> tuple[dict[str, np.ndarray], bool]:
    """Latents by field with a batch axis, and whether those of one image were given.

    Raises:
      InputError: another shape or type, or a value outside the vocabulary.
    """
    by_name = given if isinstance(given, Mapping) else {record.fields[0].name: given}
    found, single = {}, False
    for field in record.fields:
        if field.name not in by_name:
            raise InputError(f"latents must have {field.name!r}; got {', '.join(by_name)}")
        given_array, shape = as_array(field.name, by_name[field.name]), tuple(field.shape)
        x = given_array
        single = x.ndim == len(shape)
        x = x[None] if single else x
        kind = np.integer if field.vocab_size else np.floating
        if x.shape[1:] != shape or not x.size or not np.issubdtype(x.dtype, kind):
            sizes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
            what = "integers" if field.vocab_size else "floats"
            raise InputError(
                f"{field.name} must be {what} of shape ({sizes}) or (B, {sizes.rstrip(',')}); "
                f"got {given_array.dtype} of shape {given_array.shape}"
            )
        if field.vocab_size and not 0 <= x.min() <= x.max() < field.vocab_size:
            raise InputError(
                f"{field.name} must be in [0, {field.vocab_size - 1}]; "
                f"got values in [{x.min()}, {x.max()}]"
            )
        found[field.name] = x.astype(np.int32 if field.vocab_size else np.float32)
    return found, single


def warn_of_useless_masks(mask: np.ndarray) -> None:
    """Says where masks (B, h, w) bool leave nothing to regenerate, or nothing to keep."""
    for selected, effect in ((mask, "nothing is kept"), (~mask, "nothing is regenerated")):
        if selected.all((1, 2)).any():
            count = mask[0].size if effect == "nothing is kept" else 0
            warnings.warn(
                f"a mask selects {count:,} of {mask[0].size:,} pixels: {effect}",
                stacklevel=_CALLER,
            )


def warn_of_coarse_detail(windows: Sequence[crops.Window], side: int) -> None:
    """Says how much the largest square is enlarged, if that is visible."""
    largest = max(window.side for window in windows)
    if largest > _COARSE * side:
        warnings.warn(
            f"new content will be coarse: {largest}x{largest} pixels of the image are generated at "
            f"{side}x{side} and enlarged {largest / side:.3g} times; smaller regions become finer",
            stacklevel=_CALLER,
        )
