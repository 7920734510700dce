"""Several processes on one machine: a run that they train, kills, resuming on others, agreement."""

import json
import logging
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.io import checkpoints
from hmar_jax.parallel import processes
from tests import recorded, tiny

STEPS = 80


class Hosts:
    """The processes of a run in `folder`/run, each with some devices."""

    def __init__(
        self, folder: pathlib.Path, arguments: list[str], processes: int = 1, devices: int = 1
    ):
        self.folder, self.workdir = folder, folder / "run"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = tiny.ENVIRONMENT | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        }
        self.processes, self.logs = [], []
        for i in range(processes):
            flags = (
                [
                    f"--coordinator=127.0.0.1:{port}",
                    f"--num_processes={processes}",
                    f"--process_id={i}",
                ]
                if processes > 1
                else []
            )
            self.logs.append(open(folder / f"log_{time.monotonic_ns()}", "w+"))
            record = folder / f"record_{time.monotonic_ns()}_{i}.jsonl"
            command = [sys.executable, "-m", "tests.recorded", str(record), *arguments, *flags]
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=pathlib.Path(__file__).parent.parent,
                    stdout=self.logs[-1],
                    stderr=self.logs[-1],
                )
            )

    def log(self, process: int = 0) -> str:
        self.logs[process].seek(0)
        return self.logs[process].read()

    def wait_for_checkpoint(self, step: int) -> None:
        while not (self.workdir / f"checkpoints/{step}").exists():
            assert all(p.poll() is None for p in self.processes), self.log()
            time.sleep(0.002)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait(60)

    def finish(self, status: int = 0) -> None:
        for i, process in enumerate(self.processes):
            assert process.wait(200) == status, self.log(i)


