"""Distances to nearest images, which show copying and collapse.

Two figures, each divided by the same figure of held-out real images, so that 1 is what real images have:

    near         the distance to the nearest training image. Below 1: samples lie closer to training images than
                 new real images do; 0: all are copies. Above 1: unlike real images.
    diversity    the distance to the nearest other sample of the same class. Below 1: samples repeat one another, or are
                 blurred; 0: all samples of a class are the same.

Noise raises both, and so can hide a collapse: read diversity together with near. The figures themselves scatter: real
digits that were neither trained on nor held out come to 0.97 .. 1.04 and 0.98 .. 1.03 (170 to 500 of them).

A distance is Euclidean over all h * w * 3 values of two images, with pixels in [0, 1] rounded to 1/255.
"""

from __future__ import annotations

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.evaluation.classifier import to_labels, to_pixels

DRAWS = 16  # equal-sized draws that a figure is averaged over
_CHUNK = 512  # images held as float64 at a time


def nearest_distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance from each image to the nearest of `others`; exactly 0 for a copy.

    Args:
      images, others: uint8 or [0, 1] floating-point (N, h, w, 3) and (M, h, w, 3).

    Returns:
      float64 (N,).

    Raises:
      InputError: the images are not as above.
    """
    return _distances(to_pixels(images), to_pixels(others)).min(1)


def neighbour_distances(
    samples: np.ndarray,
    asked: np.ndarray,
    train_images: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[str, float]:
    """Near and diversity of samples beside those of held-out real images.

    All figures are means over the classes that occur in `asked`, of means over the images of a class; so another mix
    of classes among the held-out images makes no difference.

    near: to the nearest of all training images, whatever its class: a copy under another label is a copy. Samples
    and held-out images are compared with the same training images, so their own number does not matter.

    diversity: the nearest of many is closer than the nearest of few. Hence for each class as many samples as held-out
    images are drawn, n = min of the two counts, without replacement, and only neighbours inside a draw count; the
    figure is the mean over `draws` draws. (Digits: 50 samples and 36 held-out images a class give n = 36.)

    Args:
      samples: uint8 or [0, 1] floating-point (N, h, w, 3).
      asked: int (N,), the class that each sample was asked to be; each class at least twice.
      train_images: (M, h, w, 3), all images that the model was trained on, without augmentation.
      held_out: images (H, h, w, 3) and labels (H,) that it was not trained on, at least two of each class in `asked`.
      seed: of the draws.
      draws: their number.

    Returns:
      near_sample, near_held_out, diversity_sample, diversity_held_out: distances; near, diversity: their ratios.

    Raises:
      InputError: the arrays are not as above, or the held-out images have distance 0 (they were trained on, or all
        images of a class are the same), so that there is no ratio.
    """
    samples, train = to_pixels(samples, "samples"), to_pixels(train_images, "training images")
    asked = to_labels(asked, len(samples), "asked-for classes")
    real = to_pixels(held_out[0], "held-out images")
    labels = to_labels(held_out[1], len(real), "held-out labels")
    counts = equal_counts(asked, labels)

    near_sample = _near(samples, asked, train, counts)
    near_held_out = _near(real, labels, train, counts)
    if near_held_out == 0:
        raise InputError("every held-out image is also a training image: hold out others")
    diversity_sample = _diversity(samples, asked, counts, seed, draws)
    diversity_held_out = _diversity(real, labels, counts, seed, draws)
    if diversity_held_out == 0:
        raise InputError(
            "the held-out images of each class are all alike: there is no diversity to compare with"
        )
    return {
        "near": near_sample / near_held_out,
        "near_sample": near_sample,
        "near_held_out": near_held_out,
        "diversity": diversity_sample / diversity_held_out,
        "diversity_sample": diversity_sample,
        "diversity_held_out": diversity_held_out,
    }


def equal_counts(asked: np.ndarray, held_out: np.ndarray) -> dict[int, int]:
    """How many images of each asked-for class to draw from the samples and from the held-out images alike.

    Args:
      asked, held_out: int labels of the samples and of the held-out images, (N,) and (H,).

    Returns:
      Label to the smaller of its two counts, for the labels in `asked`, sorted.

    Raises:
      InputError: a class in `asked` has fewer than two samples or held-out images.
    """
    counts = {}
    for label in np.unique(asked):
        found = {
            "samples": int(np.sum(asked == label)),
            "held-out images": int(np.sum(held_out == label)),
        }
        for what, count in found.items():
            if count < 2:
                raise InputError(
                    f"class {label} has {count} {what}: at least 2 of each asked-for class are needed"
                )
        counts[int(label)] = min(found.values())
    return counts


def draw(labels: np.ndarray, counts: dict[int, int], rng: np.random.RandomState) -> np.ndarray:
    """Indices into labels (N,) of `counts[c]` different images of each class c, or of all where there are fewer."""
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels == label))[:n] for label, n in counts.items()]
    )


def _near(
    pictures: np.ndarray, labels: np.ndarray, train: np.ndarray, counts: dict[int, int]
) -> float:
    nearest = _distances(pictures, train).min(1)
    return float(np.mean([nearest[labels == label].mean() for label in counts]))


def _diversity(
    pictures: np.ndarray, labels: np.ndarray, counts: dict[int, int], seed: int, draws: int
) -> float:
    rng = np.random.RandomState(seed)
    means = []
    for label, n in counts.items():
        of_class = pictures[labels == label]
        distances = _distances(of_class, of_class)
        np.fill_diagonal(distances, np.inf)  # a image is not its own neighbour
        for _ in range(draws):
            drawn = rng.permutation(len(of_class))[:n]
            means.append(distances[np.ix_(drawn, drawn)].min(1).mean())
    return float(np.mean(means))  # each class has the same number of draws


def _distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """All distances, (N, M), between uint8 images. |a|^2 - 2ab + |b|^2 is exact, as it is on whole numbers."""
    if images.shape[1:] != others.shape[1:]:
        raise InputError(
            f"images of {images.shape[1:]} cannot be compared with images of {others.shape[1:]}"
        )
    images, others = (pictures.reshape(len(pictures), -1) for pictures in (images, others))
    squares = np.empty((len(images), len(others)))
    for i in range(0, len(images), _CHUNK):
        a = images[i : i + _CHUNK].astype(np.float64)
        for j in range(0, len(others), _CHUNK):
            b = others[j : j + _CHUNK].astype(np.float64)
            squares[i : i + _CHUNK, j : j + _CHUNK] = (
                np.sum(a * a, 1)[:, None] - 2 * (a @ b.T) + np.sum(b * b, 1)[None, :]
            )
    return np.sqrt(squares) / 255
