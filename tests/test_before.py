"""Run directories and token sets written before version 0.2 resume and load.

fixtures/before_0_2/README.md lists what they hold and how they were made. These tests use public
names only: the command line, hmar_jax.load and Pipeline.
"""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest

import hmar_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests/fixtures/before_0_2"
COMMANDS = json.loads((FIXTURE / "commands.json").read_text())
# Runs, and the part of Pipeline.params that each trains.
TRAINED = {"tokenizer": "tokenizer", "stage1": "transformer", "stage2": "masked"}
# Same JAX version and CPU: equal bits. Other versions and instruction sets differ by 1e-7.
TOLERANCE = 0 if os.environ.get("HMAR_EXACT") else 1e-6


@pytest.fixture(scope="module")
def expected():
    return np.load(FIXTURE / "expected.npz")


@pytest.fixture
def folder(tmp_path):
    """A copy of the recorded runs, token set and images."""
    with tarfile.open(FIXTURE / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    os.symlink(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def hmar(folder: pathlib.Path, *arguments: str) -> str:
    """Runs the command line in `folder`, to which the recorded commands' paths are relative."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as the fixture was made
    }
    done = subprocess.run(
        [sys.executable, "-m", "hmar_jax", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def training_lines(workdir: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


def assert_close(actual, expected, name=""):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in TRAINED if name != "stage2"]
    + ["stage2"],
)
def test_an_interrupted_run_resumes_to_the_recorded_parameters(name, folder, expected):
    before = (folder / name / "metrics.jsonl").read_text()
    hmar(folder, *COMMANDS[name])
    assert (folder / name / "metrics.jsonl").read_text().startswith(before)
    assert [line["step"] for line in training_lines(folder / name)] == list(range(10, 81, 10))
    (data,) = json.loads((folder / name / "config.json").read_text())["data"]  # known from now on
    assert (data["train"]["images"], data["validate"]["images"]) == (36, 9)

    params = hmar_jax.load(str(folder / name)).params[TRAINED[name]]
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    prefix = f"{name}/params/"
    assert {prefix + key for key in leaves} == {k for k in expected.files if k.startswith(prefix)}
    for key, leaf in leaves.items():
        assert_close(leaf, expected[prefix + key], key)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_an_interrupted_run_is_extended(name, folder):
    """From the checkpoint of step 40, to another length, batch size and rate, with an average."""
    saved = lambda: json.loads((folder / name / "config.json").read_text())
    former = saved()["config"]["recipe"]["learning_rate"]
    changes = ["steps=60", "batch_size=4", "recipe.learning_rate=1e-4", "ema_decay=0.9"]
    command = [*COMMANDS[name], *(f"--config.{change}" for change in changes)]
    hmar(folder, *command, "--extend")
    (entry,) = saved()["history"]
    assert (entry["from_step"], entry["position"]) == (40, 240)
    assert entry["changes"] == {
        "batch_size": [6, 4],
        "ema_decay": [0.0, 0.9],
        "recipe.learning_rate": [former, 1e-4],
        "steps": [80, 60],
    }
    assert [line["step"] for line in training_lines(folder / name)] == list(range(10, 61, 10))
    hmar(folder, *command)
    assert saved()["history"] == [entry]


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_an_interrupted_run_samples_the_recorded_tokens(name, folder, expected):
    pipe = hmar_jax.load(str(folder / name))
    images, tokens = pipe.sample(jax.random.key(1), [0, 1, 2, 2], return_tokens=True)
    assert np.array_equal(tokens, expected[f"{name}/tokens"])
    assert_close(images, expected[f"{name}/images"])


def test_a_tokenizer_encodes_and_decodes_as_recorded(folder, expected):
    pipe = hmar_jax.load(str(folder / "tokenizer"))
    tokens = pipe.encode(expected["tokenizer/image"])
    assert np.array_equal(tokens, expected["tokenizer/tokens"])
    assert_close(pipe.decode(tokens), expected["tokenizer/decoded"])


@pytest.mark.slow
def test_a_token_set_trains_as_recorded(folder, expected):
    """Same fingerprint as the tokenizer, same records in the same order, same losses."""
    hmar(folder, *COMMANDS["from_tokens"])
    losses = [line["loss"] for line in training_lines(folder / "from_tokens")]
    assert_close(losses, expected["from_tokens/loss"])


def test_info_describes_an_old_run(folder):
    text = hmar(folder, "info", "--model=stage2")
    assert "1x1, 2x2" in text and "circle, cross, stripes" in text
