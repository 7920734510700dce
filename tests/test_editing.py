"""Editing: which tokens stay, what comes back untouched, and what a user can get wrong."""

import jax
import numpy as np
import pytest
from PIL import Image

import hmar_jax
from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import editing
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


def test_a_token_stays_if_its_whole_cell_does():
    hole = np.zeros((1, 12, 12), bool)
    hole[0, 0, 4] = (
        True  # one pixel of the first row: cell (0, 0) of 2x2, (0, 1) of 3x3, (0, 1) of 4x4
    )
    keep = editing.kept_tokens(ScaleList((1, 2, 3, 4)), hole)[0]
    assert not keep[0]
    assert keep[1:5].reshape(2, 2).tolist() == [[False, True], [True, True]]
    assert keep[5:14].reshape(3, 3).tolist() == [[True, False, True], [True] * 3, [True] * 3]
    assert keep[14:].reshape(4, 4).tolist() == [[True, False, True, True]] + [[True] * 4] * 3


def test_a_cell_that_shares_pixels_with_the_hole_is_given_up():
    hole = np.zeros((1, 8, 8), bool)
    hole[0, 2, 2] = True  # of 3x3, cells overlap: pixel 2 belongs to the first and the second
    keep = editing.kept_tokens(ScaleList((3,)), hole)[0].reshape(3, 3)
    assert keep.tolist() == [[False, False, True], [False, False, True], [True, True, True]]


def test_ring_and_coarse_scales():
    hole = np.zeros((2, 16, 16), bool)
    hole[0, 0, 0] = hole[1, 9, 9] = True
    scales = ScaleList((1, 2, 4))
    ring = editing.kept_tokens(scales, hole, ring=1)[:, 5:].reshape(2, 4, 4)
    assert (~ring[0]).sum() == 4 and not ring[0, :2, :2].any()
    assert (~ring[1]).sum() == 9 and not ring[1, 1:4, 1:4].any()
    coarse = editing.kept_tokens(scales, hole, keep_coarse=True)
    assert coarse[:, :5].all() and (~coarse[:, 5:]).sum(-1).tolist() == [1, 1]


def test_holes_are_resized_without_losing_a_pixel():
    hole = np.zeros((1, 30, 50), bool)
    hole[0, 29, 49] = True
    small, large = editing.resize_mask(hole, 8)[0], editing.resize_mask(hole, 64)[0]
    assert small.sum() == 1 and small[7, 7] and large[63, 63] and not large[:60].any()


def test_hiding():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3) / 96
    hole = np.zeros((2, 4, 4), bool)
    hole[0, :2] = True
    hole[1] = True
    hidden = editing.hide(images, hole)
    assert np.array_equal(hidden[0, 2:], images[0, 2:]) and np.allclose(
        hidden[0, :2], images[0, 2:].mean((0, 1))
    )
    assert (hidden[1] == 0.5).all()
    other = editing.hide(np.where(hole[..., None], 0.5, images).astype(np.float32), hole)
    assert np.array_equal(hidden[0], other[0])  # whatever was in the hole


@pytest.mark.parametrize("feather", [0, 2])
def test_joining(feather):
    rng = np.random.default_rng(0)
    images, generated = rng.random((2, 1, 12, 12, 3), np.float32)
    hole = np.zeros((1, 12, 12), bool)
    hole[0, 2:10, 2:10] = True
    joined = editing.join(images, generated, hole, feather)
    assert np.array_equal(joined[~hole], images[~hole])
    assert np.array_equal(joined[0, 4:8, 4:8], generated[0, 4:8, 4:8])
    border = joined[0, 2, 2:10]
    if feather:
        assert np.allclose(
            border, images[0, 2, 2:10] * 2 / 3 + generated[0, 2, 2:10] / 3, atol=1e-6
        )
    else:
        assert np.array_equal(border, generated[0, 2, 2:10])
    everything = np.ones((1, 12, 12), bool)
    assert np.array_equal(editing.join(images, generated, everything, feather), generated)


@pytest.mark.parametrize(
    "box, words",
    [
        ((3, 3, 3, 5), "box 3,3,3,5 is empty"),
        ((5, 0, 2, 2), "empty"),
        ((0, 0, 9, 8), "not inside.*8 x 8 pixels: 0,0,8,8"),
        ((-1, 0, 2, 2), "not inside"),
    ],
)
def test_bad_boxes(box, words):
    with pytest.raises(InputError, match=words):
        editing.box_mask(box, 8, 8)


