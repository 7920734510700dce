"""Runs through the real command line: they learn, and interruptions do not change their results."""

import concurrent.futures
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from hmar_jax import config_files
from hmar_jax.cli import main as cli
from hmar_jax.data import loader
from hmar_jax.experiment import build_experiment
from hmar_jax.io import checkpoints, runs
from hmar_jax.io.models import load_model
from hmar_jax.loading import load_spec_and_params
from hmar_jax.training import loop, metrics, reporting
from tests import tiny

# tensorboardX imports torch where it is installed, which takes two seconds.
_HMAR = [
    sys.executable,
    "-c",
    "import sys; sys.modules['torch'] = None; from hmar_jax.cli.main import run; run()",
]


@pytest.fixture(autouse=True)
def quick():
    with tiny.cached():
        yield


def lines(workdir) -> tuple[list[dict], list[dict]]:
    """The lines of metrics.jsonl of training, and those of validation."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [x for x in found if "lr" in x], [x for x in found if "lr" not in x]


def assert_same_end(workdir, uninterrupted):
    """The same saved state, bit for bit; each step logged once; the same last metrics."""
    (step, state), (other_step, other) = (
        checkpoints.load_params_of_run(w, "opt_state", "step") for w in (workdir, uninterrupted)
    )
    assert step == other_step == 80
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    (training, validation), (other_training, other_validation) = (
        lines(workdir),
        lines(uninterrupted),
    )
    assert (
        [x["step"] for x in training]
        == [x["step"] for x in other_training]
        == list(range(10, 81, 10))
    )
    assert [x["step"] for x in validation] == [x["step"] for x in other_validation] == [40, 80]
    assert validation[-1] == other_validation[-1]
    assert (workdir / "samples/step_000080.png").read_bytes() == (
        uninterrupted / "samples/step_000080.png"
    ).read_bytes()


class Process:
    """A run in a process of its own."""

    def __init__(self, arguments):
        self.workdir = pathlib.Path(
            next(a for a in arguments if a.startswith("--workdir=")).removeprefix("--workdir=")
        )
        self.log = open(self.workdir.with_suffix(".log"), "a+")
        self.process = subprocess.Popen(
            [*_HMAR, *arguments],
            env=tiny.ENVIRONMENT,
            cwd=self.workdir.parent,
            stdout=self.log,
            stderr=self.log,
        )

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def finish(self):
        assert self.process.wait(200) == 0, self.output()


def kill_after_first_checkpoint(arguments):
    """SIGKILL at a random moment between the first checkpoint and the end."""
    for _ in range(5):
        run = Process(arguments)
        while not (run.workdir / "checkpoints/20").exists() and run.process.poll() is None:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.2))
        run.process.kill()
        if (
            run.process.wait(60) == -signal.SIGKILL
            and not (run.workdir / "checkpoints/80").exists()
        ):
            return
        assert run.process.returncode in (0, -signal.SIGKILL), run.output()
        shutil.rmtree(run.workdir)  # it had ended before the signal came
    raise AssertionError("the run always ended before it could be killed")


# Learning


def test_a_tokenizer_learns():
    training, validation = lines(tiny.tokenizer_run())
    assert training[-1]["loss"] < 0.7 * training[0]["loss"]
    assert (
        validation[-1]["validation/psnr"] > validation[0]["validation/psnr"] > training[0]["psnr"]
    )


def test_a_transformer_learns():
    training, validation = lines(tiny.model_run())
    assert 0.8 * np.log(tiny.VOCAB) < training[0]["loss"] < 1.1 * np.log(tiny.VOCAB)
    assert training[-1]["loss"] < 0.7 * training[0]["loss"]
    assert (
        validation[-1]["validation/loss"] < validation[0]["validation/loss"] < training[0]["loss"]
    )


def test_stage_2_learns_and_nothing_else_changes():
    training, validation = lines(tiny.masked_run())
    assert training[-1]["loss"] < 0.9 * training[0]["loss"]
    assert validation[-1]["validation/loss"] < validation[0]["validation/loss"]
    tenths = [f"loss/ratio_{t / 10:.1f}-{(t + 1) / 10:.1f}" for t in range(10)]
    assert {f"validation/{name}" for name in tenths} | {
        "validation/loss/2x2",
        "validation/accuracy",
    } <= validation[-1].keys()
    assert set().union(*training) >= {*tenths, "loss", "accuracy", "grad_norm"}
    by_tenth = [validation[-1][f"validation/{name}"] for name in tenths]
    assert np.isclose(np.mean(by_tenth), validation[-1]["validation/loss"], rtol=1e-4)

    spec, params = load_spec_and_params(str(tiny.masked_run()))
    assert spec.masked_depth == 1 and spec.kind == "HMAR, next-scale and masked prediction"
    _, stage1 = load_spec_and_params(str(tiny.model_run()))
    for part in ("tokenizer", "transformer"):
        for a, b in zip(jax.tree.leaves(params[part]), jax.tree.leaves(stage1[part]), strict=True):
            assert np.array_equal(a, b), part
    assert not np.array_equal(
        params["masked"]["head"]["kernel"], params["transformer"]["head"]["kernel"]
    )


def test_stage_2_of_a_model_without_class_names(tmp_path):
    """Converted weights have none: the data set's names are taken."""
    nameless = shutil.copytree(tiny.model_run(), tmp_path / "nameless")
    config = json.loads((nameless / "config.json").read_text())
    config["model"]["class_names"] = []
    (nameless / "config.json").write_text(json.dumps(config))
    experiment = build_experiment(tiny.config_of(tiny.train_masked("unused", init_from=nameless)))
    assert experiment.spec.class_names == tiny.CLASSES


