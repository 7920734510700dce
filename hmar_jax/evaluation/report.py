"""A report on class-conditional samples of a small labelled data set, next to real images.

train, held_out = (read_all(open_source("digits", split)) for split in ("train", "validate"))
print(format_report(classifier_report(samples, labels, train, held_out)))
"""

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.evaluation.classifier import (
    BLOCKS,
    accuracy,
    classifier_features,
    fit_classifier,
    predict_labels,
    to_labels,
    to_pixels,
)
from hmar_jax.evaluation.metrics import frechet_distance
from hmar_jax.evaluation.neighbours import (
    NUM_SUBSETS,
    equal_counts,
    neighbour_distances,
    subsample,
)


def check_reference(
    labels: np.ndarray,
    train: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    side: int,
) -> None:
    """Raises InputError for what `classifier_report` would reject, before there are samples.

    Args:
      labels: int (N,), the requested classes.
      train, held_out: as `classifier_report` takes them.
      side: of the samples, in pixels.
    """
    for what, (images, _) in (("training images", train), ("held-out images", held_out)):
        if images.shape[1:3] != (side, side):
            raise InputError(
                f"{what} of the reference must have the model's size, {side}x{side} pixels; got "
                f"{images.shape[1]}x{images.shape[2]}"
            )
    if side % BLOCKS:
        raise InputError(
            f"the classifier needs images whose side is a multiple of {BLOCKS}; got {side}"
        )
    equal_counts(labels, held_out[1])


def classifier_report(
    samples: np.ndarray,
    labels: np.ndarray,
    train: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    seed: int = 0,
) -> dict[str, float]:
    """Evaluates samples with a classifier of real images and with distances between images.

    The classifier is fitted on `train`. Images are compared as bytes. Fréchet distances are over
    the classifier's margins, between equally many samples and held-out images of each class, and
    averaged over random subsets as the diversity is.

    Args:
      samples: uint8 or [0, 1] floating-point (N, h, w, 3); h and w multiples of 8 pixels.
      labels: int (N,), the requested class of each sample; at least two samples per class.
      train: images (M, h, w, 3) that the model was trained on, without augmentation, and their
        labels (M,).
      held_out: images (H, h, w, 3) that it was not trained on and their labels (H,); at least two
        of each class in `labels`.
      seed: of the subsets and permutations.

    Returns:
      samples, classes: N, and the number of classes in `labels`;
      class_accuracy: fraction of the samples whose predicted class is the requested one;
      held_out_accuracy: fraction of the held-out images whose predicted class is their label;
      shuffled_labels: class_accuracy with randomly permuted labels, averaged over 16 permutations;
      chance: the expected value of shuffled_labels, the sum of the squared class frequencies (0.1
        for ten equally frequent classes);
      nearest_train_ratio, nearest_train_sample, nearest_train_held_out, diversity,
        diversity_sample, diversity_held_out: see `neighbour_distances`;
      frechet: Fréchet distance of the samples to held-out images;
      frechet_floor: of real training images, in the same number per class, to held-out images.

    Raises:
      InputError: scikit-learn is missing, or the arrays are not as above.
    """
    train_images, held_out_images = (
        to_pixels(train[0], "training images"),
        to_pixels(held_out[0], "held-out images"),
    )
    train_labels = to_labels(train[1], len(train_images), "training labels")
    held_out_labels = to_labels(held_out[1], len(held_out_images), "held-out labels")
    samples = to_pixels(samples, "samples")
    labels = to_labels(labels, len(samples), "labels of the samples")
    for what, images in (("samples", samples), ("held-out images", held_out_images)):
        if images.shape[1:] != train_images.shape[1:]:
            raise InputError(
                f"{what} must have the shape of training images, {train_images.shape[1:]}; "
                f"got {images.shape[1:]}"
            )
    counts = equal_counts(labels, held_out_labels)

    classifier = fit_classifier(train_images, train_labels)
    rng = np.random.RandomState(seed)
    predicted = predict_labels(classifier, samples)
    shuffled = [np.mean(predicted == rng.permutation(labels)) for _ in range(NUM_SUBSETS)]
    frequencies = np.bincount(labels) / len(labels)

    sets = (
        (samples, labels),
        (train_images, train_labels),
        (held_out_images, held_out_labels),
    )
    features = [classifier_features(classifier, images) for images, _ in sets]
    to_held_out = []
    for _ in range(NUM_SUBSETS):
        sample, real, held = (
            f[subsample(set_labels, counts, rng)] for f, (_, set_labels) in zip(features, sets)
        )
        to_held_out.append((frechet_distance(sample, held), frechet_distance(real, held)))
    frechet, floor = np.mean(to_held_out, 0)

    return {
        "samples": len(samples),
        "classes": len(counts),
        "class_accuracy": accuracy(classifier, samples, labels),
        "held_out_accuracy": accuracy(classifier, held_out_images, held_out_labels),
        "shuffled_labels": float(np.mean(shuffled)),
        "chance": float(np.sum(frequencies**2)),
        **neighbour_distances(
            samples, labels, train_images, (held_out_images, held_out_labels), seed=seed
        ),
        "frechet": float(frechet),
        "frechet_floor": float(floor),
    }


def format_report(report: dict[str, float]) -> str:
    """The result of `classifier_report` as a table, at most 120 columns wide."""
    r = report
    rows = [
        ("", "samples", "real", "ratio", "what would be bad"),
        (
            "class accuracy",
            f"{r['class_accuracy']:.1%}",
            f"{r['held_out_accuracy']:.1%}",
            "",
            "well below real: classes are ignored or unrecognisable",
        ),
        (
            "  with shuffled labels",
            f"{r['shuffled_labels']:.1%}",
            f"{r['chance']:.1%}",
            "",
            "far from chance: the line above cannot be trusted",
        ),
        (
            "to nearest training image",
            f"{r['nearest_train_sample']:.2f}",
            f"{r['nearest_train_held_out']:.2f}",
            f"{r['nearest_train_ratio']:.2f}",
            "below 0.95: copies; well above 1: unlike real, noisy",
        ),
        (
            "to nearest of same class",
            f"{r['diversity_sample']:.2f}",
            f"{r['diversity_held_out']:.2f}",
            f"{r['diversity']:.2f}",
            "far below 1: repetition (0: all the same) or blur",
        ),
        (
            "Frechet distance to held-out",
            f"{r['frechet']:.3f}",
            f"{r['frechet_floor']:.3f}",
            "",
            "many times that of real: another distribution",
        ),
    ]
    lines = [f"{r['samples']} samples of {r['classes']} classes; real: held-out images"]
    lines += [
        f"{what:<29}{ours:>9}{real:>9}{ratio:>7}   {bad}".rstrip()
        for what, ours, real, ratio, bad in rows
    ]
    lines += [
        "For shuffled labels, real is chance; for the Frechet distance, that of training images.",
        "Distances are Euclidean, pixels in [0, 1]. The classifier has seen training images only.",
    ]
    return "\n".join(lines)
