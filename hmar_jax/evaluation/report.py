"""One report on class-conditional samples of a small labelled data set, each figure beside its reference.

train, held_out = (read_all(open_source("digits", split)) for split in ("train", "validate"))
print(format_report(digit_report(samples, asked, train, held_out)))
"""

from __future__ import annotations

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.evaluation.classifier import (
    accuracy,
    classifier_features,
    fit_classifier,
    frechet_distance,
    read,
    to_labels,
    to_pixels,
)
from hmar_jax.evaluation.neighbours import DRAWS, draw, equal_counts, neighbour_distances


def digit_report(
    samples: np.ndarray,
    asked: np.ndarray,
    train: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    seed: int = 0,
) -> dict[str, float]:
    """Judges samples by real images alone; any small labelled data set will do, not only digits.

    The classifier is fitted on `train`. Images are compared as bytes. Fréchet distances are over its margins, of
    equally many samples and held-out images of each class, averaged over draws as diversity is.

    Args:
      samples: uint8 or [0, 1] floating-point (N, h, w, 3); h and w multiples of 8 pixels.
      asked: int (N,), the class that each sample was asked to be; each class at least twice.
      train: real images (M, h, w, 3) that the model was trained on, without augmentation, and their labels (M,).
      held_out: real images (H, h, w, 3) that it was not trained on and labels (H,); two or more of each class.
      seed: of the draws and of the shuffling.

    Returns:
      samples, classes: N, and the number of classes in `asked`;
      read_as_asked: share of the samples that the classifier reads as the class asked for;
      held_out_accuracy: share of the held-out images that it reads correctly;
      shuffled_labels: read_as_asked against randomly permuted `asked`, averaged over 16 permutations, and
      chance: what that should come to, the sum of the squared shares of the classes (0.1 for ten in equal numbers);
      near, near_sample, near_held_out, diversity, diversity_sample, diversity_held_out: as `neighbour_distances`;
      frechet: of the samples to held-out images, and
      frechet_floor: of real training images, in the same number of each class, to held-out images.

    Raises:
      InputError: scikit-learn is missing, or the arrays are not as above.
    """
    train_images, held_images = (
        to_pixels(train[0], "training images"),
        to_pixels(held_out[0], "held-out images"),
    )
    train_labels = to_labels(train[1], len(train_images), "training labels")
    held_labels = to_labels(held_out[1], len(held_images), "held-out labels")
    samples = to_pixels(samples, "samples")
    asked = to_labels(asked, len(samples), "asked-for classes")
    for what, images in (("samples", samples), ("held-out images", held_images)):
        if images.shape[1:] != train_images.shape[1:]:
            raise InputError(
                f"{what} are {images.shape[1:]}, but training images are {train_images.shape[1:]}"
            )
    counts = equal_counts(asked, held_labels)

    classifier = fit_classifier(train_images, train_labels)
    rng = np.random.RandomState(seed)
    labels_read = read(classifier, samples)
    shuffled = [np.mean(labels_read == rng.permutation(asked)) for _ in range(DRAWS)]
    shares = np.bincount(asked) / len(asked)

    sets = ((samples, asked), (train_images, train_labels), (held_images, held_labels))
    features = [classifier_features(classifier, images) for images, _ in sets]
    to_held_out = []
    for _ in range(DRAWS):
        sample, real, held = (
            f[draw(labels, counts, rng)] for f, (_, labels) in zip(features, sets)
        )
        to_held_out.append((frechet_distance(sample, held), frechet_distance(real, held)))
    frechet, floor = np.mean(to_held_out, 0)

    return {
        "samples": len(samples),
        "classes": len(counts),
        "read_as_asked": accuracy(classifier, samples, asked),
        "held_out_accuracy": accuracy(classifier, held_images, held_labels),
        "shuffled_labels": float(np.mean(shuffled)),
        "chance": float(np.sum(shares**2)),
        **neighbour_distances(samples, asked, train_images, (held_images, held_labels), seed=seed),
        "frechet": float(frechet),
        "frechet_floor": float(floor),
    }


def format_report(report: dict[str, float]) -> str:
    """What `digit_report` returns, as a table of several lines (no trailing newline), at most 120 columns."""
    r = report
    rows = [
        ("", "samples", "real", "ratio", "what would be bad"),
        (
            "read as the class asked for",
            f"{r['read_as_asked']:.1%}",
            f"{r['held_out_accuracy']:.1%}",
            "",
            "well below real: the class is ignored or unreadable",
        ),
        (
            "  the same, labels shuffled",
            f"{r['shuffled_labels']:.1%}",
            f"{r['chance']:.1%}",
            "",
            "far from chance: the line above cannot be trusted",
        ),
        (
            "to nearest training image",
            f"{r['near_sample']:.2f}",
            f"{r['near_held_out']:.2f}",
            f"{r['near']:.2f}",
            "below 0.95: copies; well above 1: unlike real, noisy",
        ),
        (
            "to nearest of same class",
            f"{r['diversity_sample']:.2f}",
            f"{r['diversity_held_out']:.2f}",
            f"{r['diversity']:.2f}",
            "far below 1: repetition (0: all alike) or blur",
        ),
        (
            "Frechet distance to held-out",
            f"{r['frechet']:.3f}",
            f"{r['frechet_floor']:.3f}",
            "",
            "many times that of real: another distribution",
        ),
    ]
    lines = [
        f"{r['samples']} samples of {r['classes']} classes, beside real images that were not trained on"
    ]
    lines += [
        f"{what:<29}{ours:>9}{real:>9}{ratio:>7}   {bad}".rstrip()
        for what, ours, real, ratio, bad in rows
    ]
    lines += [
        "Shuffled labels stand beside chance; the Frechet distance beside that of real training images.",
        "Distances are Euclidean, pixels in [0, 1]. The classifier is fitted on real training images only.",
    ]
    return "\n".join(lines)
