"""The command line: its results, and one clear line with exit status 2 for every mistake."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import hmar_jax
from hmar_jax.cli import main as cli
from hmar_jax.experiment import build_experiment
from hmar_jax.families.hmar.options import SamplingConfig
from hmar_jax.io import files
from tests import tiny
from tests.test_training import damage

TRAIN = ("train", "--config=configs/hmar.py:digits", "--workdir=run")
PACKAGED = re.compile(r"config (\S+): the packaged file (\S+)\n")  # in the log, not a message


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with tiny.cached():
        yield here


@pytest.fixture
def hmar(capfd):
    """hmar("sample", "--out=x") -> exit status, stdout, stderr."""

    def run(*arguments):
        capfd.readouterr()
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse's
            status = stop.code
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def refused(hmar, elsewhere):
    """refused(*arguments, words=[...]) checks an input error.

    Exit status 2, one line on stderr with these words, and no file written.
    """

    def run(*arguments, words):
        before = sorted(elsewhere.rglob("*"))
        status, out, err = hmar(*arguments)
        assert status == 2, (status, err)
        err = PACKAGED.sub("", err, count=1)
        assert err.endswith("\n") and err.count("\n") == 1, err
        assert err.startswith("hmar") and not [w for w in words if w not in err], err
        assert out == "" and sorted(elsewhere.rglob("*")) == before

    return run


def sample(*arguments, model=None, out="x.png"):
    return "sample", f"--model={model or tiny.model_run()}", f"--out={out}", *arguments


# Results


def test_help(hmar):
    status, out, err = hmar("--help")
    assert status == 0 and err == ""
    commands = [
        "train-tokenizer",
        "tokenize",
        "train",
        "plan",
        "sample",
        "edit",
        "evaluate",
        "info",
        "convert",
        "export",
    ]
    for command in commands:
        assert re.search(rf"^ +{command}\b", out, re.MULTILINE), command
        status, text, err = hmar(command, "--help")
        assert status == 0 and err == ""
        assert f"usage: hmar {command}" in text and "example:\n  hmar" in text


def test_help_lists_every_sampling_option(hmar):
    for command in ("sample", "edit", "evaluate"):
        _, text, _ = hmar(command, "--help")
        words = " ".join(text.split())
        for field in dataclasses.fields(SamplingConfig):
            help = field.metadata["setting"].help
            assert re.search(rf"--{field.name}( [A-Z_]+)? {re.escape(help)}", words), field.name
        assert "confidence_noise" not in text  # deprecated names are accepted, but not shown


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "hmar_jax", "--help"],
        env=tiny.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (
        result.returncode == 0 and result.stderr == "" and result.stdout.startswith("usage: hmar ")
    )


def test_sample(hmar, elsewhere):
    status, out, err = hmar(
        *sample("--classes=circle,2", "--n=2", "--seed=5", "--npz=x.npz", out="grid.png")
    )
    assert (status, out, err) == (0, "grid.png; x.npz: 4 images of 2 classes\n", "")
    assert sorted(os.listdir()) == ["grid.png", "x.npz"]
    arrays = np.load("x.npz")
    assert set(arrays.files) == {"images", "labels", "tokens"}
    assert (
        arrays["images"].shape == (4, tiny.SIDE, tiny.SIDE, 3)
        and arrays["images"].dtype == np.uint8
    )
    assert arrays["labels"].tolist() == [0, 0, 2, 2] and arrays["tokens"].shape == (4, tiny.LENGTH)
    grid = Image.open("grid.png")
    assert grid.format == "PNG" and grid.width > 2 * 48 and grid.height > 2 * 48

    first = pathlib.Path("grid.png").read_bytes()
    assert hmar(*sample("--classes=0,2", "--n=2", "--seed=5", out="again.png"))[0] == 0
    assert pathlib.Path("again.png").read_bytes() == first
    assert hmar(*sample("--classes=0,2", "--n=2", "--seed=6", out="other.png"))[0] == 0
    assert pathlib.Path("other.png").read_bytes() != first


def test_temperature_reaches_the_sampler(hmar, elsewhere):
    command = ("--classes=0,2", "--n=4", "--seed=5", "--npz=x.npz")
    tokens = {}
    for temperature in (1.0, 50.0):
        assert hmar(*sample(*command, f"--temperature={temperature}"))[0] == 0
        tokens[temperature] = np.load("x.npz")["tokens"]
    pipe = hmar_jax.load(str(tiny.model_run()))
    ids = [0] * 4 + [2] * 4
    _, hot = pipe.sample(jax.random.key(5), ids, temperature=50.0, return_tokens=True)
    assert np.array_equal(tokens[50.0], hot) and not np.array_equal(tokens[1.0], hot)


@pytest.mark.slow
def test_several_schedules_side_by_side(hmar, elsewhere):
    model = tiny.masked_run()
    one = "--schedule=[[1],[1,1,2]]"
    status, out, _ = hmar(*sample("--n=2", "--schedule=none", one, "--smooth", model=model))
    assert status == 0 and out == "x.png: 12 images of 3 classes\n"
    both = Image.open("x.png")
    options = (one, "--choice_temperature=3", "--masked_guidance=1", "--npz=x.npz")
    assert hmar(*sample("--n=2", *options, model=model))[0] == 0
    assert both.width > 1.7 * Image.open("x.png").width and both.height > Image.open("x.png").height
    assert np.load("x.npz")["tokens"].shape == (6, tiny.LENGTH)


def test_a_failure_while_writing_leaves_the_old_file(hmar, elsewhere, monkeypatch):
    pathlib.Path("x.png").write_bytes(b"old")
    command = sample("--classes=0", "--n=4")  # trains the model, the first time

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    assert hmar(*command) == (2, "", "hmar sample: cannot write x.png: No space left on device\n")
    assert os.listdir() == ["x.png"] and pathlib.Path("x.png").read_bytes() == b"old"


def test_info(hmar):
    status, out, err = hmar("info", f"--model={tiny.model_run()}")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert status == 0 and err == ""
    assert lines["model"] == f"{tiny.model_run()}: HMAR, next-scale prediction"
    assert lines["images"] == "8 x 8 pixels, 5 tokens" and lines["scales"] == "1x1, 2x2"
    assert (
        "codebook 16 x 4" in lines["tokenizer"]
        and "depth 2, width 32, 2 heads, diagonal" in lines["transformer"]
    )
    assert int(lines["transformer"].split()[0].replace(",", "")) > 2 * 12 * 32**2
    assert lines["classes"] == "3: circle, cross, stripes" and lines["sampling"].startswith(
        "guidance 1,"
    )
    assert lines["origin"].startswith("trained on folder:")
    status, out, _ = hmar("info", f"--model={tiny.tokenizer_run()}")
    assert status == 0 and "tokenizer" in out and "transformer" not in out


@pytest.mark.parametrize(
    "run, folder",
    [("model_run", "tokenizer"), pytest.param("masked_run", "stage1", marks=pytest.mark.slow)],
)
def test_a_run_without_its_parent_is_no_model(hmar, tmp_path, run, folder):
    copied = tmp_path / "run"
    shutil.copytree(getattr(tiny, run)(), copied)
    shutil.rmtree(copied / folder)
    for command in (["info"], ["export", f"--out={tmp_path / 'model'}"]):
        status, out, err = hmar(*command, f"--model={copied}")
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert f"{folder!r}" in err or f"/{folder}" in err
    assert not (tmp_path / "model").exists()


def test_evaluate(hmar, elsewhere):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validate", 4)):
        for label, name in enumerate(tiny.CLASSES):
            (elsewhere / "real" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(tiny.image(label, rng, tiny.SIDE)).save(
                    elsewhere / f"real/{split}/{name}/{i}.png"
                )
    status, out, _ = hmar(
        "evaluate",
        f"--model={tiny.model_run()}",
        "--reference=folder:real",
        "--n=12",
        "--json=report.json",
    )
    assert status == 0 and "class accuracy" in out
    report = json.loads(pathlib.Path("report.json").read_text())
    assert report["samples"] == 12 and 0 <= report["class_accuracy"] <= 1


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(hmar, elsewhere, tmp_path):
    run = shutil.copytree(tiny.model_run(), tmp_path / "run")
    damage(run / "checkpoints/80")
    status, out, err = hmar(*sample("--classes=0", "--n=4", model=run))
    assert status == 0 and out.startswith("x.png: 4 images")
    assert (
        "checkpoint of step 80" in err
        and "is damaged" in err
        and "Traceback" not in err
        and err.count("\n") <= 2
    )
    assert os.listdir() == ["x.png"] and sorted(os.listdir(run / "checkpoints")) == [
        "60",
        "80",
    ]  # nothing moved
    damage(run / "checkpoints/60")
    status, _, err = hmar(*sample(model=run))
    assert (
        status == 2
        and "can be read (steps 60, 80)" in err.splitlines()[-1]
        and "Traceback" not in err
    )


# Config files


def test_a_packaged_config_is_found_by_its_name_and_logged(hmar):
    for name in ("hmar", "configs/hmar.py"):
        status, _, err = hmar("train", f"--config={name}:digits", "--workdir=x", "--config.nope=1")
        found = PACKAGED.match(err)
        assert status == 2 and found and found[1] == name, err
        assert found[2].endswith("configs/hmar.py") and pathlib.Path(found[2]).is_file()


def test_a_config_in_another_folder_must_be_there(refused, hmar, elsewhere):
    command = ("train", "--config=elsewhere/hmar.py:digits", "--workdir=run")
    refused(*command, words=["config 'elsewhere/hmar.py': no such", "packaged configs: hmar"])
    (elsewhere / "elsewhere").mkdir()
    (elsewhere / "elsewhere/hmar.py").write_text(
        "from hmar_jax import InputError\n"
        "def get_config(spec):\n  raise InputError(f'this one: {spec}')\n"
    )
    assert hmar(*command) == (2, "", "hmar train: this one: digits\n")  # not a packaged one


def test_attention_is_a_config_key(refused):
    config = tiny.config_of(tiny.train("run", model__attention="xla"))
    assert build_experiment(config).task.transformer.attention == "xla"
    for name, words in (
        ("nope", ["model.attention must be empty or one of xla, triton", "got 'nope'"]),
        ("mosaic_tpu", ["model.attention", "'mosaic_tpu' cannot run here"]),
    ):
        refused(*tiny.train("run", model__attention=name), words=words)


# Deprecated names


def deprecated(old, new):
    return pytest.warns(FutureWarning, match=f"^{re.escape(f'{old} is deprecated; use {new}')}$")


@pytest.mark.slow
def test_deprecated_confidence_noise(hmar):
    tokens = []
    for option in ("--choice_temperature=3", "--confidence_noise=3", "--choice_temperature=0"):
        command = sample("--n=4", "--npz=x.npz", option, model=tiny.masked_run())
        if option.startswith("--confidence_noise"):
            with deprecated("--confidence_noise", "--choice_temperature"):
                assert hmar(*command)[0] == 0
        else:
            assert hmar(*command)[0] == 0
        tokens.append(np.load("x.npz")["tokens"])
    assert np.array_equal(tokens[0], tokens[1]) and not np.array_equal(tokens[0], tokens[2])


@pytest.mark.parametrize(
    "old, new",
    [
        ("--ring=1", "--dilation=1"),
        ("--coarse=keep", "--keep_coarse"),
        ("--coarse=free", "--no_keep_coarse"),
    ],
)
def test_deprecated_options_of_editing(hmar, old, new):
    Image.fromarray(tiny.image(0, np.random.default_rng(0), tiny.SIDE)).save("image.png")
    for option, out in ((old, "old.png"), (new, "new.png")):
        command = ("edit", f"--model={tiny.masked_run()}", "--image=image.png", "--box=0,0,4,4")
        command = (*command, "--class=1", "--no_paste", f"--out={out}", option)
        if option == old:
            present = "--dilation" if old == "--ring=1" else "--keep_coarse or --no_keep_coarse"
            with deprecated(old.partition("=")[0], present):
                assert hmar(*command)[:2] == (0, f"{out}: new content in 16 of 64 pixels\n")
        else:
            assert hmar(*command)[:2] == (0, f"{out}: new content in 16 of 64 pixels\n")
    assert pathlib.Path("old.png").read_bytes() == pathlib.Path("new.png").read_bytes()


def test_deprecated_config_keys(hmar, refused, tmp_path):
    run = shutil.copytree(tiny.model_run(), tmp_path / "run")
    with deprecated("config key accumulate", "grad_accum_steps"):
        status, out, _ = hmar(*tiny.train(run, accumulate=2))
    assert status == 0 and out == f"{run}: next_scale run complete\n"
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["grad_accum_steps"] == 2 and "accumulate" not in config
    with deprecated("config key recipe.unquantized_steps", "recipe.vq_start_step"):
        refused(
            *tiny.train_tokenizer(tiny.tokenizer_run(), recipe__unquantized_steps=16),
            words=["recipe.vq_start_step is 15 there and 16 here"],
        )


def test_a_deprecated_name_warns_in_one_line():
    result = subprocess.run(
        [sys.executable, "-m", "hmar_jax", *sample("--confidence_noise=3", model="nope")],
        env=tiny.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first == "hmar: --confidence_noise is deprecated; use --choice_temperature"
    assert second.startswith("hmar sample: model must be a bundled model")


# Mistakes in arguments


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["COMMAND"]),
        (["nope"], ["'nope'", "train-tokenizer", "sample"]),
        (["train"], ["--config, --workdir"]),
        (["train", "--config=configs/hmar.py:digits"], ["--workdir"]),
        (["sample", "--model=x"], ["--out"]),
        (["info"], ["--model"]),
        ([*TRAIN[:2], "--workdir="], ["--workdir", "empty"]),
        (["sample", "--model=x", "--out="], ["--out", "empty"]),
        (["export", "--model=x", "--out="], ["--out", "empty"]),
        ([*TRAIN, "--nope=1"], ["unknown argument '--nope=1'"]),
        ([*TRAIN, "extra"], ["unknown argument 'extra'"]),
        (["info", "--model=x", "--config.steps=3"], ["unknown argument '--config.steps=3'"]),
        ([*TRAIN, "--config.steps", "3"], ["'--config.steps'", "--config.KEY=VALUE"]),
        ([*TRAIN, "--config.nope=1"], ["unknown config key 'nope'; known: batch_size, "]),
        (
            [*TRAIN, "--config.model.nope=1"],
            ["unknown config key 'model.nope'; known: attention, depth"],
        ),
        (
            [*TRAIN, "--config.model=1"],
            ["config key 'model' is a group; its keys: model.attention"],
        ),
        ([*TRAIN, "--config.steps=many"], ["config key steps must be of type int", "got 'many'"]),
        (
            [*TRAIN, "--config.task=nope"],
            ["config.task must be one of next_scale, masked", "'nope'"],
        ),
        ([*TRAIN, "--config.family=nope"], ["config.family must be one of hmar, vq", "'nope'"]),
        (["train", "--config=nope.py:digits", "--workdir=run"], ["'nope.py': no such"]),
        (
            ["train", "--config=configs/hmar.py:nope", "--workdir=run"],
            ["'nope' must be one of digits, photos, cifar10, finetune, d16_256"],
        ),
        (
            ["train", "--config=configs/hmar.py:digits,stage=3", "--workdir=run"],
            ["stage must be next_scale (stage 1) or masked (stage 2)", "got '3'"],
        ),
        (
            [
                "train",
                "--config=configs/hmar.py:digits,stage=masked,pattern=causal",
                "--workdir=run",
            ],
            ["stage=masked and pattern exclude each other"],
        ),
        (
            ["train", "--config=configs/hmar.py:digits,stage=masked", "--workdir=run"],
            ["config.init_from is empty"],
        ),
        (
            ["train", "--config=configs/tokenizer.py:digits", "--workdir=run"],
            ["is for hmar train-tokenizer"],
        ),
        (
            ["train-tokenizer", "--config=configs/hmar.py:digits", "--workdir=run"],
            ["is for hmar train"],
        ),
        (
            ["train-tokenizer", "--config=configs/tokenizer.py:photos", "--workdir=run"],
            ["data.source is empty", "folder:DIR"],
        ),
        (["sample", "--model=nope", "--out=x.png"], ["must be a bundled model", "got 'nope'"]),
        (
            ["info", "--model=digits", "--checkpoint=newest"],
            ["--checkpoint", "'newest'", "latest, best or the number of a step"],
        ),
        (
            ["info", "--model=digits", "--checkpoint=best"],
            ["checkpoint 'best' of 'digits'", "only runs have"],
        ),
        (
            ["sample", "--model=nope", "--out=x.png", "--seed=-1"],
            ["--seed", "must be an integer in [0, 4294967295]", "got '-1'"],
        ),
        (["evaluate", "--model=nope", "--features=nope"], ["--features", "'nope'", "classifier"]),
        (["evaluate", "--model=nope", "--json=no/x.json"], ["no/x.json", "no does not exist"]),
        (["convert", "--out=m"], ["--tokenizer"]),
        (
            ["convert", "--tokenizer=nope.pth", "--out=m", "--heads=0"],
            ["--heads: must be an integer of at least 1", "got 0"],
        ),
    ],
)
def test_mistakes_found_without_a_model(refused, arguments, words):
    refused(*arguments, words=words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--classes=3"], ["class must be an id in [0, 2]", "got 3"]),
        (["--classes=-1"], ["class must be an id in [0, 2]", "got -1"]),
        (
            ["--classes=0,dog"],
            ["class must be an id in [0, 2]", "circle, cross, stripes", "got 'dog'"],
        ),
        (["--classes="], ["class must be", "got ''"]),
        (["--classes=1.0"], ["class must be", "got '1.0'"]),
        (["--n=0"], ["--n: must be an integer of at least 1", "got '0'"]),
        (["--n=-2"], ["'-2'"]),
        (["--n=few"], ["'few'"]),
        (["--n=²"], ["'²'"]),
        (["--top_p=1.5"], ["--top_p: must be a number in [0, 1]", "got 1.5"]),
        (["--top_p=-0.1"], ["--top_p: must be a number in [0, 1]", "got -0.1"]),
        (["--top_p=nan"], ["--top_p", "got nan"]),
        (["--top_p=x"], ["--top_p", "got 'x'"]),
        (["--top_k=17"], ["top_k must be in [0, 16]", "got 17"]),
        (["--top_k=-1"], ["--top_k: must be an integer of at least 0", "got -1"]),
        (["--top_k=1.5"], ["--top_k", "got '1.5'"]),
        (["--temperature=0"], ["--temperature: must be a number above 0", "got 0.0"]),
        (["--guidance=-1"], ["--guidance: must be a number of at least 0", "got -1.0"]),
        (["--guidance=inf"], ["--guidance", "got inf"]),
        (["--guidance=strong"], ["--guidance", "'strong'"]),
        (["--guidance"], ["--guidance"]),
        (["--seed=one"], ["--seed", "'one'"]),
        (["--seed=4294967296"], ["'4294967296'"]),
        (["--checkpoint=1"], ["no checkpoint 1 ", "known steps: 60, 80"]),
        (["--npz=no/x.npz"], ["no/x.npz", "no does not exist"]),
        (["--npz=/"], ["cannot write /: it names a folder"]),
    ],
)
def test_mistakes_in_sampling(refused, arguments, words):
    refused(*sample(*arguments), words=words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--schedule=[[1],[1,2]]"], ["scale 1 (2x2) must sum to its 4 tokens", "got sum 3"]),
        (["--schedule=[[1],[4],[9]]"], ["schedule must have 2 rows", "got 3"]),
        (["--schedule=[[1]"], ["--schedule", "list of lists"]),
        (["--schedule=fast"], ["schedule must be none, default, cosine:N", "got 'fast'"]),
        (["--schedule=[[1],[0,4]]"], ["must be integers of at least 1", "got [0, 4]"]),
        (
            ["--schedule=none", "--schedule=default", "--npz=x.npz"],
            ["--npz takes the samples of one schedule", "got --schedule 2 times"],
        ),
        (
            ["--masked_guidance=-1"],
            ["--masked_guidance: must be a number of at least 0", "got -1.0"],
        ),
        (["--choice_temperature=nan"], ["--choice_temperature: must be a number", "got nan"]),
        (["--greedy", "--smooth"], ["greedy and smooth"]),
    ],
)
def test_mistakes_in_masked_sampling(refused, arguments, words):
    refused(*sample(*arguments, model=tiny.masked_run()), words=words)


def test_masked_passes_need_stage_2(refused):
    for command in (
        sample("--schedule=none", "--schedule=default"),
        ("evaluate", f"--model={tiny.model_run()}", "--schedule=cosine:2"),
    ):
        refused(
            *command,
            words=[
                "has masked passes, which require stage 2; this model has none",
                "schedule=none",
            ],
        )


def test_outputs_that_cannot_be_written_are_found_before_the_work(refused, elsewhere, monkeypatch):
    def work(*_):
        raise AssertionError("the work has started")

    monkeypatch.setattr("hmar_jax.loading.load_spec_and_params", work)
    monkeypatch.setattr("hmar_jax.loading.convert_torch_files", work)
    (elsewhere / "file").write_text("")
    (elsewhere / "full").mkdir()
    (elsewhere / "full/x").write_text("")
    for out, words in (
        ("no/x.png", "no does not exist"),
        ("full", "names a folder"),
        ("file/x.png", "is a file"),
    ):
        if out != "full":  # there, single files would be written
            refused(*sample(out=out), words=[out, words])
        refused(*sample(f"--npz={out}"), words=[out, words])
        refused("evaluate", "--model=nope", f"--json={out}", words=[out, words])
    for out, words in (("full", "not empty"), ("file", "is a file"), ("file/m", "cannot write")):
        refused("export", "--model=nope", f"--out={out}", words=[out, words])
        refused("convert", "--tokenizer=nope", f"--out={out}", words=[out, words])


def test_a_tokenizer_cannot_sample(refused):
    alone = "is an autoencoder alone: it cannot sample"
    refused(*sample(model=tiny.tokenizer_run()), words=[alone])
    refused("evaluate", f"--model={tiny.tokenizer_run()}", words=[alone])
    refused(
        "evaluate",
        f"--model={tiny.model_run()}",
        "--reference=nope",
        words=["unknown data 'nope'", "folder:DIR"],
    )


# Mistakes in configs of training


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data__source="nope"), ["unknown data 'nope'", "one of digits, folder:DIR"]),
        (dict(data__source="folder:nope"), ["nope does not exist"]),
        (dict(data__source=""), ["data.source is empty"]),
        (dict(batch_size=37), ["config.batch_size must be at most 36", "got 37"]),
        (dict(batch_size=0), ["config.batch_size must be an integer of at least 1", "got 0"]),
        (dict(steps=0), ["config.steps must be at least 1", "got 0"]),
        (dict(seed=-1), ["config.seed must be an integer in [0, 4294967295]", "got -1"]),
        (dict(seed=2**40), ["config.seed must be", f"got {2**40}"]),
        (dict(log_every=0), ["config.log_every must be", "at least 1", "got 0"]),
        (dict(checkpoint_every=0), ["config.checkpoint_every must be", "at least 1", "got 0"]),
        (dict(keep_checkpoints=0), ["config.keep_checkpoints must be", "at least 1", "got 0"]),
        (dict(data__threads=-1), ["config.data.threads must be", "at least 0", "got -1"]),
        (
            dict(data__transform__kind="nope"),
            ["transform.kind must be one of resize_crop, random_crop, affine", "got 'nope'"],
        ),
        (dict(model__scales="2,1"), ["scales must be increasing", "got 2,1"]),
        (dict(model__scales="1.5,2"), ["model.scales must be of type tuple", "got '1.5,2'"]),
        (dict(model__groups=3), ["groups must divide the channels", "groups=3 and 8 channels"]),
        (dict(model__groups=0), ["config.model.groups must be", "[1, 1048576]", "got 0"]),
        (
            dict(model__channel_multipliers="()"),
            ["channel_multipliers must have at least one level", "got ()"],
        ),
        (dict(model__vocab_size=0), ["config.model.vocab_size must be", "[1, ", "got 0"]),
        (
            dict(model__channel_multipliers="0"),
            ["channel_multipliers: each item must be an integer in [1, ", "got 0"],
        ),
        (dict(model__distance="nope"), ["model.distance must be one of l2, cosine", "'nope'"]),
        (dict(model__dtype="nope"), ["model.dtype must be one of float32", "'nope'"]),
        (dict(recipe__schedule="nope"), ["schedule must be one of cos, lin, ", "'nope'"]),
        (
            dict(recipe__vq_start_step=0),
            ["recipe.vq_start_step must be at least 1 without config.init_from", "got 0"],
        ),
        (dict(recipe__adversarial_weight=1), ["needs images of side 24 or more", "got side 8"]),
        (dict(recipe__perceptual_weight=1), ["config.perceptual_network must name the .npz file"]),
        (dict(recipe__perceptual_weight=1, perceptual_network="no.npz"), ["no.npz: no such file"]),
    ],
)
def test_mistakes_in_training_a_tokenizer(refused, changes, words):
    refused(*tiny.train_tokenizer("run", **changes), words=words)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(tokenizer="nope"), ["must be a bundled model", "got 'nope'"]),
        (dict(tokenizer=""), ["config.tokenizer is empty", "--config.tokenizer=MODEL"]),
        (dict(image_side=48), ["image_side=48", "1,2 at 4 pixels a token make 8 pixels"]),
        (dict(steps=0), ["config.steps or config.epochs must be at least 1", "got steps=0"]),
        (
            dict(batch_size=73, data__cached_copies=2),
            ["config.batch_size must be at most 72", "got 73"],
        ),
        (dict(data__cached_copies=-1), ["data.cached_copies must be", "at least 0", "got -1"]),
        (dict(grad_accum_steps=0), ["config.grad_accum_steps must be", "at least 1", "got 0"]),
        (dict(grad_accum_steps=4), ["batch_size must be a multiple of 4", "got 6"]),
        (dict(model__heads=3), ["heads=3 must divide width=32"]),
        (dict(model__heads=0), ["config.model.heads must be", "[1, ", "got 0"]),
        (dict(model__depth=0), ["config.model.depth must be", "[1, ", "got 0"]),
        (dict(model__mlp_ratio=0), ["config.model.mlp_ratio must be", "[0.1, 100]", "got 0.0"]),
        (dict(model__pattern="nope"), ["model.pattern must be one of diagonal, causal", "'nope'"]),
        (dict(model__dropout=1.5), ["config.model.dropout must be", "[0, 1]", "got 1.5"]),
        (
            dict(recipe__loss_weights="nope"),
            ["recipe.loss_weights must be one of lognorm, equal, plain", "'nope'"],
        ),
        (dict(recipe__schedule="lin2"), ["schedule must be one of cos, lin, ", "'lin2'"]),
        (dict(recipe__class_dropout=2), ["recipe.class_dropout must be", "[0, 1]", "got 2.0"]),
        (dict(sampling__top_p=1.5), ["config.sampling.top_p must be", "[0, 1]", "got 1.5"]),
        (dict(sampling__top_k=17), ["top_k must be in [0, 16]", "got 17"]),
        (
            dict(sampling__temperature=0),
            ["config.sampling.temperature must be a number above 0", "got 0.0"],
        ),
    ],
)
def test_mistakes_in_training_a_transformer(refused, changes, words):
    refused(*tiny.train("run", **changes), words=words)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(init_from="nope"), ["must be a bundled model", "got 'nope'"]),
        (dict(init_from=""), ["config.init_from is empty", "--config.init_from=MODEL"]),
        (dict(model__masked_depth=3), ["masked_depth must be in [1, 2], the blocks of", "got 3"]),
        (dict(model__masked_depth=0), ["model.masked_depth must be", "at least 1", "got 0"]),
        (
            dict(recipe__loss_weights="plain"),
            ["one of unweighted, lognorm, equal, lognorm_published", "'plain'"],
        ),
        (
            dict(recipe__mask_ratios="nope"),
            ["recipe.mask_ratios must be one of uniform, cosine", "'nope'"],
        ),
        (dict(image_side=48), ["image_side=48"]),
        (
            dict(sampling__choice_temperature=-1.0),
            ["sampling.choice_temperature must be a number of at least 0", "got -1.0"],
        ),
    ],
)
def test_mistakes_in_training_stage_2(refused, changes, words):
    refused(*tiny.train_masked("run", **changes), words=words)


def test_stage_2_needs_a_stage_1_of_its_kind(refused, tmp_path, elsewhere):
    refused(
        *tiny.train_masked("run", init_from=tiny.tokenizer_run()),
        words=["must be a transformer", "got a "],
    )
    causal = shutil.copytree(tiny.model_run(), tmp_path / "causal")
    config = (causal / "config.json").read_text()
    (causal / "config.json").write_text(
        config.replace('"pattern": "diagonal"', '"pattern": "causal"')
    )
    refused(
        *tiny.train_masked("run", init_from=causal),
        words=["must have pattern=diagonal", "(causal, VAR)"],
    )
    fewer = shutil.copytree(tiny.images(), tmp_path / "fewer")
    for split in ("train", "validate"):
        shutil.rmtree(fewer / split / "cross")
    refused(
        *tiny.train_masked("run", data__source=f"folder:{fewer}"),
        words=["has 2 classes", "has 3", "must be equal"],
    )


def test_a_bundled_tokenizer_says_what_it_makes(refused):
    refused(
        *TRAIN,
        "--config.image_side=48",
        words=["image_side=48", "'digits'", "1,2,3,4 at 8 pixels a token make 32 pixels"],
    )


def test_directories_that_are_not_this_run(refused, elsewhere, tmp_path):
    (elsewhere / "mine").mkdir()
    (elsewhere / "mine/thesis.txt").write_text("")
    (elsewhere / "file").write_text("")
    refused(*tiny.train_tokenizer("mine"), words=["mine is neither empty nor a run directory"])
    refused(*tiny.train_tokenizer("file"), words=["workdir must be a directory; file is a file"])
    refused(
        *tiny.train_tokenizer("file/run"), words=["cannot write workdir file/run: Not a directory"]
    )
    refused(*tiny.train("mine"), words=["neither empty"])
    refused(*tiny.train_tokenizer(tiny.model_run() / "tokenizer"), words=["not a run's"])
    before = (tiny.tokenizer_run() / "config.json").read_bytes()
    refused(
        *tiny.train_tokenizer(tiny.tokenizer_run(), recipe__beta=0.5),
        words=["another config", "recipe.beta is 0.25 there and 0.5"],
    )
    refused(
        *tiny.train_tokenizer(tiny.tokenizer_run(), model__scales="1,2,4"),
        words=["model.scales is [1, 2] there and [1, 2, 4]"],
    )
    refused(
        *tiny.train(tiny.model_run(), model__depth=3), words=["model.depth is 2 there and 3 here"]
    )
    refused(*tiny.train(tiny.tokenizer_run()), words=["another config"])
    assert (tiny.tokenizer_run() / "config.json").read_bytes() == before


def test_an_unreadable_held_out_image_is_replaced(hmar, elsewhere):
    real = shutil.copytree(tiny.images(), elsewhere / "real")
    (real / "validate/circle/0.png").write_bytes(b"no image")
    built = build_experiment(
        tiny.config_of(tiny.train_tokenizer("run", data__source=f"folder:{real}"))
    )
    assert [pathlib.Path(path).name for path, _ in built.decode_errors.items] == ["0.png"]


# Published weights


@pytest.fixture
def weights(golden):
    pytest.importorskip("torch", reason="reading .pth files needs torch")
    return f"--torch={golden / 'next_scale.pth'}", f"--tokenizer={golden / 'vae.pth'}"


def test_convert(hmar, weights):
    status, out, _ = hmar("convert", *weights, "--scales=1,2,3,4,6", "--out=m/model")
    assert status == 0 and out.startswith(
        "m/model: HMAR, next-scale prediction, converted from vae.pth and next_scale.pth"
    )
    assert sorted(os.listdir("m")) == ["model"] and {"config.json", "params", "README.md"} == set(
        os.listdir("m/model")
    )
    status, out, _ = hmar("info", "--model=m/model")
    assert status == 0 and "1x1, 2x2, 3x3, 4x4, 6x6" in out and "converted from" in out


def test_weights_that_do_not_tell_their_scales(refused, weights, elsewhere):
    known = "K=5 scales and L=66 tokens"
    refused("convert", *weights, "--out=model", words=[known, "no published list", "scales"])
    refused(
        "convert", *weights, "--scales=1,2,3,4,5", "--out=model", words=["1,2,3,4,5", "L=55", known]
    )
    refused(
        "convert",
        *weights,
        "--scales=a,b",
        "--out=model",
        words=["--scales: each item must be an integer"],
    )
    refused("convert", weights[1], "--out=model", words=["K=5 scales", "sides"])
    (elsewhere / "text.pth").write_text("hello")
    refused(
        "convert",
        "--tokenizer=text.pth",
        "--out=model",
        words=["text.pth: not a file of PyTorch weights"],
    )
    refused("convert", "--tokenizer=no.pth", "--out=model", words=["no.pth: no such file"])
    refused("convert", "--torch=no.pth", weights[1], "--out=model", words=["no.pth: no such file"])
