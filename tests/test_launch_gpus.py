"""launch/gpus.sh: processes on the GPUs of one machine, and signals to them."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.launch_sandbox import (
    BASH,
    LAUNCH,
    SAVES,
    TOKENIZE_ARGS,
    TRAIN_ARGS,
    wait_until,
)


def test_gpus_single_process(sandbox):
    sandbox.add_program("nvidia-smi", 'print("GPU 0: H100 (UUID: x)\\nGPU 1: H100 (UUID: y)")')
    sandbox.add_program(
        "hmar",
        """
names = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "A")
record(env={name: os.environ.get(name) for name in names})
print("out")""",
    )
    done = sandbox.run("gpus.sh", "--env=A=b c", "--log=logs/x", "--", *TRAIN_ARGS)
    [call] = sandbox.calls("hmar")
    assert call["args"] == ["train", *TRAIN_ARGS, "--num_processes=1"]
    assert call["env"] == {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "0,1", "A": "b c"}
    assert done.stdout == "out\n"
    assert (sandbox.folder / "logs/x").read_text() == "out\n"
    sandbox.run("gpus.sh", "--gpus=2", "--", *TRAIN_ARGS, CUDA_VISIBLE_DEVICES="4,6,7")
    assert sandbox.calls("hmar")[1]["env"]["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert (
        "--gpus must be at most 3"
        in sandbox.run(
            "gpus.sh", "--gpus=4", "--", *TRAIN_ARGS, CUDA_VISIBLE_DEVICES="4,6,7", status=2
        ).stderr
    )


def test_gpus_one_process_per_gpu(sandbox):
    sandbox.add_program("hmar")
    options = ("--gpus=3", "--one_process_a_gpu", "--port=999", "--log=logs/x")
    sandbox.run("gpus.sh", *options, "--", *TRAIN_ARGS)
    calls = sorted(sandbox.args("hmar"))
    assert calls == [
        [
            "train",
            *TRAIN_ARGS,
            "--coordinator=127.0.0.1:999",
            "--num_processes=3",
            f"--process_id={i}",
            f"--local_devices={i}",
        ]
        for i in range(3)
    ]
    assert sorted(p.name for p in (sandbox.folder / "logs").iterdir()) == ["x", "x.1", "x.2"]
    # The output of --dry-run, executed by a shell, makes the same calls.
    (sandbox.folder / "calls").unlink()
    printed = sandbox.run("gpus.sh", *options, "--dry-run", "--", *TRAIN_ARGS).stdout
    assert sandbox.calls("hmar") == []
    subprocess.run([BASH, "-e", "-c", printed], env=sandbox.env, check=True)
    assert sorted(sandbox.args("hmar")) == calls


def test_gpus_second_run_takes_another_port(sandbox):
    """Two runs, on different GPUs, with one coordinator would both die."""
    sandbox.add_program("hmar")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        options = ("--gpus=2", "--one_process_a_gpu", "--")
        done = sandbox.run("gpus.sh", f"--port={port}", *options, *TRAIN_ARGS, status=2)
        assert f"--port={port} is in use" in done.stderr and sandbox.calls("hmar") == []
    sandbox.run("gpus.sh", f"--port={port}", *options, *TRAIN_ARGS)
    assert all(f"--coordinator=127.0.0.1:{port}" in args for args in sandbox.args("hmar"))


@pytest.mark.parametrize("visible", ["-1", "0,0", "0,,1", "0,-1"])
def test_gpus_that_cuda_would_ignore(sandbox, visible):
    options = ("--gpus=1", "--dry-run", "--", *TRAIN_ARGS)
    done = sandbox.run("gpus.sh", *options, CUDA_VISIBLE_DEVICES=visible, status=2)
    assert (
        f"CUDA_VISIBLE_DEVICES must list different GPUs, such as 0,1; got {visible}" in done.stderr
    )


def test_gpus_with_spaces_between_them(sandbox):
    options = ("--dry-run", "--", *TRAIN_ARGS)
    done = sandbox.run("gpus.sh", *options, CUDA_VISIBLE_DEVICES="3, MIG-a")
    assert "CUDA_VISIBLE_DEVICES=3,MIG-a " in done.stdout


def test_gpus_port_that_does_not_exist(sandbox):
    sandbox.add_program("hmar")
    done = sandbox.run("gpus.sh", "--gpus=1", "--port=99999", "--", *TRAIN_ARGS, status=2)
    assert "--port must be at most 65535; got 99999" in done.stderr


@pytest.mark.parametrize("script", ["gpus.sh", "slurm.sh", "tpu_pod.sh", "gke.sh"])
@pytest.mark.skipif(not shutil.which("dash"), reason="dash is not installed")
def test_scripts_that_sh_runs_say_what_they_need(script):
    done = subprocess.run(["dash", LAUNCH / script, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: requires bash: bash ")


def test_gpus_default_port_is_free(sandbox):
    sandbox.add_program("hmar")
    options = ("--gpus=2", "--one_process_a_gpu", "--", *TRAIN_ARGS)
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 12355)):
        sandbox.run("gpus.sh", *options)
    ports = {args[-4].removeprefix("--coordinator=127.0.0.1:") for args in sandbox.args("hmar")}
    assert len(ports) == 1 and int(*ports) > 12355


def test_gpus_failed_process_stops_the_others(sandbox):
    sandbox.add_program(
        "hmar",
        """
