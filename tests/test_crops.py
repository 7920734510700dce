"""Squares around masks: where they lie, what is cut out, and what putting back changes."""

import dataclasses

import numpy as np
import pytest

from hmar_jax.io import crops, images, masks
from hmar_jax.io.crops import Window

SOFT, HARD = masks.CompositeConfig(), masks.CompositeConfig(feather=0)


def boxes_mask(height, width, *boxes):
    """True inside boxes x0, y0, x1, y1."""
    return np.logical_or.reduce([masks.box_mask(box, height, width) for box in boxes])


def random_cases(count):
    """(mask, side, context) of many sizes and shapes."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        height, width = rng.integers(1, 90, 2)
        selected = np.zeros((height, width), bool)
        for _ in range(rng.integers(1, 4)):
            y, x = np.sort(rng.integers(0, height + 1, 2)), np.sort(rng.integers(0, width + 1, 2))
            selected[y[0] : y[1] + 1, x[0] : x[1] + 1] = True
        if rng.random() < 0.2:
            selected &= rng.random(selected.shape) < 0.1
        if selected.any():
            yield selected, int(rng.choice([1, 8, 32, 64])), float(rng.choice([1, 1.1, 1.5, 2, 4]))


# Where the squares lie


def test_each_masked_pixel_lies_in_exactly_one_square():
    for mask, side, context in random_cases(300):
        count = np.zeros(mask.shape, int)
        for window in crops.find_windows(mask, side, context):
            count[window.within(*mask.shape)] += 1
        assert (count[mask] == 1).all(), (mask.shape, side, context)


def test_squares_lie_in_the_image_where_the_region_fits_with_some_context():
    inside = 0
    for mask, side, context in random_cases(300):
        shape = np.array(mask.shape)
        for window in crops.find_windows(mask, side, context):
            start, end = np.array(window[:2]), np.array(window[:2]) + window.side
            rows, columns = window.within(*mask.shape)
            y, x = np.nonzero(mask[rows, columns])
            size = np.array([np.ptp(y) + 1, np.ptp(x) + 1])
            least = np.minimum(np.ceil(min(context, 1.25) * size), shape).max()
            wanted = max(side, np.ceil(context * size.max()))
            assert window.side == max(min(wanted, shape.min()), least)
            if least <= shape.min():
                inside += 1
                assert (start >= 0).all() and (end <= shape).all()
            else:  # the image is in the middle of it on the shorter axis
                short, long = shape.argmin(), shape.argmax()
                assert abs((start + end - shape)[short]) <= 1
                assert start[long] >= 0 and end[long] <= shape[long]
    assert inside > 100


@pytest.mark.parametrize(
    "box, context, expected",
    [
        ((400, 300, 500, 360), 2.0, Window(230, 350, 200)),  # twice the longer side
        ((400, 300, 410, 306), 2.0, Window(287, 389, 32)),  # the model's size
        ((0, 0, 100, 60), 2.0, Window(0, 0, 200)),  # shifted into the image
        ((300, 100, 800, 500), 2.0, Window(0, 208, 683)),  # the shorter side
        ((400, 300, 500, 360), 1.0, Window(280, 400, 100)),
        ((341, 0, 1024, 683), 2.0, Window(-86, 170, 854)),  # not without context
        ((0, 300, 1024, 400), 2.0, Window(-171, 0, 1024)),
        ((0, 0, 1024, 683), 2.0, Window(-171, 0, 1024)),
    ],
)
def test_squares_of_a_photograph(box, context, expected):
    assert crops.find_windows(boxes_mask(683, 1024, box), 32, context) == [expected]


def test_regions_that_are_far_apart_have_squares_of_their_own():
    far = boxes_mask(683, 1024, (100, 100, 120, 120), (600, 500, 620, 520))
    assert crops.find_windows(far, 32, 2.0) == [Window(90, 90, 40), Window(490, 590, 40)]
    assert len(crops.find_windows(far, 32, 40.0)) == 1
    # The square of the large one shows the small one.
    near = boxes_mask(683, 1024, (100, 100, 300, 300), (330, 200, 335, 205))
    assert crops.find_windows(near, 32, 2.0) == [Window(0, 0, 470)]


def test_specks_have_few_squares():
    mask = np.random.default_rng(0).random((400, 600)) < 0.01
    assert mask.sum() > 2000 and len(crops.find_windows(mask, 256, 2.0)) < 6


def test_an_empty_mask_counts_as_the_whole_image():
    assert crops.find_windows(np.zeros((20, 30), bool), 8, 2.0) == [Window(-5, 0, 30)]


# What is cut out


def test_nothing_of_the_masked_content_is_cut_out():
    rng = np.random.default_rng(1)
    for mask, side, context in random_cases(30):
        image = rng.random((1, *mask.shape, 3)).astype(np.float32)
        other = np.where(mask[None, ..., None], rng.random(3), image).astype(np.float32)
        cut, cut_other = (crops.cut_out(x, mask[None], 1, side, context) for x in (image, other))
        assert np.array_equal(cut.images, cut_other.images)
        assert cut.images.shape[1:] == (side, side, 3) and cut.images.dtype == np.float32
        assert 0 <= cut.images.min() and cut.images.max() <= 1


def test_a_square_of_the_models_size_is_cut_out_as_it_is():
    image = np.random.default_rng(1).random((1, 50, 70, 3)).astype(np.float32)
    mask = boxes_mask(50, 70, (30, 20, 40, 25))
    cut = crops.cut_out(image, mask[None], 1, 20, 2.0)
    rows, columns = np.s_[12:32], np.s_[25:45]
    hidden = mask[rows, columns]
    assert np.array_equal(cut.masks[0], hidden)
    assert np.array_equal(cut.images[0][~hidden], image[0, rows, columns][~hidden])


def test_what_lies_beyond_the_image_is_generated_too():
    image = np.full((1, 10, 30, 3), 0.5, np.float32)
    cut = crops.cut_out(image, boxes_mask(10, 30, (0, 4, 30, 6))[None], 1, 30, 2.0)
    hidden = np.ones((30, 30), bool)
    hidden[10:14] = hidden[16:20] = False
    assert np.array_equal(cut.masks[0], hidden) and np.allclose(cut.images, 0.5)


def test_crops_of_several_images():
    image = np.random.default_rng(1).random((2, 60, 90, 3)).astype(np.float32)
    one, two = (0, 0, 4, 4), (80, 50, 84, 54)
    mask = np.stack([boxes_mask(60, 90, two), boxes_mask(60, 90, one, two)])
    cut = crops.cut_out(image, mask, 2, 8, 2.0)
    assert cut.owner.tolist() == [0, 1, 1] and cut.number.tolist() == [0, 0, 1]
    assert cut.windows[0] == cut.windows[2] and not np.array_equal(cut.images[0], cut.images[2])
    same = crops.cut_out(image[:1], mask[1:], 3, 8, 2.0)
    assert same.owner.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(same.images[:2], same.images[4:])


# Putting back


def test_pixels_outside_the_mask_come_back_bit_for_bit():
    rng = np.random.default_rng(2)
    for mask, side, context in random_cases(60):
        image = (rng.integers(0, 256, (1, *mask.shape, 3)) / 255).astype(np.float32)
        cut = crops.cut_out(image, mask[None], 1, side, context)
        generated = rng.random(cut.images.shape).astype(np.float32)
        for blending in (SOFT, HARD):
            found = crops.put_back(image, mask[None], cut, generated, blending)
            assert found.dtype == np.float32 and np.array_equal(found[0][~mask], image[0][~mask])
            assert 0 <= found.min() and found.max() <= 1
            if blending is HARD:
                assert not (found == image).all(-1)[0][mask].any()


def test_new_content_blends_into_its_surroundings_and_not_into_what_it_replaces():
    mask = boxes_mask(80, 80, (20, 20, 60, 60))
    image = np.full((1, 80, 80, 3), 0.5, np.float32)
    image[0, mask] = 1  # is to disappear
    cut = crops.cut_out(image, mask[None], 1, 16, 2.0)
    assert cut.windows == (Window(0, 0, 80),)
    generated = np.full((1, 16, 16, 3), 0.9, np.float32)
    found = crops.put_back(image, mask[None], cut, generated, SOFT)[0]
    profile = found[40, 20:40, 0]
    assert 0.5 < profile[0] < 0.55 and (np.diff(profile[:10]) > 0).all()
    assert np.allclose(profile[10:], 0.9)  # two of the model's pixels from the border
    assert np.abs(np.diff(found[40, 18:40, 0])).max() < 0.06
    assert np.allclose(crops.put_back(image, mask[None], cut, generated, HARD)[0][mask], 0.9)
    # The same where the mask fills its square.
    cut = crops.cut_out(image, mask[None], 1, 16, 1.0)
    assert cut.windows == (Window(20, 20, 40),) and cut.masks.all()
    found = crops.put_back(image, mask[None], cut, generated, SOFT)[0]
    assert found[40, 20, 0] < 0.6 and np.array_equal(found[~mask], image[0][~mask])


def test_a_square_that_touches_another_region_does_not_change_it():
    image, mask = (
        np.zeros((1, 40, 60, 3), np.float32),
        boxes_mask(40, 60, (0, 10, 8, 18), (16, 6, 32, 22)),
    )
    cut = crops.cut_out(image, mask[None], 1, 8, 2.0)
    assert cut.windows == (Window(0, 8, 32), Window(6, 0, 16))
    for order in ([0, 1], [1, 0]):
        reordered = dataclasses.replace(cut, windows=[cut.windows[i] for i in order])
        generated = np.zeros((2, 8, 8, 3), np.float32)
        generated[order.index(1)] = 1  # in the first region alone
        blending = masks.CompositeConfig(feather=0.01)
        found = crops.put_back(image, mask[None], reordered, generated, blending)[0, ..., 0]
        assert (found[10:18, :8] > 0.9).all() and (found[:, 8:] == 0).all()


def test_the_border_of_the_image_is_no_border_of_the_mask():
    image, mask = np.full((1, 40, 60, 3), 0.2, np.float32), boxes_mask(40, 60, (0, 0, 20, 40))
    cut = crops.cut_out(image, mask[None], 1, 8, 2.0)
    found = crops.put_back(image, mask[None], cut, np.full((1, 8, 8, 3), 0.8, np.float32), SOFT)
    assert np.allclose(found[0, :, 0], 0.8) and (found[0, :, 19] < 0.4).all()


def test_whole_squares_are_replaced_without_paste():
    image, mask = np.full((1, 40, 60, 3), 0.2, np.float32), boxes_mask(40, 60, (0, 0, 5, 5))
    cut = crops.cut_out(image, mask[None], 1, 8, 2.0)
    blending = masks.CompositeConfig(paste=False)
    found = crops.put_back(image, mask[None], cut, np.ones((1, 8, 8, 3), np.float32), blending)[0]
    assert (found[:10, :10] == 1).all()
    assert (found[10:] == np.float32(0.2)).all() and (found[:, 10:] == np.float32(0.2)).all()


def test_every_value_of_a_byte_survives_the_way_to_float_and_back():
    values = np.arange(256, dtype=np.uint8)
    assert np.array_equal(images.to_uint8(values / np.float32(255)), values)
