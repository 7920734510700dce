"""Editing: which tokens are kept, which pixels come back unchanged, and invalid input."""

import jax
import numpy as np
import pytest
from PIL import Image

import hmar_jax
from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.editing import kept_tokens
from hmar_jax.io import masks
from hmar_jax.io.images import resize_image
from tests import tiny

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def pipe():
    return hmar_jax.load(str(tiny.masked_run()))


@pytest.fixture(scope="module")
def sample_images():
    """uint8 (3, h, w, 3)."""
    rng = np.random.default_rng(5)
    return np.stack([tiny.image(label, rng, tiny.SIDE) for label in range(3)])


# Pure functions


def test_a_token_is_kept_if_its_whole_cell_is_outside():
    mask = np.zeros((1, 12, 12), bool)
    # One pixel of the first row: cell (0, 0) of 2x2, (0, 1) of 3x3, (0, 1) of 4x4.
    mask[0, 0, 4] = True
    kept = kept_tokens(ScaleList((1, 2, 3, 4)), mask)[0]
    assert not kept[0]
    assert kept[1:5].reshape(2, 2).tolist() == [[False, True], [True, True]]
    assert kept[5:14].reshape(3, 3).tolist() == [[True, False, True], [True] * 3, [True] * 3]
    assert kept[14:].reshape(4, 4).tolist() == [[True, False, True, True]] + [[True] * 4] * 3


def test_a_cell_that_shares_pixels_with_the_mask_is_not_kept():
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 2, 2] = True  # of 3x3, cells overlap: pixel 2 belongs to the first and the second
    kept = kept_tokens(ScaleList((3,)), mask)[0].reshape(3, 3)
    assert kept.tolist() == [[False, False, True], [False, False, True], [True, True, True]]


def test_dilation_and_coarse_scales():
    mask = np.zeros((2, 16, 16), bool)
    mask[0, 0, 0] = mask[1, 9, 9] = True
    scales = ScaleList((1, 2, 4))
    dilated = kept_tokens(scales, mask, dilation=1)[:, 5:].reshape(2, 4, 4)
    assert (~dilated[0]).sum() == 4 and not dilated[0, :2, :2].any()
    assert (~dilated[1]).sum() == 9 and not dilated[1, 1:4, 1:4].any()
    coarse = kept_tokens(scales, mask, keep_coarse=True)
    assert coarse[:, :5].all() and (~coarse[:, 5:]).sum(-1).tolist() == [1, 1]


def test_resized_masks_lose_no_pixel():
    mask = np.zeros((1, 30, 50), bool)
    mask[0, 29, 49] = True
    small, large = masks.resize_mask(mask, 8)[0], masks.resize_mask(mask, 64)[0]
    assert small.sum() == 1 and small[7, 7] and large[63, 63] and not large[:60].any()


def test_filled_masks():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3) / 96
    mask = np.zeros((2, 4, 4), bool)
    mask[0, :2] = True
    mask[1] = True
    filled = masks.fill_masked(images, mask)
    assert np.array_equal(filled[0, 2:], images[0, 2:])
    assert np.allclose(filled[0, :2], images[0, 2:].mean((0, 1)))
    assert (filled[1] == 0.5).all()
    # The result does not depend on the masked content.
    other = masks.fill_masked(np.where(mask[..., None], 0.5, images).astype(np.float32), mask)
    assert np.array_equal(filled[0], other[0])


@pytest.mark.parametrize("feather", [0, 2])
def test_composites(feather):
    rng = np.random.default_rng(0)
    images, generated = rng.random((2, 1, 12, 12, 3), np.float32)
    mask = np.zeros((1, 12, 12), bool)
    mask[0, 2:10, 2:10] = True
    found = masks.composite(images, generated, mask, feather)
    assert np.array_equal(found[~mask], images[~mask])
    assert np.array_equal(found[0, 4:8, 4:8], generated[0, 4:8, 4:8])
    border = found[0, 2, 2:10]
    if feather:
        expected = images[0, 2, 2:10] * 2 / 3 + generated[0, 2, 2:10] / 3
        assert np.allclose(border, expected, atol=1e-6)
    else:
        assert np.array_equal(border, generated[0, 2, 2:10])
    everything = np.ones((1, 12, 12), bool)
    assert np.array_equal(masks.composite(images, generated, everything, feather), generated)


def test_boxes():
    mask = masks.box_mask((1, 2, 4, 3), 5, 6)
    assert mask.shape == (5, 6) and mask.sum() == 3 and mask[2, 1:4].all()
    assert masks.box_mask((0, 0, 6, 5), 5, 6).all()


_EMPTY = "box x0,y0,x1,y1 must have x0 < x1 and y0 < y1; got "
_OUTSIDE = "box must lie inside the image, 8 x 6 pixels (0,0,8,6); got "


