"""PNG files and grids of images."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from hmar_jax.io import images


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
