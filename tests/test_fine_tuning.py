"""Runs that start from the parameters of another model: what is taken, what is new, and resume."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from hmar_jax import config_files
from hmar_jax.cli import main as cli
from hmar_jax.data.sources import open_splits
from hmar_jax.experiment import build_experiment, task_kind
from hmar_jax.families.hmar.fine_tuning import match_classes
from hmar_jax.io import checkpoints
from hmar_jax.io.models import save_model
from hmar_jax.loading import load_spec_and_params
from tests import tiny


@pytest.fixture(autouse=True)
def quick():
    with tiny.cached():
        yield


@pytest.fixture
def images(tmp_path):
    """Two classes of the tiny images and a new one, in another order."""
    root = tmp_path / "images"
    for split in ("train", "validate"):
        for new, old in (("a_cross", "cross"), ("stripes", "stripes"), ("zigzag", "circle")):
            shutil.copytree(tiny.images() / split / old, root / split / new)
        (root / split / "a_cross").rename(root / split / "cross")
    shutil.move(root / "train" / "stripes", root / "train" / "astripes")
    shutil.move(root / "validate" / "stripes", root / "validate" / "astripes")
    (root / "class_names.txt").write_text("astripes stripes\ncross cross\nzigzag zigzag\n")
    return root


def finetune(workdir, images, model=None, config="configs/hmar.py:finetune", **changes):
    values = dict(
        init_from=tiny.masked_run() if model is None else model,
        steps=4,
        batch_size=6,
        checkpoint_every=2,
        eval_every=4,
        sample_every=4,
        ema_decay=0.9,
    )
    values["recipe.learning_rate"] = 0.0  # what a run starts from is what it ends with
    values["data.source"] = f"folder:{images}"
    values["data.transform.kind"] = "random_crop"
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    command = "train-tokenizer" if "tokenizer.py" in config else "train"
    return [command, f"--config={config}", f"--workdir={workdir}", *tiny.overrides(values)]


def trained_params(run):
    return checkpoints.load_params_of_run(pathlib.Path(run))[1]["params"]


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_everything_is_taken_but_the_embeddings_of_new_classes(images, tmp_path, capfd):
    run = tmp_path / "run"
    assert cli.main(finetune(run, images)) == 0
    said = capfd.readouterr().err
    _, model = load_spec_and_params(str(tiny.masked_run()))
    theirs, ours = model["transformer"], trained_params(run)
    old, new = theirs["embed"].pop("class_emb"), ours["embed"].pop("class_emb")
    assert equal(theirs, ours)
    # stripes, cross, zigzag, null of: circle, cross, stripes, null
    assert np.array_equal(new[[0, 1, 3]], old[[2, 1, 3]])
    assert 0 < np.abs(new[2] - old[3]).max() < 1 and not any((new[2] == row).all() for row in old)
    for words in (
        "class embeddings taken by name: 2 ('stripes', 'cross')",
        "class embeddings that are new: 1 ('zigzag')",
        "that are left out: 1 ('circle')",
        f"stage 2 of {tiny.masked_run()} is not taken",
    ):
        assert words in said, said

    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["model"]["depth"] == 2 and saved["config"]["model"]["width"] == 32
    assert saved["config"]["tokenizer"] == str(tiny.masked_run())
    assert f"from the parameters of {tiny.masked_run()}" in saved["model"]["origin"]
    spec, params = load_spec_and_params(str(run))  # its moving average began there too
    assert spec.class_names == ("stripes", "cross", "zigzag")
    np.testing.assert_allclose(params["transformer"]["embed"]["class_emb"], new, rtol=1e-6)
    assert equal(params["tokenizer"], model["tokenizer"])


def test_a_model_is_not_needed_once_there_is_a_checkpoint(images, tmp_path, capfd):
    model = shutil.copytree(tiny.model_run(), tmp_path / "model")
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert cli.main(finetune(whole, images, model)) == 0
    assert cli.main(finetune(run, images, model)) == 0
    shutil.rmtree(run / "checkpoints" / "4")
    shutil.rmtree(model)
    capfd.readouterr()
    assert cli.main(finetune(run, images, model)) == 0
    assert "resuming from step 2" in capfd.readouterr().err
    assert equal(trained_params(run), trained_params(whole))
    configs = [json.loads((path / "config.json").read_text()) for path in (run, whole)]
    for key in ("config", "model", "files"):
        assert configs[0][key] == configs[1][key]
    # Without any checkpoint it has to start from the model again.
    shutil.rmtree(run / "checkpoints")
    assert cli.main(finetune(run, images, model)) == 2
    assert str(model) in capfd.readouterr().err


def test_another_model_is_refused_and_a_moved_one_is_not(images, tmp_path, capfd):
    run = tmp_path / "run"
    assert cli.main(finetune(run, images)) == 0
    moved = shutil.copytree(tiny.masked_run(), tmp_path / "moved")
    assert cli.main(finetune(run, images, moved)) == 0
    before = (run / "config.json").read_bytes()
    for extend in ([], ["--extend"]):
        capfd.readouterr()
        assert cli.main([*finetune(run, images, "digits", steps=8), *extend]) == 2
        error = capfd.readouterr().err
        assert "init_from 'digits' has other contents" in error and error.count("\n") == 1
        assert (run / "config.json").read_bytes() == before
    assert cli.main([*finetune(run, images, steps=6), "--extend"]) == 0
    assert "extended from step 4: steps 4 -> 6" in capfd.readouterr().err


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(model__depth=3),
            ["has another network than the config", "depth is 2 there and 3 here", "finetune"],
        ),
        (dict(model__width=64), ["another network", "width is 32 there and 64 here"]),
        (dict(init_from=""), ["config.init_from is empty", "model.depth", "--config.init_from="]),
        (dict(init_from="no/such"), ["must be a bundled model", "no/such"]),
        (dict(init_from="TOKENIZER"), ["must be a transformer", "got a tokenizer"]),
        (dict(init_from="RUN"), ["another model than the run itself", "--workdir", "--extend"]),
        (
            dict(init_from="CHECKPOINT"),
            ["a run, not its checkpoints", "--checkpoint=80 --out=MODEL"],
        ),
    ],
)
def test_models_that_do_not_fit(changes, words, images, tmp_path, capfd):
    places = dict(
        TOKENIZER=tiny.tokenizer_run(),
        RUN=tmp_path / "x" / ".." / "run",
        CHECKPOINT=tiny.model_run() / "checkpoints" / "80",
    )
    if changes.get("init_from") in places:
        changes = dict(init_from=places[changes["init_from"]])
    arguments = finetune(tmp_path / "run", images, **changes)
    capfd.readouterr()  # of the models, if they were trained just now
    assert cli.main(arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("hmar train: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not (tmp_path / "run" / "config.json").exists()


def experiment(tmp_path, images, **changes):
    return build_experiment(tiny.config_of(finetune(tmp_path, images, **changes)))


def test_var_becomes_hmar_where_the_config_says_so(images, tmp_path):
    """Both patterns have the same parameters."""
    built = experiment(tmp_path, images, model__pattern="causal")
    assert "pattern is 'diagonal' there and 'causal' here" in built.initial().notes[-1]
    assert built.spec.kind == "VAR"


@pytest.mark.parametrize(
    "theirs, ours, words",
    [
        (("circle", "cross", "moon"), (), "taken by name: 1 ('cross')"),
        ((), (), "taken by id, as one side has no names: 3 ('stripes', 'cross', 'zigzag')"),
        (("tench", "cross"), ("n01440764", "n01443537", "n01484850"), "3 ('n01440764',"),
    ],
)
def test_how_classes_were_matched_is_said(theirs, ours, words, images, tmp_path):
    spec, params = load_spec_and_params(str(tiny.model_run()))
    count = len(theirs) or 3
    transformer = dataclasses.replace(spec.transformer, num_classes=count)
    params["transformer"]["embed"]["class_emb"] = params["transformer"]["embed"]["class_emb"][
        : count + 1
    ]
    spec = dataclasses.replace(spec, class_names=theirs, transformer=transformer)
    save_model(tmp_path / "model", spec.to_json(), params, "")
    if ours:
        lines = [f"{old} {new}" for old, new in zip(("astripes", "cross", "zigzag"), ours)]
        (images / "class_names.txt").write_text("\n".join(lines))
    notes = experiment(tmp_path / "run", images, init_from=tmp_path / "model").initial().notes
    assert any(words in note for note in notes), notes
    assert any("class_names.txt" in note for note in notes) == bool(ours)


def test_another_tokenizer_is_named(images, tmp_path):
    found = lambda built: [text for text in built.warnings if "is not the tokenizer" in text]
    assert not found(experiment(tmp_path, images, tokenizer=tiny.tokenizer_run()))
    spec, params = load_spec_and_params(str(tiny.tokenizer_run()))
    params["tokenizer"]["quantizer"]["codebook"] += 1
    save_model(tmp_path / "other", spec.to_json(), params, "")
    (text,) = found(experiment(tmp_path, images, tokenizer=tmp_path / "other"))
    assert text.startswith(f"{tmp_path / 'other'} is not the tokenizer of init_from")


def test_a_tokenizer_is_fine_tuned(images, tmp_path, capfd):
    """Of any model; its codebook is that model's from the first step on."""
    config = "configs/tokenizer.py:finetune"
    run = tmp_path / "run"
    assert cli.main(finetune(run, images, config=config)) == 0
    _, model = load_spec_and_params(str(tiny.masked_run()))
    count = sum(x.size for x in jax.tree.leaves(model["tokenizer"]))
    assert f"all {count:,} parameters are taken from there" in capfd.readouterr().err
    assert equal(trained_params(run), model["tokenizer"])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["quantizer_loss"] > 0 and "validation/loss" in metrics[-1]

    for name, changes, words in (
        ("a", dict(recipe__vq_start_step=5), "vq_start_step must be 0 with config.init_from"),
        ("b", dict(init_from=""), "config.init_from is empty"),
        ("c", dict(model__vocab_size=32), "vocab_size is 16 there and 32 here"),
    ):
        assert cli.main(finetune(tmp_path / name, images, config=config, **changes)) == 2
        error = capfd.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_stage_2_of_a_fine_tuned_stage_1():
    """Its config has no empty keys, although that of its stage 1 has."""
    config = config_files.load_config("configs/hmar.py:finetune,stage=masked")
    schema = task_kind(config)[1].schema
    assert schema.empty_keys(config) == []
    schema.check(config)