# The pipeline


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_to_edit_gives_back_the_reconstruction_to_the_bit(pipe, sample_images, count):
    images, nothing = sample_images[:count], np.zeros((tiny.SIDE, tiny.SIDE), bool)
    edited, tokens = pipe.edit(KEY, images, nothing, paste=False, return_tokens=True)
    wanted = pipe.encode(images)
    assert np.array_equal(tokens, wanted) and np.array_equal(edited, pipe.decode(wanted))
    assert np.array_equal(pipe.edit(KEY, images, nothing), images / np.float32(255))


def test_pixels_outside_come_back_untouched(pipe, sample_images):
    mask = np.zeros((tiny.SIDE, tiny.SIDE), bool)
    mask[:4, 2:] = True
    edited = np.asarray(pipe.edit(KEY, sample_images, mask, [0, 1, 2], feather=1))
    assert np.array_equal(
        (edited * 255).round().astype(np.uint8)[:, ~mask], sample_images[:, ~mask]
    )
    assert not np.array_equal(edited[:, mask], sample_images[:, mask] / np.float32(255))
    other = sample_images.copy()
    other[:, mask] = 77
    assert np.array_equal(
        pipe.edit(KEY, other, mask, [0, 1, 2]), pipe.edit(KEY, sample_images, mask, [0, 1, 2])
    )  # nothing leaks


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
    hidden = editing.hide(sample_images[:1] / np.float32(255), mask[None] >= 128)
    assert (tokens[:, 2:] == pipe.encode(hidden)[0, 2:]).all() and tokens.shape == (3, tiny.LENGTH)
    _, kept = pipe.edit(
        KEY, sample_images[0], mask, return_tokens=True
    )  # without a class the coarse scales stay
    assert kept.shape == (tiny.LENGTH,) and np.array_equal(kept, pipe.encode(hidden)[0])
    _, free = pipe.edit(KEY, sample_images[0], mask, None, keep_coarse=False, return_tokens=True)
    assert np.array_equal(free[2:], kept[2:])
    one = pipe.edit(KEY, sample_images[1], mask, 2)
    assert one.shape == (tiny.SIDE, tiny.SIDE, 3)
    assert np.allclose(pipe.edit(KEY, sample_images[1:2], mask, [2])[0], one, atol=1e-6)


def test_works_without_stage_2_and_smoothly(sample_images):
    pipe = hmar_jax.load(str(tiny.model_run()))
    mask = np.ones((tiny.SIDE, tiny.SIDE), bool)
    plain, smooth = (
        pipe.edit(KEY, sample_images, mask, 1),
        pipe.edit(KEY, sample_images, mask, 1, smooth=True),
    )
    assert plain.shape == smooth.shape and not np.array_equal(plain, smooth)
    with pytest.raises(InputError, match="no stage 2"):
        pipe.edit(KEY, sample_images, mask, 1, schedule="default")


@pytest.mark.parametrize(
    "options, words",
    [
        (
            dict(mask=np.zeros((3, 3), bool)),
            r"mask of shape \(3, 3\) for a image of shape \(8, 8, 3\)",
        ),
        (dict(mask=np.zeros((8, 8), np.float32)), "mask of type float32"),
        (dict(ring=-1), "ring=-1"),
        (dict(ring=0.5), "ring=0.5"),
        (dict(feather=-1), "feather=-1"),
        (dict(class_id=[0, 1], mask=np.zeros((3, 8, 8), bool)), "2 classes for 3 edits"),
        (dict(class_id=7), "class 7"),
        (dict(image=np.zeros((8, 8), np.uint8)), r"^image of shape \(8, 8\)"),
        (dict(image=np.zeros((0, 8, 8, 3), np.uint8)), r"^image of shape \(0, 8, 8, 3\)"),
    ],
)
def test_wrong_wishes(pipe, sample_images, options, words):
    arguments = dict(image=sample_images[0], mask=np.zeros((8, 8), bool), class_id=0) | options
    with pytest.raises(InputError, match=words):
        pipe.edit(KEY, arguments.pop("image"), arguments.pop("mask"), **arguments)