def test_frozen_parameters_have_no_optimizer_state():
    _, state = checkpoints.load_params_of_run(tiny.masked_run(), "opt_state")
    sizes = lambda tree: sum(np.size(x) for x in jax.tree.leaves(tree))
    assert set(state["params"]) == {"mask_embed", "blocks", "head"}
    assert 2 * sizes(state["params"]) < sizes(state["opt_state"]) < 2 * sizes(state["params"]) + 10


def test_contents_of_a_run_directory():
    training, validation = lines(tiny.model_run())
    assert {
        "step",
        "time",
        "loss",
        "accuracy",
        "lr",
        "grad_norm",
        "images_per_second",
        "device_seconds",
        "host_wait_seconds",
        "loss/1x1",
        "loss/2x2",
        "accuracy/1x1",
        "accuracy/2x2",
    } <= training[0].keys()
    assert {"validation/loss", "validation/accuracy", "validation/loss/2x2"} <= validation[0].keys()
    assert {"l1", "l2", "psnr", "usage/1x1", "usage/2x2", "usage/any", "codes_reset"} <= lines(
        tiny.tokenizer_run()
    )[0][0].keys()
    config = json.loads((tiny.model_run() / "config.json").read_text())
    assert config["config"]["model"]["depth"] == 2 and config["model"]["class_names"] == list(
        tiny.CLASSES
    )
    for run, frozen in ((tiny.model_run(), "tokenizer"), (tiny.masked_run(), "stage1")):
        found = {p.name for p in run.iterdir()}
        assert found == {
            "config.json",
            "metrics.jsonl",
            "tensorboard",
            "samples",
            "checkpoints",
            "log.txt",
            frozen,
        }
    assert sorted(p.name for p in (tiny.model_run() / "checkpoints").iterdir()) == [
        "60",
        "80",
    ]  # keep_checkpoints=2


# Interruptions


def test_a_killed_run_resumes_to_the_same_result(tmp_path):
    uninterrupted = [tiny.tokenizer_run(), tiny.model_run(), tiny.masked_run()]
    commands = [
        tiny.train_tokenizer(tmp_path / "tokenizer"),
        tiny.train(tmp_path / "model"),
        tiny.train_masked(tmp_path / "masked"),
    ]
    with concurrent.futures.ThreadPoolExecutor() as together:
        list(together.map(kill_after_first_checkpoint, commands))
    runs = [Process(command) for command in commands]
    for run, other in zip(runs, uninterrupted):
        run.finish()
        assert "resuming from step" in run.output()
        assert_same_end(run.workdir, other)


def test_resumes_with_cached_tokens():
    """The second process encodes the images again, and the batches continue where they were."""
    config = tiny.config_of(tiny.train("unused", data__cached_copies=2))
    batches = iter(build_experiment(config).loader())
    first = [next(batches) for _ in range(7)]
    state = loader.loader_state_to_bytes(batches)
    expected = [next(batches) for _ in range(12)]  # beyond an epoch of 72 rows
    again = iter(build_experiment(config).loader())
    loader.restore_loader_state(again, state)
    for batch in expected:
        found = next(again)
        assert all(np.array_equal(found[name], batch[name]) for name in ("tokens", "label"))
    assert not any(np.array_equal(first[0]["tokens"], batch["tokens"]) for batch in expected)


@pytest.mark.parametrize("train", [tiny.train, tiny.train_masked])
def test_evaluation_beside_cached_tokens(tmp_path, train):
    """Training reads tokens from memory; validation encodes images in the step."""
    changes = dict(data__cached_copies=1, steps=2, eval_every=2, sample_every=2, checkpoint_every=2)
    with tiny.cached():
        assert cli.main(train(tmp_path / "run", **changes)) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert any("validation/loss" in json.loads(line) for line in lines)


@pytest.mark.slow
def test_killed_with_cached_tokens(tmp_path):
    commands = [
        tiny.train(tmp_path / name, data__cached_copies=2) for name in ("run", "uninterrupted")
    ]
    assert cli.main(commands[1]) == 0
    kill_after_first_checkpoint(commands[0])
    Process(commands[0]).finish()
    assert_same_end(tmp_path / "run", tmp_path / "uninterrupted")


