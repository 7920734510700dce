"""Evaluation of samples: real digits, samples with a known fault, and examples by hand."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.data.digits import ArraySource
from hmar_jax.data.sources import open_source
from hmar_jax.errors import InputError
from hmar_jax.evaluation.classifier import (
    accuracy,
    block_means,
    classifier_features,
    fit_classifier,
    predict_labels,
    read_all,
    to_pixels,
)
from hmar_jax.evaluation.metrics import frechet_distance
from hmar_jax.evaluation.neighbours import equal_counts, nearest_distances, neighbour_distances
from hmar_jax.evaluation.report import classifier_report, format_report


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    threadpoolctl = pytest.importorskip("threadpoolctl")  # scikit-learn needs it too
    with threadpoolctl.threadpool_limits(
        1
    ):  # on a busy machine BLAS threads wait for each other: 40 s, not 8 s
        yield read_all(open_source("digits")), read_all(open_source("digits", "validate"))


@pytest.fixture(scope="module")
def classifier(digits):
    return fit_classifier(*digits[0])


def some(images_and_labels, count, seed=0):
    """Splits off `count` images of each class."""
    images, labels = images_and_labels
    rng = np.random.RandomState(seed)
    chosen = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:count] for c in np.unique(labels)]
    )
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    return (images[chosen], labels[chosen]), (images[rest], labels[rest])


def flat(*values, side=8):
    """One-coloured uint8 images."""
    return np.broadcast_to(
        np.array(values, np.uint8)[:, None, None, None], (len(values), side, side, 3)
    ).copy()


# Images


def test_to_pixels():
    image = np.full((1, 8, 8, 3), 0.5, np.float64)
    image[0, 0, 0] = [0, 1, 1.0005]  # rounding of a decoder may leave the range by a little
    pixels = to_pixels(image)
    assert (
        pixels.dtype == np.uint8
        and pixels[0, 0, 0].tolist() == [0, 255, 255]
        and pixels[0, 1, 1, 0] == 128
    )
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert to_pixels(every) is every
    np.testing.assert_array_equal(to_pixels((every / 255).astype(np.float32)), every)
    np.testing.assert_array_equal(to_pixels(jnp.full((1, 8, 8, 3), 0.5, jnp.bfloat16)), 128)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((8, 8, 3), np.uint8), r"must have shape \(N, h, w, 3\) .*; got \(8, 8, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one image"),
        (np.zeros((1, 8, 8, 3), np.int32), "must be uint8, .*; got int32"),
        (np.full((1, 8, 8, 3), -1.0), r"pixels of images must be in \[0, 1\]; got \[-1, -1\]"),
        (np.full((1, 8, 8, 3), 200.0), r"must be in \[0, 1\]; got"),
        (np.full((1, 8, 8, 3), np.nan), r"must be in \[0, 1\]; got"),
    ],
)
def test_wrong_images(images, message):
    with pytest.raises(InputError, match=message):
        to_pixels(images)


def test_read_all():
    source = ArraySource("two", ("a", "b"), flat(3, 4), np.array([1, 0]))
    images, labels = read_all(source)
    np.testing.assert_array_equal(images, source.images)
    assert labels.tolist() == [1, 0] and labels.dtype == np.int64
    with pytest.raises(InputError, match="must have one size"):
        read_all(ArraySource("odd", ("a",), [flat(1)[0], flat(1, side=16)[0]], np.array([0, 0])))
    with pytest.raises(InputError, match="two has no images"):
        read_all(ArraySource("two", ("a",), flat(3)[:0], np.zeros(0, int)))


def test_block_means():
    image = np.zeros((1, 16, 24, 3), np.uint8)
    image[0, 2:4, 3:6, 1] = 255  # the block in row 1, column 1 is all green
    image[0, 0, 0, 0] = 255  # a sixth of block 0 is red
    means = block_means(image, grey=False).reshape(8, 8, 3)
    assert means[1, 1].tolist() == [0, 1, 0] and means[0, 0] == pytest.approx([1 / 6, 0, 0])
    assert means.sum() == pytest.approx(1 + 1 / 6)
    np.testing.assert_allclose(block_means(image, grey=True).reshape(8, 8), means.mean(-1))
    with pytest.raises(InputError, match="both sides .* must be multiples of 8; got 12x8"):
        block_means(np.zeros((1, 12, 8, 3), np.uint8), grey=True)


# The classifier


def test_accuracy_on_held_out_digits(digits, classifier):
    _, (images, labels) = digits
    assert accuracy(classifier, images, labels) >= 0.98
    assert accuracy(classifier, images / 255, labels) == accuracy(classifier, images, labels)
    doubled = images.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(
        predict_labels(classifier, doubled), predict_labels(classifier, images)
    )
    assert classifier.grey and classifier.classes.tolist() == list(range(10))


def test_features(digits, classifier):
    _, (images, _) = digits
    features = classifier_features(classifier, images)
    assert features.shape == (360, 45) and features.dtype == np.float64
    np.testing.assert_array_equal(features, classifier_features(fit_classifier(*digits[0]), images))


def test_colour_and_two_classes():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    images = np.random.RandomState(0).randint(0, 60, (40, 8, 16, 3)).astype(np.uint8)
    labels = np.arange(40) % 2 * 3  # labels need not be 0, 1, ...
    images[labels == 0, ..., 0] += 150  # red and blue of the same mean grey
    images[labels == 3, ..., 2] += 150
    classifier = fit_classifier(images[:20], labels[:20])
    assert not classifier.grey
    assert accuracy(classifier, images[20:], labels[20:]) == 1
    assert classifier_features(classifier, images).shape == (40, 1)
    with pytest.raises(InputError, match="fitted without images of label 1"):
        accuracy(classifier, images[:1], np.array([1]))


def test_input_errors_of_the_classifier(monkeypatch):
    with pytest.raises(InputError, match=r"labels must have shape \(3,\), .*; got \(2,\)"):
        fit_classifier(flat(1, 2, 3), np.array([0, 1]))
    with pytest.raises(InputError, match="must be integers"):
        fit_classifier(flat(1, 2), np.array([0.0, 1.0]))
    with pytest.raises(InputError, match="all have label 7"):
        fit_classifier(flat(1, 2), np.array([7, 7]))
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(InputError, match=r'needs scikit-learn: pip install "hmar_jax\[demo\]"'):
        fit_classifier(flat(1, 2), np.array([0, 1]))


# Fréchet distance


def gaussian(mean, covariance, count=200, seed=0):
    """Points whose mean and covariance are exactly those given."""
    points = np.random.RandomState(seed).randn(count, len(mean))
    points -= points.mean(0)
    points = (
        points
        @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T, ddof=1).reshape(len(mean), -1))).T
    )
    return points @ np.linalg.cholesky(np.asarray(covariance, float)).T + mean


def test_frechet_in_one_dimension():
    # (5 - 2)^2 + (3 - 1)^2
    assert frechet_distance(gaussian([5], [[9]]), gaussian([2], [[1]], 50, 1)) == pytest.approx(13)


def test_frechet_of_covariances_that_do_not_commute():
    a, b = np.array([[2, 1], [1, 2]]), np.array([[4, 0], [0, 1]])
    # tr M^(1/2) = (tr M + 2 det(M)^(1/2))^(1/2) for 2x2; tr(ab) = 10, det(ab) = 3 * 4
    expected = 1 + 4 + (4 + 5 - 2 * np.sqrt(10 + 2 * np.sqrt(12)))
    assert frechet_distance(gaussian([1, 2], a), gaussian([0, 0], b, 90, 1)) == pytest.approx(
        expected
    )


def test_frechet_of_singular_covariances():
    a = gaussian([0, 0, 0], np.eye(3))
    plane = a * [1, 1, 0]
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, plane) == pytest.approx(1)
    few = np.random.RandomState(0).randn(5, 30)  # fewer points than dimensions
    assert frechet_distance(few, few + 0.5) == pytest.approx(30 * 0.25)
    assert frechet_distance(few, 3 * few - 2 * few.mean(0)) == pytest.approx(
        4 * few.var(0, ddof=1).sum()
    )


def test_input_errors_of_frechet_distance():
    for shape_a, shape_b in (((5, 3), (5, 2)), ((1, 3), (5, 3)), ((3,), (3,))):
        with pytest.raises(InputError, match="features must have shapes"):
            frechet_distance(np.zeros(shape_a), np.zeros(shape_b))
    with pytest.raises(InputError, match="must be finite"):
        frechet_distance(np.full((3, 2), np.nan), np.zeros((3, 2)))


# Neighbours


def test_nearest_distances_against_all_pairs(monkeypatch):
    monkeypatch.setattr("hmar_jax.evaluation.neighbours._CHUNK", 3)  # neither 7 nor 5 is a multiple
    rng = np.random.RandomState(0)
    a, b = (rng.randint(0, 256, (n, 8, 16, 3)).astype(np.uint8) for n in (7, 5))
    b[3] = a[2]
    expected = [min(np.linalg.norm((x / 255 - y / 255).ravel()) for y in b) for x in a]
    found = nearest_distances(a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[2] == 0
    with pytest.raises(InputError, match="must have the same shape"):
        nearest_distances(a, b[:, :, :8])


def test_neighbours_by_hand():
    # One-coloured images: the distance of two is their difference times (192 values)^(1/2) / 255.
    unit = np.sqrt(8 * 8 * 3) / 255
    samples, labels = flat(10, 14, 60, 70, 71, 200), np.array([0, 0, 5, 5, 5, 0])
    train = flat(12, 80)
    held_out = flat(8, 24, 90, 60, 255), np.array([0, 0, 5, 5, 9])  # no sample is of class 9
    found = neighbour_distances(samples, labels, train, held_out, num_subsets=4000)
    train_sample = ((2 + 2 + 120) / 3 + (20 + 10 + 9) / 3) / 2
    train_held_out = ((4 + 12) / 2 + (10 + 20) / 2) / 2
    # Subsets of two: (10, 14), (10, 200), (14, 200); and (60, 70), (60, 71), (70, 71).
    diversity_sample = ((4 + 190 + 186) / 3 + (10 + 11 + 1) / 3) / 2
    diversity_held_out = (16 + 30) / 2
    assert found["nearest_train_sample"] == pytest.approx(train_sample * unit)
    assert found["nearest_train_held_out"] == pytest.approx(train_held_out * unit)
    assert found["nearest_train_ratio"] == pytest.approx(train_sample / train_held_out)
    assert found["diversity_sample"] == pytest.approx(diversity_sample * unit, rel=0.03)
    assert found["diversity_held_out"] == pytest.approx(diversity_held_out * unit)
    assert found["diversity"] == pytest.approx(diversity_sample / diversity_held_out, rel=0.03)


def test_equal_counts():
    counts = equal_counts(np.repeat([0, 3], [50, 20]), np.repeat([0, 1, 3], [36, 9, 40]))
    assert counts == {0: 36, 3: 20}
    with pytest.raises(InputError, match="at least 2 samples; class 3 has 1"):
        equal_counts(np.array([3]), np.array([3, 3]))
    with pytest.raises(InputError, match="at least 2 held-out images; class 3 has 0"):
        equal_counts(np.array([3, 3]), np.array([0, 0]))


def test_no_ratio_without_a_reference():
    samples, labels = flat(1, 5), np.array([0, 0])
    with pytest.raises(InputError, match="must not be training images"):
        neighbour_distances(samples, labels, flat(1, 2), (flat(1, 2), labels))
    with pytest.raises(InputError, match="of a class must differ"):
        neighbour_distances(samples, labels, flat(1, 2), (flat(3, 3), labels))


@pytest.mark.parametrize("per_class", [17, 36, 50])
def test_diversity_does_not_depend_on_the_number_of_samples(digits, per_class):
    train, held_out = digits
    (images, labels), (rest, _) = some(train, per_class, seed=3)
    found = neighbour_distances(images, labels, rest, held_out)
    assert found["diversity"] == pytest.approx(1, abs=0.04)
    assert found["nearest_train_ratio"] == pytest.approx(1, abs=0.05)


# The report


def test_report_of_held_out_digits(digits):
    train, held_out = digits
    report = classifier_report(*held_out, train, held_out)
    assert report["samples"] == 360 and report["classes"] == 10
    assert report["nearest_train_ratio"] == 1 and report["diversity"] == pytest.approx(1, abs=0.005)
    assert report["class_accuracy"] == report["held_out_accuracy"] >= 0.98
    assert report["shuffled_labels"] == pytest.approx(0.1, abs=0.02)
    assert report["chance"] == pytest.approx(0.1, abs=1e-3)
    assert report["frechet"] < 0.05 < report["frechet_floor"] < 0.3
    assert report == classifier_report(
        held_out[0] / 255, held_out[1], train, held_out
    )  # deterministic, from bytes or floats
    assert (
        report["frechet_floor"]
        != classifier_report(*held_out, train, held_out, seed=1)["frechet_floor"]
    )


def test_report_of_two_halves_of_the_held_out_digits(digits):
    train, held_out = digits
    one, other = some(held_out, 17)
    report = classifier_report(*one, train, other)
    assert report["nearest_train_ratio"] == pytest.approx(1, abs=0.04)
    assert report["diversity"] == pytest.approx(1, abs=0.04)
    assert report["shuffled_labels"] == pytest.approx(0.1, abs=0.02)
    assert report["frechet"] == pytest.approx(report["frechet_floor"], rel=0.3)


def test_copies_are_detected(digits):
    train, held_out = digits
    (copies, labels), _ = some(train, 50)
    report = classifier_report(copies, labels, train, held_out)
    assert report["nearest_train_ratio"] == report["nearest_train_sample"] == 0
    assert report["diversity"] == pytest.approx(1, abs=0.04)  # and nothing else

    real = held_out[0].copy()
    real[::5] = train[0][:72]  # a fifth are copies
    assert (
        0.75
        < neighbour_distances(real, held_out[1], train[0], held_out)["nearest_train_ratio"]
        < 0.85
    )


def test_collapse_is_detected(digits):
    train, held_out = digits
    first = np.stack([held_out[0][held_out[1] == c][0] for c in range(10)])
    report = classifier_report(first.repeat(50, 0), np.arange(10).repeat(50), train, held_out)
    assert report["diversity"] == report["diversity_sample"] == 0
    assert report["nearest_train_ratio"] == pytest.approx(
        1, abs=0.1
    )  # and nothing else: the ten images are new and recognised
    assert report["class_accuracy"] >= 0.9
    assert report["frechet"] > 10 * report["frechet_floor"]


def test_ignored_classes_are_detected(digits):
    train, held_out = digits
    labels = np.random.RandomState(0).permutation(held_out[1])
    report = classifier_report(held_out[0], labels, train, held_out)
    assert report["class_accuracy"] == pytest.approx(report["chance"], abs=0.06)


def test_input_errors_of_the_report(digits):
    train, held_out = digits
    with pytest.raises(
        InputError, match=r"samples must have .* training images, \(32, 32, 3\); got \(16, 16, 3\)"
    ):
        classifier_report(flat(1, 2, side=16), np.array([0, 0]), train, held_out)
    with pytest.raises(InputError, match="pixels of samples must be in"):
        classifier_report(held_out[0] / 127.5 - 1, held_out[1], train, held_out)
    with pytest.raises(InputError, match="held-out images; class 12 has 0"):
        classifier_report(held_out[0][:2], np.array([12, 12]), train, held_out)


def test_format_report():
    text = format_report(
        {
            "samples": 500,
            "classes": 10,
            "class_accuracy": 0.99444,
            "held_out_accuracy": 0.9833,
            "shuffled_labels": 0.1016,
            "chance": 0.1,
            "nearest_train_ratio": 1.046,
            "nearest_train_sample": 6.29,
            "nearest_train_held_out": 6.013,
            "diversity": 0.825,
            "diversity_sample": 6.03,
            "diversity_held_out": 7.313,
            "frechet": 0.9131,
            "frechet_floor": 0.179,
        }
    )
    lines = text.split("\n")
    assert max(map(len, lines)) <= 120
    assert lines[0] == "500 samples of 10 classes; real: held-out images"
    table = [line[29:54].split() for line in lines[1:7]]
    assert table == [
        ["samples", "real", "ratio"],
        ["99.4%", "98.3%"],
        ["10.2%", "10.0%"],
        ["6.29", "6.01", "1.05"],
        ["6.03", "7.31", "0.82"],
        ["0.913", "0.179"],
    ]
    assert "below 0.95: copies" in lines[4] and "repetition" in lines[5]
