"""Model directories, checkpoints of a run and small files: exactness, damage, kills, errors."""

import contextlib
import gc
import json
import logging
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.errors import InputError
from hmar_jax.io import arrays, checkpoints, files, models
from hmar_jax.io.checkpoints import RunCheckpoints, load_params_of_run
from hmar_jax.io.models import load_model, save_model
from hmar_jax.io.stored_states import first_version_names

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch):
    monkeypatch.setattr(arrays, "RETRY_DELAYS", (0.0, 0.0))


@contextlib.contextmanager
def input_error(*words):
    """The body must raise InputError with a one-line message that contains the words."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message, message
    assert not [word for word in words if str(word) not in message], message


@pytest.fixture
def other_output(caplog, capfd, monkeypatch):
    """Returns what was printed or logged, except warnings of ours and of Orbax (absl)."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(repr(args.exc_value)))
    # After a test that ran the command line, our warnings also go to stderr.
    monkeypatch.setattr(logging.getLogger("hmar_jax"), "handlers", [])

    def read():
        gc.collect()  # Exceptions that nobody fetched are reported when their tasks are freed.
        others = [
            record
            for record in caplog.records
            if record.name.split(".")[0] not in ("hmar_jax", "absl")
        ]
        return [
            *(record.getMessage() for record in others),
            *unraisable,
            *capfd.readouterr().err.splitlines(),
        ]

    yield read
    read()


def make_state(seed=0, width=3):
    """One leaf of each stored type, an optimizer's nested tuples, and nodes without arrays."""
    import optax  # here, because most child processes do not need it

    rng = np.random.default_rng(seed)
    bits = jnp.asarray(rng.integers(0, 2**32, (width, 5), np.uint32))
    params = {
        "block": {
            "w": jnp.asarray(rng.normal(size=(width, 4)), jnp.float32),
            "b": jnp.full((4,), seed, jnp.float32),
        },
        # Every 16-bit pattern that is a number, including subnormals and infinities.
        "bf16": jnp.asarray(np.arange(2**16, dtype=np.uint16)).view(jnp.bfloat16)[:0x7F81],
    }
    mask = {"block": {"w": True, "b": False}, "bf16": False}
    optimizer = optax.masked(optax.adamw(1e-3, mu_dtype=jnp.bfloat16), mask)
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.int32(seed),
        "key": jax.random.key_data(jax.random.key(seed)),
        "bits": bits,
        "flags": jnp.asarray([True, False, True]),
        "ints": np.asarray([-(2**31), 2**31 - 1], np.int32),
        "special": jnp.asarray([np.nan, np.inf, -0.0, 1e-45], jnp.float32),
        "scalar": np.uint32(2**32 - 1),
        "none": None,
        "empty": {},
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        same = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        assert same, (jax.tree_util.keystr(path), a, b)


def save_steps(workdir, *steps, **options):
    with RunCheckpoints(workdir, **options) as run:
        for step in steps:
            assert run.save(step, make_state(step), {"position": step}, note=f"step {step}")
    return workdir


def child(code, *arguments, devices=1, **options):
    """Starts a Python process that runs `code`, with this module as `t`."""
    environment = dict(
        os.environ,
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        JAX_PLATFORMS="cpu",
    )
    environment["PYTHONPATH"] = str(ROOT)
    code = "import sys, os, signal\nfrom tests import test_checkpoints as t\n" + textwrap.dedent(
        code
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, **options
    )


def finish(process):
    """Waits for a successful end; returns the output."""
    output = process.communicate()[0]
    assert process.returncode == 0
    return output


# A run: exact restoring


def test_round_trip_is_exact(tmp_path):
    state = make_state(7)
    with RunCheckpoints(tmp_path) as run:
        assert run.restore_latest(abstract(state)) is None
        assert run.save(7, state, b"\x00grain\xff", seed=2**40, names=["a"])
        assert not run.save(7, state), "the same step twice"
        run.wait()
    with RunCheckpoints(tmp_path) as run:
        step, restored, metadata = run.restore_latest(abstract(state))
        assert step == 7
        assert metadata == {"data_state": b"\x00grain\xff", "seed": 2**40, "names": ["a"]}
        assert_same_bits(restored, state)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_keeps_the_newest_across_a_restart(tmp_path):
    save_steps(tmp_path, 1, 2, 3, max_to_keep=2)
    with RunCheckpoints(tmp_path, max_to_keep=2) as run:
        assert run.steps() == [2, 3]
        assert run.restore_latest(make_state()).metadata == {
            "data_state": {"position": 3},
            "note": "step 3",
        }
        run.save(4, make_state(4))
        assert run.steps() == [3, 4]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4"]