@pytest.mark.parametrize(
    "box, message",
    [
        ((3, 3, 3, 5), _EMPTY + "3,3,3,5"),
        ((5, 0, 2, 2), _EMPTY + "5,0,2,2"),
        ((0, 0, 9, 6), _OUTSIDE + "0,0,9,6"),
        ((0, 0, 8, 7), _OUTSIDE + "0,0,8,7"),
        ((-1, 0, 2, 2), _OUTSIDE + "-1,0,2,2"),
    ],
)
def test_invalid_boxes(box, message):
    with pytest.raises(InputError) as error:
        masks.box_mask(box, 6, 8)
    assert str(error.value) == message


# The pipeline


@pytest.mark.parametrize("count", [1, 3])
def test_an_empty_mask_gives_the_exact_reconstruction(pipe, sample_images, count):
    images, nothing = sample_images[:count], np.zeros((tiny.SIDE, tiny.SIDE), bool)
    edited, tokens = pipe.edit(KEY, images, nothing, paste=False, return_tokens=True)
    expected = pipe.encode(images)
    assert np.array_equal(tokens, expected) and np.array_equal(edited, pipe.decode(expected))
    assert np.array_equal(pipe.edit(KEY, images, nothing), images / np.float32(255))


def test_pixels_outside_come_back_unchanged(pipe, sample_images):
    mask = np.zeros((tiny.SIDE, tiny.SIDE), bool)
    mask[:4, 2:] = True
    edited = np.asarray(pipe.edit(KEY, sample_images, mask, [0, 1, 2], feather=1))
    pixels = (edited * 255).round().astype(np.uint8)
    assert np.array_equal(pixels[:, ~mask], sample_images[:, ~mask])
    assert not np.array_equal(edited[:, mask], sample_images[:, mask] / np.float32(255))
    # The result does not depend on the masked content.
    other = sample_images.copy()
    other[:, mask] = 77
    edits = [pipe.edit(KEY, images, mask, [0, 1, 2]) for images in (other, sample_images)]
    assert np.array_equal(*edits)


def test_kept_tokens_and_classes(pipe, sample_images):
    mask = np.zeros((tiny.SIDE, tiny.SIDE), np.uint8)
    mask[:4, :4] = 255  # one of the four cells of the last scale, and the only one of the first
    _, tokens = pipe.edit(
        KEY,
        sample_images[0],
        mask,
        ["circle", "cross", "stripes"],
        return_tokens=True,
        guidance=5.0,
    )
    filled = masks.fill_masked(sample_images[:1] / np.float32(255), mask[None] >= 128)
    expected = pipe.encode(filled)[0]
    assert tokens.shape == (3, tiny.LENGTH) and (tokens[:, 2:] == expected[2:]).all()
    # Without a class the coarse scales are kept.
    _, kept = pipe.edit(KEY, sample_images[0], mask, return_tokens=True)
    assert kept.shape == (tiny.LENGTH,) and np.array_equal(kept, expected)
    _, free = pipe.edit(KEY, sample_images[0], mask, None, keep_coarse=False, return_tokens=True)
    assert np.array_equal(free[2:], kept[2:])
    one = pipe.edit(KEY, sample_images[1], mask, 2)
    assert one.shape == (tiny.SIDE, tiny.SIDE, 3)
    assert np.allclose(pipe.edit(KEY, sample_images[1:2], mask, [2])[0], one, atol=1e-6)


def test_without_stage_2_and_smoothly(sample_images):
    pipe = hmar_jax.load(str(tiny.model_run()))
    mask = np.ones((tiny.SIDE, tiny.SIDE), bool)
    plain = pipe.edit(KEY, sample_images, mask, 1)
    smooth = pipe.edit(KEY, sample_images, mask, 1, smooth=True)
    assert plain.shape == smooth.shape and not np.array_equal(plain, smooth)
    with pytest.raises(InputError, match="masked passes, which require stage 2; this model has no"):
        pipe.edit(KEY, sample_images, mask, 1, schedule="default")


def test_temperature(pipe, sample_images):
    """It acts on the regenerated tokens only."""
    mask = np.ones((tiny.SIDE, tiny.SIDE), bool)

    def edit(mask=mask, **options):
        return pipe.edit(KEY, sample_images, mask, 1, return_tokens=True, **options)

    image, tokens = edit()
    same_image, same_tokens = edit(temperature=1.0)
    assert np.array_equal(image, same_image) and np.array_equal(tokens, same_tokens)
    assert not np.array_equal(edit(temperature=50.0)[1], tokens)
    _, kept = edit(~mask, temperature=50.0)
    assert np.array_equal(kept, pipe.encode(sample_images))


