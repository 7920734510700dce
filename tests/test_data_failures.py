"""Training data that can be read no more: the steps done are saved, and one line says why."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.io import checkpoints
from hmar_jax.training.batches import Batches
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHANGES = dict(log_every=5, eval_every=1000, sample_every=1000, checkpoint_every=1000)


def saved_step(text: str, workdir: pathlib.Path) -> int:
    [step] = re.findall(r"stopped after step (\d+), which is saved", text)
    assert checkpoints.steps_of_run(workdir)[-1] == int(step)
    return int(step)


def test_images_that_disappear_cost_no_step(tmp_path, at_step, capfd):
    """A disk that is unmounted, a folder that is deleted."""
    images, away, workdir = tmp_path / "images", tmp_path / "away", tmp_path / "run"
    shutil.copytree(tiny.images(), images)
    changes = CHANGES | dict(data__source=f"folder:{images}", data__in_memory=False, steps=40)
    arguments = tiny.train(workdir, **changes)
    at_step(12, lambda: images.rename(away))
    with tiny.cached():
        assert cli.main(arguments) == 2
        text = capfd.readouterr().err
        assert 12 <= saved_step(text, workdir) < 40
        last = text.splitlines()[-1]
        assert last.startswith(f"hmar train: folder:{images}: ") and "can be read" in last
        away.rename(images)
        assert cli.main(arguments) == 0
    assert checkpoints.steps_of_run(workdir)[-1] == 40


def test_a_token_set_that_is_cut_off_costs_no_step(tmp_path, at_step, capfd):
    tokens, workdir = tmp_path / "tokens", tmp_path / "run"
    data = [f"--tokenizer={tiny.tokenizer_run()}", f"--data=folder:{tiny.images()}"]
    changes = CHANGES | dict(data__source=f"tokens:{tokens}", data__in_memory=False, steps=40)

    def cut_off():
        for file in tokens.glob("*.array_record"):
            os.truncate(file, 100)

    at_step(12, cut_off)
    with tiny.cached():
        assert cli.main(["tokenize", *data, "--transform=random_crop", f"--out={tokens}"]) == 0
        capfd.readouterr()
        assert cli.main(tiny.train(workdir, **changes)) == 2
    text = capfd.readouterr().err
    assert 12 <= saved_step(text, workdir) < 40
    assert f"{tokens} is damaged: " in text.splitlines()[-1] and "--verify" in text


def test_data_that_cannot_be_read_from_the_start_leaves_no_checkpoint(tmp_path, capfd):
    images, workdir = tmp_path / "images", tmp_path / "run"
    shutil.copytree(tiny.images(), images)
    for path in images.glob("train/*/*"):
        path.write_bytes(b"")
    changes = CHANGES | dict(data__source=f"folder:{images}", data__in_memory=False, steps=40)
    with tiny.cached():
        assert cli.main(tiny.train(workdir, **changes)) == 2
    assert "stopped after" not in capfd.readouterr().err
    assert checkpoints.steps_of_run(workdir) == []


class Numbers:
    """An iterator of 0, 1, 2, ..., which fails at some number."""

    def __init__(self, error: Exception, at: int):
        self.next, self.error, self.at = 0, error, at

    def __next__(self):
        if self.next == self.at:
            raise self.error
        self.next += 1
        return self.next - 1

    def get_state(self):
        return {"next_index": self.next}


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_position_is_that_of_the_batches_taken(ahead):
    asked = []
    batches = Batches(Numbers(InputError("broken"), 4), 10, ahead, lambda: asked.append(1))
    batches.fill()
    for number in range(4):
        assert batches.take() == number
        assert batches.position == b'{"next_index": %d}' % (number + 1)
        assert len(asked) == (batches.failure is not None) == (number >= 4 - ahead)
    assert batches.take() is batches.take() is None
    assert str(batches.failure) == "broken" and len(asked) == 1
    assert batches.position == b'{"next_index": 4}'


def test_no_batch_is_read_beyond_the_end():
    """A failure there would be one of a run that is complete."""
    batches = Batches(Numbers(OSError("gone"), 4), 4, 2, lambda: None)
    batches.fill()
    assert [batches.take() for _ in range(5)] == [0, 1, 2, 3, None] and batches.failure is None


def test_an_error_of_the_file_system_is_one_line():
    batches = Batches(Numbers(OSError(5, "Input/output error", "/data/x"), 0), 1, 0, lambda: None)
    assert batches.take() is None and isinstance(batches.failure, InputError)
    message = "the training data cannot be read: [Errno 5] Input/output error: '/data/x'"
    assert str(batches.failure) == message


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "hmar_jax", *arguments],
        env=tiny.ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_metrics(workdir: pathlib.Path, processes: list[subprocess.Popen]) -> None:
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.slow
def test_a_worker_process_that_is_killed_costs_no_step(tmp_path):
    workdir = tmp_path / "run"
    changes = CHANGES | dict(data__in_memory=False, data__workers=2, steps=100000)
    process = start(tiny.train(workdir, **changes))
    wait_for_metrics(workdir, [process])
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    children = " ".join(path.read_text() for path in tasks).split()
    workers = [
        child
        for child in children
        if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in text, text
    assert saved_step(text, workdir) > 10
    last = text.splitlines()[-1]  # also none of Python's resource tracker
    assert last.startswith("hmar train: a worker process that reads the data was ended by SIGKILL")


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_process_cannot_read_all_stop_after_the_same_step(tmp_path, failing):
    workdir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for i in range(2):
        images = shutil.copytree(tiny.images(), tmp_path / f"images{i}")
        changes = CHANGES | dict(
            data__source=f"folder:{images}", data__in_memory=False, steps=100000
        )
        flags = [f"--coordinator={address}", "--num_processes=2", f"--process_id={i}"]
        processes.append(start([*tiny.train(workdir, **changes), *flags]))
    wait_for_metrics(workdir, processes)
    shutil.rmtree(tmp_path / f"images{failing}" / "train")
    texts = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], texts
    assert saved_step(texts[0], workdir) > 10
    for text in texts:
        assert "Traceback" not in text
        assert f"{tmp_path / f'images{failing}'}: " in text.splitlines()[-1]
