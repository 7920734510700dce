"""scikit-learn's 1,797 handwritten digits, as a source of images in memory."""

import dataclasses

import numpy as np
from PIL import Image

from hmar_jax.data.fingerprint import fingerprint_values
from hmar_jax.errors import InputError

_NUM_VALIDATE_DIGITS = 360  # leaves 1,437 for training
_DIGITS_SPLIT_SEED = 0  # fixed, so that runs with different seeds validate on the same digits


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images that are already in an array."""

    name: str
    class_names: tuple[str, ...]
    images: np.ndarray  # (N, h, w, 3) uint8
    labels: np.ndarray  # (N,) int

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return fingerprint_values(self.name, list(self.images.shape), self.labels.tolist())


def open_digits(split: str) -> ArraySource:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError('digits requires scikit-learn: pip install "hmar_jax[demo]"') from error
    digits = load_digits()
    validate = _stratified_mask(digits.target, _NUM_VALIDATE_DIGITS, _DIGITS_SPLIT_SEED)
    selected = validate if split == "validate" else ~validate
    images = np.stack([_enlarge_digit(digit) for digit in digits.images[selected]])
    images.setflags(write=False)
    return ArraySource("digits", tuple("0123456789"), images, digits.target[selected])


def _enlarge_digit(digit: np.ndarray) -> np.ndarray:
    """Resizes (8, 8) values in [0, 16] to (32, 32, 3) uint8."""
    image = Image.fromarray((digit * (255 / 16)).astype(np.float32))
    gray = np.array(image.resize((32, 32), Image.Resampling.BICUBIC))
    gray = np.clip(np.rint(gray), 0, 255).astype(np.uint8)  # bicubic resampling overshoots
    return np.repeat(gray[:, :, None], 3, axis=2)


def _stratified_mask(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Selects examples at random, from each class in proportion (largest remainders round up).

    Args:
      labels: (N,) int.
      count: how many examples to select.
      seed: seed of the selection.

    Returns:
      (N,) bool.
    """
    sizes = np.bincount(labels)
    quota = sizes * count / len(labels)
    per_class = np.floor(quota).astype(int)
    by_remainder = np.argsort(per_class - quota, kind="stable")
    per_class[by_remainder[: count - per_class.sum()]] += 1
    # NumPy guarantees the stream of this legacy generator for good, unlike default_rng's.
    rng = np.random.RandomState(seed)
    selected = np.zeros(len(labels), bool)
    for label, n in enumerate(per_class):
        selected[rng.permutation(np.flatnonzero(labels == label))[:n]] = True
    return selected