@pytest.mark.slow
def test_deprecated_names(pipe, sample_images):
    mask = np.zeros((tiny.SIDE, tiny.SIDE), bool)
    mask[:4, :4] = True
    expected = pipe.edit(KEY, sample_images, mask, 1, dilation=1, choice_temperature=20.0)
    plain = pipe.edit(KEY, sample_images, mask, 1)
    with pytest.warns(FutureWarning) as warned:
        found = pipe.edit(KEY, sample_images, mask, 1, ring=1, confidence_noise=20.0)
    assert [str(w.message) for w in warned] == [
        "ring is deprecated; use dilation",
        "confidence_noise is deprecated; use choice_temperature",
    ]
    assert np.array_equal(found, expected) and not np.array_equal(found, plain)

    expected, plain = (pipe.sample(KEY, [0, 1, 2], choice_temperature=x) for x in (20.0, 0.0))
    with pytest.warns(FutureWarning, match="^confidence_noise is deprecated; use choice_temper"):
        found = pipe.sample(KEY, [0, 1, 2], confidence_noise=20.0)
    assert np.array_equal(found, expected) and not np.array_equal(found, plain)


_IMAGE = "image must have shape (h, w, 3) or (B, h, w, 3); got "


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(mask=np.zeros((3, 3), bool)),
            "mask must have shape (h, w) or (B, h, w) of the image, (8, 8, 3); got (3, 3)",
        ),
        (
            dict(mask=np.zeros((8, 8), np.float32)),
            "mask must be bool, or uint8 with at least 128 where new content goes; got float32",
        ),
        (dict(dilation=-1), "dilation must be an integer of at least 0; got -1"),
        (dict(dilation=0.5), "dilation must be an integer of at least 0; got 0.5"),
        (dict(feather=-1), "feather must be a number of at least 0; got -1"),
        (dict(temperature=0), "temperature must be a number above 0; got 0"),
        (dict(keep_coarse="yes"), "keep_coarse must be True or False; got 'yes'"),
        (
            dict(class_id=[0, 1], mask=np.zeros((3, 8, 8), bool)),
            "3 edits need 1 or 3 classes; got 2",
        ),
        (dict(class_id=7), "class must be an id in [0, 2]; got 7"),
        (dict(image=np.zeros((8, 8), np.uint8)), _IMAGE + "(8, 8)"),
        (dict(image=np.zeros((0, 8, 8, 3), np.uint8)), _IMAGE + "(0, 8, 8, 3)"),
    ],
)
def test_invalid_arguments(pipe, sample_images, options, message):
    arguments = dict(image=sample_images[0], mask=np.zeros((8, 8), bool), class_id=0) | options
    with pytest.raises(InputError) as error:
        pipe.edit(KEY, arguments.pop("image"), arguments.pop("mask"), **arguments)
    assert str(error.value) == message


def test_another_size_is_resized_on_request(pipe, sample_images):
    large = np.kron(sample_images[0], np.ones((3, 4, 1), np.uint8))
    mask = np.zeros(large.shape[:2], bool)
    mask[0, 0] = True
    with pytest.warns(UserWarning, match="resizing an image of 32x24 to 8x8, the model's size"):
        edited, tokens = pipe.edit(KEY, large, mask, resize=True, return_tokens=True)
    assert edited.shape == (8, 8, 3) and tokens.shape == (tiny.LENGTH,)
    small = resize_image(large / np.float32(255), 8)
    small_mask = masks.resize_mask(mask[None], 8)[0]
    expected = pipe.edit(KEY, small, small_mask, resize=True)
    assert np.array_equal(edited, expected)
    assert np.array_equal(expected, pipe.edit(KEY, small, small_mask))


# The command


@pytest.fixture
def here(tmp_path, monkeypatch, sample_images):
    tiny.masked_run()  # trained before the command's output is captured
    monkeypatch.chdir(tmp_path)
    Image.fromarray(sample_images[0]).save("image.png")
    Image.fromarray(sample_images[0]).resize((20, 30)).save("large.png")
    (tmp_path / "text.png").write_text("no image")
    mask = np.zeros((8, 8), np.uint8)
    Image.fromarray(mask).save("black.png")
    mask[2:5, 2:5] = 255
    Image.fromarray(mask).save("mask.png")
    with tiny.cached():
        yield tmp_path


def edit(*arguments, image="image.png"):
    return cli.main(
        ["edit", f"--model={tiny.masked_run()}", f"--image={image}", "--out=out.png", *arguments]
    )


def pixels(name):
    return np.asarray(Image.open(name))


