"""Paths that users give: `~` is expanded wherever a path enters, and only there."""

import ast
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import hmar_jax
from hmar_jax.autoencoders.perceptual import load_perceptual
from hmar_jax.cli import main as cli
from hmar_jax.data.sources import open_source, records_directory
from hmar_jax.errors import InputError
from hmar_jax.io import files
from hmar_jax.loading import convert_torch_files
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory of its own, and another current directory, which must stay empty."""
    folder, here = tmp_path / "home", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(here)
    with tiny.cached():
        yield folder
    assert os.listdir(here) == [], "a folder that is called ~"


def test_expand(home):
    assert files.expand("~") == str(home)
    assert files.expand("~/a/~b") == f"{home}/a/~b"
    assert files.expand(pathlib.Path("~/a")) == f"{home}/a"
    assert files.expand("~root/x") == f"{os.path.expanduser('~root')}/x"
    for same in ("", "a~", "./~/x", "/~/x", "gs://~/x", "gs://bucket/~"):
        assert files.expand(same) == same
    with pytest.raises(InputError, match="user that does not exist; .* write ./~nobody_here/x"):
        files.expand("~nobody_here/x")


def test_expansion_has_one_place():
    """Whoever needs a path from a user calls files.expand."""
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "hmar_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "expanduser"
    }
    assert found == {"hmar_jax/io/files.py"}


@pytest.mark.slow
def test_training_writes_to_the_home_directory(home):
    shutil.copytree(tiny.images(), home / "images")
    shutil.copytree(ROOT / "configs", home / "configs")
    arguments = tiny.train_tokenizer("~/runs/tokenizer", steps=2, data__source="folder:~/images")
    arguments[1] = "--config=~/configs/tokenizer.py:digits"
    assert cli.main(arguments) == 0
    assert (home / "runs/tokenizer/checkpoints").is_dir()
    run = home / "runs/tokenizer"
    tokenize = ["tokenize", "--tokenizer=~/runs/tokenizer", "--data=folder:~/images"]
    assert cli.main([*tokenize, "--out=~/tokens", "--transform=random_crop"]) == 0
    assert records_directory("tokens:~/tokens") == str(home / "tokens")
    arguments = tiny.train("~/runs/model", steps=2, tokenizer="~/runs/tokenizer")
    arguments.append("--config.data.source=tokens:~/tokens")
    assert cli.main(arguments) == 0
    assert (home / "runs/model/config.json").exists() and run.exists()
    assert cli.main(["export", "--model=~/runs/model", "--out=~/model"]) == 0
    assert (home / "model/config.json").exists()


def test_results_go_to_the_home_directory(home):
    shutil.copytree(tiny.masked_run(), home / "run")
    pixels = tiny.image(0, np.random.default_rng(0), tiny.SIDE)
    Image.fromarray(pixels).save(home / "a.png")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(home / "m.png")
    sample = ["sample", "--model=~/run", "--classes=0", "--n=1"]
    assert cli.main([*sample, "--out=~/grid.png", "--npz=~/x.npz"]) == 0
    edit = ["edit", "--model=~/run", "--image=~/a.png", "--mask=~/m.png"]
    assert cli.main([*edit, "--out=~/edited.png", "--show=~/shown.png"]) == 0
    assert {"grid.png", "x.npz", "edited.png", "shown.png"} <= set(os.listdir(home))


def test_paths_in_the_python_interface(home):
    shutil.copytree(tiny.masked_run(), home / "run")
    assert hmar_jax.load("~/run").can_sample
    assert hmar_jax.load(pathlib.Path("~/run")).can_sample
    assert hmar_jax.sample(jax.random.key(0), 1, model="~/run").shape == (8, 8, 3)
    shutil.copytree(tiny.images(), home / "images")
    assert len(open_source("folder:~/images")) == 36
    with pytest.raises(InputError, match=f"^{home}/lpips.npz: no such file"):
        load_perceptual("~/lpips.npz")


def test_published_weights_in_the_home_directory(home):
    pytest.importorskip("torch")
    for read in (convert_torch_files, hmar_jax.from_torch):
        with pytest.raises(InputError, match=f"^{home}/vae.pth: no such file"):
            read(None, tokenizer="~/vae.pth")
