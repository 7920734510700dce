"""launch/slurm.sh and slurm_job.sh, with fake versions of sbatch, srun and scontrol."""

import os
import signal
import subprocess

import pytest

from tests.launch_sandbox import (
    BASH,
    LAUNCH,
    SAVES,
    TRAIN_ARGS,
    wait_until,
)


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