def test_edit_by_box_and_by_mask(here, sample_images, capsys):
    assert edit("--box=2,2,5,5", "--class=cross", "--show=show.png") == 0
    assert capsys.readouterr().out == "out.png; show.png: new content in 9 of 64 pixels\n"
    by_box, outside = pixels("out.png"), np.ones((8, 8), bool)
    outside[2:5, 2:5] = False
    assert np.array_equal(by_box[outside], sample_images[0][outside])
    assert not np.array_equal(by_box, sample_images[0])
    sheet = Image.open("show.png")
    assert sheet.width > 3 * 48 and sheet.height > 48
    assert edit("--mask=mask.png", "--class=1") == 0
    assert np.array_equal(pixels("out.png"), by_box)
    assert edit("--box=2,2,5,5", "--class=cross", "--mode=outpaint") == 0
    assert np.array_equal(pixels("out.png")[~outside], sample_images[0][~outside])
    assert not np.array_equal(pixels("out.png")[outside], sample_images[0][outside])


def test_edit_of_another_size_that_is_resized(here, capsys):
    assert edit("--box=0,0,10,15", "--resize", image="large.png") == 0
    err = capsys.readouterr().err
    assert err == "hmar edit: resizing an image of 20x30 to 8x8, the model's size\n"
    assert pixels("out.png").shape == (8, 8, 3)


def test_deprecated_options(here):
    assert edit("--box=2,2,5,5", "--class=1", "--dilation=1", "--choice_temperature=20") == 0
    expected = pixels("out.png")
    with pytest.warns(FutureWarning) as warned:
        assert edit("--box=2,2,5,5", "--class=1", "--ring=1", "--confidence_noise=20") == 0
    assert {str(w.message) for w in warned} == {
        "--ring is deprecated; use --dilation",
        "--confidence_noise is deprecated; use --choice_temperature",
    }
    assert np.array_equal(pixels("out.png"), expected)


@pytest.mark.parametrize(
    "arguments, image, words",
    [
        (
            ["--box=2,2,9,5"],
            "image.png",
            ["box must lie inside the image, 8 x 8 pixels (0,0,8,8); got 2,2,9,5"],
        ),
        (["--box=2,2,2,5"], "image.png", ["must have x0 < x1 and y0 < y1; got 2,2,2,5"]),
        (["--box=1,2,3"], "image.png", ["must be four integers x0,y0,x1,y1; got '1,2,3'"]),
        (["--box=a,b,c,d"], "image.png", ["must be four integers x0,y0,x1,y1; got 'a,b,c,d'"]),
        ([], "image.png", ["--box", "--mask"]),
        (["--box=0,0,2,2", "--mask=mask.png"], "image.png", ["--mask", "not allowed with"]),
        (["--box=0,0,8,8", "--mode=outpaint"], "image.png", ["--box must", "the whole image"]),
        (
            ["--mask=black.png"],
            "image.png",
            ["black.png selects 0 of 64 pixels", "must be white"],
        ),
        (
            ["--mask=mask.png"],
            "large.png",
            ["mask mask.png must have the image's size, 20 x 30 pixels; got 8 x 8"],
        ),
        (["--mask=text.png"], "image.png", ["--mask text.png cannot be decoded as an image"]),
        (["--box=0,0,2,2"], "text.png", ["--image text.png cannot be decoded as an image"]),
        (["--box=0,0,2,2"], "no.png", ["--image no.png: no such file"]),
        (
            ["--box=0,0,2,2", "--class=dog"],
            "image.png",
            ["class must be an id in [0, 2], or a name such as circle, cross, stripes; got 'dog'"],
        ),
        (
            ["--box=0,0,2,2", "--dilation=-1"],
            "image.png",
            ["--dilation: must be an integer of at least 0; got -1"],
        ),
        (
            ["--box=0,0,2,2", "--feather=-1"],
            "image.png",
            ["--feather: must be a number of at least 0; got -1"],
        ),
        (
            ["--box=0,0,2,2", "--temperature=0"],
            "image.png",
            ["--temperature: must be a number above 0; got 0.0"],
        ),
        (
            ["--box=0,0,2,2", "--schedule=[[1],[3]]"],
            "image.png",
            ["schedule of scale 1 (2x2) must sum to its 4 tokens; got sum 3"],
        ),
        (
            ["--box=0,0,2,2", "--greedy", "--smooth"],
            "image.png",
            ["greedy and smooth exclude each other"],
        ),
        (["--box=0,0,2,2", "--show=no/x.png"], "image.png", ["no/x.png"]),
    ],
)
def test_invalid_commands(here, capsys, arguments, image, words):
    before = sorted(here.rglob("*"))
    try:
        status = edit(*arguments, image=image)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1, err
    assert not [w for w in words if w not in err], err
    assert sorted(here.rglob("*")) == before
