"""The command line: what it makes, and one clear line with exit status 2 for every mistake."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hmar_jax.cli import main as cli
from hmar_jax.io import files
from tests import tiny
from tests.test_training import damage

TRAIN = ("train", "--config=configs/hmar.py:digits", "--workdir=run")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
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
    """refused(arguments…, words=[…]): status 2, one line on stderr with these words, nothing written."""

    def run(*arguments, words):
        before = sorted(elsewhere.rglob("*"))
        status, out, err = hmar(*arguments)
        assert status == 2, (status, err)
        assert err.endswith("\n") and err.count("\n") == 1, err
        assert err.startswith("hmar") and not [w for w in words if w not in err], err
        assert out == "" and sorted(elsewhere.rglob("*")) == before

    return run


def sample(*arguments, model=None, out="x.png"):
    return "sample", f"--model={model or tiny.model_run()}", f"--out={out}", *arguments


# What it makes


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
    found = [c for c in commands if re.search(rf"^ +{c}\b", out, re.MULTILINE)]
    assert len(found) >= 8
    for command in found:
        status, text, err = hmar(command, "--help")
        assert (
            status == 0
            and err == ""
            and f"usage: hmar {command}" in text
            and "example:\n  hmar" in text
        )


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
    assert (status, out, err) == (0, "grid.png: 4 images of 2 classes; x.npz\n", "")
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


def test_several_schedules_side_by_side(hmar, elsewhere):
    model = tiny.masked_run()
    one = "--schedule=[[1],[1,1,2]]"
    status, out, _ = hmar(*sample("--n=2", "--schedule=none", one, "--smooth", model=model))
    assert status == 0 and out == "x.png: 12 images of 3 classes\n"
    both = Image.open("x.png")
    assert (
        hmar(
            *sample(
                "--n=2",
                one,
                "--confidence_noise=3",
                "--masked_guidance=1",
                "--npz=x.npz",
                model=model,
            )
        )[0]
        == 0
    )
    assert both.width > 1.7 * Image.open("x.png").width and both.height > Image.open("x.png").height
    assert np.load("x.npz")["tokens"].shape == (6, tiny.LENGTH)


def test_a_failure_while_writing_leaves_the_old_file(hmar, elsewhere, monkeypatch):
    pathlib.Path("x.png").write_bytes(b"old")
    command = sample("--classes=0", "--n=4")  # makes the model, the first time

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
        "--json=figures.json",
    )
    assert status == 0 and "class accuracy" in out
    figures = json.loads(pathlib.Path("figures.json").read_text())
    assert figures["samples"] == 12 and 0 <= figures["class_accuracy"] <= 1


def test_a_damaged_checkpoint_gives_way_to_the_one_before(hmar, elsewhere, tmp_path):
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


# Mistakes in what was asked for


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
        ([*TRAIN, "--config.nope=1"], ["'nope': unknown; there are accumulate, batch_size"]),
        ([*TRAIN, "--config.model.nope=1"], ["'model.nope': unknown; there are depth"]),
        ([*TRAIN, "--config.model=1"], ["'model' is a group"]),
        ([*TRAIN, "--config.steps=many"], ["steps='many'", "type int"]),
        ([*TRAIN, "--config.task=nope"], ["task='nope'", "tokenizer, next_scale"]),
        (["train", "--config=nope.py:digits", "--workdir=run"], ["'nope.py': no such"]),
        (
            ["train", "--config=configs/hmar.py:nope", "--workdir=run"],
            ["'nope': known are digits, cifar10, d16_256"],
        ),
        (
            ["train", "--config=configs/hmar.py:digits,stage=3", "--workdir=run"],
            ["stage='3'", "next_scale (stage 1), masked (stage 2)"],
        ),
        (
            [
                "train",
                "--config=configs/hmar.py:digits,stage=masked,pattern=causal",
                "--workdir=run",
            ],
            ["stage=masked and pattern"],
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
        (["sample", "--model=nope", "--out=x.png"], ["model 'nope'", "bundled"]),
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
            ["--seed", "'-1'", "from 0 to 4294967295"],
        ),
        (["evaluate", "--model=nope", "--features=nope"], ["--features", "'nope'", "classifier"]),
        (["evaluate", "--model=nope", "--json=no/x.json"], ["no/x.json", "no folder"]),
        (["convert", "--out=m"], ["--tokenizer"]),
        (["convert", "--tokenizer=nope.pth", "--out=m", "--heads=0"], ["--heads", "'0'"]),
    ],
)
def test_mistakes_found_without_a_model(refused, arguments, words):
    refused(*arguments, words=words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--classes=3"], ["class 3", "0 to 2"]),
        (["--classes=-1"], ["class -1", "0 to 2"]),
        (["--classes=0,dog"], ["class 'dog'", "0 to 2", "circle, cross, stripes"]),
        (["--classes="], ["class ''"]),
        (["--classes=1.0"], ["'1.0'"]),
        (["--n=0"], ["--n", "'0'", "1 or more"]),
        (["--n=-2"], ["'-2'"]),
        (["--n=few"], ["'few'"]),
        (["--n=²"], ["'²'"]),
        (["--top_p=1.5"], ["top_p=1.5", "0 to 1"]),
        (["--top_p=-0.1"], ["top_p=-0.1"]),
        (["--top_p=nan"], ["top_p=nan"]),
        (["--top_p=x"], ["--top_p", "'x'"]),
        (["--top_k=17"], ["top_k=17", "0 to 16"]),
        (["--top_k=-1"], ["top_k=-1"]),
        (["--top_k=1.5"], ["--top_k", "'1.5'"]),
        (["--guidance=-1"], ["guidance=-1", "0 or more"]),
        (["--guidance=inf"], ["guidance=inf"]),
        (["--guidance=strong"], ["--guidance", "'strong'"]),
        (["--guidance"], ["--guidance"]),
        (["--seed=one"], ["--seed", "'one'"]),
        (["--seed=4294967296"], ["'4294967296'"]),
        (["--checkpoint=1"], ["no checkpoint 1", "there are those of steps"]),
        (["--npz=no/x.npz"], ["no/x.npz", "no folder"]),
        (["--npz=/"], ["folder"]),
    ],
)
def test_mistakes_in_sampling(refused, arguments, words):
    refused(*sample(*arguments), words=words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--schedule=[[1],[1,2]]"], ["scale 1 (2x2) sums to 3, but the scale has 4 tokens"]),
        (["--schedule=[[1],[4],[9]]"], ["3 rows", "2 scales"]),
        (["--schedule=[[1]"], ["--schedule", "list of lists"]),
        (["--schedule=fast"], ["'fast'", "none, default, cosine:N"]),
        (["--schedule=[[1],[0,4]]"], ["[0, 4]", "1 or more"]),
        (["--schedule=none", "--schedule=default", "--npz=x.npz"], ["--npz", "given 2 times"]),
        (["--masked_guidance=-1"], ["masked_guidance=-1.0"]),
        (["--confidence_noise=nan"], ["confidence_noise=nan"]),
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
            *command, words=["has masked passes, but this model has no stage 2", "schedule='none'"]
        )


def test_outputs_that_cannot_be_written_are_found_before_the_work(refused, elsewhere, monkeypatch):
    def work(*_):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("hmar_jax.pipeline.load_spec_and_params", work)
    monkeypatch.setattr("hmar_jax.pipeline.convert_torch_files", work)
    (elsewhere / "file").write_text("")
    (elsewhere / "full").mkdir()
    (elsewhere / "full/x").write_text("")
    for out, words in (
        ("no/x.png", "no folder"),
        ("full", "names a folder"),
        ("file/x.png", "is a file"),
    ):
        refused(*sample(out=out), words=[out, words])
        refused(*sample(f"--npz={out}"), words=[out, words])
        refused("evaluate", "--model=nope", f"--json={out}", words=[out, words])
    for out, words in (("full", "not empty"), ("file", "is a file"), ("file/m", "cannot write")):
        refused("export", "--model=nope", f"--out={out}", words=[out, words])
        refused("convert", "--tokenizer=nope", f"--out={out}", words=[out, words])


def test_a_tokenizer_cannot_sample(refused):
    refused(*sample(model=tiny.tokenizer_run()), words=["tokenizer alone"])
    refused("evaluate", f"--model={tiny.tokenizer_run()}", words=["tokenizer alone"])
    refused(
        "evaluate",
        f"--model={tiny.model_run()}",
        "--reference=nope",
        words=["unknown data 'nope'", "folder:DIR"],
    )


# Mistakes in what shall be trained


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data__source="nope"), ["unknown data 'nope'", "digits, folder:DIR"]),
        (dict(data__source="folder:nope"), ["nope does not exist"]),
        (dict(data__source=""), ["data.source is empty"]),
        (dict(batch_size=37), ["batch_size=37", "36 or less"]),
        (dict(batch_size=0), ["batch_size=0"]),
        (dict(steps=0), ["steps=0"]),
        (dict(seed=-1), ["seed=-1"]),
        (dict(seed=2**40), [f"seed={2**40}"]),
        (dict(log_every=0), ["log_every=0"]),
        (dict(checkpoint_every=0), ["checkpoint_every=0"]),
        (dict(keep_checkpoints=0), ["keep_checkpoints=0"]),
        (dict(data__threads=-1), ["data.threads=-1"]),
        (dict(data__transform__kind="nope"), ["'nope'", "resize_crop, random_crop, affine"]),
        (dict(model__scales="2,1"), ["scales 2,1", "increasing"]),
        (dict(model__scales="1.5,2"), ["model.scales='1.5,2'"]),
        (dict(model__groups=3), ["groups=3 does not divide 8"]),
        (dict(model__groups=0), ["groups=0"]),
        (dict(model__channel_multipliers="()"), ["channel_multipliers=()"]),
        (dict(model__vocab_size=0), ["vocab_size=0"]),
        (dict(model__channel_multipliers="0"), ["channel_multipliers=(0,)"]),
        (dict(model__distance="nope"), ["'nope'", "l2, cosine"]),
        (dict(model__dtype="nope"), ["'nope'", "float32"]),
        (dict(recipe__schedule="nope"), ["'nope'", "cos, lin"]),
        (dict(recipe__unquantized_steps=0), ["unquantized_steps=0"]),
        (dict(recipe__adversarial_weight=1), ["side 8 are too small", "24 or more"]),
        (dict(recipe__perceptual_weight=1), ["perceptual_network", ".npz"]),
        (dict(recipe__perceptual_weight=1, perceptual_network="no.npz"), ["no.npz: no such file"]),
    ],
)
def test_mistakes_in_training_a_tokenizer(refused, changes, words):
    refused(*tiny.train_tokenizer("run", **changes), words=words)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(tokenizer="nope"), ["model 'nope'", "bundled"]),
        (dict(tokenizer=""), ["config.tokenizer is empty"]),
        (dict(image_side=48), ["image_side=48", "1,2 at 4 pixels a token make 8 pixels"]),
        (dict(steps=0), ["steps=0 and epochs=0"]),
        (dict(batch_size=73, data__cached_copies=2), ["batch_size=73", "72 or less"]),
        (dict(data__cached_copies=-1), ["cached_copies=-1"]),
        (dict(model__heads=3), ["heads=3 does not divide width=32"]),
        (dict(model__heads=0), ["heads=0"]),
        (dict(model__depth=0), ["depth=0"]),
        (dict(model__mlp_ratio=0), ["mlp_ratio=0"]),
        (dict(model__pattern="nope"), ["'nope'", "diagonal", "causal"]),
        (dict(model__dropout=1.5), ["dropout=1.5"]),
        (dict(recipe__loss_weights="nope"), ["'nope'", "lognorm, equal, plain"]),
        (dict(recipe__schedule="lin2"), ["'lin2'"]),
        (dict(recipe__class_dropout=2), ["class_dropout=2"]),
        (dict(sampling__top_p=1.5), ["top_p=1.5", "0 to 1"]),
        (dict(sampling__top_k=17), ["top_k=17", "0 to 16"]),
    ],
)
def test_mistakes_in_training_a_transformer(refused, changes, words):
    refused(*tiny.train("run", **changes), words=words)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(init_from="nope"), ["model 'nope'", "bundled"]),
        (dict(init_from=""), ["config.init_from is empty", "--config.init_from=RUN"]),
        (dict(model__masked_depth=3), ["masked_depth=3", "has 2 blocks, 1 to 2 is wanted"]),
        (dict(model__masked_depth=0), ["masked_depth=0"]),
        (
            dict(recipe__loss_weights="plain"),
            ["'plain'", "unweighted, lognorm, equal, lognorm_published"],
        ),
        (dict(recipe__mask_ratios="nope"), ["'nope'", "uniform, cosine"]),
        (dict(image_side=48), ["image_side=48"]),
        (dict(sampling__confidence_noise=-1.0), ["confidence_noise=-1.0"]),
    ],
)
def test_mistakes_in_training_stage_2(refused, changes, words):
    refused(*tiny.train_masked("run", **changes), words=words)


def test_stage_2_needs_a_stage_1_of_its_kind(refused, tmp_path, elsewhere):
    refused(
        *tiny.train_masked("run", init_from=tiny.tokenizer_run()), words=["is a tokenizer alone"]
    )
    causal = shutil.copytree(tiny.model_run(), tmp_path / "causal")
    config = (causal / "config.json").read_text()
    (causal / "config.json").write_text(
        config.replace('"pattern": "diagonal"', '"pattern": "causal"')
    )
    refused(
        *tiny.train_masked("run", init_from=causal), words=["pattern=causal", "pattern=diagonal"]
    )
    fewer = shutil.copytree(tiny.images(), tmp_path / "fewer")
    for split in ("train", "validate"):
        shutil.rmtree(fewer / split / "cross")
    refused(
        *tiny.train_masked("run", data__source=f"folder:{fewer}"), words=["has 2 classes", "has 3"]
    )


def test_a_bundled_tokenizer_says_what_it_makes(refused):
    from hmar_jax import pipeline

    if "digits" not in pipeline.bundled_models():
        pytest.skip("no bundled model digits")
    refused(
        *TRAIN,
        "--config.image_side=48",
        words=["image_side=48", "'digits'", "1,2,3,4 at 8 pixels a token make 32 pixels"],
    )


def test_directories_of_others(refused, elsewhere, tmp_path):
    (elsewhere / "mine").mkdir()
    (elsewhere / "mine/thesis.txt").write_text("")
    (elsewhere / "file").write_text("")
    refused(*tiny.train_tokenizer("mine"), words=["mine is neither empty nor a run directory"])
    refused(*tiny.train_tokenizer("file"), words=["workdir file is a file"])
    refused(
        *tiny.train_tokenizer("file/run"), words=["file/run cannot be written: Not a directory"]
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


def test_a_broken_held_out_image_stops_nothing(hmar, elsewhere):
    real = shutil.copytree(tiny.images(), elsewhere / "real")
    (real / "validate/circle/0.png").write_bytes(b"no image")
    from hmar_jax.experiment import build_experiment

    built = build_experiment(
        tiny.config_of(tiny.train_tokenizer("run", data__source=f"folder:{real}"))
    )
    assert [pathlib.Path(path).name for path, _ in built.broken.items] == ["0.png"]


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
    refused("convert", *weights, "--scales=a,b", "--out=model", words=["a list of sides is wanted"])
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
