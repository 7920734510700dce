"""Transforms: an image of any size becomes a square one, with random crops in training."""

import dataclasses

import numpy as np
from PIL import Image

from hmar_jax.settings import Settings, setting

KINDS = ("resize_crop", "random_crop", "affine")

# Longer images are cut to this aspect ratio first. Enlarging one of 1 x 10000 would take gigabytes.
_MAX_ASPECT = 16


@dataclasses.dataclass(frozen=True)
class Transform(Settings):
    """Turns an image of any size into one of (side, side).

    Kinds, in training (in validation every crop is the center crop, and nothing else is random):
      resize_crop: resizes the shorter side to round(resize_ratio * side) with Lanczos, then takes a
        random crop. The published recipe (VAR, arXiv 2404.02905).
      random_crop: takes a random crop without resizing. Only an image whose shorter side is below
        `side` is enlarged to it.
      affine: for digits. Takes the center square at `side`, then applies one bicubic affine map
        around its center: rotation, scale and shear, then translation. Each is uniform in plus or
        minus its setting; pixels from outside are black.

    As in torchvision, which the published recipe uses, the longer side rounds down and the offset
    of the center crop rounds half to even.
    """

    prefix = "transform."

    side: int = setting(dataclasses.MISSING, "Side of the result, in pixels.", at_least=1)
    kind: str = setting("resize_crop", "How images are cropped.", choices=KINDS)
    resize_ratio: float = setting(
        1.125, "resize_crop: the shorter side before the crop, relative to `side`.", at_least=1
    )
    flip: bool = setting(
        False, "Mirror half of the training images left to right. The published recipe does not."
    )
    rotate: float = setting(6.0, "affine: largest rotation, in degrees.", at_least=0)
    shift: float = setting(1.0, "affine: largest translation in x and in y, in pixels.", at_least=0)
    scale: float = setting(0.03, "affine: largest relative change of size.", at_least=0, below=1)
    shear: float = setting(0.05, "affine: largest shear, x per y.", at_least=0)

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Transforms one image.

        Args:
          image: (h, w, 3) uint8.
          rng: random numbers for training; None transforms as in validation.

        Returns:
          (side, side, 3) uint8, C-contiguous.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image must be (h, w, 3) uint8; got {image.shape} {image.dtype}")
        if self.kind == "resize_crop":
            shorter = round(self.resize_ratio * self.side)
            image = _resize_shorter(image, shorter, Image.Resampling.LANCZOS)
        elif self.kind == "random_crop":
            if min(image.shape[:2]) < self.side:
                image = _resize_shorter(image, self.side, Image.Resampling.LANCZOS)
        else:
            image = _resize_shorter(image, self.side, Image.Resampling.BICUBIC)
        image = _crop(image, self.side, None if self.kind == "affine" else rng)
        if rng is not None and self.kind == "affine":
            image = self._random_affine(image, rng)
        if rng is not None and self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return np.ascontiguousarray(image)

    def _random_affine(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        angle = np.deg2rad(rng.uniform(-self.rotate, self.rotate))
        shift = rng.uniform(-self.shift, self.shift, size=2)  # x, y
        scale = 1 + rng.uniform(-self.scale, self.scale)
        shear = rng.uniform(-self.shear, self.shear)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        forward = scale * rotation @ np.array([[1, shear], [0, 1]])
        # PIL takes the map from output to input pixels:
        # input = inverse @ (output - center - shift) + center.
        inverse = np.linalg.inv(forward)
        center = np.full(2, self.side / 2)
        offset = center - inverse @ (center + shift)
        coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
        transformed = Image.fromarray(image).transform(
            (self.side, self.side),
            Image.Transform.AFFINE,
            coefficients,
            Image.Resampling.BICUBIC,
            fillcolor=0,
        )
        return np.asarray(transformed)


def _resize_shorter(image: np.ndarray, shorter: int, resampling: Image.Resampling) -> np.ndarray:
    h, w = image.shape[:2]
    if max(h, w) > _MAX_ASPECT * min(h, w):
        limit = _MAX_ASPECT * min(h, w)
        top, left = max(0, h - limit) // 2, max(0, w - limit) // 2
        image = image[top : top + limit, left : left + limit]
        h, w = image.shape[:2]
    if min(h, w) == shorter:
        return image
    size = (shorter, int(shorter * h / w)) if w <= h else (int(shorter * w / h), shorter)
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, resampling))


def _crop(image: np.ndarray, side: int, rng: np.random.Generator | None) -> np.ndarray:
    max_top, max_left = image.shape[0] - side, image.shape[1] - side
    if rng is None:
        top, left = round(max_top / 2), round(max_left / 2)
    else:
        top, left = int(rng.integers(max_top + 1)), int(rng.integers(max_left + 1))
    return image[top : top + side, left : left + side]