if "--process_id=1" in args: sys.exit(7)
signal.signal(signal.SIGTERM, lambda *_: (record(stopped=True), sys.exit(0)))
time.sleep(60)""",
    )
    start = time.monotonic()
    done = sandbox.run("gpus.sh", "--gpus=3", "--one_process_a_gpu", "--", *TRAIN_ARGS, status=7)
    assert time.monotonic() - start < 30 and "status 7; stopping the other processes" in done.stderr
    # A process that was stopped before it installed its handler records no call.
    assert len(sandbox.calls("hmar")) <= 2


def start_gpus(sandbox, *options: str, wait: int = 2, **how) -> subprocess.Popen:
    """Starts gpus.sh with two processes, and waits for them."""
    process = subprocess.Popen(
        [BASH, LAUNCH / "gpus.sh", "--gpus=2", "--one_process_a_gpu", *options, "--", *TRAIN_ARGS],
        cwd=sandbox.folder,
        env=sandbox.env,
        **how,
    )
    wait_until(lambda: len(sandbox.calls("hmar")) >= wait)
    return process


def recorded(sandbox, what: str) -> int:
    return sum(what in call for call in sandbox.calls("hmar"))


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_gpus_forwards_signals(number, status, sandbox):
    """Each process gets one signal, and all have saved when the script ends."""
    sandbox.add_program("hmar", SAVES)
    process = start_gpus(sandbox, stderr=subprocess.PIPE, text=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (status, "")
    assert recorded(sandbox, "signal") == recorded(sandbox, "saved") == 2


def test_gpus_ctrl_c_in_a_terminal(sandbox):
    """The terminal's signal reaches the script alone, and its log is complete."""
    sandbox.add_program("hmar", SAVES.replace("record(saved=True)", "record(saved=True); print(1)"))
    process = start_gpus(sandbox, "--log=log", start_new_session=True, stdout=subprocess.DEVNULL)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert recorded(sandbox, "signal") == recorded(sandbox, "saved") == 2
    wait_until(lambda: (sandbox.folder / "log").read_text() == "1\n")  # tee ends after the script


def test_gpus_second_signal_kills(sandbox):
    sandbox.add_program("hmar", SAVES.replace("time.sleep(0.5)", "time.sleep(60)"))
    process = start_gpus(sandbox)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: recorded(sandbox, "signal") == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and recorded(sandbox, "saved") == 0


def test_gpus_processes_that_are_killed_at_once(sandbox):
    """As by the kernel when memory is short. The script ends; bash forgets jobs that are killed."""
    sandbox.add_program("hmar", "record(pid=os.getpid()); time.sleep(60)")
    process = start_gpus(sandbox, stderr=subprocess.PIPE, text=True)
    for call in sandbox.calls("hmar"):
        with contextlib.suppress(ProcessLookupError):  # the script was quick to end the others
            os.kill(call["pid"], signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 137


def test_gpus_process_that_was_stopped_is_no_failure(sandbox):
    """JAX tells the others of a signal to one of them: they save too and must not be disturbed."""
    sandbox.add_program(
        "hmar",
        """
signal.signal(signal.SIGTERM, lambda *_: record(signal=True))
record(started=True)
if "--process_id=1" in args: sys.exit(143)
time.sleep(1)
record(saved=True)
sys.exit(143)""",
    )
    process = start_gpus(sandbox, stderr=subprocess.PIPE, text=True)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "")
    assert recorded(sandbox, "signal") == 0 and recorded(sandbox, "saved") == 1


