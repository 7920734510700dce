"""`--overwrite` of export and convert: a complete model replaces a model, and nothing else."""

import hashlib
import json
import os

import pytest
from safetensors.numpy import save_file

from hmar_jax.cli.main import main
from hmar_jax.io import models
from tests.state_dicts import tokenizer_state


def digest(folder) -> dict[str, str]:
    """Of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def model(tmp_path):
    out = tmp_path / "model"
    assert main(["export", "--model=digits", f"--out={out}", "--licence=first"]) == 0
    return out


def test_export_names_an_option_that_exists(model, capsys):
    before = digest(model)
    command = ["export", "--model=digits", f"--out={model}", "--licence=second"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said == (
        f"hmar export: {model} is not empty: choose another directory, or replace the model in it "
        "with --overwrite\n"
    )
    assert digest(model) == before
    assert main([*command, "--overwrite"]) == 0
    assert json.loads((model / "config.json").read_text())["licence"] == "second"
    assert os.listdir(model.parent) == ["model"]  # no temporary directory


def test_a_model_may_replace_itself(model):
    command = ["export", f"--model={model}", f"--out={model}", "--half", "--overwrite"]
    before = sum(path.stat().st_size for path in model.rglob("*"))
    assert main(command) == 0
    assert sum(path.stat().st_size for path in model.rglob("*")) < before


def test_convert_overwrites_a_model(model, tmp_path, capsys):
    save_file(tokenizer_state(), tmp_path / "vae.safetensors")
    command = ["convert", f"--tokenizer={tmp_path / 'vae.safetensors'}", "--scales=1,2"]
    assert main([*command, f"--out={model}"]) == 2
    assert "replace the model in it with --overwrite" in capsys.readouterr().err
    assert main([*command, f"--out={model}", "--overwrite"]) == 0
    assert main(["info", f"--model={model}"]) == 0
    assert "tokenizer" in capsys.readouterr().out


def test_other_directories_are_not_overwritten(tmp_path, model, capsys):
    run, other = tmp_path / "run", tmp_path / "home"
    (run / "checkpoints" / "100").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    (model / "notes.txt").write_text("x")
    for folder, what in ((run, "a run"), (other, "thesis.tex"), (model, "notes.txt")):
        before = digest(folder)
        assert main(["export", "--model=digits", f"--out={folder}", "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert f"contains {what}: only a directory with nothing but a model may be" in said
        assert digest(folder) == before


def test_a_failure_leaves_the_old_model(model, monkeypatch, capsys):
    before = digest(model)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "write_atomically", fail)
    command = ["export", "--model=digits", f"--out={model}", "--licence=second", "--overwrite"]
    assert main(command) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert digest(model) == before and os.listdir(model.parent) == ["model"]
