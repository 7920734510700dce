"""Locks of directories: who holds one, whether that process lives, and what a refusal leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.experiment import build_experiment
from hmar_jax.io import locks, runs
from hmar_jax.io.locks import DirectoryLock
from tests import tiny
from tests.test_interruptions import digests, read_until, start

HOLD = """
import sys, time
from hmar_jax.io.locks import DirectoryLock
with DirectoryLock(sys.argv[1], "workdir"):
    print("held", flush=True)
    time.sleep(100)
"""


def hold(directory) -> subprocess.Popen:
    """A process that holds the lock until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        env=tiny.ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def on_another_machine(directory) -> None:
    """Changes a lock file to one that a process on another machine left."""
    path = directory / locks.LOCK_FILE
    holder = json.loads(path.read_text())
    holder |= {"host": "other", "machine": "1234", "pids": "pid:[1]"}
    path.write_text(json.dumps(holder))


@pytest.fixture
def without_flock(monkeypatch):
    """As on file systems that have none."""
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "_SETTLE_SECONDS", 0.05)


def test_the_holder_is_named_and_a_killed_one_is_recognized_at_once(tmp_path):
    process = hold(tmp_path / "run")
    with pytest.raises(InputError) as caught:
        DirectoryLock(tmp_path / "run", "workdir").acquire()
    message = str(caught.value)
    assert f"workdir {tmp_path}/run is in use by process {process.pid} on host" in message
    assert (
        "UTC" in message and f"delete {tmp_path}/run/.lock.tmp" in message and "\n" not in message
    )
    process.kill()
    process.wait()
    assert (tmp_path / "run/.lock.tmp").exists()
    start_time = time.monotonic()
    with DirectoryLock(tmp_path / "run", "workdir"):
        assert time.monotonic() - start_time < 1
        assert json.loads((tmp_path / "run/.lock.tmp").read_text())["pid"] == os.getpid()


def test_without_flock_the_process_is_looked_up(tmp_path, without_flock):
    process = hold(tmp_path / "run")
    with pytest.raises(InputError, match=f"by process {process.pid} on host"):
        DirectoryLock(tmp_path / "run", "workdir").acquire()
    # Another process may have got the number of a dead one.
    path = tmp_path / "run/.lock.tmp"
    lock = path.read_text()
    path.write_text(json.dumps(json.loads(lock) | {"process_start": "1"}))
    with DirectoryLock(tmp_path / "run", "workdir"):
        pass
    path.write_text(lock)
    process.kill()
    process.wait()
    with DirectoryLock(tmp_path / "run", "workdir"):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_machine_is_known_by_its_heartbeat(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(locks, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    lock = DirectoryLock(tmp_path / "run", "workdir")
    lock.acquire()
    text = (tmp_path / "run/.lock.tmp").read_text()
    lock.release()
    (tmp_path / "run/.lock.tmp").write_text(text)
    on_another_machine(tmp_path / "run")
    text = (tmp_path / "run/.lock.tmp").read_text()
    other = DirectoryLock(tmp_path / "run", "workdir")
    if not alive:
        other.acquire()
        other.release()
        return
    beating = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "for i in range(100):\n"
            "  open(sys.argv[1], 'w').write(sys.argv[2].replace('0000000000', f'{i:010d}'))\n"
            "  time.sleep(0.2)",
            str(tmp_path / "run/.lock.tmp"),
            text,
        ]
    )
    try:
        with pytest.raises(InputError, match="on host other, since"):
            other.acquire()
    finally:
        beating.kill()
        beating.wait()


def test_a_process_whose_lock_was_taken_over_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    with DirectoryLock(tmp_path / "run", "workdir") as lock:
        lock.check()
        on_another_machine(tmp_path / "run")
        path = tmp_path / "run/.lock.tmp"
        taken = json.dumps(json.loads(path.read_text()) | {"token": "another"})
        with pytest.raises(InputError, match="was taken over by process"):
            for _ in range(100):  # a beat in progress may still overwrite it
                path.write_text(taken)
                time.sleep(0.1)
                lock.check()
    assert path.exists(), "it belongs to the other one"


