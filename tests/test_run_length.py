"""Short runs: what counts in steps fits into them, epochs replace steps, and warnings."""

import json

import numpy as np
import pytest
from PIL import Image

from hmar_jax import config_files
from hmar_jax.cli import main as cli
from hmar_jax.data.sources import open_source
from hmar_jax.experiment import build_experiment, task_kind
from hmar_jax.loading import load_spec_and_params
from hmar_jax.training import run_length
from tests import tiny


@pytest.fixture(autouse=True)
def quick():
    with tiny.cached():
        yield


def fitted(config, steps, **more):
    return run_length.fit_to_run(config, task_kind(config)[1].schema, steps, **more)


def metrics_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_steps(arguments: list[str]) -> list[str]:
    return [argument for argument in arguments if not argument.startswith("--config.steps=")]


# Fitting


@pytest.mark.parametrize("name", ["tokenizer:photos", "tokenizer:vae_256", "hmar:digits"])
def test_a_shipped_config_is_not_changed(name):
    config = config_files.load_config(name)
    assert fitted(config, config.steps) == (config, [])


def test_intervals_and_warm_up_lie_within_a_short_run():
    config = config_files.load_config("hmar:cifar10")  # 400 images in 98 epochs of 128
    found, notes = fitted(config, 306)
    assert config.recipe.warmup_steps == 500 and found.recipe.warmup_steps == 15
    assert (found.log_every, found.eval_every) == (100, 76)
    assert (found.sample_every, found.checkpoint_every) == (76, 76)
    assert "recipe.warmup_steps=500" in notes[0] and "using 15" in notes[0]
    assert notes[1].endswith("shortened: eval_every=76, sample_every=76, checkpoint_every=76")


