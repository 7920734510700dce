"""Distances to nearest images, which reveal memorisation and mode collapse.

Two metrics, each divided by its value for held-out real images, so that real images have 1:

    nearest_train_ratio  the distance to the nearest training image. Below 1: samples are closer to
                         training images than new real images are; 0: all are copies. Above 1:
                         samples are unlike real images.
    diversity            the distance to the nearest other sample of the same class. Below 1:
                         samples repeat each other, or are blurred; 0: all samples of a class are
                         the same.

Noise raises both and can hide a collapse: read diversity together with nearest_train_ratio. Both
vary by chance: real digits that were neither trained on nor held out have 0.97 to 1.04 and 0.98 to
1.03 (170 to 500 digits).

A distance is Euclidean, over all h * w * 3 values of two images, with pixels in [0, 1] rounded to
1/255.
"""

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.evaluation.classifier import to_labels, to_pixels

NUM_SUBSETS = 16  # random subsets of equal size that a metric is averaged over
_CHUNK = 512  # images that are float64 at a time


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
    labels: np.ndarray,
    train_images: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray],
    *,
    seed: int = 0,
    num_subsets: int = NUM_SUBSETS,
) -> dict[str, float]:
    """Distances of samples to training images and to each other, relative to held-out real images.

    All values are means over the classes in `labels` of means over the images of a class, so that
    they do not depend on the proportions of classes among the held-out images.

    nearest_train: the distance to the nearest of all training images, whatever its class, because a
    copy under another label is a copy. Samples and held-out images are compared with the same
    training images, so their own numbers do not matter.

    diversity: the nearest of many images is closer than the nearest of few. So for each class,
    random subsets of n samples and of n held-out images are drawn without replacement, where n is
    the smaller of the two counts. Only neighbours within a subset count; the result is the mean
    over `num_subsets` subsets. For example, 50 samples and 36 held-out images give n = 36.

    Args:
      samples: uint8 or [0, 1] floating-point (N, h, w, 3).
      labels: int (N,), the requested class of each sample; at least two samples per class.
      train_images: (M, h, w, 3), all images that the model was trained on, without augmentation.
      held_out: images (H, h, w, 3) and labels (H,) that it was not trained on, at least two of each
        class in `labels`.
      seed: of the subsets.
      num_subsets: their number.

    Returns:
      nearest_train_sample, nearest_train_held_out, diversity_sample, diversity_held_out: the
      distances; nearest_train_ratio, diversity: their ratios.

    Raises:
      InputError: the arrays are not as above; or the held-out images have distance 0, because they
        are training images or all images of a class are the same, so that there is no ratio.
    """
    samples, train = to_pixels(samples, "samples"), to_pixels(train_images, "training images")
    labels = to_labels(labels, len(samples), "labels of the samples")
    real = to_pixels(held_out[0], "held-out images")
    real_labels = to_labels(held_out[1], len(real), "held-out labels")
    counts = equal_counts(labels, real_labels)

    train_samples = _nearest_train(samples, labels, train, counts)
    train_held_out = _nearest_train(real, real_labels, train, counts)
    if train_held_out == 0:
        raise InputError("held-out images must not be training images; all of them are")
    diversity_sample = _diversity(samples, labels, counts, seed, num_subsets)
    diversity_held_out = _diversity(real, real_labels, counts, seed, num_subsets)
    if diversity_held_out == 0:
        raise InputError("held-out images of a class must differ; all are the same in each class")
    return {
        "nearest_train_ratio": train_samples / train_held_out,
        "nearest_train_sample": train_samples,
        "nearest_train_held_out": train_held_out,
        "diversity": diversity_sample / diversity_held_out,
        "diversity_sample": diversity_sample,
        "diversity_held_out": diversity_held_out,
    }


def equal_counts(labels: np.ndarray, held_out_labels: np.ndarray) -> dict[int, int]:
    """How many images of each class are in both samples and held-out images.

    Args:
      labels, held_out_labels: int, of the samples (N,) and of the held-out images (H,).

    Returns:
      Label -> the smaller of its two counts, for the classes in `labels`, sorted.

    Raises:
      InputError: a class in `labels` has fewer than two samples or held-out images.
    """
    counts = {}
    for label in np.unique(labels):
        samples, held_out = int(np.sum(labels == label)), int(np.sum(held_out_labels == label))
        for what, count, cure in (
            ("samples", samples, "sample more (--n)"),
            ("held-out images", held_out, "add images, or hold out more (--held_out)"),
        ):
            if count < 2:
                raise InputError(
                    f"each class must have at least 2 {what}; class {label} has {count}; {cure}"
                )
        counts[int(label)] = min(samples, held_out)
    return counts


def subsample(labels: np.ndarray, counts: dict[int, int], rng: np.random.RandomState) -> np.ndarray:
    """Indices into labels (N,) of counts[c] random images, or all there are, of each class c."""
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels == label))[:n] for label, n in counts.items()]
    )


def _nearest_train(
    images: np.ndarray, labels: np.ndarray, train: np.ndarray, counts: dict[int, int]
) -> float:
    nearest = _distances(images, train).min(1)
    return float(np.mean([nearest[labels == label].mean() for label in counts]))


def _diversity(
    images: np.ndarray, labels: np.ndarray, counts: dict[int, int], seed: int, num_subsets: int
) -> float:
    rng = np.random.RandomState(seed)
    means = []
    for label, n in counts.items():
        of_class = images[labels == label]
        distances = _distances(of_class, of_class)
        np.fill_diagonal(distances, np.inf)  # an image is not its own neighbour
        for _ in range(num_subsets):
            subset = rng.permutation(len(of_class))[:n]
            means.append(distances[np.ix_(subset, subset)].min(1).mean())
    return float(np.mean(means))  # each class has the same number of subsets


def _distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """All distances, (N, M), between uint8 images.

    |a|^2 - 2ab + |b|^2 is exact, because the values are integers.
    """
    if images.shape[1:] != others.shape[1:]:
        raise InputError(
            f"images must have the same shape; got {images.shape[1:]} and {others.shape[1:]}"
        )
    images, others = images.reshape(len(images), -1), others.reshape(len(others), -1)
    squares = np.empty((len(images), len(others)))
    for i in range(0, len(images), _CHUNK):
        a = images[i : i + _CHUNK].astype(np.float64)
        for j in range(0, len(others), _CHUNK):
            b = others[j : j + _CHUNK].astype(np.float64)
            squares[i : i + _CHUNK, j : j + _CHUNK] = (
                np.sum(a * a, 1)[:, None] - 2 * (a @ b.T) + np.sum(b * b, 1)[None, :]
            )
    return np.sqrt(squares) / 255
