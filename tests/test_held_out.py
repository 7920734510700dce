"""The held-out share of a folder without validation images: by class, and kept by runs and sets."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from hmar_jax import config_files
from hmar_jax.cli import main as cli
from hmar_jax.data.held_out import hold_out, num_held_out
from hmar_jax.data.records import read_info
from hmar_jax.data.sources import SourceConfig, open_splits
from hmar_jax.errors import InputError
from hmar_jax.experiment import recorded_source_config
from hmar_jax.io import runs
from hmar_jax.pipeline import Pipeline
from tests import tiny


def classes_of(**sizes):
    return {name: [f"{name}/{i}.png" for i in range(size)] for name, size in sizes.items()}


def counts(classes, held_out):
    return [sum(file in held_out for file in files) for files in classes.values()]


# Which images


def test_at_least_two_of_each_class_with_ten_images():
    sizes = (1, 4, 5, 9, 10, 14, 100, 200, 1300)
    classes = classes_of(**{f"c{n}": n for n in sizes})
    assert counts(classes, hold_out(classes, 0.02, 2, "")) == [0, 0, 1, 1, 2, 2, 2, 4, 26]
    assert counts(classes, hold_out(classes, 0.25, 2, "")) == [0, 1, 1, 2, 2, 4, 25, 50, 325]


def test_every_class_keeps_an_image_to_train_on():
    assert [num_held_out(n, 0.99) for n in range(6)] == [0, 0, 1, 2, 3, 4]


def test_one_image_is_held_out_where_no_class_has_five():
    classes = classes_of(a=1, b=4, c=3)
    assert counts(classes, hold_out(classes, 0.02, 2, "")) == [0, 1, 0]
    with pytest.raises(InputError, match="X must have at least two images"):
        hold_out(classes_of(a=1), 0.02, 2, "X")


def test_the_choice_never_changes():
    classes = classes_of(a=10, b=12)
    assert sorted(hold_out(classes, 0.02, 2, "")) == ["a/4.png", "a/5.png", "b/10.png", "b/7.png"]
    decomposed = {"e": [f"cafe\u0301/{i}.png" for i in range(20)]}  # as macOS writes names
    composed = {"e": [f"caf\u00e9/{i}.png" for i in range(20)]}
    numbers = [
        sorted(file.rpartition("/")[2] for file in hold_out(names, 0.2, 2, ""))
        for names in (decomposed, composed)
    ]
    assert numbers[0] == numbers[1]


def test_new_images_move_few_of_the_others():
    few, more = classes_of(a=400, b=100, c=10), classes_of(a=440, b=100, c=11)
    before, after = hold_out(few, 0.02, 2, ""), hold_out(more, 0.02, 2, "")
    old = {file for files in few.values() for file in files}
    # Those that left were replaced by new images; none of the others came in but for the share.
    assert len(before - after) <= 2 and len((after & old) - before) <= 1
    assert {f for f in before if f[0] == "b"} == {f for f in after if f[0] == "b"}


# As version 0.1 chose


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of 12 images each, without a validation folder."""
    root = tmp_path_factory.mktemp("images") / "train"
    rng = np.random.default_rng(0)
    for label, name in enumerate(tiny.CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(tiny.image(label, rng, tiny.SIDE)).save(root / name / f"{i}.png")
    return root


def test_rules_of_version_0_1(images):
    splits = open_splits(f"folder:{images}", config=SourceConfig(folder_rules=1))
    assert splits["validate"].files == ("cross/0.png",)  # as version 0.1 gave
    splits = open_splits(f"folder:{images}")
    assert np.bincount(splits["validate"].labels).tolist() == [2, 2, 2]
    assert not set(splits["validate"].files) & set(splits["train"].files)


def without_new_keys(path, group=None):
    """Takes away what version 0.1 did not write into a run's or a token set's description."""
    found = json.loads(path.read_text())
    node = found["config"]["data"] if group else found
    for name in ("held_out", "folder_rules", "allow_empty_classes", "max_pixels"):
        node.pop(name, None)
    path.write_text(json.dumps(found))


def test_a_config_from_before_has_the_former_rules():
    schema = config_files.ConfigSchema({"": (), "data": (SourceConfig,)})
    old, new = schema.upgrade({"data": {}}), schema.default_config()
    assert old["data"]["folder_rules"] == 1 and old["data"]["held_out"] == 0.02
    assert schema.settle(new, None).data.folder_rules == 2
    assert schema.settle(new, old).data.folder_rules == 1
    assert new.data.folder_rules is None  # not changed
    new.data.folder_rules = 2
    assert schema.settle(new, old).data.folder_rules == 2  # which does not fit: refused later


@pytest.mark.slow
def test_a_run_keeps_the_rules_that_it_was_started_with(images, tmp_path, capfd):
    workdir = tmp_path / "run"
    command = tiny.train_tokenizer(workdir, data__source=f"folder:{images}")
    short = [*command, "--config.steps=4", "--config.checkpoint_every=2"]
    with tiny.cached():
        assert cli.main([*short, "--config.data.folder_rules=1"]) == 0
        assert "35 images of 3 classes to train, 1 held out" in capfd.readouterr().err
        without_new_keys(workdir / "config.json", "data")
        shutil.rmtree(workdir / "checkpoints" / "4")
        assert cli.main(short) == 0  # as version 0.1 would resume it
        assert "35 images of 3 classes to train, 1 held out" in capfd.readouterr().err
        assert (
            json.loads((workdir / "config.json").read_text())["config"]["data"]["folder_rules"] == 1
        )
        assert recorded_source_config(str(workdir)).folder_rules == 1
        assert cli.main([*short, "--config.data.folder_rules=2"]) == 2
        assert "data.folder_rules is 1 there and 2 here" in capfd.readouterr().err

        workdir = tmp_path / "new"
        short[2] = f"--workdir={workdir}"
        assert cli.main([*short, "--config.data.held_out=0.3"]) == 0
        assert "24 images of 3 classes to train, 12 held out" in capfd.readouterr().err
    found = recorded_source_config(str(workdir))
    assert (found.folder_rules, found.held_out) == (2, 0.3)
    assert recorded_source_config(str(tmp_path)) is None


def test_settle_without_a_run(tmp_path):
    config = tiny.config_of(tiny.train_tokenizer("unused"))
    schema = config_files.ConfigSchema({"": (), "data": (SourceConfig,)})
    assert runs.settle(str(tmp_path / "none"), config, schema).data.folder_rules == 2


def test_a_token_set_keeps_the_rules_that_it_was_started_with(images, tmp_path, capfd):
    out = tmp_path / "tokens"
    command = [
        "tokenize",
        f"--tokenizer={tiny.tokenizer_run()}",
        f"--data=folder:{images}",
        f"--out={out}",
        "--transform=random_crop",
    ]
    with tiny.cached():
        assert cli.main([*command, "--folder_rules=1"]) == 0
        without_new_keys(out / "records.json")
        assert cli.main([*command, "--crops=2"]) == 0
        assert {name: s.num_images for name, s in read_info(out).splits.items()} == {
            "train": 35,
            "validate": 1,
        }
        assert cli.main([*command, "--folder_rules=2"]) == 2
        assert "another folder_rules: 1 there, 2 here" in capfd.readouterr().err
        assert cli.main([*command, "--held_out=0.5"]) == 2
        assert "another held_out: 0.02 there, 0.5 here" in capfd.readouterr().err
        shutil.rmtree(out)
        assert cli.main(command) == 0
    info = read_info(out)
    assert info.folder_rules == 2 and info.splits["validate"].num_images == 6


# hmar evaluate


def evaluate(images, *options):
    arguments = [f"--model={tiny.model_run()}", f"--reference=folder:{images}", "--n=12"]
    with tiny.cached():
        return cli.main(["evaluate", *arguments, *options])


def test_a_folder_without_validation_images_is_a_reference(images, capfd):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    assert evaluate(images) == 0
    assert "12 samples of 3 classes" in capfd.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--folder_rules=1"], "at least 2 held-out images; class 0 has 0; add images, or hold"),
        (["--n=4"], "--n must be at least 6, two samples of each of the model's 3 classes; got 4"),
        (["--held_out=1"], "must be in (0, 1)"),
    ],
)
def test_a_reference_is_checked_before_anything_is_sampled(
    images, capfd, monkeypatch, options, message
):
    monkeypatch.setattr(Pipeline, "sample", None)  # calling it would fail
    try:
        status = evaluate(images, *options)
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capfd.readouterr().err.replace("a number ", "")


def test_the_size_of_a_reference_is_checked_before_anything_is_sampled(
    tmp_path, capfd, monkeypatch
):
    for name in tiny.CLASSES:
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (16, 16)).save(tmp_path / name / f"{i}.png")
    monkeypatch.setattr(Pipeline, "sample", None)
    assert evaluate(tmp_path) == 2
    assert "must have the model's size, 8x8 pixels; got 16x16" in capfd.readouterr().err
