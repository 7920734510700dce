"""A sandbox for the launch scripts: fake versions of gcloud, sbatch, srun, kubectl and hmar, which
record their arguments.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

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


def expand_variables(text: str, variables: dict[str, str]) -> str:
    """Expands variables in a word of command, args or env, as Kubernetes does."""
    return re.sub(
        r"\$(\$|\(([A-Za-z_]\w*)\))",
        lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]),
        text,
    )


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
