"""launch/tpu_pod.sh, with a fake gcloud that runs the commands of two workers here."""

import os
import pathlib
import signal
import subprocess

import pytest

from tests.launch_sandbox import (
    BASH,
    LAUNCH,
    POD_ARGS,
    SAVES,
    TRAIN_ARGS,
    wait_until,
)

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
    # The command that follows the run reports it, and does not restart the run.
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