def seen(folder: pathlib.Path) -> dict[int, list[int]]:
    """Images of each batch, of all hosts; every attempt at a batch must have had the same."""
    attempts: dict[int, list[list[int]]] = {}
    for path in sorted(folder.glob("record_*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                batch, images = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            attempts.setdefault(batch, []).append(images)
    batches = {}
    for batch, parts in attempts.items():
        whole = [part for part in parts if len(part) == 6]
        halves = {tuple(part) for part in parts if len(part) == 3}
        assert len({tuple(part) for part in whole}) <= 1 and len(halves) <= 2, (batch, parts)
        images = whole[0] if whole else [p for half in sorted(halves) for p in half]
        assert not halves or {p for half in halves for p in half} <= set(images), (batch, parts)
        batches[batch] = images
    return batches


def assert_every_image_once_an_epoch(folder: pathlib.Path) -> None:
    batches = seen(folder)
    assert sorted(batches) == list(range(1, STEPS + 1))
    stream = [image for batch in sorted(batches) for image in batches[batch]]
    for epoch in range(len(stream) // recorded.COUNT):
        assert sorted(stream[epoch * recorded.COUNT : (epoch + 1) * recorded.COUNT]) == list(
            range(recorded.COUNT)
        ), epoch


def assert_close_end(workdir: pathlib.Path, other: pathlib.Path) -> None:
    (step, state), (other_step, expected) = (
        checkpoints.load_params_of_run(w, "opt_state", "skipped") for w in (workdir, other)
    )
    assert step == other_step == STEPS
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
    ):
        assert np.allclose(a, b, rtol=1e-3, atol=2e-4), jax.tree_util.keystr(path)


@pytest.fixture
def command(tmp_path):
    """Returns the arguments of a run in tmp_path/run."""
    data = f"folder:{recorded.colours(tmp_path / 'images')}"
    return lambda **changes: tiny.train(tmp_path / "run", data__source=data, **changes)


@pytest.mark.parametrize("signalled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_hosts_are_killed_and_one_resumes(tmp_path, command, signalled):
    """Two processes are killed, and one finishes the run.

    In between, the slow test restarts both and stops them by a signal to one of them. It finishes
    on another mesh, and compares with an uninterrupted run.
    """
    hosts = Hosts(tmp_path, command(), processes=2)
    hosts.wait_for_checkpoint(20)
    time.sleep(random.uniform(0, 0.3))
    hosts.kill()
    if signalled:
        hosts = Hosts(tmp_path, command(), processes=2)
        while "step 30 of 80" not in hosts.log():
            assert all(p.poll() is None for p in hosts.processes), hosts.log()
            time.sleep(0.01)
        hosts.processes[1].send_signal(signal.SIGTERM)
        hosts.finish(status=143)
        log = hosts.log()
        assert "resuming from step 20" in log and "stopped by a signal after step" in log, log
        assert "step" not in hosts.log(1)  # only the first process logs

    single = (
        Hosts(tmp_path, command(mesh__fsdp=2), devices=2)
        if signalled
        else Hosts(tmp_path, command())
    )
    single.finish()
    assert "resuming from step" in single.log() and "run complete" in single.log()
    assert_every_image_once_an_epoch(tmp_path)
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps) and set(steps) == set(range(10, STEPS + 1, 10))

    if signalled:
        with tiny.cached():
            arguments = command()
            arguments[2] = f"--workdir={tmp_path / 'uninterrupted'}"
            assert cli.main(arguments) == 0
        assert_close_end(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, command):
    """At random moments, from start to last step; every other attempt runs in two processes."""
    kills, attempt = 0, 0
    while kills < 20:
        hosts = Hosts(tmp_path, command(checkpoint_every=4), processes=1 + attempt % 2)
        attempt += 1
        deadline = time.monotonic() + random.uniform(4, 14)
        while time.monotonic() < deadline and any(p.poll() is None for p in hosts.processes):
            time.sleep(0.01)
        hosts.kill()
        killed = any(p.returncode == -signal.SIGKILL for p in hosts.processes)
        assert killed or all(p.returncode == 0 for p in hosts.processes), hosts.log()
        kills += killed
        if not killed:  # it was done: a new run gets the remaining kills
            assert_every_image_once_an_epoch(tmp_path)
            for path in tmp_path.glob("record_*.jsonl"):
                path.unlink()
            os.rename(tmp_path / "run", tmp_path / f"run_{attempt}")
    hosts = Hosts(tmp_path, command(checkpoint_every=4))
    hosts.finish()
    assert_every_image_once_an_epoch(tmp_path)
    print(f"{attempt} attempts, {kills} kills")


@pytest.mark.slow
def test_two_hosts_extend_a_run_of_one(tmp_path, command):
    """They are killed, one resumes, and every image is seen once an epoch all the time."""
    first = dict(steps=13, checkpoint_every=4)
    Hosts(tmp_path, command(**first)).finish()
    longer = command(steps=STEPS, checkpoint_every=4, ema_decay=0.9, data__transform__flip=True)
    hosts = Hosts(tmp_path, [*longer, "--extend"], processes=2)
    hosts.wait_for_checkpoint(40)
    hosts.kill()
    Hosts(tmp_path, longer).finish()
    assert_every_image_once_an_epoch(tmp_path)
    (entry,) = json.loads((tmp_path / "run/config.json").read_text())["history"]
    assert (entry["from_step"], entry["position"]) == (13, 78)
    refusing = Hosts(tmp_path, [*command(steps=STEPS, seed=1), "--extend"], processes=2)
    refusing.finish(status=2)
    assert all("--extend cannot change: seed" in refusing.log(i) for i in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_one_host_stops_both_after_the_same_step(tmp_path, command, number, status):
    hosts = Hosts(tmp_path, command(steps=100000), processes=2)
    while "step 10 of" not in hosts.log():
        assert all(p.poll() is None for p in hosts.processes), hosts.log()
        time.sleep(0.01)
    second = start_second(tmp_path, command(steps=100000))
    assert second.returncode == 2 and "is in use by process" in second.stderr, second.stderr
    hosts.processes[1].send_signal(number)
    hosts.finish(status=status)
    [step] = re.findall(r"run stopped at step (\d+) of 100000", hosts.log())
    assert (tmp_path / f"run/checkpoints/{step}/state").is_dir()
    assert not (tmp_path / "run/.lock.tmp").exists()


def start_second(folder: pathlib.Path, arguments: list[str]) -> subprocess.CompletedProcess:
    """The same command again, as one process."""
    command = [sys.executable, "-m", "tests.recorded", str(folder / "unused"), *arguments]
    root = pathlib.Path(__file__).parent.parent
    return subprocess.run(
        command, env=tiny.ENVIRONMENT, cwd=root, capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_hosts_that_do_not_divide_the_batch(tmp_path, command):
    hosts = Hosts(tmp_path, command(batch_size=7), processes=2)
    hosts.finish(status=2)
    for i in range(2):
        lines = [line for line in hosts.log(i).splitlines() if "Gloo" not in line]
        assert lines == [
            "hmar train: batch_size must be a multiple of 2 to be divided over 2 devices "
            "(mesh.data=2 x mesh.fsdp=1) of 2 hosts; got 7"
        ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_hosts_that_see_different_images(tmp_path):
    """Nothing is written, and every process says which of them sees what."""
    places = [recorded.colours(tmp_path / name) for name in ("one", "other")]
    (places[1] / "train/a/0.png").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "hmar_jax"),
                *tiny.train(tmp_path / "run", data__source=f"folder:{place}"),
                *(f"--coordinator={address}", "--num_processes=2", f"--process_id={i}"),
            ],
            env=tiny.ENVIRONMENT,
            cwd=pathlib.Path(__file__).parent.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, place in enumerate(places)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    for error in errors:
        lines = [line for line in error.splitlines() if line.startswith("hmar train:")]
        assert len(lines) == 1 and "process 0 sees 36 to train" in lines[0], error
        assert "process 1 sees 35 to train" in lines[0] and "Traceback" not in error
    assert not (tmp_path / "run").exists()


# Connecting


def test_flags_that_do_not_fit(tmp_path, capfd):
    for flags, words in (
        (
            ["--coordinator=here:1"],
            "must be given together; missing: --num_processes, --process_id",
        ),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "must be HOST:PORT"),
        (
            ["--coordinator=here:1", "--num_processes=2", "--process_id=2"],
            "below --num_processes=2; got 2",
        ),
    ):
        assert cli.main([*tiny.train(tmp_path / "run", tokenizer="unused"), *flags]) == 2
        assert words in capfd.readouterr().err
    with pytest.raises(InputError, match="alone"):
        processes.raise_on_all_processes(InputError("alone"))
    processes.raise_on_all_processes(None)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    "environment, cluster",
    [
        ({}, None),
        (SLURM, ("SLURM", 4, "SLURM_NTASKS=4")),
        (SLURM | {"SLURM_NTASKS": "1"}, ("SLURM", 1, "SLURM_NTASKS=1")),
        (SLURM | {"SLURM_NTASKS": "?"}, ("SLURM", None, "SLURM_NTASKS=?")),
        ({"SLURM_NTASKS": "4"}, None),
        (SLURM | {"OMPI_COMM_WORLD_SIZE": "1"}, ("SLURM", 4, "SLURM_NTASKS=4")),
        (SLURM | {"OMPI_COMM_WORLD_SIZE": "2"}, ("Open MPI", 2, "OMPI_COMM_WORLD_SIZE=2")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ("Cloud TPU", 1, "TPU_WORKER_HOSTNAMES=localhost")),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ("Cloud TPU", 2, "TPU_WORKER_HOSTNAMES=a,b")),
        (
            {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "MEGASCALE_NUM_SLICES": "3"},
            ("Cloud TPU", 6, "TPU_PROCESS_ADDRESSES=a:1,b:1, MEGASCALE_NUM_SLICES=3"),
        ),
        (KUBERNETES, None),
        (
            KUBERNETES | {"JOB_COMPLETION_INDEX": "0"},
            ("Kubernetes", None, "JOB_COMPLETION_INDEX=0"),
        ),
        (
            KUBERNETES | {"JOB_COMPLETION_INDEX": "0", "TPU_WORKER_HOSTNAMES": "a"},
            ("Cloud TPU", 1, "TPU_WORKER_HOSTNAMES=a"),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1"},
            ("JAX", None, "JAX_COORDINATOR_ADDRESS=a:1"),
        ),
    ],
)
def test_clusters_of_the_environment(environment, cluster):
    assert processes.find_cluster(environment) == cluster


