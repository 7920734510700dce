"""Masks as paint programs write them: each is right, or refused in one line with a count."""

import numpy as np
import pytest
from PIL import Image

from hmar_jax.cli import main as cli
from hmar_jax.data import mask_images
from hmar_jax.errors import InputError
from tests import tiny

H, W = 12, 16
HOLE = np.zeros((H, W), bool)
HOLE[2:6, 3:9] = True
GRAY = (HOLE * 255).astype(np.uint8)


def rgba(colour, alpha):
    pixels = np.zeros((H, W, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = colour, alpha
    return Image.fromarray(pixels)


def palette(transparency=None):
    image = Image.fromarray(HOLE.astype(np.uint8))
    image = image.convert("P")
    image.putpalette([0, 0, 0, 255, 255, 255] + [0] * 750)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


FORMS = {
    "1 bit": ("m.png", Image.fromarray(HOLE)),
    "8 bits": ("m.png", Image.fromarray(GRAY)),
    "8 bits, 0 and 1": ("m.png", Image.fromarray(HOLE.astype(np.uint8))),
    "16 bits": ("m.png", Image.fromarray(HOLE.astype(np.uint16) * 65535)),
    "16 bits, 0 and 255": ("m.png", Image.fromarray(HOLE.astype(np.uint16) * 255)),
    "16 bits, 0 and 1": ("m.tif", Image.fromarray(HOLE.astype(np.uint16))),
    "colour": ("m.bmp", Image.fromarray(GRAY).convert("RGB")),
    "CMYK": ("m.tif", Image.fromarray(GRAY).convert("RGB").convert("CMYK")),
    "palette": ("m.png", palette()),
    "palette with a transparent entry": ("m.png", palette(transparency=0)),
    "white on a transparent layer": ("m.png", rgba(255, GRAY)),
    "white on black that is transparent": ("m.png", rgba(GRAY[..., None], GRAY)),
    "white on opaque black": ("m.png", rgba(GRAY[..., None], 255)),
    "gray with alpha": ("m.png", rgba(255, GRAY).convert("LA")),
    "transparent white in a palette": ("m.gif", rgba(255, GRAY)),
    "WebP with alpha": ("m.webp", rgba(255, GRAY)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mask(form, tmp_path):
    name, image = FORMS[form]
    image.save(tmp_path / name)
    assert np.array_equal(mask_images.read_mask(str(tmp_path / name)), HOLE)


def test_a_mask_with_the_noise_of_jpeg(tmp_path):
    large = GRAY.repeat(9, 0).repeat(9, 1)
    Image.fromarray(large).save(tmp_path / "m.jpg", quality=60)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "m.jpg")))) > 2
    assert np.array_equal(mask_images.read_mask(str(tmp_path / "m.jpg")), large > 0)


def test_a_rotated_mask(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # is shown turned by 90 degrees
    image = Image.fromarray(GRAY).transpose(Image.Transpose.ROTATE_90)
    image.save(tmp_path / "m.png", exif=exif)
    assert np.array_equal(mask_images.read_mask(str(tmp_path / "m.png")), HOLE)


def test_the_transparency_of_an_image_as_its_mask(tmp_path):
    rgba((200, 10, 30), 255 - GRAY).save(tmp_path / "a.png")
    assert np.array_equal(mask_images.read_transparency(str(tmp_path / "a.png")), HOLE)
    soft = 255 - GRAY
    soft[2, 3] = 200  # the border of a soft eraser is not whole any more
    rgba((200, 10, 30), soft).save(tmp_path / "a.png")
    assert np.array_equal(mask_images.read_transparency(str(tmp_path / "a.png")), HOLE)
    for opaque in (rgba((200, 10, 30), 255), Image.fromarray(GRAY)):
        opaque.save(tmp_path / "a.png")
        with pytest.raises(InputError, match="has no transparent pixels .0 of 192."):
            mask_images.read_transparency(str(tmp_path / "a.png"))


# The command


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny.masked_run()
    monkeypatch.chdir(tmp_path)
    pixels = tiny.image(0, np.random.default_rng(0), tiny.SIDE)
    Image.fromarray(pixels).save("image.png")
    hole = np.zeros((8, 8), np.uint8)
    hole[2:5, 2:5] = 255
    Image.fromarray(np.dstack([pixels, 255 - hole])).save("holed.png")
    Image.fromarray(np.dstack([np.full((8, 8, 3), 255, np.uint8), hole])).save("layer.png")
    Image.fromarray(hole).save("plain.png")
    Image.fromarray(hole // 4).save("dark.png")
    Image.fromarray(np.dstack([np.full((8, 8, 3), 255, np.uint8), hole * 0])).save("clear.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save("white.png")
    with tiny.cached():
        yield tmp_path


def edit(*arguments, image="image.png"):
    options = [f"--model={tiny.masked_run()}", f"--image={image}", "--class=1", "--out=out.png"]
    return cli.main(["edit", *options, *arguments])


def test_a_layer_with_transparency_is_the_mask_that_was_painted(here, capsys):
    results = []
    for image, mask in (("image.png", "plain"), ("image.png", "layer"), ("holed.png", "alpha")):
        name = mask if mask == "alpha" else f"{mask}.png"
        assert edit(f"--mask={name}", image=image) == 0
        assert capsys.readouterr().out == "out.png: new content in 9 of 64 pixels\n"
        results.append(np.asarray(Image.open("out.png")))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_a_full_mask_is_reported(here, capsys):
    assert edit("--mask=white.png") == 0
    found = capsys.readouterr()
    assert found.out == "out.png: new content in 64 of 64 pixels\n"
    assert found.err == "hmar edit: a mask selects 64 of 64 pixels: nothing is kept\n"


@pytest.mark.parametrize(
    "mask, image, words",
    [
        (
            "dark.png",
            "image.png",
            "mask dark.png selects 0 of 64 pixels (its values lie in [0, 63] of 255",
        ),
        ("clear.png", "image.png", "selects 0 of 64 pixels (all of it is transparent)"),
        ("alpha", "image.png", "image image.png has no transparent pixels (0 of 64)"),
    ],
)
def test_a_mask_that_selects_nothing(here, capsys, mask, image, words):
    assert edit(f"--mask={mask}", image=image) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (here / "out.png").exists()
