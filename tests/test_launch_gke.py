"""launch/gke.sh, with a fake kubectl; the commands of the pods run here."""

import signal
import subprocess

import pytest
import yaml

from tests.launch_sandbox import (
    JOBSET_ARGS,
    TOKENIZE_ARGS,
    TRAIN_ARGS,
    pod_command,
    wait_until,
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
