"""Metrics of a run in the files that `wandb sync` sends; nothing here needs the network."""

import json
import shutil
import signal
import socket
import struct
import time

import pytest
from etils import epath

from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.training import weights_and_biases
from tests import tiny
from tests.test_interruptions import read_until, start

wandb = pytest.importorskip("wandb", reason="an optional package")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with tiny.cached():
        yield
    wandb.teardown()  # it has read the environment


def records(run) -> list:
    """What the offline files of a run directory hold, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    paths = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    return [Record.FromString(data) for path in paths for data in logged(path.read_bytes())]


def logged(data: bytes) -> list[bytes]:
    """The records of a log in LevelDB's format, after a header of seven bytes."""
    found, place, block = [], 7, 32768
    while place + 7 <= len(data):
        if block - place % block < 7:  # the rest of a block is padding
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 2):  # whole, first; otherwise middle, last
            found.append(part)
        elif kind:
            found[-1] += part
    return found


def losses(found) -> list[tuple[int, float]]:
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            if "loss" in row:
                rows.append((row["step"], row["loss"]))
    return rows


def run_id(run) -> str:
    return (run / "wandb" / "run_id.txt").read_text().splitlines()[0]


def test_metrics_name_and_config_of_a_run_that_resumes(tmp_path, capfd, at_step):
    run = tmp_path / "my_run"
    arguments = tiny.train(run, wandb="team/flowers", steps=40, sample_every=40)

    def fail():
        raise RuntimeError("as if killed")

    at_step(30, fail)
    with pytest.raises(RuntimeError):
        cli.main(arguments)
    assert "Weights & Biases: offline, in " in capfd.readouterr().err
    assert cli.main(arguments) == 0
    found = records(run)
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert {(r.entity, r.project, r.display_name) for r in runs} == {("team", "flowers", "my_run")}
    assert {r.run_id for r in runs} == {run_id(run)}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["model"]["depth"] == 2 and config["steps"] == 40
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    by_step = {line["step"]: line["loss"] for line in lines if "loss" in line}
    # Steps 30 and 40: of the second start, from the checkpoint of step 20.
    sent = losses(found)
    assert [step for step, _ in sent][-2:] == [30, 40] and dict(sent) == by_step


@pytest.mark.parametrize(
    "project, words",
    [
        ("a/b/c", ["config.wandb must be PROJECT or ENTITY/PROJECT", "got 'a/b/c'"]),
        ("what?", ["without / \\ # ? % :", "got 'what?'"]),
    ],
)
def test_names_that_are_no_project(project, words, tmp_path, capfd):
    assert cli.main(tiny.train(tmp_path / "run", wandb=project)) == 2
    error = capfd.readouterr().err
    assert all(word in error for word in words) and error.count("\n") == 1, error
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_copy_of_a_run_is_another_run_and_a_moved_one_is_not(tmp_path):
    """One who copies a run and extends the copy does not want its curves in those of the first."""
    first, copy, moved = (epath.Path(tmp_path / name) for name in ("first", "copy", "moved"))
    first.mkdir()
    found = weights_and_biases._run_id(first)
    assert weights_and_biases._run_id(first) == found
    (tmp_path / "link").symlink_to(first)
    assert weights_and_biases._run_id(epath.Path(tmp_path / "link")) == found
    shutil.copytree(first, copy)
    other = weights_and_biases._run_id(copy)
    assert other != found and weights_and_biases._run_id(copy) == other
    assert weights_and_biases._run_id(first) == found
    shutil.move(first, moved)
    assert weights_and_biases._run_id(moved) == found
    # Of an earlier version, and cut off.
    for text, stays in ((f"{found}\n", True), ("", False)):
        (moved / "wandb" / "run_id.txt").write_text(text)
        assert (weights_and_biases._run_id(moved) == found) == stays


@pytest.mark.parametrize(
    "variable, value, words",
    [
        ("WANDB_MODE", "nonsense", ["refuses the settings mode=nonsense", "WANDB_MODE"]),
        ("WANDB_API_KEY", "short", ["needs a login", "40+ characters"]),
    ],
)
def test_a_wrong_environment_is_refused(variable, value, words, tmp_path, monkeypatch):
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError) as error:
        weights_and_biases.start(epath.Path(tmp_path), "flowers", {})
    assert all(word in str(error.value) for word in words), error.value


def test_a_disabled_run_is_said_to_be_disabled(tmp_path, monkeypatch, caplog):
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    weights_and_biases.start(epath.Path(tmp_path), "flowers", {}).close()
    said = [record.getMessage() for record in caplog.records if record.name == "hmar_jax"]
    assert said == ["metrics are not sent to Weights & Biases: WANDB_MODE=disabled"]


@pytest.mark.slow  # a process
def test_ctrl_c_does_not_wait_for_the_network(tmp_path):
    with socket.create_server(("localhost", 0)) as silent:  # accepts, and never answers
        address = f"http://localhost:{silent.getsockname()[1]}"
        variables = dict(WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL=address)
        command = start(tiny.train(tmp_path / "run", wandb="p"), env=tiny.ENVIRONMENT | variables)
        read_until(command, "connecting to Weights & Biases ...")
        began = time.monotonic()
        command.send_signal(signal.SIGINT)
        output, _ = command.communicate(timeout=60)
    assert command.returncode == 130 and time.monotonic() - began < 20, output
    assert "Traceback" not in output, output


def test_a_login_is_needed_online(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # without ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert cli.main(tiny.train(tmp_path / "run", wandb="flowers", steps=4)) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("hmar train: config.wandb=flowers needs a login: run wandb login")
    assert "WANDB_MODE=offline" in error


def test_without_the_package(tmp_path, capfd, monkeypatch):
    find = "hmar_jax.training.weights_and_biases.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    assert cli.main(tiny.train(tmp_path / "run", wandb="flowers")) == 2
    error = capfd.readouterr().err
    assert 'requires wandb: pip install "hmar_jax[wandb]"' in error and error.count("\n") == 1
