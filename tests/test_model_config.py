"""A model directory whose config.json is not that of its parameters, or was edited by hand."""

import json
import pathlib
import shutil

import pytest

import hmar_jax
from hmar_jax.errors import InputError

BUNDLED = pathlib.Path(hmar_jax.__file__).parent / "bundled" / "digits"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(BUNDLED, tmp_path / "model")


def change(model, key, value):
    path = model / "config.json"
    config = json.loads(path.read_text())
    *groups, last = key.split(".")
    node = config
    for group in groups:
        node = node[group]
    node[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("transformer.depth", 3, r"transformer\.\S+ must have shape \(3, 768\); got shape \(4, "),
        ("transformer.depth", 5, r"must have shape \(5, 768\); got shape \(4, "),
        ("transformer.heads", 2, "must have shape"),
        ("masked_depth", 0, r"masked\.\S+ must have nothing of this name; got shape"),
        ("tokenizer.channels", 64, r"tokenizer\.\S+ must have shape"),
    ],
)
def test_parameters_of_another_model(model, key, value, words):
    """With fewer blocks, the first ones would be taken and sample noise."""
    change(model, key, value)
    with pytest.raises(InputError, match=f"do not fit its config.json: .*{words}"):
        hmar_jax.load(model)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("class_names", ["a", "b"], "class_names must have 10 names, one for each class; got 2"),
        ("class_names", "0123456789", "class_names must be a list of texts"),
        ("class_names", list(range(10)), "class_names must be a list of texts; it has 0"),
        ("origin", 5, "origin must be a text; got 5"),
        ("masked_depth", 1.5, "masked_depth must be an integer in"),
        ("family", ["hmar"], "family must be one of"),
        ("format", "hmar_jax model 2", "got format 'hmar_jax model 2'; a newer version"),
        ("format", None, "got format None$"),
    ],
)
def test_values_that_no_program_wrote(model, key, value, words):
    change(model, key, value)
    with pytest.raises(InputError, match=words):
        hmar_jax.load(model)


@pytest.mark.parametrize("value", ["x", 5, [1], [[1]]])
def test_an_autoencoder_that_is_none(model, value):
    config = hmar_jax.load(model).spec.to_json() | {"autoencoder": value}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config.json"):
        hmar_jax.load(model)


@pytest.mark.parametrize("text", ["[]", "null", '"hmar_jax model 1"'])
def test_no_config_at_all(model, text):
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"must be the config of a model \(format"):
        hmar_jax.load(model)
