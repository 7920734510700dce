"""Images that cannot be decoded are named and counted, whatever reads them."""

import json

import numpy as np
import pytest
from PIL import Image

from hmar_jax.cli import main as cli
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.sources import open_source
from hmar_jax.errors import InputError
from hmar_jax.evaluation.classifier import read_all
from tests import tiny


@pytest.fixture
def images(tmp_path):
    """Three classes of 12 images, some of them broken: two to train on and one held out."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validate", 3)):
        for label, name in enumerate(tiny.CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = tiny.image(label, rng, tiny.SIDE)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    whole = (root / "train/circle/0.png").read_bytes()
    (root / "train/circle/0.png").write_bytes(b"")
    (root / "train/cross/1.png").write_bytes(whole[: len(whole) // 2])
    (root / "validate/cross/2.png").write_text("<html>404</html>")
    return root


NAMES = ("train/circle/0.png", "train/cross/1.png", "validate/cross/2.png")


def assert_named_and_counted(text, images, names=NAMES):
    for name in names:
        assert text.count(f"{images / name}: ") == 1, text
    assert f"could not be decoded: {len(names)}" in text


@pytest.mark.parametrize("copies", [0, 2])
def test_training_names_them_with_and_without_cached_crops(images, tmp_path, capfd, copies):
    workdir = tmp_path / "run"
    arguments = tiny.train(
        workdir, data__source=f"folder:{images}", data__cached_copies=copies, steps=20
    )
    with tiny.cached():
        assert cli.main(arguments) == 0
    assert_named_and_counted(capfd.readouterr().err, images)
    assert_named_and_counted((workdir / "log.txt").read_text(), images)


def test_cached_crops_name_them_before_the_first_step(images, tmp_path, capfd):
    """Also in a run that is over before a log line falls due."""
    arguments = tiny.train(
        tmp_path / "run",
        data__source=f"folder:{images}",
        data__cached_copies=2,
        steps=1,
        log_every=1000,
    )
    with tiny.cached():
        assert cli.main(arguments) == 0
    text = capfd.readouterr().err
    assert text.index(NAMES[0]) < text.index("step 1 of 1: ")


def test_tokenize_names_them(images, tmp_path, capfd):
    arguments = [f"--tokenizer={tiny.tokenizer_run()}", f"--data=folder:{images}"]
    out = tmp_path / "tokens"
    with tiny.cached():
        assert cli.main(["tokenize", *arguments, "--transform=random_crop", f"--out={out}"]) == 0
    captured = capfd.readouterr()
    for name in NAMES:
        assert captured.err.count(f"{images / name}: ") == 1
    assert "34 images to train (2 could not be decoded)" in captured.out
    assert "8 images to validate (1 could not be decoded)" in captured.out


def test_evaluate_names_those_of_its_reference(images, tmp_path, capfd):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    arguments = [f"--model={tiny.model_run()}", f"--reference=folder:{images}", "--n=12"]
    with tiny.cached():
        assert cli.main(["evaluate", *arguments, f"--json={tmp_path / 'report.json'}"]) == 0
    assert_named_and_counted(capfd.readouterr().err, images)
    assert json.loads((tmp_path / "report.json").read_text())["samples"] == 12


def test_a_reference_may_not_have_too_many(tmp_path):
    for i in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(b"")
    train = open_source(f"folder:{tmp_path}")
    with pytest.raises(InputError, match="12 of the 28 images cannot be read|1[012] of the 28"):
        read_all(train)
    (tmp_path / "11.png").unlink()
    (tmp_path / "10.png").unlink()
    log = DecodeErrorLog()
    images, labels = read_all(open_source(f"folder:{tmp_path}"), log)
    assert len(images) == len(labels) == 26 - log.count