def test_gpus_run_that_completes_while_it_is_stopped(sandbox):
    sandbox.add_program("hmar", SAVES.replace("sys.exit(143)", "sys.exit(0)"))
    process = start_gpus(sandbox)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_gpus_tokenize_in_parts(sandbox):
    """The processes do not connect; each sees its own GPU. A part of this machine is divided."""
    sandbox.add_program("hmar", 'record(gpus=os.environ["CUDA_VISIBLE_DEVICES"])')
    options = ("--command=tokenize", "--gpus=2", "--", *TOKENIZE_ARGS)
    sandbox.run("gpus.sh", "--one_process_a_gpu", *options, CUDA_VISIBLE_DEVICES="4,6,7")
    sandbox.run("gpus.sh", "--one_process_a_gpu", *options, "--part=1/3")
    sandbox.run("gpus.sh", *options)
    calls = sandbox.calls("hmar")
    assert all(call["args"][:4] == ["tokenize", *TOKENIZE_ARGS] for call in calls)
    assert [
        sorted((c["gpus"], c["args"][-1]) for c in calls[i:j]) for i, j in ((0, 2), (2, 4))
    ] == [
        [("4", "--part=0/2"), ("6", "--part=1/2")],
        [("0", "--part=2/6"), ("1", "--part=3/6")],
    ]
    assert (calls[4]["gpus"], calls[4]["args"][4:]) == ("0,1", ["--part=0/1"])


@pytest.mark.slow
def test_gpus_tokenize_with_real_hmar(tmp_path):
    """Two processes write the same files as one, with one tokenizer that was trained before."""
    hmar = tmp_path / "hmar"
    hmar.write_text(f'#!/bin/sh\nexec {sys.executable} -m hmar_jax "$@"\n')
    hmar.chmod(0o755)

    def tokenize(out: str, *options: str) -> dict[str, bytes]:
        args = (
            "--tokenizer=digits",
            "--data=digits",
            "--transform=affine",
            f"--out={tmp_path}/{out}",
        )
        subprocess.run(
            [BASH, LAUNCH / "gpus.sh", "--command=tokenize", "--gpus=2", f"--hmar={hmar}", *options]
            + ["--env=JAX_PLATFORMS=cpu", "--", *args, "--shard_size=400"],
            cwd=LAUNCH.parent,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(LAUNCH.parent)},
            check=True,
            timeout=600,
        )
        files = sorted((tmp_path / out).rglob("*.array_record*"))
        return {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in files}

    alone = tokenize("alone")
    assert len(alone) > 2 and tokenize("shared", "--one_process_a_gpu") == alone
    assert json.loads((tmp_path / "shared/records.json").read_text())["complete"]


@pytest.mark.slow
def test_gpus_with_real_hmar(tmp_path):
    """Two processes train together on CPU devices; a rerun finds the run complete."""
    hmar = pathlib.Path(sys.executable).parent / "hmar"
    command = [
        BASH,
        LAUNCH / "gpus.sh",
        "--gpus=2",
        "--one_process_a_gpu",
        f"--hmar={hmar}",
        "--env=JAX_PLATFORMS=cpu",
        f"--log={tmp_path}/log",
        "--",
        "--config=configs/hmar.py:digits",
        f"--workdir={tmp_path}/my run",
        "--config.steps=4",
        "--config.eval_every=4",
        "--config.sample_every=4",
        "--config.data.cached_copies=1",
        "--config.model.depth=1",
        "--config.model.width=64",
        "--config.model.heads=2",
    ]
    for _ in range(2):
        done = subprocess.run(
            command,
            cwd=LAUNCH.parent,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "my run/metrics.jsonl").read_text().splitlines()
    ]
    assert max(steps) == 4 and "this run is complete" in (tmp_path / "log").read_text()
