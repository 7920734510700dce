"""Signals to real processes: what they save, their exit status, and what they leave behind."""

import gc
import hashlib
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from hmar_jax import interruption
from hmar_jax.interruption import Interrupted, Interruptions
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
_MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.modules["torch"] = None  # tensorboardX imports it where it finds it: two seconds
from hmar_jax.cli.main import run
run()
"""


def start(arguments, **options) -> subprocess.Popen:
    """A command with the default signal handlers, whatever started the tests."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pipes |= dict(env=tiny.ENVIRONMENT, cwd=ROOT)
    return subprocess.Popen([sys.executable, "-c", _MAIN, *arguments], **(pipes | options))


def read_until(process: subprocess.Popen, text: str) -> str:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def wait_for_handlers(process: subprocess.Popen) -> None:
    """Returns when the process handles SIGHUP, which Python alone does not."""
    status, mask = pathlib.Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGHUP - 1)
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & mask:
        assert process.poll() is None
        time.sleep(0.01)


def digests(folder: pathlib.Path) -> dict[str, str]:
    """A hash of each file of a directory."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Training


@pytest.mark.parametrize(
    "number, status",
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_run_and_gives_its_status(tmp_path, number, status):
    command = tiny.train_tokenizer(tmp_path / "run", steps=100000, log_every=5)
    process = start(command)
    read_until(process, "step 10 of")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "Traceback" not in output and "Segmentation" not in output
    stopped = int(re.search(r"run stopped at step (\d+) of 100000", output)[1])
    assert (tmp_path / f"run/checkpoints/{stopped}/state").is_dir()
    assert not (tmp_path / "run/.lock.tmp").exists()


def test_a_closed_terminal_saves_the_run(tmp_path):
    """The kernel sends SIGHUP, and every further line to the terminal is an error."""
    main, terminal = pty.openpty()
    process = start(
        tiny.train_tokenizer(tmp_path / "run", steps=100000, log_every=5),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown = b""
    while b"step 10 of" not in shown:
        shown += os.read(main, 1000)
    os.close(main)
    process.send_signal(signal.SIGHUP)  # as the shell of that terminal does
    assert process.wait(60) == 129
    steps = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    log = (tmp_path / "run/log.txt").read_text()
    stopped = re.search(r"stopped by a signal after step (\d+)", log)[1]
    assert stopped in steps and "Traceback" not in log


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """Also where the first one waits for a loader that never returns."""
    os.mkfifo(tmp_path / "never.png")  # reading it waits for a writer
    images = shutil.copytree(tiny.images(), tmp_path / "images")
    for path in (images / "train").rglob("*.png"):
        path.unlink()
        path.symlink_to(tmp_path / "never.png")
    command = tiny.train_tokenizer(tmp_path / "run", data__source=f"folder:{images}")
    process = start(command)
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    read_until(process, "press Ctrl-C again to end at once")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_start_leaves_the_run_as_it_was_or_further_along(tmp_path, number):
    run, command = tmp_path / "run", tiny.train_tokenizer(tmp_path / "run", steps=100000)
    process = start(command)
    read_until(process, "step 10 of")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    stopped = re.search(r"stopped at step (\d+)", output)[1]
    before, log = digests(run), (run / "log.txt").read_text()
    process = start(command)
    read_until(process, f"resuming from step {stopped}")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 130), output
    after = digests(run)
    changed = {name for name, digest in before.items() if after.get(name) != digest}
    assert changed <= {"log.txt"} and (run / "log.txt").read_text().startswith(log)
    new = {pathlib.Path(name).parts[0] for name in after.keys() - before.keys()}
    if number == signal.SIGKILL:  # what a killed process leaves is recognized as such
        new = {name for name in new if not name.endswith(".tmp")}
    assert new <= {"tensorboard", "checkpoints"}, new


@pytest.mark.slow
def test_ctrl_c_at_any_moment_is_clean(tmp_path):
    """Import, listing, compilation, first step, save: no crash, no traceback, a usable directory.

    Without a compilation cache, so that compilation takes most of the time. An interrupted wait for
    the compiler used to crash: the client was destroyed while the compiler's thread used it.
    """
    environment = {name: value for name, value in tiny.ENVIRONMENT.items() if "COMPIL" not in name}
    workdir = tmp_path / "run"
    command = tiny.train_tokenizer(workdir, steps=100000, checkpoint_every=2, log_every=1)
    delay, num_saved = 0.0, 0
    while num_saved < 4:  # the slower the machine, the later
        process = start(command, env=environment)
        wait_for_handlers(process)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 130, (delay, output)
        assert "Traceback" not in output and "Fatal" not in output, (delay, output)
        assert not (workdir / ".lock.tmp").exists(), (delay, output)
        num_saved += "run stopped at step" in output
        delay += 0.7
        assert delay < 100, output
    print(f"the last of the interruptions came after {delay:.1f} s")


@pytest.mark.slow
def test_ctrl_c_leaves_worker_processes_to_their_parent(tmp_path):
    """A terminal sends it to all of them; a run whose workers die cannot save its position."""
    changes = dict(steps=100000, log_every=5, data__workers=2, data__in_memory=False)
    command = tiny.train_tokenizer(tmp_path / "run", **changes)
    process = start(command, start_new_session=True)
    read_until(process, "step 10 of")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "run stopped at step" in output, output
    assert "Traceback" not in output


def test_an_ignored_signal_stays_ignored():
    """nohup ignores SIGHUP, and scripts ignore SIGINT in their background jobs."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruptions() as interruptions:
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert interruptions.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_noted_where_an_exception_would_do_harm():
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    with Interruptions() as interruptions:
        with interruptions.deferred():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # schedulers send it again
            assert interruptions.received == signal.SIGTERM
        with pytest.raises(Interrupted) as caught:
            interruptions.check()
    assert caught.value.status == 143
    with Interruptions() as interruptions:
        with interruptions.deferred(), pytest.raises(Interrupted), interruptions.immediate():
            signal.raise_signal(signal.SIGHUP)
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


def test_a_swallowed_exception_is_raised_again(capfd):
    """Python prints exceptions in callbacks of the garbage collector, and continues."""
    raised = []

    def callback(phase, _info):
        if phase == "start" and not raised:
            raised.append(True)
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(callback)
    try:
        with Interruptions(), pytest.raises(Interrupted):
            gc.collect()
            time.sleep(10)
    finally:
        gc.callbacks.remove(callback)
    assert raised and capfd.readouterr().err == ""


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def enter():
        with Interruptions():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


# Other commands


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_tokenize_ends_in_order_and_resumes(tmp_path, number, status):
    command = [
        "tokenize",
        f"--tokenizer={tiny.tokenizer_run()}",
        f"--data=folder:{tiny.images()}",
        f"--out={tmp_path / 'out'}",
        "--transform=random_crop",
        "--shard_size=8",
        "--batch_size=4",
        "--crops=100",
    ]
    process = start(command)
    progress = tmp_path / "out/progress"
    while not (progress.is_dir() and list(progress.iterdir())):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "Traceback" not in output
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any(name.endswith(".tmp") for name in left)

    done = start(command)
    output, _ = done.communicate(timeout=100)
    assert done.returncode == 0 and "36 images to train in 100 crops" in output, output


def test_sample_ends_at_once(tmp_path):
    """While it compiles or computes; nothing half-written stays."""
    process = start(
        ["sample", "--model=digits", "--n=4000", f"--out={tmp_path / 'a.png'}"], bufsize=1
    )
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted by SIGINT" in output, output
    assert "Traceback" not in output and not list(tmp_path.iterdir())
