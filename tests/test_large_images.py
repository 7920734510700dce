"""Images of many pixels: one limit, `max_pixels`, in place of Pillow's."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hmar_jax.cli import main as cli
from hmar_jax.data.decoding import ImageDecodeError, decode_image
from hmar_jax.data.sources import SourceConfig, open_source
from tests import tiny

MEGAPIXELS_196 = (14000, 14000)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A PNG file of 196 megapixels, gray."""
    path = tmp_path_factory.mktemp("large") / "large.png"
    Image.new("L", MEGAPIXELS_196, 200).save(path, compress_level=1)
    return path


def test_an_image_of_196_megapixels_is_decoded(large):
    limit = Image.MAX_IMAGE_PIXELS
    image = decode_image(str(large))
    assert image.shape == (14000, 14000, 3) and (image[::4000, ::4000] == 200).all()
    assert limit == Image.MAX_IMAGE_PIXELS  # other users of Pillow in the program keep it


def test_the_limit_is_an_option_and_the_error_says_how_to_raise_it(large, tmp_path):
    with pytest.raises(ImageDecodeError) as error:
        decode_image(str(large), max_pixels=195_999_999)
    assert error.value.reason == (
        "14000 x 14000 pixels are more than max_pixels=195999999; to read it, give "
        "max_pixels=196000000 (--config.data.max_pixels, or --max_pixels)"
    )
    for i in range(2):
        Image.new("RGB", (10, 10)).save(tmp_path / f"{i}.png")
    source = open_source(f"folder:{tmp_path}", config=SourceConfig(max_pixels=99))
    with pytest.raises(ImageDecodeError, match="10 x 10 pixels .* max_pixels=100"):
        source[0]


def test_the_size_is_checked_before_pixels_are_decoded(tmp_path):
    """A file of a few bytes that claims 10^18 pixels takes neither time nor memory."""
    path = tmp_path / "bomb.pgm"
    path.write_bytes(b"P5 1000000000 1000000000 255\n" + bytes(100))
    with pytest.raises(ImageDecodeError, match="1000000000 x 1000000000 pixels are more than"):
        decode_image(str(path))


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "gif", "bmp", "webp"])
def test_pillows_own_limit_neither_warns_nor_rejects(tmp_path, ending):
    """A real process, whose stderr stays empty; its limit is low so that small files exceed it."""
    path = tmp_path / f"x.{ending}"
    Image.new("RGB", (15, 10), "white").save(path)
    program = (
        "import sys\n"
        "from PIL import Image\n"
        "from hmar_jax.data.decoding import decode_image\n"
        "Image.MAX_IMAGE_PIXELS = 100\n"
        "print(decode_image(sys.argv[1]).shape, Image.MAX_IMAGE_PIXELS)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("(10, 15, 3) 100\n", "")


@pytest.mark.slow
def test_an_image_of_196_megapixels_trains_and_is_edited(large, tmp_path, capfd):
    rng = np.random.default_rng(0)
    for label, name in enumerate(tiny.CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = tiny.image(label, rng)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / tiny.CLASSES[0] / "large.png").symlink_to(large)
    run = tiny.train_tokenizer(
        tmp_path / "run",
        data__source=f"folder:{tmp_path / 'images'}",
        data__transform__kind="resize_crop",
        steps=3,
    )
    edit = [
        "edit",
        f"--model={tiny.model_run()}",
        f"--image={large}",
        "--box=0,0,7000,14000",
        f"--out={tmp_path / 'edited.png'}",
    ]
    with tiny.cached():
        assert cli.main(run) == 0
        text = capfd.readouterr().err
        assert "could not be decoded" not in text and "Bomb" not in text
        assert cli.main(edit) == 0
        assert "Bomb" not in capfd.readouterr().err
        assert cli.main([*edit, "--max_pixels=1000"]) == 2
    assert "--max_pixels" in capfd.readouterr().err
