"""Does an autoencoder suit the images that a model is to be trained on?

A model cannot be better than its autoencoder's reconstructions. One that was trained on other
images may fail without any error: one of gray digits makes gray blots of photographs.

Letters: B images, h w sides of an image.
"""

from typing import Any

import jax
import numpy as np

from hmar_jax.autoencoders import make_autoencoder

_MAX_IMAGES = 16
# Decibels. The digits' tokenizer has 29 on its digits, and 11 on photographs, where the mean color
# of each image has 15.
_LEAST_PSNR = 16.0
_LEAST_COLOR = 0.1  # of the variance between the channels
_COLORED = 1e-4  # images of less variance between the channels are called gray


def warnings(name: str, config: Any, params: Any, images: np.ndarray) -> list[str]:
    """Why images come back from an autoencoder too much changed to train on it, in words.

    Args:
      name: what the user calls the autoencoder, or the model it is part of.
      config: of the autoencoder.
      params: of the autoencoder.
      images: (B, h, w, 3) uint8, as the model is trained on; a few of them are used.
    """
    images = images[:_MAX_IMAGES]
    if not len(images):
        return []
    autoencoder = make_autoencoder(config)
    with jax.default_device(jax.local_devices()[0]):
        decoded = jax.jit(lambda p, x: autoencoder.decode(p, autoencoder.encode(p, x)))(
            params, images
        )
    decoded = np.clip(np.asarray(decoded, np.float32), 0, 1)
    images = images / np.float32(255)
    means = np.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)
    psnr, psnr_of_means = _psnr(decoded, images), _psnr(means, images)
    cure = (
        "a model trained on it cannot sample better than that; train a tokenizer on these images "
        "(hmar train-tokenizer --config=configs/tokenizer.py:photos), or name one that was"
    )
    found = []
    if psnr < max(_LEAST_PSNR, psnr_of_means):
        found.append(
            f"{name!r} reconstructs {len(images)} held-out images with {psnr:.1f} dB PSNR (each "
            f"image's mean color: {psnr_of_means:.1f} dB): {cure}"
        )
    elif _color(images) > _COLORED and _color(decoded) < _LEAST_COLOR * _color(images):
        found.append(f"{name!r} reconstructs colored images in gray: {cure}")
    return found


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over images in [0, 1], (B, h, w, 3), in decibels."""
    errors = np.maximum(np.mean((a - b) ** 2, (1, 2, 3)), 1e-10)
    return float(np.mean(-10 * np.log10(errors)))


def _color(images: np.ndarray) -> float:
    """The variance between the channels of a pixel."""
    return float(np.mean(images.var(-1)))
