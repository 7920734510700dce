"""Hints in messages: options that exist, spelled as the caller writes them."""

import argparse
import ast
import pathlib
import re

import jax
import pytest
from safetensors.numpy import save_file

import hmar_jax
from hmar_jax.cli.main import main, make_parser
from hmar_jax.errors import InputError
from tests.state_dicts import tokenizer_state, transformer_state

PACKAGE = pathlib.Path(hmar_jax.__file__).parent
OTHER_PROGRAMS = {"--file_format", "--data_dir", "--upgrade"}  # of `tfds build` and pip


def test_every_option_that_a_message_names_exists():
    parser = make_parser()
    commands = next(
        a for a in parser._actions if isinstance(a, argparse._SubParsersAction)
    ).choices.values()
    known = {option for p in (parser, *commands) for option in p._option_string_actions}
    unknown = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?<![\w-])--[a-z]\w*", node.value)
                unknown |= {(path.name, n) for n in named if n not in known | {"--config"}}
    assert {name for _, name in unknown} <= OTHER_PROGRAMS, unknown


@pytest.fixture
def files(tmp_path):
    vae, model = tmp_path / "vae.safetensors", tmp_path / "model.safetensors"
    save_file(tokenizer_state(), vae)
    save_file(transformer_state(), model)
    return str(vae), str(model)


CASES = [  # options with VAE and MODEL for the files, and both spellings of what is said
    ({"tokenizer": "VAE"}, "such as scales=(1, 2, 3, 4, 6)", "such as --scales=1,2,3,4,6"),
    ({"torch": "MODEL", "tokenizer": "VAE"}, "scales=(1, 2, 3, 4, 6)", "--scales=1,2,3,4,6"),
    ({"torch": "MODEL"}, "is required: tokenizer=vae.pth", "is required: --tokenizer=vae.pth"),
    ({"tokenizer": "VAE", "masked": "x.pth"}, "masked=x.pth requires", "--masked=x.pth requires"),
]


@pytest.mark.parametrize("options, python, command_line", CASES)
def test_hints_of_convert(files, tmp_path, capsys, options, python, command_line):
    vae, model = files
    given = {k: v.replace("VAE", vae).replace("MODEL", model) for k, v in options.items()}
    flags = [f"--{name}={value}" for name, value in given.items()]
    with pytest.raises(InputError) as error:
        hmar_jax.from_torch(given.pop("torch", None), **given)
    assert python in str(error.value) and "--" not in str(error.value)
    assert main(["convert", *flags, f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert command_line in said and not re.search(r"(?<![-\w])(scales|tokenizer|masked)=", said)


def test_hint_of_a_schedule_without_stage_2(files, tmp_path, capsys):
    vae, model = files
    out = tmp_path / "model"
    convert = ["convert", f"--torch={model}", f"--tokenizer={vae}", "--scales=1,2", f"--out={out}"]
    assert main(convert) == 0
    sample = ["sample", f"--model={out}", "--schedule=default", f"--out={tmp_path / 'a.png'}"]
    capsys.readouterr()
    assert main(sample) == 2
    assert capsys.readouterr().err.endswith("this model has none: use --schedule=none\n")
    with pytest.raises(InputError, match="use schedule=none$"):
        hmar_jax.load(str(out)).sample(jax.random.key(0), 1, schedule="default")


def test_a_file_of_weights_as_model_names_the_conversion(files, tmp_path, capsys):
    model = files[1]
    assert main(["info", f"--model={model}"]) == 2
    assert f"convert it first: hmar convert --torch={model} --tok" in capsys.readouterr().err