def test_another_size_is_resized_with_a_notice(pipe, sample_images):
    large = np.kron(sample_images[0], np.ones((3, 4, 1), np.uint8))
    mask = np.zeros(large.shape[:2], bool)
    mask[0, 0] = True
    with pytest.warns(UserWarning, match="resizing a image of 32x24 to the model's 8x8"):
        edited, tokens = pipe.edit(KEY, large, mask, return_tokens=True)
    assert edited.shape == (8, 8, 3) and tokens.shape == (tiny.LENGTH,)


# The command


@pytest.fixture
def here(tmp_path, monkeypatch, sample_images):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(sample_images[0]).save("image.png")
    Image.fromarray(sample_images[0]).resize((20, 30)).save("large.png")
    (tmp_path / "text.png").write_text("no image")
    white = np.zeros((8, 8), np.uint8)
    Image.fromarray(white).save("black.png")
    white[2:5, 2:5] = 255
    Image.fromarray(white).save("mask.png")
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
    assert capsys.readouterr().out == "out.png; show.png\n"
    by_box, outside = pixels("out.png"), np.ones((8, 8), bool)
    outside[2:5, 2:5] = False
    assert np.array_equal(by_box[outside], sample_images[0][outside]) and not np.array_equal(
        by_box, sample_images[0]
    )
    sheet = Image.open("show.png")
    assert sheet.width > 3 * 48 and sheet.height > 48
    assert edit("--mask=mask.png", "--class=1") == 0
    assert np.array_equal(pixels("out.png"), by_box)
    assert edit("--box=2,2,5,5", "--class=cross", "--mode=outpaint") == 0
    assert np.array_equal(pixels("out.png")[~outside], sample_images[0][~outside])
    assert not np.array_equal(pixels("out.png")[outside], sample_images[0][outside])


def test_edit_of_another_size(here, capsys):
    assert edit("--box=0,0,10,15", image="large.png") == 0
    said = capsys.readouterr()
    assert said.err == "hmar edit: resizing a image of 20x30 to the model's 8x8\n" and pixels(
        "out.png"
    ).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "arguments, image, words",
    [
        (["--box=2,2,9,5"], "image.png", ["box 2,2,9,5 is not inside", "8 x 8", "0,0,8,8"]),
        (["--box=2,2,2,5"], "image.png", ["box 2,2,2,5 is empty"]),
        (["--box=1,2,3"], "image.png", ["'1,2,3'", "x0,y0,x1,y1"]),
        (["--box=a,b,c,d"], "image.png", ["'a,b,c,d'"]),
        ([], "image.png", ["--box", "--mask"]),
        (["--box=0,0,2,2", "--mask=mask.png"], "image.png", ["--mask", "not allowed with"]),
        (["--box=0,0,8,8", "--mode=outpaint"], "image.png", ["whole image"]),
        (["--mask=black.png"], "image.png", ["black.png selects nothing", "white"]),
        (["--mask=mask.png"], "large.png", ["mask.png is 8 x 8", "20 x 30"]),
        (["--mask=text.png"], "image.png", ["--mask text.png", "cannot be read as a image"]),
        (["--box=0,0,2,2"], "text.png", ["--image text.png", "cannot be read as a image"]),
        (["--box=0,0,2,2"], "no.png", ["--image no.png: no such file"]),
        (
            ["--box=0,0,2,2", "--class=dog"],
            "image.png",
            ["class 'dog'", "circle, cross, stripes"],
        ),
        (["--box=0,0,2,2", "--ring=-1"], "image.png", ["--ring", "'-1'"]),
        (["--box=0,0,2,2", "--feather=-1"], "image.png", ["feather=-1"]),
        (
            ["--box=0,0,2,2", "--schedule=[[1],[3]]"],
            "image.png",
            ["scale 1 (2x2) sums to 3, but the scale has 4"],
        ),
        (["--box=0,0,2,2", "--greedy", "--smooth"], "image.png", ["greedy and smooth"]),
        (["--box=0,0,2,2", "--show=no/x.png"], "image.png", ["no/x.png", "no folder"]),
    ],
)
def test_mistakes(here, capsys, arguments, image, words):
    before = sorted(here.rglob("*"))
    try:
        status = edit(*arguments, image=image)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and said.out == "" and said.err.count("\n") == 1, said.err
    assert not [w for w in words if w not in said.err], said.err
    assert sorted(here.rglob("*")) == before
