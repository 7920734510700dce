"""What commands say while they work: lines in a log, a bar on a terminal, and how far a run is."""

import functools
import io
import json
import logging
import re
import shutil
import sys
import time

import numpy as np
import pytest
from PIL import Image

from hmar_jax import progress
from hmar_jax.cli import main as cli
from hmar_jax.parallel import processes
from hmar_jax.pipeline import Pipeline
from hmar_jax.progress import Progress, describe_seconds, phase
from tests import tiny


@pytest.fixture(autouse=True)
def quick():
    with tiny.cached():
        yield


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(caplog, monkeypatch):
    """The lines of the package's log so far."""
    monkeypatch.setattr(logging.getLogger("hmar_jax"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hmar_jax"), "handlers", [])  # the command line's
    caplog.set_level(logging.INFO, "hmar_jax")
    return lambda: [record.getMessage() for record in caplog.records]


# The mechanism


def test_lines_without_a_terminal(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("encoding", 10, "crop", line_seconds=0) as done:
        done.advance(2)
        time.sleep(0.01)
        done.advance(4)
    assert log()[0] == "encoding: 10 crops ..." and log()[1] == "encoding: 2 of 10 crops"
    assert re.fullmatch("encoding: 6 of 10 crops, [0-9]+ s left", log()[2])
    assert re.fullmatch("encoding: 6 crops in [0-9]+ s, 6 of 10 are done", log()[3])
    assert len(log()) == 4 and sys.stderr.getvalue() == ""


def test_the_last_line_counts_what_was_done_in_its_time(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("encoding", 10, "crop", start=7) as done:
        done.advance(3)
    assert re.fullmatch("encoding: 3 crops in [0-9]+ s", log()[-1])


def test_a_bar_on_a_terminal(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("encoding", 10, "crop", line_seconds=0) as done:
        done.advance(2)
        done.show("loss 3")
    assert "encoding" in sys.stderr.getvalue() and "2/10" in sys.stderr.getvalue()
    assert log() == []


def test_only_the_first_process_says_anything(log, monkeypatch):
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("encoding", 10, "crop", line_seconds=0) as done:
        done.advance(2)
    progress.announce("compiling")
    assert log() == [] and sys.stderr.getvalue() == ""


def test_a_phase_is_named_when_it_takes_long(log, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.3)
    with phase("short"):
        pass
    with phase("long"):
        time.sleep(1)
    with phase("short", at_once=True):
        pass
    assert log() == ["long ...", "long: 1 s", "short ..."]


@pytest.mark.parametrize(
    "seconds, words", [(0.2, "1 s"), (89, "89 s"), (200, "3 min"), (7500, "2 h 5 min")]
)
def test_durations_in_words(seconds, words):
    assert describe_seconds(seconds) == words


# Training


def test_training_says_what_it_does(tmp_path, capfd):
    arguments = tiny.train(
        tmp_path / "run", steps=20, log_every=5, eval_every=20, data__cached_copies=2
    )
    capfd.readouterr()  # of the tokenizer, if it was trained just now
    assert cli.main(arguments) == 0
    err = capfd.readouterr().err
    lines = err.splitlines()
    first = next(i for i, line in enumerate(lines) if "36 images of 3 classes to train" in line)
    for words in ("9 held out", "1 cpu device", " parameters", "20 steps of 6 images", "epochs"):
        assert words in lines[first], words
    order = [
        "encoding: 72 crops ...",
        "encoding: 72 crops in",
        "compiling the training step ...",
        "step 1 of 20: loss ",
        "step 5 of 20: ",
        "step 20 of 20: validation/",
    ]
    found = [next(i for i, line in enumerate(lines) if words in line) for words in order]
    assert found == sorted(found) and found[0] > first
    assert " left" in next(line for line in lines if line.startswith("step 10 of 20"))
    assert "\r" not in err
    assert lines[first] in (tmp_path / "run/log.txt").read_text()


@pytest.mark.slow
def test_training_a_tokenizer_says_what_it_does(tmp_path, capfd):
    assert cli.main(tiny.train_tokenizer(tmp_path / "run", steps=20)) == 0
    err = capfd.readouterr().err
    assert "36 images of 3 classes to train, 9 held out; 1 cpu device; 14,540 parameters" in err
    assert "step 1 of 20: loss " in err


# Runs


def info(capfd, model) -> dict[str, str]:
    capfd.readouterr()
    assert cli.main(["info", f"--model={model}"]) == 0
    return dict(line.split(None, 1) for line in capfd.readouterr().out.splitlines())


def test_info_of_a_finished_run(capfd):
    rows = info(capfd, tiny.model_run())
    assert rows["run"] == "finished, step 80 of 80" and rows["checkpoints"] == "60, 80"
    lines = (tiny.model_run() / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    last = [x["loss"] for x in lines if "loss" in x][-1]
    losses = [x["validation/loss"] for x in lines if "validation/loss" in x]
    assert rows["loss"].startswith(f"training {last:.4g} (step 80); validation {losses[-1]:.4g}")
    assert f"best {np.min(losses):.4g} (step " in rows["loss"]


def test_info_of_a_run_that_was_interrupted(capfd, tmp_path):
    for source, command in ((tiny.tokenizer_run(), "train-tokenizer"), (tiny.model_run(), "train")):
        run = shutil.copytree(source, tmp_path / source.name)
        shutil.rmtree(run / "checkpoints/80")
        rows = info(capfd, run)
        assert rows["run"].startswith("not finished, step 60 of 80; to resume, rerun its command: ")
        assert f"hmar {command} " in rows["run"] and str(run) in rows["run"]


def test_writing_a_model_says_so(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    model = tiny.model_run()
    capfd.readouterr()  # of its training
    assert cli.main(["export", f"--model={model}", f"--out={tmp_path / 'model'}"]) == 0
    err = capfd.readouterr().err
    assert f"writing {tmp_path / 'model'}: " in err and f"reading the model {model}: " in err


# Evaluation


def test_evaluation_shows_how_many_images_it_has_read_and_sampled(monkeypatch, tmp_path):
    for path in tiny.images().rglob("*.png"):  # of the model's size
        target = tmp_path / path.relative_to(tiny.images())
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((tiny.SIDE, tiny.SIDE)).save(target)
    command = ["evaluate", f"--model={tiny.model_run()}", f"--reference=folder:{tmp_path}"]
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.main([*command, "--n=6"]) == 0
    shown = sys.stderr.getvalue()
    assert "reading:" in shown and "/45" in shown and "sampling:" in shown and "6/6" in shown


def test_too_few_samples_are_refused_before_sampling(capfd, monkeypatch):
    @functools.wraps(Pipeline.sample)
    def sample(*args, **kw):
        raise AssertionError("sampled")

    monkeypatch.setattr(Pipeline, "sample", sample)
    command = ["evaluate", f"--model={tiny.model_run()}", f"--reference=folder:{tiny.images()}"]
    assert cli.main([*command, "--n=5"]) == 2
    err = capfd.readouterr().err
    assert "--n must be at least 6, two samples of each of the model's 3 classes; got 5" in err