def test_what_a_tokenizer_counts_lies_within_a_short_run():
    config = config_files.load_config("tokenizer:vae_256")
    found = fitted(config, 1000)[0].recipe
    assert (found.warmup_steps, found.vq_start_step, found.adversarial_start) == (50, 100, 500)
    assert found.reset_every == 100  # fits
    # A few steps, to try something out, have room for no part of it.
    assert fitted(config, 90)[0].recipe.reset_every == 100
    images = 100 * config.batch_size
    found = fitted(config, 100)[0].recipe
    assert (found.reset_after, found.usage_window) == (images // 10, images // 4)


def test_what_a_run_was_started_with_stays():
    """An earlier version did not shorten the warm-up: a run of it resumes as it began."""
    config = config_files.load_config("hmar:cifar10")
    saved = config_files.to_dict(config)
    found, notes = fitted(config, 306, saved=saved)
    assert found.recipe.warmup_steps == 500 and "was started with it" in notes[0]
    assert found.eval_every == 76
    saved["recipe"]["warmup_steps"] = 15  # as a run of this version has it
    assert fitted(config, 306, saved=saved)[0].recipe.warmup_steps == 15


def test_an_older_run_resumes_with_its_warm_up(tmp_path):
    config = tiny.config_of(tiny.train("unused", steps=20, recipe__warmup_steps=500))
    assert build_experiment(config).config.recipe.warmup_steps == 1
    run = {"format": "hmar_jax run 1", "config": config_files.to_dict(config), "model": {}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    experiment = build_experiment(config, tmp_path)
    assert experiment.config.recipe.warmup_steps == 500
    assert experiment.task.recipe.warmup_steps == 500


@pytest.mark.slow
def test_a_short_run_reports_and_reaches_its_learning_rate(tmp_path):
    long = dict(log_every=100, eval_every=5000, sample_every=5000, checkpoint_every=5000)
    arguments = tiny.train(tmp_path / "run", steps=20, recipe__warmup_steps=500, **long)
    assert cli.main(arguments) == 0
    lines = metrics_of(tmp_path / "run")
    assert [x["step"] for x in lines if "lr" in x] == list(range(2, 21, 2))
    assert [x["step"] for x in lines if "validation/loss" in x] == [5, 10, 15, 20]
    assert len(list((tmp_path / "run/samples").iterdir())) == 4
    peak = config_files.load_config("hmar:digits").recipe.learning_rate
    assert max(x["lr"] for x in lines if "lr" in x) > 0.9 * peak
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert saved["recipe"]["warmup_steps"] == 1
    assert cli.main(arguments) == 0  # the same command is the same run


# Epochs


@pytest.mark.parametrize("stage", ["", ",stage=masked"])
def test_epochs_replace_the_steps_of_a_config(stage):
    config = config_files.load_config(f"hmar:digits{stage},epochs=3")
    assert (config.epochs, config.steps) == (3, 0)
    config = config_files.load_config(f"hmar:digits{stage},steps=9")
    assert (config.epochs, config.steps) == (0, 9)


def test_epochs_on_the_command_line_count(tmp_path, capfd):
    arguments = without_steps(tiny.train(tmp_path / "run", epochs=2))
    assert cli.main(arguments) == 0
    assert max(x["step"] for x in metrics_of(tmp_path / "run")) == 12  # 36 images, 6 at a time
    assert "12 steps of 6 images (2 epochs)" in capfd.readouterr().err
    assert cli.main(["info", f"--model={tmp_path / 'run'}"]) == 0
    assert "finished, step 12 of 12" in capfd.readouterr().out


def test_steps_and_epochs_together_are_not_silent(tmp_path, capfd):
    assert cli.main(tiny.train(tmp_path / "run", steps=4, epochs=3)) == 0
    assert "config.epochs has no effect, as config.steps is given too" in capfd.readouterr().err
    assert max(x["step"] for x in metrics_of(tmp_path / "run")) == 4
    log = (tmp_path / "run/log.txt").read_text()
    assert "WARNING a run of 4 steps is short" in log


# Warnings


def test_a_run_that_does_not_see_every_image_is_named():
    assert len(run_length.warnings(5, 6, 36)) == 2
    assert [w for w in run_length.warnings(5, 6, 36) if "each of the 36 images was seen once" in w]
    assert run_length.warnings(1000, 6, 36) == [] and len(run_length.warnings(499, 6, 36)) == 1


def test_more_codes_than_tokens_are_named(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(7):
        Image.fromarray(tiny.image(i % 3, np.random.default_rng(i))).save(images / f"{i}.png")
    config = tiny.config_of(tiny.train_tokenizer("unused", data__source=f"folder:{images}"))
    words = "at most 30, the tokens of all 6 images"  # 5 tokens each
    assert not any(words in text for text in build_experiment(config).warnings)
    config.model.vocab_size = 31
    assert any(words in text for text in build_experiment(config).warnings)


@pytest.fixture(scope="module")
def colored(tmp_path_factory):
    """A folder of two classes of colored images."""
    root = tmp_path_factory.mktemp("colored")
    ramp = np.linspace(0, 1, 40)
    for label, name in enumerate(("red", "blue")):
        (root / name).mkdir()
        for i in range(5):
            color = np.array([0.9, 0.3, 0.1 * i] if label == 0 else [0.1, 0.1 * i, 0.9])
            image = ramp[:, None, None] * color + ramp[::-1, None, None] * color[::-1]
            image = np.broadcast_to(image, (40, 40, 3))
            Image.fromarray((255 * image).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.mark.slow
def test_a_tokenizer_of_other_images_is_named_before_the_first_step(colored, tmp_path, capfd):
    arguments = tiny.train(
        tmp_path / "run", tokenizer="digits", data__source=f"folder:{colored}", steps=1
    )
    assert cli.main(arguments) == 0
    err = capfd.readouterr().err
    said = err.index("warning: 'digits' reconstructs 2 held-out images with")
    assert "dB PSNR" in err and "train-tokenizer" in err and said < err.index("step 1 of 1")
    assert cli.main(arguments) == 0  # complete
    assert "reconstructs" not in capfd.readouterr().err


def test_a_gray_tokenizer_of_colored_images_is_named():
    from hmar_jax.autoencoders import reconstruction

    spec, params = load_spec_and_params("digits")
    digits = open_source("digits", "validate")
    images = np.stack([digits[i]["image"] for i in range(4)])
    warnings = lambda x: reconstruction.warnings("d", spec.autoencoder, params["tokenizer"], x)
    assert warnings(images) == []
    faintly_red = (images * np.array([1, 0.8, 0.8])).astype(np.uint8)
    assert [w for w in warnings(faintly_red) if "reconstructs colored images in gray" in w]
    assert warnings(images[:0]) == []
