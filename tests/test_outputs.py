"""Outputs of commands: refused before any work where they cannot be written as asked."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import hmar_jax
from hmar_jax import pipeline
from hmar_jax.cli import main as cli
from tests import tiny


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("image.png")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save("mask.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.png").symlink_to("linked.png")
    (tmp_path / "same").symlink_to(".")
    (tmp_path / "c.py").write_text("x = 1\n")
    with tiny.cached():
        yield tmp_path


def snapshot(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


SAMPLE = ["sample", "--model=digits", "--n=1"]
EDIT = ["edit", "--model=digits", "--image=image.png", "--mask=mask.png"]
PLAN = ["plan", "--config=c.py:x", "--topology=v5e:2x2"]
ENDINGS = "must end in .png, .jpg, .jpeg or .webp; got "


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([*SAMPLE, "--out=a.gif"], "--out " + ENDINGS + "a.gif"),
        ([*SAMPLE, "--out=image.png/"], "image.png is a file, not a folder"),
        ([*SAMPLE, "--out=a.png.bak"], "--out " + ENDINGS + "a.png.bak"),
        ([*SAMPLE, "--out=a.png", "--npz=a.png"], "--npz must end in .npz; got a.png"),
        ([*SAMPLE, "--out=a.png", "--npz=."], "it names a folder"),
        ([*SAMPLE, "--out=a.png", "--npz=a"], "--npz must end in .npz; got a"),
        ([*SAMPLE, "--out=folder.png"], "folder.png: it names a folder"),
        ([*SAMPLE, "--out=no/a.png"], "folder"),
        ([*SAMPLE, "--out=a.png", "--npz=no/a.npz"], "does not exist"),
        ([*SAMPLE, "--out=image.png/a.png"], "is a file, not a folder"),
        ([*EDIT, "--out=a.png", "--show=a.png"], "--out and --show must be different files"),
        ([*EDIT, "--out=a.png", "--show=./sub/../a.png"], "must be different files; got a.png and"),
        ([*EDIT, "--out=a.png", "--show=same/a.png"], "must be different files"),
        ([*EDIT, "--out=link.png", "--show=linked.png"], "must be different files"),
        ([*EDIT, "--out=a.png", "--show=A.PNG"], "must be different files"),
        ([*EDIT, "--out=a.png", "--show=a.tif"], "--show " + ENDINGS + "a.tif"),
        ([*EDIT, "--out=image.png"], "--out image.png would overwrite --image image.png"),
        ([*EDIT, "--out=same/image.png"], "would overwrite --image"),
        ([*EDIT, "--out=a.png", "--show=mask.png"], "--show mask.png would overwrite --mask"),
        ([*PLAN, "--json=c.py"], "--json c.py would overwrite --config c.py"),
        ([*PLAN, "--json=no/x.json"], "does not exist"),
        (["evaluate", "--model=digits", "--json=sub"], "it names a folder"),
        ([*SAMPLE, "--out=a.png", "--classes="], "each class must be a name or an id"),
        ([*SAMPLE, "--out=a.png", "--classes=1,,2"], "each class must be a name or an id"),
        (
            [*SAMPLE, "--out=a.png", "--clases=1"],
            "unknown argument '--clases=1'; did you mean",
        ),
        ([*SAMPLE, "--out=a.png", "--zzzzz=1"], "unknown argument '--zzzzz=1' (see"),
        ([*SAMPLE, "--out=a.png", "--top_p=nan"], "--top_p: must be a number in [0, 1]; got nan"),
        ([*SAMPLE, "--out=a.png", "--n=0"], "--n: must be an integer of at least 1; got '0'"),
        (["info", "--model=digits", "--checkpoint=best"], "only runs have checkpoints"),
        (["info", "--model="], "--model: must not be empty"),
    ],
)
def test_refused_in_one_line(here, capfd, monkeypatch, arguments, words):
    def no_sampling(*_, **__):
        raise AssertionError("work before the check")

    monkeypatch.setattr(pipeline.Pipeline, "_in_turns", no_sampling)
    before = snapshot(here)
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, err = capfd.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and words in err, err
    assert snapshot(here) == before


def test_the_ending_of_out_decides_the_format(here, capsys):
    model = f"--model={tiny.model_run()}"
    for name, kind in (("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("a.PNG", "PNG")):
        assert cli.main(["sample", model, "--classes=0", "--n=1", f"--out={name}"]) == 0
        assert Image.open(name).format == kind
    assert cli.main(["sample", model, "--classes=0", "--n=1", "--out=/dev/null"]) == 0


def hmar(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "hmar_jax", *arguments],
        cwd=cwd,
        env={**tiny.ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )


def test_a_deleted_current_directory(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; exec {sys.executable} -m hmar_jax info --model=digits"
    result = subprocess.run(
        ["sh", "-c", command], cwd=gone, env=tiny.ENVIRONMENT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "hmar info: the current directory does not exist any more; cd to another\n"
    )


@pytest.mark.skipif(
    any(p.name.startswith("nvidia") for p in pathlib.Path("/dev").iterdir()), reason="has a GPU"
)
@pytest.mark.parametrize(
    "arguments", [["info", "--model=digits"], [*SAMPLE, "--out=a.png", "--classes=1"]]
)
def test_a_platform_without_devices(tmp_path, arguments):
    result = hmar(*arguments, cwd=tmp_path, JAX_PLATFORMS="cuda")
    assert (result.returncode, result.stdout) == (2, "")
    err = result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and "damaged" not in result.stderr
    assert err.startswith(f"hmar {arguments[0]}: JAX finds no device")
    assert "unset JAX_PLATFORMS, which is 'cuda'" in err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"hmar_jax {hmar_jax.__version__}, jax {jax.__version__}, Python 3.")
    assert out.endswith(f"; devices: {len(jax.devices())} x {jax.devices()[0].device_kind}\n")


def test_without_a_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("hmar: a COMMAND is required: tokenize, train-tokenizer, train, ")


def test_names_that_are_no_text_can_be_printed(tmp_path):
    """Names of files and classes may be bytes of another encoding."""
    code = (
        "from hmar_jax.cli import main; main._main = lambda _: print('a\\udce9\\u0436'); main.run()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**tiny.ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        cwd=tmp_path,
    )
    assert result.stdout == b"a\\udce9\\u0436\n" and result.stderr == b""
    assert os.listdir(tmp_path) == []
