"""Editing images of another size than the model's: they keep their size, and what is not masked."""

import os
import warnings

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms

import hmar_jax
from hmar_jax.cli import main as cli
from hmar_jax.data.decoding import read_profile
from hmar_jax.errors import InputError
from hmar_jax.io import crops, images
from tests import tiny

KEY = jax.random.key(3)
H, W = 30, 44
ONE, TWO = np.s_[3:7, 2:6], np.s_[20:26, 33:38]  # far from each other for a model of 8x8 pixels


@pytest.fixture(scope="module")
def pipe():
    return hmar_jax.load(str(tiny.masked_run()))


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def no_other_warnings():
    """Editing at full size warns of nothing but coarse detail."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "new content will be coarse")
        yield


def mask_of(*regions):
    mask = np.zeros((H, W), bool)
    for region in regions:
        mask[region] = True
    return mask


# The pipeline


def test_size_and_pixels_outside_stay(pipe, photo):
    for mask in (mask_of(ONE), mask_of(ONE, TWO), ~mask_of(ONE), mask_of(np.s_[10:14])):
        edited = np.asarray(pipe.edit(KEY, photo, mask, 1))
        assert edited.shape == (H, W, 3) and edited.dtype == np.float32
        assert np.array_equal(images.to_uint8(edited)[~mask], photo[~mask])
        assert (images.to_uint8(edited) != photo).any(-1)[mask].mean() > 0.9
    image = np.random.default_rng(1).random((H, W, 3)).astype(np.float32)
    assert np.array_equal(np.asarray(pipe.edit(KEY, image, mask, 1))[~mask], image[~mask])


def test_the_masked_content_does_not_matter(pipe, photo):
    mask = mask_of(ONE, TWO)
    other = photo.copy()
    other[mask] = 255
    assert np.array_equal(pipe.edit(KEY, photo, mask, 1), pipe.edit(KEY, other, mask, 1))


def test_regions_are_edited_on_their_own(pipe, photo):
    both, tokens = pipe.edit(KEY, photo, mask_of(ONE, TWO), 1, return_tokens=True)
    one, first = pipe.edit(KEY, photo, mask_of(ONE), 1, return_tokens=True)
    assert tokens.shape == (2, tiny.LENGTH) and np.array_equal(first, tokens[:1])
    assert np.array_equal(both[ONE], one[ONE])
    assert np.array_equal(one[TWO], photo[TWO] / np.float32(255))
    # The tokens are those of the squares.
    whole = pipe.edit(KEY, photo, mask_of(ONE), 1, paste=False)
    assert crops.find_windows(mask_of(ONE), 8, 2.0) == [(1, 0, 8)]
    assert np.allclose(whole[1:9, :8], pipe.decode(first)[0], atol=1e-6)


def test_batches_have_squares_of_their_own(pipe, photo):
    batch, mask = np.stack([photo, photo[::-1]]), np.stack([mask_of(ONE), mask_of(TWO)])
    edited = np.asarray(pipe.edit(KEY, batch, mask, [0, 2]))
    pixels = images.to_uint8(edited)
    assert np.array_equal(pixels[~mask], batch[~mask]) and (pixels != batch)[mask].any()
    assert np.allclose(pipe.edit(KEY, photo, mask_of(ONE), 0), edited[0], atol=1e-6)
    # One image and several classes.
    several, tokens = pipe.edit(KEY, photo, mask_of(ONE, TWO), [0, 1], return_tokens=True)
    assert several.shape == (2, H, W, 3) and tokens.shape == (4, tiny.LENGTH)
    assert np.allclose(several[0], pipe.edit(KEY, photo, mask_of(ONE, TWO), 0), atol=1e-6)
    assert not np.allclose(several[0], several[1], atol=0.01)


def test_an_image_smaller_than_the_model(pipe, photo):
    small, mask = photo[:5, :7], np.zeros((5, 7), bool)
    mask[1:3, 4:6] = True
    edited = images.to_uint8(pipe.edit(KEY, small, mask, 1))
    assert edited.shape == (5, 7, 3) and np.array_equal(edited[~mask], small[~mask])
    assert (edited != small).any(-1)[mask].all()


def test_an_empty_mask_changes_nothing(pipe, photo):
    with pytest.warns(UserWarning, match="a mask selects 0 of 1,320 pixels: nothing is regener"):
        edited = pipe.edit(KEY, photo, mask_of(), 1)
    assert np.array_equal(edited, photo / np.float32(255))


def test_coarse_detail_is_reported(pipe, photo):
    with pytest.warns(UserWarning) as warned:
        pipe.edit(KEY, photo, mask_of(np.s_[5:20, 10:25]), 1)
    assert [str(w.message) for w in warned] == [
        "new content will be coarse: 30x30 pixels of the image are generated at 8x8 and enlarged "
        "3.75 times; smaller regions become finer"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.edit(KEY, photo, mask_of(ONE), 1)


def test_warnings_name_the_line_that_edits(pipe, photo):
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        pipe.edit(KEY, photo, np.ones((H, W), bool), 1)
        pipe.edit(KEY, photo, mask_of(ONE), 1, resize=True)
    words = ("nothing is kept", "will be coarse", "resizing an image")
    assert [word in str(n.message) for n, word in zip(notices, words, strict=True)] == [True] * 3
    assert {notice.filename for notice in notices} == {__file__}


def test_context(pipe, photo):
    edits = [pipe.edit(KEY, photo, mask_of(TWO), 1, context=c) for c in (None, 2.0, 4.0)]
    assert np.array_equal(edits[0], edits[1]) and not np.array_equal(edits[1], edits[2])
    for context in (0.9, "2"):
        with pytest.raises(InputError, match="context must be a number of at least 1; got"):
            pipe.edit(KEY, photo, mask_of(TWO), 1, context=context)


# The command


@pytest.fixture
def here(tmp_path, monkeypatch, photo):
    tiny.masked_run()  # trained before the command's output is captured
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("photo.png")
    with tiny.cached():
        yield tmp_path


def edit(*arguments, image="photo.png", out="out.png"):
    return cli.main(
        ["edit", f"--model={tiny.masked_run()}", f"--image={image}", f"--out={out}", *arguments]
    )


def pixels(name):
    with Image.open(name) as image:
        return np.asarray(image)


def profile_of(name):
    with Image.open(name) as image:
        return image.info.get("icc_profile")


def test_the_command_says_what_was_generated_at_which_scale(here, photo, capsys):
    assert edit("--box=2,3,6,7", "--class=1", "--show=show.png") == 0
    found = capsys.readouterr()
    assert found.err == ""
    assert found.out == (
        "out.png; show.png: new content in 16 of 1,320 pixels\n"
        "  square 0,1,8,9: generated at its own scale\n"
    )
    mask = mask_of(ONE)
    assert np.array_equal(pixels("out.png")[~mask], photo[~mask])
    sheet = pixels("show.png")
    assert sheet.shape[1] > 3 * W
    assert (sheet == (255, 0, 80)).all(-1).sum() > 20, "the square is outlined"
    assert edit("--box=2,3,42,26", "--class=1", "--context=1.5") == 0
    found = capsys.readouterr()
    assert "44x44 pixels of the image are generated at 8x8 and enlarged 5.5 times" in found.err
    assert found.out.splitlines()[1:] == [
        "  square 0,-7,44,37: generated at 8x8 and enlarged 5.5 times; the part inside the image "
        "is used"
    ]


def test_jpeg_is_reported_to_change_pixels(here, photo, capsys):
    note = "out.jpg: JPEG changes pixels outside the mask a little; .png and .webp keep them"
    assert edit("--box=2,3,6,7", out="out.jpg") == 0
    assert capsys.readouterr().err == f"hmar edit: {note}\n"
    assert pixels("out.jpg").shape == photo.shape
    assert not images.is_lossy("out.webp") and not images.is_lossy("out.png")


def test_photographs_come_back_upright_and_with_their_colour_profile(here, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # is shown turned by 90 degrees
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    turned = Image.fromarray(photo).transpose(Image.Transpose.ROTATE_90)
    turned.save("turned.png", exif=exif, icc_profile=profile)
    assert edit("--box=2,3,6,7", image="turned.png") == 0
    mask = mask_of(ONE)
    assert np.array_equal(pixels("out.png")[~mask], photo[~mask])
    assert profile_of("out.png") == profile
    Image.fromarray(photo[..., 0]).save("gray.png", icc_profile=profile)
    assert read_profile("gray.png") is None, "of gray, not of the RGB that is read"


def test_what_the_result_cannot_hold_is_reported(here, photo, capsys):
    alpha = np.full((H, W, 1), 255, np.uint8)
    alpha[ONE] = alpha[0, :5] = 0
    Image.fromarray(np.concatenate([photo, alpha], -1)).save("holes.png")
    frames = [Image.fromarray(photo), Image.fromarray(photo[::-1])]
    frames[0].save("film.png", save_all=True, append_images=frames[1:])
    Image.fromarray(photo[..., 0].astype(np.uint16) * 257).save("deep.png")
    for image, note in (
        ("holes.png", "5 transparent pixels outside the mask become white"),
        ("film.png", "only the first of 2 frames is read"),
        ("deep.png", "its 16 bits become 8"),
    ):
        assert edit("--box=2,3,6,7", image=image) == 0
        assert capsys.readouterr().err == f"hmar edit: {image}: {note}\n"
    assert edit("--mask=alpha", image="holes.png") == 0
    assert "become white" not in capsys.readouterr().err


def test_a_mask_of_a_photograph_before_it_is_turned_upright(here, photo, capsys):
    Image.fromarray(mask_of(ONE).T).save("mask.png")
    assert edit("--mask=mask.png") == 2
    words = "must have the image's size, 44 x 30 pixels; got 30 x 44; an image's EXIF orientation"
    assert words in capsys.readouterr().err


def test_a_file_of_three_bytes_is_no_image(here, capsys):
    (here / "note.txt").write_text("hi\n")
    assert edit("--box=0,0,1,1", image="note.txt") == 2
    assert "(not an image of a known format)" in capsys.readouterr().err


def test_an_image_too_large_for_its_file_is_refused_before_the_model_is_loaded(here, capsys):
    Image.new("RGB", (16384, 2)).save("long.png")
    arguments = ["--image=long.png", "--box=0,0,2,2", "--out=out.webp"]
    assert cli.main(["edit", "--model=no/model", *arguments]) == 2
    err = capsys.readouterr().err
    assert "WEBP images must be at most 16,383 pixels; got 16,384 x 2" in err
    assert os.listdir(here).count("out.webp") == 0


@pytest.mark.slow  # the bundled model compiles for half a minute
def test_a_photograph_edited_with_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets = pytest.importorskip("sklearn.datasets")
    china = Image.fromarray(datasets.load_sample_image("china.jpg"))
    china.resize((1024, 683), Image.Resampling.LANCZOS).save("china.png")
    before, mask = pixels("china.png"), np.zeros((683, 1024), bool)
    mask[200:320, 300:460] = True
    Image.fromarray(mask).save("mask.png")
    options = ["--model=digits", "--image=china.png", "--mask=mask.png", "--class=3"]
    assert cli.main(["edit", *options, "--out=out.png"]) == 0
    after = pixels("out.png")
    assert after.shape == (683, 1024, 3) and np.array_equal(after[~mask], before[~mask])
    assert (after != before).any(-1)[mask].mean() > 0.95