def test_keeps_the_best(tmp_path):
    def save(*rows):
        with RunCheckpoints(tmp_path, max_to_keep=1, keep_best=1) as run:
            for step, loss in rows:
                assert run.save(step, make_state(step), validation_loss=loss)
        return sorted(int(name) for name in os.listdir(tmp_path / "checkpoints"))

    assert save((1, 3.0), (2, 1.0), (3, 2.0), (4, None)) == [2, 4]
    assert save((5, float("nan")), (6, None)) == [2, 6]  # the best is known after a restart
    assert save((7, 0.5), (8, 0.7)) == [7, 8]
    with RunCheckpoints(tmp_path, max_to_keep=1, keep_best=1) as run:
        assert run.restore_latest(make_state()).step == 8


def test_select_a_checkpoint(tmp_path):
    with RunCheckpoints(tmp_path, max_to_keep=2, keep_best=2) as run:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, None)):
            run.save(step, {"params": {"w": np.full(3, step)}}, validation_loss=loss)

    def step_of(checkpoint):
        step, saved = load_params_of_run(tmp_path, checkpoint=checkpoint)
        assert saved["params"]["w"].tolist() == [step] * 3
        return step

    assert [step_of(x) for x in ("best", "latest", 2, 4)] == [2, 5, 2, 4]
    with pytest.raises(
        InputError,
        match="no checkpoint 1 in .*; known steps: 2, 3, 4, 5, or latest or best",
    ):
        load_params_of_run(tmp_path, checkpoint=1)
    (tmp_path / "checkpoints/3/metrics/metrics").write_text("{")
    with pytest.raises(
        InputError, match="the validation loss of a checkpoint is damaged: .*/3/metrics"
    ):
        load_params_of_run(tmp_path, checkpoint="best")
    shutil.rmtree(tmp_path / "checkpoints/3")
    for file in (tmp_path / "checkpoints/2/state").rglob("*"):
        file.is_file() and file.write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read \(steps 2\)"):
        load_params_of_run(tmp_path, checkpoint="best")
    shutil.rmtree(tmp_path / "checkpoints/2")
    with pytest.raises(InputError, match="was saved with a validation loss; known steps: 4, 5"):
        load_params_of_run(tmp_path, checkpoint="best")


def test_arrays_may_be_donated_and_changed_while_saving(tmp_path):
    add_one = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"w": jnp.zeros(500_000), "v": jnp.zeros((300, 300))}
    on_host, lists = np.zeros(500_000, np.float32), {"seen": [1]}
    with RunCheckpoints(tmp_path) as run:
        run.save(0, {**state, "on_host": on_host}, None, lists=lists)
        for _ in range(3):
            state = add_one(state)
        on_host += 1
        lists["seen"].append(2)
        jax.block_until_ready(state)
        run.wait()
        restored = run.restore_latest({**state, "on_host": on_host})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(restored.state))
    assert restored.metadata["lists"] == {"seen": [1]}


