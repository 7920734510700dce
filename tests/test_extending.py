"""`--extend`: what may change in a run, its data order and schedules, its history, kills, refusals.

Most runs are of the toy family, which compiles in no time.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from hmar_jax import experiment as experiments
from hmar_jax.cli import main as cli
from hmar_jax.data.loader import loader_state_to_bytes, make_loader, restore_loader_state
from hmar_jax.data.records import RecordsInMemory, make_record_loader
from hmar_jax.data.sources import open_source
from hmar_jax.data.transforms import Transform
from hmar_jax.io import checkpoints, history, runs
from hmar_jax.io.history import Change, Segment
from hmar_jax.training.optimizer import OptimizerConfig
from tests import recorded, tiny, toy_family

_TIMES = ("time", "images_per_second", "device_seconds", "host_wait_seconds", "mfu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """36 images to train on, each of one colour: see recorded.py."""
    return recorded.colours(tmp_path_factory.mktemp("extending") / "images")


@contextlib.contextmanager
def toy_family_is_known():
    with pytest.MonkeyPatch.context() as patch, tiny.cached():
        patch.chdir(tiny.ENVIRONMENT["PYTHONPATH"])
        toy_family.register(patch)
        yield


def train(workdir, images, *more, **changes) -> list[str]:
    """Arguments of a run of the toy family: 20 steps of 6 images."""
    values = dict(steps=20, log_every=1, eval_every=20, sample_every=20, checkpoint_every=10)
    values |= {"data.source": f"folder:{images}"}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    config = "--config=tests/toy_config.py:toy"
    return ["train", config, f"--workdir={workdir}", *tiny.overrides(values), *more]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A finished run of 20 steps. Copy it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with toy_family_is_known():
        assert cli.main(train(run, images)) == 0
    return run


@pytest.fixture
def command(images, tmp_path):
    """command("--extend", steps=40): arguments of the run in tmp_path/run."""
    with toy_family_is_known():
        yield lambda *more, **changes: train(tmp_path / "run", images, *more, **changes)


@pytest.fixture
def run(finished, tmp_path):
    """A finished run of 20 steps, in tmp_path/run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """seen() -> {step: the colours of its batch}, of all commands of the test."""
    path = tmp_path / "record.jsonl"
    build = recorded.recording(experiments.build_experiment, path)
    monkeypatch.setattr(experiments, "build_experiment", build)

    def read():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({step for step, _ in lines}) == len(lines)
        return dict(lines)

    return read


@pytest.fixture
def refused(capfd):
    """refused(arguments, directory, *words): status 2, one line, and the same bytes as before."""

    def check(arguments, directory, *words):
        before = contents(directory)
        capfd.readouterr()
        assert cli.main(arguments) == 2
        error = capfd.readouterr().err
        assert contents(directory) == before
        assert error.count("\n") == 1 and error.startswith("hmar train"), error
        for word in words:
            assert word in error, error
        return error

    return check


def contents(directory) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in pathlib.Path(directory).rglob("*") if p.is_file()}


def saved(run) -> dict:
    return json.loads((run / "config.json").read_text())


def metrics(run, *without) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


def stream(images, count) -> list[int]:
    """The first colours of a folder in the order of training, read one by one."""
    source = open_source(f"folder:{images}", "train")
    loader = make_loader(source, Transform(8), batch_size=1, seed=0, train=True)
    batches = iter(loader)
    return [int(next(batches)["image"][0, 0, 0, 0]) for _ in range(count)]


def state_of(run, *parts):
    parts = parts or ("opt_state", "ema_params", "step", "skipped")
    return checkpoints.load_params_of_run(run, *parts)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# Data order, steps and schedules


