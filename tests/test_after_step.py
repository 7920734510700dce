"""Evaluation, previews, metrics and progress: their failures cost no training step."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from hmar_jax import progress
from hmar_jax.cli import main as cli
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.readable import readable_part
from hmar_jax.data.sources import open_source
from hmar_jax.io import checkpoints, images
from hmar_jax.training import after_step, metrics
from tests import tiny
from tests.test_training import assert_same_end, lines


@pytest.fixture(autouse=True)
def quick():
    with tiny.cached():
        yield


def broken_validation(folder, keep: int = 0):
    """The tiny images, but with one held-out image, which is not an image, and `keep` others."""
    root = shutil.copytree(tiny.images(), folder)
    held_out = sorted((root / "validate").rglob("*.png"))
    for path in held_out[1 + keep :]:
        path.unlink()
    held_out[0].write_bytes(b"not an image")
    return f"folder:{root}"


FEW = dict(steps=6, log_every=3, eval_every=3, sample_every=3, checkpoint_every=6)


@pytest.mark.parametrize("train", [tiny.train_tokenizer, tiny.train])
def test_a_run_whose_held_out_images_are_broken_trains_without_validation(tmp_path, capfd, train):
    data = broken_validation(tmp_path / "images")
    assert cli.main(train(tmp_path / "run", data__source=data, **FEW)) == 0
    message = capfd.readouterr().err
    assert "none of the 1 held-out images of" in message and "0.png" in message
    assert "this run has no validation" in message and "Traceback" not in message
    training, validation = lines(tmp_path / "run")
    assert [row["step"] for row in training] == [3, 6] and not validation
    assert (tmp_path / "run/checkpoints/6").is_dir()


def test_broken_held_out_images_are_named_before_training(tmp_path, capfd):
    data = broken_validation(tmp_path / "images", keep=2)
    assert cli.main(tiny.train_tokenizer(tmp_path / "run", data__source=data, **FEW)) == 0
    assert "skipped" in capfd.readouterr().err
    assert [row["step"] for row in lines(tmp_path / "run")[1]] == [3, 6]


def test_broken_images_are_left_out(tmp_path):
    source = open_source(broken_validation(tmp_path / "images", keep=2), "validate")
    log = DecodeErrorLog()
    found = readable_part(source, log, threads=2)
    assert len(source) == 3 and len(found) == 2 and log.count == 1
    assert (found[0]["image"] == source[1]["image"]).all() and found.num_classes == 3
    whole = open_source(f"folder:{tiny.images()}", "validate")
    assert readable_part(whole, DecodeErrorLog(), threads=0) is whole


def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_no_failure_beside_training_ends_it(tmp_path, monkeypatch, capfd):
    for owner, name in (
        (after_step, "evaluate"),
        (images, "save_image"),
        (metrics.MetricsWriter, "write"),
        (metrics.MetricsWriter, "sync"),
        (progress.tqdm, "update"),
    ):
        monkeypatch.setattr(owner, name, fail)
    assert cli.main(tiny.train_tokenizer(tmp_path / "run")) == 0
    message = capfd.readouterr().err
    for what in (
        "the evaluation after step 40",
        "the preview after step 80",
        "writing metrics",
        "showing the progress",
    ):
        assert message.count(f"{what} failed, training continues: ") == 1, what
    step, state = checkpoints.load_params_of_run(tmp_path / "run", "step")
    _, expected = checkpoints.load_params_of_run(tiny.tokenizer_run(), "step")
    assert step == 80
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (a == b).all()


def test_a_full_disk_does_not_stop_tensorboard(tmp_path):
    """tensorboardX's own thread would end, and the eleventh event would wait for ever."""
    writer = metrics.MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    writer.sync()
    [events] = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    writer._board._file._py_recordio_writer._writer.close()
    for step in range(2, 40):
        with pytest.raises(ValueError, match="closed"):
            writer.write(step, {"loss": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 39


DIES = """
import os, sys
sys.modules["torch"] = None
from hmar_jax.cli.main import run
from hmar_jax.training import after_step
after_step.evaluate = lambda *args: os._exit(9)
run()
"""


@pytest.mark.slow
def test_a_process_that_dies_in_evaluation_has_saved_and_gets_on(tmp_path):
    """As when the host's memory runs out. The third start skips what has ended two."""
    run, results = tmp_path / "run", []
    for _ in range(3):
        results.append(
            subprocess.run(
                [sys.executable, "-c", DIES, *tiny.train_tokenizer(run)],
                env=tiny.ENVIRONMENT,
                capture_output=True,
                text=True,
            )
        )
    assert [result.returncode for result in results] == [9, 9, 9]
    assert "resuming from step 40" in results[1].stderr
    assert "the run ended 2 times in the evaluation or preview after step 40" in results[2].stderr
    assert (run / "checkpoints/80").is_dir(), results[2].stderr  # it died in the next evaluation


def test_a_run_stopped_in_evaluation_makes_up_for_it(tmp_path, monkeypatch, capfd):
    evaluate, calls = after_step.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) in (1, 3):  # after step 40, and after the last one
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(after_step, "evaluate", interrupted)
    run = tmp_path / "run"
    assert cli.main(tiny.train_tokenizer(run)) == 143
    assert "stopped by a signal after step 40" in capfd.readouterr().err
    assert json.loads((run / "after_step.json").read_text()) == {"step": 40, "attempts": 0}
    assert cli.main(tiny.train_tokenizer(run)) == 143
    assert "run stopped at step 80 of 80" in capfd.readouterr().out
    assert cli.main(tiny.train_tokenizer(run)) == 0
    assert len(calls) == 4
    assert_same_end(run, tiny.tokenizer_run())
    assert not (run / "after_step.json").exists()


def test_the_best_checkpoint_is_kept_though_it_is_saved_before_its_loss_is_known(tmp_path):
    with checkpoints.RunCheckpoints(tmp_path, max_to_keep=2, keep_best=1) as store:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, 0.5), (6, 4.0)):
            store.save(step, {"w": np.ones(3)})
            store.record_validation_loss(step, loss)
            if step == 4:
                assert store.steps() == [2, 3, 4]
        assert store.steps() == [5, 6]
        store.save(7, {"w": np.ones(3)})
        store.save(8, {"w": np.ones(3)})
        assert store.steps() == [5, 7, 8]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["5", "7", "8"]
    assert checkpoints._step_of(checkpoints.absolute(tmp_path / "checkpoints"), "best") == 5