@pytest.mark.slow
def test_plans_of_what_starts_from_a_model(capsys):
    base = ["plan", "--topology=h100:1", "--config.init_from=digits"]
    assert cli.main([*base, "--config=configs/hmar.py:finetune"]) == 0
    assert "1,260,944 trained" in capsys.readouterr().out
    assert cli.main([*base[:2], "--config=configs/hmar.py:finetune"]) == 2
    assert "config.init_from is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "old, new, expected",
    [
        (("a", "b", "c"), ("c", "a"), [2, 0]),
        (("Great White", "b"), ("b", "great-white", "x"), [1, 0, None]),
        (("crane", "crane"), ("crane", "crane"), [0, 1]),  # ImageNet has two
        (("crane", "crane"), ("crane", "duck"), [None, None]),
        ((), ("a", "b"), [0, 1]),
        (("n01440764", "n01443537"), ("tench", "goldfish"), [0, 1]),
    ],
)
def test_classes_are_matched_by_name(old, new, expected):
    assert match_classes(old, new, len(old) or 2, len(new)) == expected


def test_without_names_another_number_of_classes_is_new():
    assert match_classes((), ("a", "b", "c"), 1000, 3) == [None] * 3


@pytest.mark.slow  # a minute each, nearly all of it compilation
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_converted_weights_are_fine_tuned(pattern, golden, images, tmp_path, capfd):
    """The golden weights of HMAR, and as VAR: the same parameters under a causal mask."""
    torch = pytest.importorskip("torch")
    weights, model, run = tmp_path / "var.pth", tmp_path / "model", tmp_path / "run"
    state = torch.load(golden / "next_scale.pth", weights_only=True)
    if pattern == "causal":
        scale = np.repeat(np.arange(5), [1, 4, 9, 16, 36])
        hidden = torch.tensor(scale[:, None] < scale)
        state["attn_bias_for_masking"] = torch.where(hidden, -torch.inf, 0.0)[None, None]
    torch.save(state, weights)
    files = [f"--torch={weights}", f"--tokenizer={golden / 'vae.pth'}", "--scales=1,2,3,4,6"]
    assert cli.main(["convert", *files, f"--out={model}"]) == 0
    assert cli.main(finetune(run, images, model, steps=3, recipe__learning_rate=1e-3)) == 0
    assert "class embeddings that are new: 3" in capfd.readouterr().err
    spec, params = load_spec_and_params(str(run))
    _, before = load_spec_and_params(str(model))
    assert (spec.transformer.pattern, spec.num_classes) == (pattern, 3)
    assert spec.licence == load_spec_and_params(str(model))[0].licence != ""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert not equal(params["transformer"]["blocks"], before["transformer"]["blocks"])
    assert equal(params["tokenizer"], before["tokenizer"])


@pytest.mark.slow
def test_digits_under_other_names_in_a_fifth_of_the_steps(tmp_path, capfd):
    """Five classes, renamed and reordered; from scratch 240 steps give 26 %, and 1,200 100 %."""
    root, run, found = tmp_path / "five", tmp_path / "run", tmp_path / "found.json"
    names = {7: "a_seven", 2: "b_two", 9: "c_nine", 0: "d_zero", 4: "e_four"}
    for split, source in open_splits("digits").items():
        for i in range(len(source)):
            if (digit := source[i])["label"] in names:
                folder = root / split / names[digit["label"]]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(digit["image"]).save(folder / f"{i}.png")
    train = ["train", "--config=configs/hmar.py:digits", "--config.steps=240", f"--workdir={run}"]
    start = ["--config.init_from=digits", f"--config.data.source=folder:{root}"]
    assert cli.main([*train, *start]) == 0
    evaluate = ["evaluate", f"--model={run}", f"--reference=folder:{root}", f"--json={found}"]
    assert cli.main([*evaluate, "--features=classifier", "--n=500"]) == 0
    assert json.loads(found.read_text())["class_accuracy"] > 0.98