def check_extended(command, seen, images, tmp_path, steps, extended_steps):
    """A run that is extended with half the learning rate, compared with what its history says."""
    run, rate = tmp_path / "run", 0.05
    rates = dict(recipe__warmup_steps=5)
    assert cli.main(command(steps=steps, **rates)) == 0
    half = dict(steps=extended_steps, recipe__learning_rate=rate / 2, **rates)
    assert cli.main(command("--extend", **half)) == 0

    (change,) = saved(run)["history"]
    assert (change["from_step"], change["position"]) == (steps, 6 * steps)
    assert change["last_step"] == [steps, extended_steps] and not change["new_data"]
    assert change["changes"] == {
        "recipe.learning_rate": [rate, rate / 2],
        "steps": [steps, extended_steps],
    }
    assert change["time"].endswith("+00:00") and set(change["versions"]) == {"hmar_jax", "jax"}

    # The batches are those of an undisturbed run.
    order = stream(images, 6 * extended_steps)
    assert seen() == {
        step: order[6 * (step - 1) : 6 * step] for step in range(1, extended_steps + 1)
    }
    # Each step has its line, and the rate that the recipe of its time gives.
    lines = [line for line in metrics(run) if "lr" in line]
    assert [line["step"] for line in lines] == list(range(1, extended_steps + 1))
    recipe = lambda peak: OptimizerConfig(learning_rate=peak, warmup_steps=5)
    before, after = (
        recipe(peak).learning_rates(total)
        for peak, total in ((rate, steps), (rate / 2, extended_steps))
    )
    for line in lines:
        it = line["step"] - 1
        expected = (before if line["step"] <= steps else after)(it)
        assert line["lr"] == pytest.approx(float(expected), rel=1e-6)
    assert int(state_of(run)[1]["step"]) == extended_steps
    counts = [int(x) for x in jax.tree.leaves(state_of(run)[1]["opt_state"]) if np.ndim(x) == 0]
    assert counts == [extended_steps] * 3  # of Adam and both schedules


def test_an_extended_run_is_what_its_history_says(command, seen, images, tmp_path, capfd):
    check_extended(command, seen, images, tmp_path, 20, 40)
    shown = capfd.readouterr().err
    first = next(line for line in shown.splitlines() if "extended" in line)
    assert first == ("extended from step 20: recipe.learning_rate 0.05 -> 0.025, steps 20 -> 40"), (
        shown
    )
    log = (tmp_path / "run/log.txt").read_text()
    assert first in log and "resuming from step 20" in log
    assert cli.main(["info", f"--model={tmp_path / 'run'}"]) == 0
    shown = capfd.readouterr().out
    assert "finished, step 40 of 40" in shown
    assert (
        "history      from step 20: recipe.learning_rate 0.05 -> 0.025, steps 20 -> 40 (" in shown
    )


@pytest.mark.slow
def test_400_steps_are_extended_to_800(command, seen, images, tmp_path):
    check_extended(command, seen, images, tmp_path, 400, 800)


