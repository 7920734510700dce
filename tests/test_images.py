"""Image files, and grids of images with labels."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from hmar_jax.errors import InputError
from hmar_jax.io import images, labels


def test_png_of_arrays_and_pil_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    for image in (pixels, pixels / 255, (pixels / 255).astype(np.float32), Image.fromarray(pixels)):
        images.save_image(tmp_path / "a.png", image)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)
        assert (tmp_path / "a.png").read_bytes() == images.encode_image(image)
    assert os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(OSError, match="gone"):
        images.save_image(tmp_path / "gone" / "a.png", pixels)


def test_pixels_are_clipped_and_rounded():
    values = np.array([-1, 0, 0.499 / 255, 0.501 / 255, 1, 2])
    assert images.to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_grid_without_labels():
    """Small images are enlarged by a whole factor, with 2 pixels between them."""
    values = np.array([10, 20, 30], np.uint8)
    grid = np.asarray(images.make_grid(np.full((3, 16, 16, 3), values[:, None, None, None]), 2))
    assert grid.shape == (2 + 2 * 50, 2 + 2 * 50, 3)
    assert (grid[2:50, 2:50] == 10).all() and (grid[2:50, 52:100] == 20).all()
    assert (grid[52:100, 2:50] == 30).all() and (grid[50:, 50:] == 255).all()


def test_grid_with_labels_and_titles():
    black = np.zeros((4, 64, 64, 3), np.float32)
    plain, labelled = (
        np.asarray(images.make_grid(black, 2, **options))
        for options in ({}, {"labels": ["one", "two"], "titles": ["left", "right"]})
    )
    assert (labelled[: labelled.shape[0] - plain.shape[0]] == 0).any(), "titles at the top"
    assert labelled.shape[0] > plain.shape[0] and labelled.shape[1] > plain.shape[1]
    count = lambda grid: (grid == 0).all(-1).sum()
    assert count(labelled) > count(plain) == 4 * 64 * 64
    file = io.BytesIO(images.encode_image(images.make_grid(black, 2)))
    assert Image.open(file).size == (plain.shape[1], plain.shape[0])


# Labels

_LETTERS = ("café Łódź ő", "Ελληνικά", "Жираф Ґ ї", "e\u0301", "עברית")


def test_the_font_of_labels_has_latin_greek_and_cyrillic():
    font = labels.load_font(14)
    for text in _LETTERS:
        assert labels.printable(text, font, "7") == text
    for text in ("猫", "ไทย", "\udce9", "dog 猫", "a\x07"):
        assert labels.printable(text, font, "7") == "7"
    assert labels.printable("dog 猫", font) == "dog ?"
    assert labels.printable("two\nlines\tof it", font) == "two lines of it"


def test_labels_of_other_scripts_are_the_substitutes():
    black = np.zeros((3, 64, 64, 3), np.float32)
    grid = lambda texts, **options: images.make_grid(black, 1, labels=texts, **options)
    found = grid(["猫", "Жираф", "ไทย"], substitutes=["4", "5", "12"])
    assert found.tobytes() == grid(["4", "Жираф", "12"]).tobytes()
    assert found.tobytes() != grid(["4", "12345", "12"]).tobytes()


def test_long_labels_are_cut_in_the_middle():
    font = labels.load_font(14)
    text = "a very long name of a class, breed and all, number 12"
    cut = labels.fit(text, font, 150)
    assert font.getlength(cut) <= 150 and cut.startswith("a very") and cut.endswith("12")
    assert labels.fit("short", font, 150) == "short"
    black = np.zeros((1, 64, 64, 3), np.float32)
    assert images.make_grid(black, 1, labels=[text * 20]).width < 400


# Formats


@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG")])
def test_the_ending_decides_the_format(tmp_path, name, kind):
    pixels = np.full((5, 7, 3), 90, np.uint8)
    images.save_image(tmp_path / name, pixels)
    found = Image.open(tmp_path / name)
    assert found.format == kind and abs(np.asarray(found).astype(int) - 90).max() <= 2


def test_webp_is_lossless_and_has_a_largest_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    images.save_image(tmp_path / "a.webp", pixels)
    found = Image.open(tmp_path / "a.webp")
    assert found.format == "WEBP" and np.array_equal(np.asarray(found), pixels)
    with pytest.raises(InputError, match="WEBP images must be at most 16,383 pixels; got 3 x 16,"):
        images.save_image(tmp_path / "b.webp", np.zeros((16384, 3, 3), np.uint8))
    assert not (tmp_path / "b.webp").exists()