def test_restores_in_the_requested_type(tmp_path):
    with RunCheckpoints(tmp_path) as run:
        run.save(1, {"w": jnp.asarray([1 / 3, 2.0])})
        restored = run.restore_latest({"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)})
    assert_same_bits(restored.state["w"], jnp.asarray([1 / 3, 2.0], jnp.bfloat16))


def test_arrays_that_cannot_be_stored_exactly_are_rejected(tmp_path):
    with RunCheckpoints(tmp_path) as run:
        with pytest.raises(TypeError, match="key_data"):
            run.save(1, {"key": jax.random.key(0)})
        with pytest.raises(TypeError, match="state\\['n'\\] must be an array; got 3"):
            run.save(1, {"n": 3})
        with pytest.raises(ValueError, match="without elements"):
            run.save(1, {"w": jnp.zeros((0, 3))})
        with pytest.raises(TypeError, match="JSON"):
            run.save(1, make_state(), rng=object())
        assert run.steps() == []
    assert os.listdir(tmp_path / "checkpoints") == []


def test_restore_on_another_number_of_devices(tmp_path):
    """Four devices save shards; one device here and two elsewhere restore the same bits."""
    code = """
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        state = t.make_state(5, width=8)
        sharding = NamedSharding(jax.make_mesh((len(jax.devices()),), ("d",)), P("d"))
        state["params"]["block"]["w"] = jax.device_put(state["params"]["block"]["w"], sharding)
        with t.RunCheckpoints(sys.argv[1]) as run:
            if len(jax.devices()) == 4:
                run.save(5, state)
            else:
                shapes = t.abstract(state)
                sharded = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)
                shapes["params"]["block"]["w"] = sharded
                restored = run.restore_latest(shapes).state
                t.assert_same_bits(restored, state)
                assert restored["params"]["block"]["w"].sharding == sharding
    """
    assert finish(child(code, tmp_path, devices=4)) == ""
    state = make_state(5, width=8)
    with RunCheckpoints(tmp_path) as run:
        assert_same_bits(run.restore_latest(abstract(state)).state, state)
    assert_same_bits(load_params_of_run(tmp_path)[1]["params"], state["params"])
    assert finish(child(code, tmp_path, devices=2)) == ""


# A run: checkpoints of the first version


def test_restore_under_former_names(tmp_path):
    """Fields, and parts of nested names, that were renamed after the checkpoint was saved."""
    former = {new: old for old, new in first_version_names().items()}
    last_used, count, state = jnp.arange(6).reshape(2, 3), jnp.int32(9), make_state(3)
    present = {**state, "last_used": last_used, "nested": {"images_seen": count}}
    saved = {**state, former["last_used"]: last_used, "nested": {former["images_seen"]: count}}
    with RunCheckpoints(tmp_path) as run:
        run.save(1, saved)
        assert_same_bits(run.restore_latest(abstract(present)).state, present)
        assert_same_bits(run.restore_latest(abstract(saved)).state, saved)
        with input_error("it has no last_used"):
            run.restore_latest(abstract(present), former_names={})
        with input_error("it has no nested/more"):
            run.restore_latest(abstract({**present, "nested": {"more": count}}))
        run.save(2, present)
        assert_same_bits(run.restore_latest(abstract(present)).state, present)


# A run: damage


def _largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def _cut(path):
    os.truncate(path, path.stat().st_size // 2)


def _remove_folder(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


DAMAGES = {
    "data cut": lambda folder: _cut(_largest(folder)),
    "data removed": lambda folder: _largest(folder).unlink(),
    "manifest cut": lambda folder: _cut(folder / "state" / "manifest.ocdbt"),
    "manifest removed": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "index cut": lambda folder: [_cut(path) for path in (folder / "state" / "d").iterdir()],
    "index removed": lambda folder: [path.unlink() for path in (folder / "state" / "d").iterdir()],
    "names cut": lambda folder: _cut(folder / "state" / "_METADATA"),
    "names removed": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "metadata cut": lambda folder: _cut(folder / "extra" / "metadata"),
    "metadata removed": lambda folder: (folder / "extra" / "metadata").unlink(),
    "everything removed": _remove_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_falls_back_over_a_damaged_checkpoint(tmp_path, caplog, other_output, damage):
    rng = np.random.default_rng(0)
    state = {
        "params": [jnp.asarray(rng.normal(size=(32, 64))) for _ in range(9)],
        "step": jnp.int32(0),
    }
    with RunCheckpoints(tmp_path) as run:
        for step in (10, 20):
            run.save(step, {**state, "step": jnp.int32(step)}, {"position": step})
    DAMAGES[damage](tmp_path / "checkpoints" / "20")
    with RunCheckpoints(tmp_path) as run:
        with caplog.at_level(logging.WARNING, logger="hmar_jax"):
            step, restored, metadata = run.restore_latest(abstract(state))
        assert step == 10 and metadata == {"data_state": {"position": 10}}
        assert_same_bits(restored, {**state, "step": jnp.int32(10)})
        (record,) = [record for record in caplog.records if record.name.startswith("hmar_jax")]
        message = record.getMessage()
        assert (
            "step 20" in message
            and "damaged: " in message
            and "\n" not in message
            and len(message) < 500
        )
        assert run.steps() == [10]
        assert run.save(20, state), "the step can be saved again"
        run.wait()
        assert run.restore_latest(abstract(state)).step == 20
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["10", "20", "damaged_20"]
    assert not other_output()


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            'RESOURCE_EXHAUSTED: Error writing "w/0": Failed to write 886972 bytes: '
            "No space left on device",
            InputError,
        ),
        ("something else", ValueError),
        ("OUT_OF_RANGE: Error writing: Read-only file system [OS error 30: EROFS]", InputError),
    ],
)
def test_a_full_disk(tmp_path, monkeypatch, error, expected):
    with RunCheckpoints(tmp_path) as run:

        def fail(*_, **__):
            raise ValueError(error)

        monkeypatch.setattr(run._manager, "save", fail)
        pattern = "cannot write a checkpoint to .*(No space left|Read-only).*rerun the same command"
        with pytest.raises(expected, match=pattern if expected is InputError else error):
            run.save(1, make_state())
        monkeypatch.undo()
        assert run.save(1, make_state())


def test_a_save_that_does_not_fit_is_not_started(tmp_path, monkeypatch):
    with RunCheckpoints(tmp_path / "run") as run:
        assert run.save(1, make_state())
        run.wait()
        monkeypatch.setattr(
            arrays.shutil,
            "disk_usage",
            lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100),
        )
        with input_error(
            "not enough disk space for the checkpoint of step 2",
            "0.0 MB free",
            "rerun the same command to resume",
        ):
            run.save(2, make_state())
        with input_error("not enough disk space for the model", f"{tmp_path}/models/a"):
            save_model(tmp_path / "models/a", {}, make_state(), "")
        monkeypatch.undo()
        assert run.save(2, make_state())
    assert (
        sorted(os.listdir(tmp_path / "run/checkpoints")) == ["1", "2"]
        and os.listdir(tmp_path / "models") == []
    )


def test_falls_back_over_wrong_contents_of_the_right_length(tmp_path):
    """In a process of its own, because Orbax reports this on stderr too, some time later."""
    save_steps(tmp_path, 10, 20)
    data = _largest(tmp_path / "checkpoints" / "20")
    data.write_bytes(bytes(data.stat().st_size))
    code = """
        t.arrays.RETRY_DELAYS = (0.0, 0.0)
        with t.RunCheckpoints(sys.argv[1]) as run:
            print(run.restore_latest(t.make_state()).step, run.steps())
    """
    process = child(code, tmp_path, stderr=subprocess.STDOUT)
    lines = finish(process).splitlines()
    assert "10 [10]" in lines
    assert (
        len([line for line in lines if "checkpoint of step 20" in line and "damaged: " in line])
        == 1
    )


def test_when_every_checkpoint_is_damaged(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in "1", "2":
        _cut(tmp_path / "checkpoints" / step / "state" / "manifest.ocdbt")
    with RunCheckpoints(tmp_path) as run, input_error("no checkpoint in", "steps 1, 2", tmp_path):
        run.restore_latest(make_state())
    with input_error("no checkpoint in", "steps 1, 2", tmp_path):
        load_params_of_run(tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"], (
        "nothing is renamed when nothing is found"
    )


def test_two_damaged_checkpoints_of_one_step(tmp_path):
    for _ in range(2):
        save_steps(tmp_path, *([1, 2] if not (tmp_path / "checkpoints" / "1").exists() else [2]))
        _cut(tmp_path / "checkpoints" / "2" / "state" / "manifest.ocdbt")
        with RunCheckpoints(tmp_path) as run:
            assert run.restore_latest(make_state()).step == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "damaged_2", "damaged_2_2"]


def test_another_model_is_an_input_error_and_no_damage(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    with RunCheckpoints(tmp_path) as run:
        with input_error("step 2", "params/block/w has shape (3, 4), not (9, 4)"):
            run.restore_latest(abstract({**make_state(), "params": make_state(width=9)["params"]}))
        with input_error("it has no params/more"):
            run.restore_latest(
                {**make_state(), "params": {**make_state()["params"], "more": jnp.zeros(1)}}
            )
        with input_error("it has flags"):
            run.restore_latest(
                {name: leaf for name, leaf in make_state().items() if name != "flags"}
            )
        assert run.steps() == [1, 2]
    assert not caplog.records
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


@pytest.mark.parametrize("error", [MemoryError("device full"), RuntimeError("device full")])
def test_a_device_error_is_no_damage(tmp_path, monkeypatch, error):
    save_steps(tmp_path, 1, 2)
    with RunCheckpoints(tmp_path) as run:
        monkeypatch.setattr(arrays, "read_on_devices", failing(error, times=math.inf))
        with pytest.raises(type(error), match="device full"):
            run.restore_latest(make_state())
        assert run.steps() == [1, 2]


# A run: errors that pass


def failing(error, times, otherwise=None):
    """Returns a function that raises the error `times` times and then calls `otherwise`."""

    def function(*args, **kwargs):
        function.calls += 1
        if function.calls <= times:
            raise error
        return otherwise(*args, **kwargs)

    function.calls = 0
    return function


READS = {
    "index": (arrays, "read_metadata"),
    "data": (arrays, "read_on_devices"),
    "metadata": (checkpoints, "_decode"),
}


@pytest.mark.parametrize("read", READS)
def test_an_error_that_passes_is_no_damage(tmp_path, monkeypatch, caplog, read):
    save_steps(tmp_path, 1, 2)
    with RunCheckpoints(tmp_path) as run:
        function = failing(OSError(5, "Input/output error"), 2, getattr(*READS[read]))
        monkeypatch.setattr(*READS[read], function)
        restored = run.restore_latest(make_state())
        assert restored.step == 2 and function.calls == 3
        assert_same_bits(restored.state, make_state(2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("file", ["data", "extra/metadata"])
def test_a_file_that_is_missing_for_a_moment(tmp_path, monkeypatch, file):
    save_steps(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "2"
    missing = _largest(folder) if file == "data" else folder / file
    missing.rename(tmp_path / "away")
    monkeypatch.setattr(arrays.time, "sleep", lambda _: (tmp_path / "away").rename(missing))
    with RunCheckpoints(tmp_path) as run:
        assert run.restore_latest(make_state()).step == 2
    missing.rename(tmp_path / "away")
    assert load_params_of_run(tmp_path)[0] == 2


def test_an_error_that_stays_is_damage(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path, 1, 2)
    read, attempts = arrays.read_metadata, []

    def fail_at_step_2(folder, *parts):
        if folder.parent.name == "2":
            attempts.append(folder)
            raise OSError(116, "Stale file handle")
        return read(folder, *parts)

    monkeypatch.setattr(arrays, "read_metadata", fail_at_step_2)
    assert load_params_of_run(tmp_path)[0] == 1
    with RunCheckpoints(tmp_path) as run:
        assert run.restore_latest(make_state()).step == 1
    # Each attempt is logged at DEBUG, which another test's logger level may let through.
    reported = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(attempts) == 2 * 3
    assert sum("Stale file handle" in r.getMessage() for r in reported) == 2
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "damaged_2"]


def test_a_model_is_read_again_after_an_error(tmp_path, monkeypatch):
    save_model(tmp_path / "m", {}, {"w": np.ones(3)}, "")
    error = OSError(5, "Input/output error")
    monkeypatch.setattr(arrays, "read_metadata", failing(error, 2, arrays.read_metadata))
    assert load_model(tmp_path / "m")[1]["w"].shape == (3,)
    monkeypatch.setattr(arrays, "read_metadata", failing(error, 3))
    with input_error("damaged", "Input/output error"):
        load_model(tmp_path / "m")


def test_a_file_in_place_of_the_checkpoint_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with input_error("cannot store checkpoints in", tmp_path / "file"):
        RunCheckpoints(tmp_path / "file")


# A run: parameters without the rest of the state


def test_parameters_of_a_run(tmp_path, caplog):
    save_steps(tmp_path / "a run #1, 50%", 1, 2)
    before = sorted((tmp_path).rglob("*"))
    step, parts = load_params_of_run(tmp_path / "a run #1, 50%", "step")
    assert step == 2 and sorted(parts) == ["params", "step"]
    assert_same_bits(parts, {"params": make_state(2)["params"], "step": np.asarray(2, np.int32)})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(parts))
    _cut(_largest(tmp_path / "a run #1, 50%" / "checkpoints" / "2"))
    assert load_params_of_run(tmp_path / "a run #1, 50%")[0] == 1
    assert "step 2" in caplog.text
    assert sorted((tmp_path).rglob("*")) == before, "reading must change nothing"


def test_parameters_are_read_without_the_optimizer(tmp_path, monkeypatch):
    """Files that hold nothing but optimizer state may be missing."""
    rng = np.random.default_rng(0)
    with RunCheckpoints(tmp_path) as run:
        run.save(
            1, {"params": {"w": jnp.ones(3)}, "opt_state": jnp.asarray(rng.normal(size=100_000))}
        )
    _largest(tmp_path / "checkpoints").unlink()
    assert_same_bits(load_params_of_run(tmp_path)[1], {"params": {"w": np.ones(3, np.float32)}})


def test_runs_without_parameters(tmp_path):
    with input_error("run directory", tmp_path / "gone", "does not exist"):
        load_params_of_run(tmp_path / "gone")
    with input_error("has no checkpoints", tmp_path):
        load_params_of_run(tmp_path)
    save_steps(tmp_path, 1)
    with input_error("step 1", "has no 'ema'"):
        load_params_of_run(tmp_path, "ema")


# A run: kills

KILLED = """
    import jax.numpy as jnp, numpy as np
    workdir, kill_at = sys.argv[1], int(sys.argv[2])
    rng = np.random.default_rng
    normal = lambda step: jnp.asarray(rng(step).normal(size=(400, 400)))
    state = lambda step: {"w": normal(step), "step": jnp.int32(step)}
    with t.RunCheckpoints(workdir, max_to_keep=2) as run:
        found = run.restore_latest(state(0))
        first = found.step + 1 if found else 0
        if found:
            t.assert_same_bits(found.state, state(found.step))
            assert found.metadata["data_state"] == {"position": found.step}
        for step in range(first, 10_000):
            run.save(step, state(step), {"position": step})
            print(step, flush=True)
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)  # while the save of this step is in flight
"""


def test_killed_while_saving_and_restarted(tmp_path):
    """Killed by itself right after save() returned, then from outside at some moment."""
    process = child(KILLED, tmp_path, 4)
    saved = [int(line) for line in process.communicate()[0].split()]
    assert process.returncode == -signal.SIGKILL and saved == [0, 1, 2, 3, 4]
    assert (tmp_path / "checkpoints" / "3").is_dir()

    process = child(KILLED, tmp_path, -1)
    for count, line in enumerate(process.stdout):
        if count == 0:
            assert int(line) in (4, 5), "must resume from the last complete checkpoint"
        if count == 12:
            process.kill()
            last = int(line)
            break
    process.communicate()
    with RunCheckpoints(tmp_path, max_to_keep=2) as run:
        rng = np.random.default_rng
        shapes = {
            "w": jax.ShapeDtypeStruct((400, 400), jnp.float32),
            "step": jax.ShapeDtypeStruct((), jnp.int32),
        }
        step, state, _ = run.restore_latest(shapes)
        assert last - 1 <= step <= last + 20
        assert_same_bits(
            state, {"w": jnp.asarray(rng(step).normal(size=(400, 400))), "step": jnp.int32(step)}
        )
        assert run.save(step + 1, state)
    # Nothing is left of the killed processes.
    assert sorted(os.listdir(tmp_path / "checkpoints")) == sorted([str(step), str(step + 1)])


def test_temporary_folders_are_not_checkpoints(tmp_path):
    save_steps(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    (leftover / "manifest.ocdbt").write_bytes(b"half")
    assert load_params_of_run(tmp_path)[0] == 1
    assert leftover.exists(), "a reader must not remove the files of a run in training"
    with RunCheckpoints(tmp_path) as run:
        assert run.steps() == [1] and run.restore_latest(make_state()).step == 1
        assert run.save(2, make_state(2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


# Model directories


def test_model_round_trip(tmp_path):
    config = {"width": 8, "scales": [1, 2], "a": {"rate": 0.1, "name": "tëst"}}
    params = make_state(3)["params"]
    half = np.asarray([[1.5, -65504.0, 6e-8]], np.float16)
    save_model(tmp_path / "deep" / "model", config, {**params, "half": half}, "# A model\n")
    folder = tmp_path / "deep" / "model"
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "params"]
    assert os.listdir(tmp_path / "deep") == ["model"], "nothing temporary is left"
    assert (folder / "README.md").read_text() == "# A model\n"
    assert (folder / "config.json").read_text() == json.dumps(
        config, indent=2, sort_keys=True
    ) + "\n"
    loaded_config, loaded = load_model(folder)
    assert loaded_config == config
    assert_same_bits(loaded, jax.tree.map(np.asarray, {**params, "half": half.astype(np.float32)}))
    # Other users may read it like any new directory; temporary directories are often private.
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_models_are_not_overwritten_by_default(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, {"n": 1}, {"w": np.ones(2)}, "first")  # an empty directory may be used
    with input_error("not empty", folder):
        save_model(folder, {"n": 2}, {"w": np.ones(2)}, "second")
    with input_error("not empty", folder):
        models.check_new_model(folder)

    # A failure at the last moment leaves the old model.
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(models, "write_atomically", fail)
        with pytest.raises(OSError, match="disk full"):
            save_model(folder, {"n": 2}, {"w": np.ones(2)}, "second", overwrite=True)
    assert load_model(folder)[0] == {"n": 1} and os.listdir(tmp_path) == ["model"]

    save_model(folder, {"n": 2}, {"w": np.zeros(3)}, "second", overwrite=True)
    config, params = load_model(folder)
    assert config == {"n": 2} and params["w"].shape == (3,) and os.listdir(tmp_path) == ["model"]


def test_input_errors_of_models(tmp_path):
    (tmp_path / "file").write_text("x")
    with input_error("it is a file", tmp_path / "file"):
        save_model(tmp_path / "file", {}, {"w": np.ones(1)}, "")
    with input_error("cannot write a model to", tmp_path / "file" / "model"):
        save_model(tmp_path / "file" / "model", {}, {"w": np.ones(1)}, "")
    with input_error("model directory", tmp_path / "gone", "does not exist"):
        load_model(tmp_path / "gone")
    with input_error("not a model directory", "config.json", "params"):
        load_model(tmp_path)
    save_steps(tmp_path / "run", 1)
    with input_error("not a model directory", "run directory"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize("damage", ["data cut", "index removed", "names cut", "manifest removed"])
def test_damaged_models(tmp_path, other_output, damage):
    rng = np.random.default_rng(0)
    save_model(tmp_path / "m", {}, {"w": rng.normal(size=(99, 99)), "b": rng.normal(size=(3,))}, "")
    (tmp_path / "m" / "params").rename(tmp_path / "m" / "state")
    DAMAGES[damage](tmp_path / "m")
    (tmp_path / "m" / "state").rename(tmp_path / "m" / "params")
    with input_error("damaged", tmp_path / "m"):
        load_model(tmp_path / "m")
    assert not other_output()
    (tmp_path / "m" / "config.json").write_text('{"a": ')
    with input_error("config.json", "is not JSON"):
        load_model(tmp_path / "m")


# Small files


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    files.write_atomically(path, "é")
    files.write_atomically(str(path), b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "link").symlink_to("out.json")
    files.write_atomically(tmp_path / "link", "through")
    assert path.read_text() == "through" and (tmp_path / "link").is_symlink()
    files.write_atomically(os.devnull, "gone")
    assert not os.path.isfile(os.devnull)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, "new")
    assert path.read_text() == "through"
    assert sorted(os.listdir(tmp_path)) == ["link", "out.json", "plain"]


def test_check_writable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    for path in tmp_path / "new.png", tmp_path / "file", os.devnull, "gs://bucket/out.png":
        files.check_writable(path)
    monkeypatch.chdir(tmp_path)
    files.check_writable("new.png")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"
    with input_error("folder", tmp_path / "gone", "does not exist"):
        files.check_writable(tmp_path / "gone" / "out.png")
    with input_error("is a file, not a folder", tmp_path / "file"):
        files.check_writable(tmp_path / "file" / "out.png")
    with input_error("names a folder", tmp_path):
        files.check_writable(tmp_path)
    with input_error("names a folder"):
        files.check_writable(f"{tmp_path}/new/")
    with input_error("empty"):
        files.check_writable("")
    with input_error("null"):
        files.check_writable("a\0b")
    if os.path.isdir("/proc/self"):  # A file system that refuses new files even to root.
        with input_error("cannot write /proc/self/out.png"):
            files.check_writable("/proc/self/out.png")


def test_check_writable_on_a_read_only_file_system(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with input_error("Read-only file system", tmp_path / "out.png"):
        files.check_writable(tmp_path / "out.png")


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    with input_error("the configuration is missing", path):
        files.read_json(path, "the configuration")
    for damaged in b"", b'{"a": 1':
        path.write_bytes(damaged)
        with input_error("the configuration is damaged", path):
            files.read_json(path, "the configuration")
    path.write_text("{}", encoding="utf-16")
    with input_error("the configuration must be UTF-8 text", path):
        files.read_json(path, "the configuration")
    with input_error("cannot be read", tmp_path):
        files.read_json(tmp_path, "the configuration")
    files.write_atomically(path, '{"a": [1]}')
    assert files.read_json(path, "the configuration") == {"a": [1]}