def test_no_image_is_seen_twice_in_an_epoch_where_the_batch_size_changes(
    command, seen, run, images
):
    """From 6 to 8 and to 3; neither change is at the end of an epoch of 36."""
    assert cli.main(command("--extend", steps=27, batch_size=8)) == 0
    assert cli.main(command("--extend", steps=40, batch_size=3)) == 0
    positions = [change["position"] for change in saved(run)["history"]]
    assert positions == [20 * 6, 20 * 6 + 7 * 8]
    order = stream(images, 20 * 6 + 7 * 8 + 13 * 3)
    found = [image for _, batch in sorted(seen().items()) for image in batch]
    assert found == order[20 * 6 :]
    for epoch in range(len(order) // recorded.COUNT):
        one = order[epoch * recorded.COUNT :][: recorded.COUNT]
        assert sorted(one) == list(range(recorded.COUNT))


def test_epochs_are_those_of_the_whole_run(command, seen, run):
    """20 steps of 6 images leave 24 of the fourth epoch, which are 6 steps of 4."""
    assert cli.main(command("--extend", steps=0, epochs=4, batch_size=4)) == 0
    assert state_of(run)[0] == 26
    (change,) = saved(run)["history"]
    assert change["last_step"] == [20, 26] and change["changes"]["epochs"] == [0, 4]
    assert cli.main(command(steps=0, epochs=4, batch_size=4)) == 0
    assert saved(run)["history"] == [change] and len(seen()) == 6


def test_other_data_begin_at_their_first_epoch(command, seen, run, images, tmp_path, refused):
    other = shutil.copytree(images, tmp_path / "other")
    for path in other.glob("train/*/1*.png"):
        path.unlink()  # 3 of 12 in each class
    new = dict(steps=0, epochs=2, data__source=f"folder:{other}")
    refused(command(**new), run, "36 training images there, 27 here", "--extend")
    assert cli.main(command("--extend", **new)) == 0
    (change,) = saved(run)["history"]
    assert (change["position"], change["new_data"]) == (0, True)
    assert change["images"] == "36 training images before, 27 now"
    assert change["changes"]["data.source"] == [f"folder:{images}", f"folder:{other}"]
    assert [entry["train"]["images"] for entry in saved(run)["data"]] == [36, 27]
    assert change["last_step"] == [20, 29]  # two epochs of 27 images
    found = [image for _, batch in sorted(seen().items()) for image in batch]
    assert found == stream(other, 9 * 6)
    refused(command(steps=40), run, "27 training images there, 36 here")

    (other / "train/a").rename(other / "train/z")
    (other / "validate/a").rename(other / "validate/z")
    error = refused(command("--extend", **new | dict(epochs=9)), run, "other classes: added 'z'")
    assert "--extend" not in error and "--allow_data_change" not in error


@pytest.mark.slow
@pytest.mark.parametrize("offset", [-24, 17])
def test_worker_processes_move_the_stream_too(images, offset):
    source = open_source(f"folder:{images}", "train")
    options = dict(batch_size=4, seed=1, train=True, offset=offset)
    found = []
    for workers in (0, 2):
        with contextlib.closing(
            iter(make_loader(source, Transform(8), workers=workers, **options))
        ) as batches:
            restore_loader_state(batches, b'{"next_index": 10}')
            found.append([next(batches)["image"] for _ in range(12)])
    assert np.array_equal(*found)


def test_batches_of_a_moved_stream_are_those_of_the_stream(images):
    """Image by image, for every kind of loader, with any number of hosts, and when resumed."""
    source = open_source(f"folder:{images}", "train")
    values = np.arange(72, dtype=np.uint8).reshape(72, 1)
    spec = toy_family.RecordSpec("x", (toy_family.RecordField("x", (1,), "float16"),))
    records = RecordsInMemory.from_arrays({"x": values}, np.zeros(72, np.int32), spec)
    kinds = (
        lambda **options: make_loader(source, Transform(8), seed=1, train=True, **options),
        lambda **options: make_record_loader(records, seed=1, **options),
    )
    for make, name in zip(kinds, ("image", "x"), strict=True):
        rows = iter(make(batch_size=1))
        expected = np.concatenate([next(rows)[name] for _ in range(120)])
        for offset, first in ((-24, 10), (17, 3)):
            halves = []
            for shard in range(2):
                found = make(batch_size=2, shard_index=shard, shard_count=2, offset=offset)
                batches = iter(found)
                restore_loader_state(batches, b'{"next_index": %d}' % first)
                halves.append([next(batches)[name] for _ in range(20)])
                assert json.loads(loader_state_to_bytes(batches)) == {"next_index": first + 20}
            found = np.concatenate([np.concatenate(pair) for pair in zip(*halves, strict=True)])
            start = first * 4 + offset
            assert np.array_equal(found, expected[start : start + 80])


# Kills and reruns


_KILLED_AFTER_8_STEPS = """
import os, signal, sys
sys.modules["torch"] = None  # tensorboardX imports it where it finds it: two seconds
from hmar_jax.cli.main import run
from hmar_jax.training.reporting import Reporter
from tests import toy_family
toy_family.register()
advance, steps = Reporter.advance, []

def advance_and_end(self):
    advance(self)
    steps.append(1)
    if len(steps) == 8:
        os.kill(os.getpid(), signal.SIGKILL)

Reporter.advance = advance_and_end
run()
"""


def test_a_sigkill_in_the_extended_part_costs_nothing(command, run, images, tmp_path):
    """Parameters, optimizer, average and metrics are bit for bit those of an undisturbed run."""
    twin = shutil.copytree(run, tmp_path / "twin")
    longer = dict(steps=40, batch_size=4, checkpoint_every=3, ema_decay=0.9, recipe__clip=0.0)
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED_AFTER_8_STEPS, *command("--extend", **longer)],
        env=tiny.ENVIRONMENT,
        cwd=tiny.ENVIRONMENT["PYTHONPATH"],
        capture_output=True,
        timeout=200,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = saved(run)
    assert cli.main(command("--extend", **longer)) == 0
    assert saved(run) == before and len(before["history"]) == 1
    assert re.search(r"resuming from step 2[47]\n", (run / "log.txt").read_text())
    assert cli.main(train(twin, images, "--extend", **longer)) == 0
    assert_same_bits(state_of(run), state_of(twin))
    assert metrics(run, *_TIMES) == metrics(twin, *_TIMES)
    assert [line["step"] for line in metrics(run) if "lr" in line] == list(range(1, 41))


class Killed(BaseException):
    """In place of a kill."""