def test_sigterm_saves_and_ends_with_its_status(tmp_path, monkeypatch, capfd):
    report = loop.Reporter.report

    def report_and_signal(self, step, means):
        report(self, step, means)
        if step == 30:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop.Reporter, "report", report_and_signal)
    assert cli.main(tiny.train(tmp_path / "run")) == 143
    output = capfd.readouterr()
    assert "stopped by a signal after step 30; rerun the command to resume" in output.err
    assert output.out == f"{tmp_path}/run: next_scale run stopped at step 30 of 80\n"
    assert (tmp_path / "run/checkpoints/30").is_dir() and signal.getsignal(signal.SIGTERM) == before

    monkeypatch.undo()
    assert cli.main(tiny.train(tmp_path / "run")) == 0
    output = capfd.readouterr()
    assert (
        "resuming from step 30" in output.err
        and output.out == f"{tmp_path}/run: next_scale run complete\n"
    )
    assert_same_end(tmp_path / "run", tiny.model_run())


def test_a_finished_run_does_nothing_and_says_so(tmp_path, capfd):
    run = shutil.copytree(tiny.tokenizer_run(), tmp_path / "run")
    files = lambda: {
        p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "log.txt"
    }
    before = files()
    assert cli.main(tiny.train_tokenizer(run)) == 0
    assert "this run is complete: step 80 of 80" in capfd.readouterr().err
    assert files() == before


def test_what_does_not_change_the_result_may_change(tmp_path):
    run = shutil.copytree(tiny.tokenizer_run(), tmp_path / "run")
    assert (
        cli.main(tiny.train_tokenizer(run, log_every=7, data__threads=0, keep_checkpoints=1)) == 0
    )
    assert json.loads((run / "config.json").read_text())["config"]["log_every"] == 7


def test_resumes_from_the_last_good_checkpoint(tmp_path, capfd):
    run = shutil.copytree(tiny.tokenizer_run(), tmp_path / "run")
    damage(run / "checkpoints/80")
    assert cli.main(tiny.train_tokenizer(run)) == 0
    output = capfd.readouterr().err
    assert (
        "checkpoint of step 80" in output
        and "is damaged" in output
        and "resuming from step 60" in output
    )
    assert "Traceback" not in output
    assert_same_end(run, tiny.tokenizer_run())


def damage(checkpoint):
    """Cuts the files with the arrays short."""
    for path in (checkpoint / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_kill_while_the_directory_is_made(tmp_path):
    """Between the folder and its config.json, and between that and the frozen tokenizer."""
    run = shutil.copytree(tiny.model_run(), tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    assert cli.main(tiny.train(run)) == 0
    _, kept = load_model(run / "tokenizer")
    _, trained = checkpoints.load_params_of_run(tiny.tokenizer_run())
    assert np.array_equal(
        kept["tokenizer"]["quantizer"]["codebook"], trained["params"]["quantizer"]["codebook"]
    )

    (tmp_path / "new").mkdir()
    (tmp_path / "new/.config.json.0123abcd.tmp").write_text("{")
    config = tiny.config_of(tiny.train_tokenizer("unused"))
    experiment = build_experiment(config)
    runs.compare(tmp_path / "new", config, experiment.spec.to_json(), experiment.schema).write()
    assert json.loads((tmp_path / "new/config.json").read_text())["config"] == config_files.to_dict(
        config
    )


def test_a_run_keeps_its_parent(tmp_path, capfd):
    gone = tmp_path / "gone"
    for source, frozen, command in (
        (tiny.model_run(), tiny.tokenizer_run(), lambda run: tiny.train(run, tokenizer=gone)),
        (tiny.masked_run(), tiny.model_run(), lambda run: tiny.train_masked(run, init_from=gone)),
    ):
        run = shutil.copytree(source, tmp_path / source.name)
        config = (run / "config.json").read_text()
        (run / "config.json").write_text(config.replace(str(frozen), str(gone)))
        assert cli.main(command(run)) == 0
        assert "this run is complete" in capfd.readouterr().err


# Metrics


def test_metrics_beyond_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n{"step": 30, "loss": 0.2}\n'
        '{"step": 40, "lo'
    )
    writer = metrics.MetricsWriter(tmp_path, 20)
    writer.write(30, {"loss": 0.25})
    writer.close()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 0.5},
        {"step": 30, "loss": 0.25},
    ]


def test_means_leave_out_skipped_steps():
    meter = reporting.Meter(batch_size=4)
    meter.add(7, {"loss": np.float32(1), "skipped": 0, "skipped_in_row": 0})
    meter.add(8, {"loss": np.float32(np.nan), "skipped": 1, "skipped_in_row": 1})
    means = meter.read()
    assert means["loss"] == 1 and means["skipped"] == 1 and "skipped_in_row" not in means
    with pytest.raises(FloatingPointError, match="last 10 steps, up to step 18"):
        for step in range(9, 30):
            meter.add(step, {"loss": np.float32(np.nan), "skipped": 1, "skipped_in_row": step - 8})