def test_a_copy_of_a_directory_is_not_locked(tmp_path):
    process = hold(tmp_path / "run")
    try:
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with DirectoryLock(tmp_path / "copy", "workdir"):
            pass
    finally:
        process.kill()
        process.wait()


def test_what_the_lock_leaves(tmp_path):
    with DirectoryLock(tmp_path / "a/b/run", "workdir"):
        assert (tmp_path / "a/b/run/.lock.tmp").exists()
    assert not (tmp_path / "a").exists(), "nothing was written into it"
    with DirectoryLock(tmp_path / "a/run", "workdir"):
        (tmp_path / "a/run/config.json").write_text("{}")
    assert os.listdir(tmp_path / "a/run") == ["config.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a directory"):
        DirectoryLock(tmp_path / "file", "workdir").acquire()


# Commands


def test_a_second_command_is_refused_while_a_run_trains(tmp_path, capfd):
    run, command = tmp_path / "run", tiny.train_tokenizer(tmp_path / "run", steps=100000)
    process = start(command)
    read_until(process, "step 10 of")
    process.send_signal(signal.SIGSTOP)  # nothing changes meanwhile
    try:
        time.sleep(0.3)
        before, begin = digests(run), time.monotonic()
        with tiny.cached():
            assert cli.main(command) == 2
        assert time.monotonic() - begin < 5
        message = capfd.readouterr().err
        assert message.count("\n") == 1 and f"in use by process {process.pid} on host" in message
        assert digests(run) == before
    finally:
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()
    resumed = start(command)  # at once
    read_until(resumed, "step 10 of")
    resumed.kill()
    resumed.communicate()


def test_a_second_tokenize_is_refused(tmp_path, capfd):
    command = [
        "tokenize",
        f"--tokenizer={tiny.tokenizer_run()}",
        f"--data=folder:{tiny.images()}",
        f"--out={tmp_path / 'out'}",
        "--transform=random_crop",
    ]
    process = hold(tmp_path / "out")
    try:
        with tiny.cached():
            assert cli.main(command) == 2
        message = capfd.readouterr().err
        assert f"--out {tmp_path}/out is in use by process {process.pid}" in message
        assert os.listdir(tmp_path / "out") == [".lock.tmp"]
        with tiny.cached():  # parts write to one set together
            assert cli.main([*command, "--part=0/1"]) == 0
    finally:
        process.kill()
        process.wait()


# What refused and failed commands leave


def test_a_refused_run_is_as_it_was(tmp_path, capfd):
    run = shutil.copytree(tiny.tokenizer_run(), tmp_path / "run")
    (run / ".config.json.0123abcd.tmp").write_text("{")  # of a process that was killed
    images = shutil.copytree(tiny.images(), tmp_path / "images")
    shutil.rmtree(images / "train/cross")
    shutil.rmtree(images / "validate/cross")
    before = digests(run)
    for command in (
        tiny.train_tokenizer(run, recipe__learning_rate=1.0),
        tiny.train_tokenizer(run, model__vocab_size=8),
        tiny.train_tokenizer(run, data__source=f"folder:{images}"),
        tiny.train_tokenizer(run, data__source="folder:/nowhere"),
        tiny.train_tokenizer(run, batch_size=1000),
        tiny.train_tokenizer(run, no_such_key=1),
        [*tiny.train_tokenizer(run), "--no_such_flag"],
        tiny.train(run),
    ):
        with tiny.cached():
            assert cli.main(command) == 2, command
        assert capfd.readouterr().err.count("\n") == 1, command
        assert digests(run) == before, command
    process = hold(run)
    try:
        before = digests(run)
        with tiny.cached():
            assert cli.main(tiny.train_tokenizer(run)) == 2
        assert digests(run) == before
    finally:
        process.kill()
        process.wait()


def test_a_lock_is_no_part_of_a_run_directory(tmp_path):
    """A process that was killed between its lock and its config.json."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock.tmp").write_text("")
    config = tiny.config_of(tiny.train_tokenizer("unused"))
    experiment = build_experiment(config)
    runs.compare(
        str(tmp_path / "run"), config, experiment.spec.to_json(), experiment.schema
    ).write()
    assert (tmp_path / "run/config.json").exists()