def test_killed_between_the_history_and_the_first_step(command, run, monkeypatch):
    """A rerun resumes, with --extend or without it, and nothing is recorded twice."""
    longer = dict(steps=30, recipe__clip=0.5)

    def kill(*_args, **_options):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints.RunCheckpoints, "restore_latest", kill)
        cli.main(command("--extend", **longer))
    (change,) = saved(run)["history"]
    for more in ([], ["--extend"]):
        assert cli.main(command(*more, **longer)) == 0
        assert saved(run)["history"] == [change]
    assert state_of(run)[0] == 30


def test_killed_before_the_history(command, run, monkeypatch):
    before = contents(run)

    def kill(*_args, **_options):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", kill)  # by which config.json becomes the new one
        cli.main(command("--extend", steps=30))
    left = {name: data for name, data in contents(run).items() if not name.endswith(".tmp")}
    assert left == before
    assert cli.main(command()) == 0  # still the former run, which is complete


def test_what_was_owed_after_the_former_last_step_is_done(command, tmp_path, monkeypatch):
    run = tmp_path / "run"
    from hmar_jax.training.after_step import AfterStep

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AfterStep, "_evaluate", kill)
        cli.main(command(steps=13, eval_every=13))
    assert (run / "after_step.json").exists()
    shutil.rmtree(run / "samples")
    assert cli.main(command("--extend", steps=25)) == 0
    evaluated = [line["step"] for line in metrics(run) if "validation/loss" in line]
    assert evaluated == [13, 20, 25]
    assert (run / "samples/step_000013.png").exists()


def test_a_damaged_checkpoint_moves_the_change_back(command, seen, run, images, capfd):
    """The change began after step 20, and the checkpoint of that step is lost."""
    longer = dict(steps=24, batch_size=9, checkpoint_every=100)

    def stop(*_args, **_options):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints.RunCheckpoints, "restore_latest", stop)
        cli.main(command("--extend", **longer))
    for path in (run / "checkpoints/20/state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hmar_jax.io.arrays.RETRY_DELAYS", ())
        assert cli.main(command(**longer)) == 2  # the damaged one is set aside
    assert "rerun the command, and the change begins after step 10" in capfd.readouterr().err
    assert cli.main(command(**longer)) == 0
    (change,) = saved(run)["history"]
    assert (change["from_step"], change["position"]) == (10, 60)
    found = [image for _, batch in sorted(seen().items()) for image in batch]
    assert found == stream(images, 60 + 14 * 9)[60:]
    assert [line["step"] for line in metrics(run) if "lr" in line] == list(range(1, 25))


def test_an_unfinished_run_is_extended_from_its_newest_checkpoint(command, tmp_path, at_step):
    run = tmp_path / "run"

    def kill():
        raise Killed

    at_step(17, kill)
    with contextlib.suppress(Killed):
        cli.main(command(steps=50))
    assert [line["step"] for line in metrics(run) if "lr" in line][-1] == 16
    assert cli.main(command("--extend", steps=25, recipe__weight_decay=0.1)) == 0
    (change,) = saved(run)["history"]
    assert (change["from_step"], change["last_step"]) == (10, [50, 25])
    assert [line["step"] for line in metrics(run) if "lr" in line] == list(range(1, 26))


# What may change, and what it means