def test_jax_reads_the_same_variables(monkeypatch):
    """A new version of JAX may read others: then find_cluster must follow."""
    from jax._src import clusters

    step = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    mpi = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
    for cls, environment in (
        (clusters.SlurmCluster, SLURM | step),
        (clusters.OmpiCluster, mpi | {"OMPI_COMM_WORLD_SIZE": "2"}),
        (clusters.GkeTpuCluster, {"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}),
    ):
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            patched.setattr(clusters.cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
            assert cls.is_env_present()
            assert cls.get_process_count() == processes.find_cluster().num_processes
    assert not clusters.GceTpuCluster.is_env_present()  # asks no server where there is no TPU


@pytest.fixture
def connect(monkeypatch):
    """connect(error, **environment): calls initialize(); returns how often JAX was called."""

    def connect(error, flags=(), **environment):
        calls = []

        def initialize(*args, **kwargs):
            calls.append(args)
            if error is not None:
                raise error

        with monkeypatch.context() as patched:
            for name in list(os.environ):
                if name.startswith(
                    ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JOB_", "JAX_COORDINATOR")
                ):
                    patched.delenv(name)
            for name, value in environment.items():
                patched.setenv(name, value)
            patched.setattr(jax.distributed, "initialize", initialize)
            processes.initialize(*flags)
        return len(calls)

    return connect


# What JAX raises if it detects no cluster, after a first computation, and on a timeout.
ERRORS = (
    ValueError("coordinator_address should be defined."),
    RuntimeError("jax.distributed.initialize() must be called before any JAX calls"),
    RuntimeError("DEADLINE_EXCEEDED"),
)


@pytest.mark.parametrize("error", ERRORS)
def test_a_process_of_a_cluster_is_never_alone_by_mistake(connect, error):
    for environment in (SLURM, {"OMPI_COMM_WORLD_SIZE": "2"}, {"TPU_WORKER_HOSTNAMES": "a,b"}):
        with pytest.raises(InputError) as caught:
            connect(error, **environment)
        message = str(caught.value)
        evidence = [f"{name}={value}" for name, value in environment.items()][-1]
        assert evidence in message and str(error) in message and "--num_processes=1" in message
    with pytest.raises(InputError, match="JOB_COMPLETION_INDEX=1"):
        connect(error, **KUBERNETES, JOB_COMPLETION_INDEX="1")
    with pytest.raises(InputError, match="here:1"):
        connect(error, ("here:1", 2, 0))


def test_a_process_is_alone_without_a_cluster(connect):
    assert connect(ERRORS[0]) == 0
    assert connect(ERRORS[0], **KUBERNETES) == 0
    assert connect(ERRORS[0], (None, 1), **SLURM) == 0
    assert connect(ERRORS[1], **SLURM | {"SLURM_NTASKS": "1"}) == 1, "nobody else to connect to"
    assert connect(None, **SLURM) == 1


def test_a_task_that_srun_did_not_start(tmp_path, capfd, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert cli.main(tiny.train(tmp_path / "run", tokenizer="unused")) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and "SLURM (SLURM_NTASKS=4)" in message


def test_waiting_for_other_processes_is_said(monkeypatch, caplog):
    monkeypatch.setattr(processes, "_QUIET_SECONDS", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: time.sleep(0.5))
    monkeypatch.setattr(logging.getLogger("hmar_jax"), "propagate", True)
    with caplog.at_level(logging.INFO, "hmar_jax"):
        processes.initialize("127.0.0.1:9", 2, 1)
    assert "waiting for the other processes of 127.0.0.1:9 ..." in caplog.messages


# What the processes of a run agree on

AGREE = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from hmar_jax.io import arrays
from hmar_jax.io.checkpoints import RunCheckpoints
from hmar_jax.parallel import processes, sharding

workdir, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
processes.initialize(f"127.0.0.1:{port}", 2, index)
arrays.RETRY_DELAYS = (0.0, 0.0)
mesh = sharding.make_mesh()
places = {"w": NamedSharding(mesh, P("data")), "step": sharding.replicated(mesh)}
state = lambda step: sharding.place({"w": np.arange(8.0) + step, "step": np.int32(step)}, places)
read, report = arrays.read_on_devices, {"gathered": processes.gather_messages("é" * index)}


def failing(error, times):
    left = [times]

    def function(folder, *args):
        if index == 1 and folder.parent.name == "20" and left[0]:
            left[0] -= 1
            raise error
        return read(folder, *args)

    return function


with RunCheckpoints(workdir) as run:
    for step in (10, 20):
        run.save(step, state(step))
    for name, error, times in (
        ("passes", OSError(5, "Input/output error"), 2),
        ("other", MemoryError("host full"), 1),
        ("stays", OSError(5, "Input/output error"), -1),
    ):
        arrays.read_on_devices = failing(error, times)
        arrays.read_as_numpy = failing(error, times)
        try:
            restored = run.restore_latest(state(0))
            values = np.asarray(restored.state["w"].addressable_data(0)) - 4 * index
            report[name] = [restored.step, int(restored.state["step"]), values.tolist()]
        except Exception as error:
            report[name] = f"{type(error).__name__}: {error}"
    report["steps"] = run.steps()
print(json.dumps(report))
"""


def test_all_processes_skip_a_checkpoint_that_one_cannot_read(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, str(tmp_path), port, str(index)],
            env=tiny.ENVIRONMENT,
            cwd=pathlib.Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [child.communicate(timeout=200)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    for report in first, second:
        assert report["gathered"] == ["", "é"]
        assert report["passes"] == [20, 20, [20, 21, 22, 23]], "a passing error is no damage"
        assert report["stays"] == [10, 10, [10, 11, 12, 13]], "one process cannot read step 20"
        assert report["steps"] == [10]
    assert first["other"] == "RuntimeError: process 1 failed with MemoryError: host full"
    assert second["other"] == "MemoryError: host full"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["10", "damaged_20"]
