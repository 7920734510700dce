"""Arguments of the Python API that are not quite what it asks for; pipelines that are sent on."""

import copy
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hmar_jax
from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.io import models
from hmar_jax.pipeline import Pipeline
from tests import tiny


@pytest.fixture(scope="module")
def pipe():
    with tiny.cached():
        yield hmar_jax.load(tiny.model_run())


def options(pipe, **given):
    family = pipe._family()
    return pipe.sampling_config(family.SamplingConfig, given)


@pytest.mark.parametrize("number", [np.float32(1.5), np.array(1.5), jnp.float32(1.5)])
def test_numbers_of_numpy_and_jax_are_options(pipe, number):
    assert options(pipe, guidance=number) == options(pipe, guidance=1.5)


def test_arrays_are_lists_and_integers(pipe):
    assert options(pipe, top_k=np.int64(3)) == options(pipe, top_k=3)
    rows = [[n] for n in pipe.spec.autoencoder.scale_list.lengths]
    assert options(pipe, schedule=np.array(rows)) == options(pipe, schedule=rows)
    assert options(pipe, schedule=[list(map(np.int64, row)) for row in rows]) == options(
        pipe, schedule=rows
    )
    with pytest.raises(InputError, match="guidance must be a number"):
        options(pipe, guidance=np.array([1.5, 2.0]))


def test_lists_that_are_no_array(pipe):
    ragged = [[1, 2], [3]]
    for call in (pipe.encode, pipe.decode, lambda x: pipe.edit(0, x, x)):
        with pytest.raises(InputError, match="must be an array"):
            call(ragged)
    with pytest.raises(InputError, match="class must be an id"):
        pipe.sample(0, ragged)


def test_rounding_beyond_white_is_white(pipe):
    side = pipe.image_side
    white = np.ones((side, side, 3), np.float32)
    expected = np.asarray(pipe.encode(white))
    for image in (white + 1e-6, jnp.asarray(white, jnp.bfloat16)):
        np.testing.assert_array_equal(pipe.encode(image), expected)
    with pytest.raises(InputError, match=r"got values in \[1, 1\.01\]"):
        pipe.encode(np.where(np.arange(side)[:, None, None], white, white + 0.01))


def test_dilation_beyond_the_image(pipe):
    side = pipe.image_side
    image, mask = np.zeros((side, side, 3)), np.eye(side, dtype=bool)
    edits = [pipe.edit(0, image, mask, 0, dilation=d) for d in (side, 10**12)]
    np.testing.assert_array_equal(*edits)


def test_a_pipeline_can_be_pickled_and_copied(pipe):
    image = np.asarray(pipe.sample(0, 1))
    for other in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert isinstance(other, Pipeline) and other.sample.__doc__ == pipe.sample.__doc__
        np.testing.assert_array_equal(other.sample(0, 1), image)


@pytest.mark.parametrize("devices", [2, "cpu", [], ["cpu"], [None]])
def test_devices_that_are_none(devices):
    with pytest.raises(InputError, match="devices must be a list such as jax.devices"):
        hmar_jax.load(tiny.model_run(), devices=devices)


def test_one_device():
    assert hmar_jax.load(tiny.model_run(), devices=jax.devices()[0]).params


@pytest.mark.parametrize("name", [None, 5, b"digits", ["digits"], "a\0b"])
def test_what_is_no_path(name):
    for load in (hmar_jax.load, lambda name: hmar_jax.from_torch(tokenizer=name or 5)):
        with pytest.raises(InputError, match="^(a )?path "):
            load(name)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about CPUs")
def test_float16_on_a_cpu():
    with pytest.raises(InputError, match="dtype must be float32 or bfloat16 on CPUs"):
        hmar_jax.load(tiny.model_run(), dtype="float16")


# The command line


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--n=3000", "--out=a.webp"], "sides of WEBP images must be at most 16,383 pixels"),
        (["--n=99999999999999999999", "--out=a.png"], "--n must be less"),
        (["--n=99999999999", "--out=a.png"], "GB of memory"),
    ],
)
def test_too_many_images_are_refused_before_any_is_sampled(
    tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "_in_turns", lambda *_, **__: pytest.fail("has sampled"))
    model = tiny.model_run()
    capsys.readouterr()  # of its training
    assert cli.main(["sample", f"--model={model}", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_model_is_not_written_into_another(tmp_path, capsys):
    outer = tmp_path / "outer"
    models.save_model(outer, {}, {"w": np.zeros(2)}, "")
    before = sorted(outer.rglob("*"))
    for inner in ("inner", "params/d/inner"):
        out = f"--out={outer / inner}"
        assert cli.main(["export", f"--model={tiny.model_run()}", out]) == 2
        assert f"lies inside the model {outer}" in capsys.readouterr().err
    assert sorted(outer.rglob("*")) == before


def plan(config: pathlib.Path, capsys) -> str:
    assert cli.main(["plan", f"--config={config}:x", "--topology=v5e:2x2"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_a_config_that_sets_an_unknown_key(tmp_path, capsys):
    path = tmp_path / "c.py"
    path.write_text(
        "from configs import hmar\n"
        "def get_config(spec):\n"
        "    config = hmar.get_config('digits').lock()\n"
        "    config.lr_peak = 3\n"
        "    return config\n"
    )
    err = plan(path, capsys)
    assert "line 4" in err and '"lr_peak" does not exist' in err and len(err) < 250, err


@pytest.mark.parametrize("values", ["'family': ['hmar']", "'family': 'hmar', 'task': ['masked']"])
def test_a_config_whose_names_are_lists(tmp_path, capsys, values):
    path = tmp_path / "c.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(spec):\n    return ConfigDict({{{values}}})\n"
    )
    assert "must be one of" in plan(path, capsys)
