"""Another family goes through every command, with nothing changed outside of its own modules."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import hmar_jax
from hmar_jax.cli import main as cli
from hmar_jax.io import checkpoints
from tests import tiny, toy_family

KEY = jax.random.key(3)


def command(workdir, images, **changes) -> list[str]:
    values = {"data.source": f"folder:{images}"} | changes
    return [
        "train",
        "--config=tests/toy_config.py:toy",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of three classes, 12 images each to train and 3 to validate, of 8 x 8 pixels."""
    root, rng = tmp_path_factory.mktemp("toy") / "images", np.random.default_rng(0)
    for split, count in (("train", 12), ("validate", 3)):
        for label, name in enumerate(tiny.CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = tiny.image(label, rng, toy_family.SIDE)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A finished run, of a process of its own."""
    workdir = tmp_path_factory.mktemp("toy_run") / "run"
    process = start(command(workdir, images))
    assert process.wait(300) == 0
    return workdir


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.chdir(tiny.ENVIRONMENT["PYTHONPATH"])
    toy_family.register(monkeypatch)
    with tiny.cached():
        yield


def start(arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.toy_family", *arguments],
        env={**tiny.ENVIRONMENT, **environment},
        cwd=tiny.ENVIRONMENT["PYTHONPATH"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def state_of(workdir):
    step, state = checkpoints.load_params_of_run(workdir, "opt_state", "step")
    assert step == 80
    return state


def test_it_learns(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert losses[1] < losses[0] < 0.3
    assert (run / "samples/step_000080.png").exists()


def test_a_killed_run_resumes_bit_for_bit(run, images, tmp_path):
    arguments = command(tmp_path / "run", images)
    for _ in range(5):
        process = start(arguments)
        while not (tmp_path / "run/checkpoints/20").exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        if not (tmp_path / "run/checkpoints/80").exists():
            break
        shutil.rmtree(tmp_path / "run")  # it had ended before the signal came
    else:
        raise AssertionError("the run always ended before it could be killed")
    assert start(arguments).wait(300) == 0
    found, expected = state_of(tmp_path / "run"), state_of(run)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_two_devices_give_the_same_result(run, images, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    arguments = command(tmp_path / "run", images, **{"mesh.data": 1, "mesh.fsdp": 2})
    assert start(arguments, **flags).wait(300) == 0
    found, expected = state_of(tmp_path / "run"), state_of(run)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_sample_and_decode(run, toy):
    pipe = hmar_jax.load(str(run))
    images, latents = pipe.sample(KEY, ["circle", 2], return_tokens=True)
    assert images.shape == (2, 8, 8, 3) and latents.shape == (2, 8, 8, 3)
    assert np.allclose(pipe.decode(latents), images, atol=1e-6)
    again = pipe.sample(KEY, [0, 2, 1])
    assert np.array_equal(again[:2], images)  # an image does not depend on its batch
    narrow = pipe.sample(KEY, [0] * 20, spread=0.0)
    assert np.array_equal(narrow[0], narrow[1])
    with pytest.raises(hmar_jax.InputError, match="spread must be at most 10; got 11"):
        pipe.sample(KEY, 0, spread=11.0)
    with pytest.raises(hmar_jax.InputError, match="unknown option 'guidance'; known: spread"):
        pipe.sample(KEY, 0, guidance=1.0)
    with pytest.raises(hmar_jax.InputError, match="cannot edit"):
        pipe.edit(KEY, images[0], np.ones((8, 8), bool))


def test_commands(run, toy, images, tmp_path, capsys):
    grid = tmp_path / "grid.png"
    assert cli.main(["sample", f"--model={run}", "--n=2", "--spread=0.5", f"--out={grid}"]) == 0
    assert Image.open(grid).width > 2 * 48
    assert cli.main(["info", f"--model={run}"]) == 0
    assert "linear-Gaussian toy" in capsys.readouterr().out
    image = tmp_path / "image.png"  # the options of all families are declared, for any model
    Image.new("RGB", (8, 8)).save(image)
    edit = ["edit", f"--model={run}", f"--image={image}", "--box=0,0,4,4"]
    assert cli.main([*edit, f"--out={tmp_path / 'edited.png'}"]) == 2
    assert "cannot edit" in capsys.readouterr().err
    model = tmp_path / "model"
    assert cli.main(["export", f"--model={run}", f"--out={model}"]) == 0
    one, two = (hmar_jax.load(str(name)).sample(KEY, [0, 1]) for name in (run, model))
    assert np.array_equal(one, two)
    pytest.importorskip("sklearn")
    report = tmp_path / "report.json"
    arguments = [f"--model={model}", f"--reference=folder:{images}", "--n=30"]
    assert cli.main(["evaluate", *arguments, f"--json={report}"]) == 0
    assert json.loads(report.read_text())["class_accuracy"] > 0.9


def test_plan(run, toy, images, capsys):
    arguments = ["plan", "--config=tests/toy_config.py:toy", "--config.batch_size=8", "--json"]
    assert cli.main([*arguments, "--topology=h100:8"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Without data, as many classes as ImageNet has are assumed.
    assert found["fits"] and found["parameters"] == 1000 * 192 * 5
    assert found["frozen_parameters"] == 0


def test_wrong_settings(toy, images, tmp_path, capsys):
    for changes, words in (
        ({"model.rank": 0}, "config.model.rank must be an integer of at least 1; got 0"),
        ({"sampling.guidance": 1.0}, "unknown config key 'sampling.guidance'; known: spread"),
    ):
        assert cli.main(command(tmp_path / "run", images, **changes)) == 2
        assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