def test_a_moving_average_and_clipping_may_come_and_go(command, run):
    """The average begins with the parameters; Adam's moments are kept."""
    still = dict(recipe__learning_rate=0.0, eval_every=100, sample_every=100)
    assert cli.main(command("--extend", steps=21, recipe__clip=0.0, **still)) == 0
    _, before = state_of(run, "opt_state")
    changes = dict(steps=22, recipe__clip=1e-6, ema_decay=0.99, **still)
    assert cli.main(command("--extend", **changes)) == 0
    _, after = state_of(run, "opt_state", "ema_params")
    assert_same_bits(after["params"], before["params"])  # at a rate of 0
    for a, b in zip(
        jax.tree.leaves(after["ema_params"]), jax.tree.leaves(after["params"]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    # The moments decay by b1 and b2; the clipped gradient adds next to nothing.
    adam = lambda state: next(s for s in state["opt_state"] if s and "mu" in s)
    for name, decay, atol in (("mu", 0.9, 2e-7), ("nu", 0.95, 1e-12)):
        for a, b in zip(
            jax.tree.leaves(adam(before)[name]), jax.tree.leaves(adam(after)[name]), strict=True
        ):
            assert np.abs(a).max() > 100 * atol
            np.testing.assert_allclose(b, decay * np.asarray(a), rtol=1e-5, atol=atol)
    assert cli.main(command("--extend", steps=23, recipe__clip=0.0, **still)) == 0
    assert not state_of(run)[1]["ema_params"]


def test_values_that_were_shortened_stay_and_intervals_grow(command, tmp_path, capfd):
    """A warm-up of 25 steps became 1 in 20 steps; in 40 it would begin again."""
    run = tmp_path / "run"
    warm = dict(recipe__warmup_steps=25, checkpoint_every=30, eval_every=40, sample_every=40)
    assert cli.main(command(**warm)) == 0
    assert saved(run)["config"]["checkpoint_every"] == 5
    longer = command("--extend", steps=40, **warm)
    capfd.readouterr()
    assert cli.main(longer) == 0
    assert "config.recipe.warmup_steps=25 is not used" in capfd.readouterr().err
    config, (change,) = saved(run)["config"], saved(run)["history"]
    assert (config["recipe"]["warmup_steps"], config["checkpoint_every"]) == (1, 30)
    assert change["kept"] == {"recipe.warmup_steps": [25, 1]}
    assert cli.main([text for text in longer if text != "--extend"]) == 0
    assert saved(run)["history"] == [change]


def test_a_rerun_that_changes_nothing_is_said(command, run, capfd):
    before = saved(run)
    assert cli.main(command("--extend", log_every=3)) == 0
    assert "nothing is changed" in capfd.readouterr().err
    assert "history" not in saved(run) and saved(run)["config"]["log_every"] == 3
    assert saved(run)["data"] == before["data"]


def test_what_cannot_be_extended(command, run, images, tmp_path, refused):
    cure = refused(command(steps=40), run, "another config: steps is 20 there and 40 here")
    assert cure.endswith("or use the run's config, or change it with --extend\n")
    error = refused(command(steps=40, seed=1), run, "seed is 0 there and 1 here, steps is")
    assert "--extend" not in error
    for changes, words in (
        (dict(steps=40, model__rank=2), "--extend cannot change: model.rank is 4 there and 2 here"),
        (dict(steps=40, seed=3), "--extend cannot change: seed is 0 there and 3 here"),
        (dict(recipe__b1=0.5), "more than 20 steps, which are done; got 20"),
        (dict(steps=19), "more than 20 steps, which are done; got 19"),
        (dict(steps=40, batch_size=40), "batch_size must be at most 36"),
    ):
        refused(command("--extend", **changes), run, words)
    nowhere = train(tmp_path / "nowhere", images, "--extend", steps=40)
    refused(nowhere, tmp_path, "--extend requires a run, and there is none in")
    assert not (tmp_path / "nowhere").exists()


def test_images_that_were_trained_on_and_are_held_out_now_are_named(images, tmp_path):
    flat = shutil.copytree(images / "train", tmp_path / "flat")
    run = tmp_path / "run"
    with toy_family_is_known():
        config = lambda share: tiny.config_of(train(run, flat, steps=20, data__held_out=share))
        build = experiments.build_experiment(config(0.1), str(run))
        runs.compare(
            str(run), build.config, build.spec.to_json(), build.schema, build.inputs
        ).write()
        warnings = lambda share: [
            text
            for text in experiments.build_experiment(config(share), str(run), extend=True).warnings
            if "trained on some of the images" in text
        ]
        assert [len(warnings(share)) for share in (0.05, 0.1, 0.3)] == [0, 0, 1]


def test_a_history_that_cannot_be_read(command, run, refused):
    config = saved(run)
    (run / "config.json").write_text(json.dumps(config | {"history": [{"from_step": "x"}]}))
    refused(command("--extend"), run, "the history in", "must have entries as hmar train --extend")


def test_an_allowed_change_of_the_images_is_in_the_history(command, run, images, tmp_path):
    """It continues at the position of the stream that it has reached."""
    other = shutil.copytree(images, tmp_path / "other")
    shutil.copy(other / "train/a/0.png", other / "train/a/new.png")
    changed = command("--allow_data_change", data__source=f"folder:{other}")
    assert cli.main(changed) == 0
    (change,) = saved(run)["history"]
    assert (change["position"], change["new_data"]) == (120, False)
    assert change["images"] == "36 training images before, 37 now"


def test_segments_follow_from_the_history():
    entry = lambda step, position, **more: Change(step, (10, 20), position=position, **more)
    sizes = lambda old, new: {"batch_size": (old, new)}
    changes = [
        entry(10, 60, changes=sizes(6, 4)),
        entry(20, 100, changes={}),
        entry(30, 0, changes=sizes(4, 9), new_data=True),
    ]
    found = history.segments(changes, 9)
    assert found == [Segment(0, 0, 6), Segment(10, 60, 4), Segment(20, 100, 4), Segment(30, 0, 9)]
    assert [s.position_at(s.from_step) for s in found] == [0, 60, 100, 0]
    assert Change.from_json(json.loads(json.dumps(changes[2].to_json()))) == changes[2]
    back = history.segments(history.rewound(changes, 9, 15), 9)
    assert back[1:] == [Segment(10, 60, 4), Segment(15, 80, 4), Segment(15, 0, 9)]
    assert history.segments(history.rewound(changes, 9, 5), 9)[1:] == [
        Segment(5, 30, 4),
        Segment(5, 30, 4),
        Segment(5, 0, 9),
    ]


# Tokenizers, records, several processes


def test_a_step_of_something_that_happens_once_stays_behind(tmp_path, refused):
    """The codebook of a tokenizer is initialized once, here at step 15."""
    run = shutil.copytree(tiny.tokenizer_run(), tmp_path / "run")
    for step in (10, 90):
        changes = dict(steps=120, recipe__vq_start_step=step)
        with tiny.cached():
            refused(
                [*tiny.train_tokenizer(run, **changes), "--extend"],
                run,
                f"config.recipe.vq_start_step must stay 15, as this happens once, and the run has "
                f"reached step 80; got {step}",
            )


@pytest.mark.slow
def test_a_tokenizer_gets_an_adversarial_loss(tmp_path, refused):
    """A discriminator of its own begins with the extended part; codebook and moments are kept."""
    run = shutil.copytree(tiny.tokenizer_run(), tmp_path / "run")
    before = state_of(run, "last_used", "images_seen")[1]
    still = dict(steps=81, recipe__learning_rate=0.0, recipe__discriminator_channels=16)
    still |= dict(recipe__adversarial_weight=0.1, batch_size=4, recipe__discriminator_layers=1)
    with tiny.cached():
        assert cli.main([*tiny.train_tokenizer(run, **still), "--extend"]) == 0
    after = state_of(run, "last_used", "images_seen", "discriminator")[1]
    assert_same_bits(after["params"], before["params"])
    assert int(after["images_seen"]) == int(before["images_seen"]) + 4
    assert jax.tree.leaves(after["discriminator"])
    last = [line for line in metrics(run) if "lr" in line][-1]
    assert last["step"] == 81 and last["adversarial"] and last["discriminator_loss"]
    other = dict(still, steps=90, recipe__discriminator_channels=32)
    with tiny.cached():
        command = [*tiny.train_tokenizer(run, **other), "--extend"]
        refused(command, run, "step 81", "does not match this configuration: ", "discriminator")
    off = dict(steps=82, recipe__learning_rate=0.0, batch_size=4)
    with tiny.cached():
        assert cli.main([*tiny.train_tokenizer(run, **off), "--extend"]) == 0
    assert not state_of(run, "discriminator")[1]["discriminator"]


@pytest.mark.slow
def test_a_model_goes_on_with_encoded_images(tmp_path):
    """From a folder to crops in memory, to records on disk, and to other images again."""
    run = shutil.copytree(tiny.model_run(), tmp_path / "run")
    tokens = tmp_path / "tokens"
    tokenize = ["tokenize", f"--tokenizer={tiny.tokenizer_run()}", f"--out={tokens}"]
    tokenize += [f"--data=folder:{tiny.images()}", "--transform=random_crop", "--crops=2"]
    changes = (
        dict(steps=84, data__cached_copies=2, eval_every=1000),
        dict(steps=90, data__cached_copies=2, batch_size=9, eval_every=1000),
        dict(steps=96, data__source=f"tokens:{tokens}", batch_size=9, eval_every=1000),
        dict(steps=99, model__dropout=0.1, model__drop_path=0.1, eval_every=1000),
    )
    with tiny.cached():
        assert cli.main(tokenize) == 0
        for change in changes:
            assert cli.main([*tiny.train(run, **change), "--extend"]) == 0
    entries = saved(run)["history"]
    assert [(e["from_step"], e["position"], e["new_data"]) for e in entries] == [
        (80, 0, True),
        (84, 24, False),
        (90, 0, True),
        (96, 0, True),
    ]
    assert [line["step"] for line in metrics(run) if "lr" in line][-4:] == [84, 90, 96, 99]
    assert saved(run)["model"]["transformer"]["dropout"] == 0.1
