"""What identifies a run and its data: inputs may move; changed ones are refused, with no loss."""

import json
import pathlib
import shutil

import pytest
from PIL import Image

from hmar_jax.cli import main as cli
from hmar_jax.data.agreement import check_same_data
from hmar_jax.data.fingerprint import describe_data
from hmar_jax.data.records import open_records, read_info
from hmar_jax.data.sources import open_source
from hmar_jax.data.tfds import TfdsSource
from hmar_jax.errors import InputError
from hmar_jax.experiment import build_experiment
from hmar_jax.io import identity, runs
from hmar_jax.io.models import save_model
from hmar_jax.loading import load_spec_and_params
from hmar_jax.parallel import processes
from tests import tiny


@pytest.fixture(autouse=True)
def quick():
    with tiny.cached():
        yield


@pytest.fixture
def images(tmp_path):
    """A copy of the tiny images in another place than that of the tiny runs."""
    return shutil.copytree(tiny.images(), tmp_path / "images")


@pytest.fixture
def resumes(capfd):
    """resumes(arguments, complete=True): the command takes the finished run for its own."""

    def check(arguments):
        status = cli.main(arguments)
        error = capfd.readouterr().err
        assert status == 0, error
        assert "this run is complete: step 80 of 80" in error
        return error

    return check


@pytest.fixture
def refused(capfd):
    """refused(arguments, directory, *words): status 2, one line, and the same bytes as before."""

    def check(arguments, directory, *words):
        before = contents(directory)
        capfd.readouterr()
        status = cli.main([str(a) for a in arguments])
        error = capfd.readouterr().err
        assert status == 2, error
        assert contents(directory) == before
        assert error.count("\n") == 1 and error.startswith(f"hmar {arguments[0]}: "), error
        for word in words:
            assert word in error, error
        return error

    return check


def contents(directory) -> dict[str, bytes]:
    files = (path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def copy_of(run: pathlib.Path, tmp_path: pathlib.Path, images=None) -> pathlib.Path:
    """A copy of a tiny run, which may be changed; as if it had been trained on `images`."""
    copy = shutil.copytree(run, tmp_path / "run")
    config = copy / "config.json"
    config.write_text(config.read_text().replace(str(tiny.images()), str(images or tiny.images())))
    return copy


def config_of(run: pathlib.Path) -> dict:
    return json.loads((run / "config.json").read_text())


# Data sets that moved


def test_a_data_set_may_move(images, resumes, tmp_path, monkeypatch):
    run = copy_of(tiny.tokenizer_run(), tmp_path)
    recorded = config_of(run).get("data")
    monkeypatch.chdir(tmp_path)
    for place in (images, f"{images}/", "images", "./images//"):
        resumes(tiny.train_tokenizer(run, data__source=f"folder:{place}"))
        assert config_of(run)["config"]["data"]["source"] == f"folder:{place}"
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", images)
    resumes(tiny.train_tokenizer(run, data__source=f"zip:{archive}"))
    assert config_of(run)["data"] == recorded


def test_what_a_run_records_of_its_data():
    (entry,) = config_of(tiny.model_run())["data"]
    assert entry["source"] == f"folder:{tiny.images()}" and entry["classes"] == 3
    assert entry["first_seen"].endswith("+00:00")
    assert entry["train"]["images"] == 36 and entry["validate"]["images"] == 9
    assert entry["train"]["fingerprint"] != entry["validate"]["fingerprint"]


# Data sets that changed


def add(images):
    shutil.copy(images / "train/cross/0.png", images / "train/cross/new.png")


def add_to_validation(images):
    shutil.copy(images / "train/cross/0.png", images / "validate/cross/new.png")


def remove(images):
    (images / "train/stripes/3.png").unlink()


def rename(images):
    (images / "train/circle/3.png").rename(images / "train/circle/33.png")


def relabel(images):
    (images / "train/circle/3.png").rename(images / "train/cross/circle.png")


def rewrite(images):
    shutil.copy(images / "train/cross/0.png", images / "train/circle/3.png")


@pytest.mark.parametrize(
    "change, words",
    [
        (add, "36 training images there, 37 here;"),
        (remove, "36 training images there, 35 here;"),
        (add_to_validation, "holds a run with other images: 9 validation images there, 10 here;"),
        (rename, "the 36 training images have other names, sizes or labels"),
        (relabel, "the 36 training images have other names, sizes or labels"),
        (rewrite, "the 36 training images have other names, sizes or labels"),
    ],
)
def test_changed_images_are_refused(change, words, images, refused, tmp_path):
    run = copy_of(tiny.tokenizer_run(), tmp_path, images)
    change(images)
    command = tiny.train_tokenizer(run, data__source=f"folder:{images}")
    refused(command, run, words, "--allow_data_change")


def test_a_change_that_is_allowed_is_recorded(images, resumes, refused, tmp_path):
    run = copy_of(tiny.model_run(), tmp_path)
    (before,) = config_of(run)["data"]
    add(images)
    changed = tiny.train(run, data__source=f"folder:{images}")
    error = resumes([*changed, "--allow_data_change"])
    assert "36 training images there, 37 here" in error
    assert "36 training images there, 37 here" in (run / "log.txt").read_text()
    former, present = config_of(run)["data"]
    assert former == before and present["source"] == f"folder:{images}"
    assert (present["train"]["images"], present["validate"]) == (37, before["validate"])
    resumes(changed)  # needs no option any more
    resumes([*changed, "--allow_data_change"])  # and nothing is recorded twice
    assert config_of(run)["data"] == [former, present]
    refused(tiny.train(run), run, "37 training images there, 36 here")


def test_a_run_of_an_earlier_version_records_its_data_once(images, resumes, refused, tmp_path):
    run = copy_of(tiny.tokenizer_run(), tmp_path)
    config = config_of(run)
    entry = config.pop("data")[0]
    (run / "config.json").write_text(json.dumps(config))
    elsewhere = tiny.train_tokenizer(run, data__source=f"folder:{images}")
    refused(elsewhere, run, f"which was 'folder:{tiny.images()}' and is 'folder:{images}'")
    resumes(tiny.train_tokenizer(run, data__source=f"folder:{tiny.images()}/"))
    (recorded,) = config_of(run)["data"]
    assert recorded["train"] == entry["train"] and recorded["validate"] == entry["validate"]
    resumes(elsewhere)  # from now on it may move
    assert config_of(run)["data"] == [recorded]

    (run / "config.json").write_text(json.dumps(config))
    resumes([*elsewhere, "--allow_data_change"])
    assert config_of(run)["data"][0]["source"] == f"folder:{images}"


# Classes


def add_class(images):
    for split in ("train", "validate"):
        shutil.copytree(images / split / "cross", images / split / "diamond")


def remove_class(images):
    for split in ("train", "validate"):
        shutil.rmtree(images / split / "cross")


def rename_class(images):
    for split in ("train", "validate"):
        (images / split / "cross").rename(images / split / "zigzag")


@pytest.mark.parametrize(
    "change, words",
    [
        (add_class, "other classes: added 'diamond'; "),
        (remove_class, "other classes: removed 'cross'; "),
        (rename_class, "other classes: added 'zigzag', removed 'cross'; "),
    ],
)
@pytest.mark.parametrize("more", [[], ["--allow_data_change"]])
def test_other_classes_are_refused_and_named(change, words, more, images, refused, tmp_path, capfd):
    run = copy_of(tiny.model_run(), tmp_path, images)
    change(images)
    refused([*tiny.train(run, data__source=f"folder:{images}"), *more], run, words)
    assert cli.main(["info", f"--model={run}"]) == 0
    assert "3: circle, cross, stripes" in capfd.readouterr().out


def test_names_of_the_same_classes_change_on_request_alone(images, resumes, refused, tmp_path):
    run = copy_of(tiny.model_run(), tmp_path, images)
    (images / "class_names.txt").write_text("circle cross\ncross circle\n")
    command = tiny.train(run, data__source=f"folder:{images}")
    words = "the same names in another order: class 0 was 'circle' and is 'cross'; "
    refused(command, run, words, "restore its classes, or accept these with --allow_data_change")
    resumes([*command, "--allow_data_change"])
    assert config_of(run)["model"]["class_names"] == ["cross", "circle", "stripes"]


def test_a_tokenizer_may_train_on_with_more_classes(images, resumes, refused, tmp_path):
    run = copy_of(tiny.tokenizer_run(), tmp_path, images)
    add_class(images)
    command = tiny.train_tokenizer(run, data__source=f"folder:{images}")
    refused(command, run, "added 'diamond'")
    assert "added 'diamond'" in resumes([*command, "--allow_data_change"])
    assert config_of(run)["model"]["class_names"][2] == "diamond"


def test_stage_2_needs_the_classes_of_its_stage_1(images, refused, tmp_path):
    command = tiny.train_masked(tmp_path / "run", data__source=f"folder:{images}")
    rename_class(images)
    refused(command, tmp_path, "in the same order", "added 'zigzag', removed 'cross'")
    add_class(shutil.copytree(tiny.images(), images, dirs_exist_ok=True))
    refused(command, tmp_path, "has 5 classes (added 'diamond', 'zigzag'), init_from")
    assert not (tmp_path / "run").exists()


def test_stage_2_takes_folders_named_by_wordnet_ids(images):
    """Converted weights have ImageNet's names, and its folders are called n01440764, …"""
    for split in ("train", "validate"):
        for i, folder in enumerate(sorted((images / split).iterdir())):
            folder.rename(images / split / f"n0144076{i}")
    config = tiny.config_of(tiny.train_masked("unused", data__source=f"folder:{images}"))
    assert build_experiment(config).spec.class_names == tiny.CLASSES


def test_evaluation_needs_the_classes_of_the_model(images, refused, tmp_path):
    for path in images.rglob("*.png"):  # of the model's size
        Image.open(path).crop((1, 1, 9, 9)).save(path)
    rename_class(images)
    command = ["evaluate", f"--model={tiny.model_run()}", f"--reference=folder:{images}", "--n=6"]
    refused(command, tmp_path, "in the same order", "added 'zigzag', removed 'cross'")


# Configs and models


def test_a_refusal_names_every_key_that_differs(images, refused, tmp_path):
    run = copy_of(tiny.tokenizer_run(), tmp_path, images)
    add(images)
    changes = dict(seed=1, recipe__beta=0.5, model__vocab_size=32, log_every=3)
    error = refused(
        tiny.train_tokenizer(run, **changes, data__source=f"folder:{images}"),
        run,
        "another config: model.vocab_size is 16 there and 32 here, "
        "recipe.beta is 0.25 there and 0.5 here, seed is 0 there and 1 here; ",
        "36 training images there, 37 here",
    )
    assert "log_every" not in error
    changes |= dict(batch_size=3, steps=90, recipe__warmup_steps=6, ema_decay=0.5)
    refused(tiny.train_tokenizer(run, **changes), run, "recipe.beta", "and 2 more; ")


def test_another_task_is_named_alone(refused, tmp_path):
    run = copy_of(tiny.tokenizer_run(), tmp_path)
    error = refused(tiny.train(run), run, "task is 'tokenizer' there and 'next_scale' here; choose")
    assert "model." not in error


def test_a_parent_may_move(resumes, refused, tmp_path, monkeypatch):
    run = copy_of(tiny.model_run(), tmp_path)
    moved = shutil.copytree(tiny.tokenizer_run(), tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for place in (f"{tiny.tokenizer_run()}/", moved, "moved"):
        resumes(tiny.train(run, tokenizer=place))
    assert config_of(run)["config"]["tokenizer"] == "moved"
    resumes(tiny.train(run, tokenizer=moved))
    monkeypatch.undo()  # the log names packaged configs that are read from another folder

    spec, params = load_spec_and_params(str(moved))
    params["tokenizer"]["quantizer"]["codebook"] = params["tokenizer"]["quantizer"]["codebook"] + 1
    save_model(tmp_path / "other", spec.to_json(), params, "")
    refused(
        tiny.train(run, tokenizer=tmp_path / "other", seed=3),
        run,
        "seed is 0 there and 3 here",
        f"tokenizer is '{moved}' there and '{tmp_path}/other', another model, here",
    )
    refused(tiny.train(run, tokenizer="gone"), run, "'gone' here, which cannot be compared")


def test_a_stage_1_may_move(resumes, tmp_path):
    run = copy_of(tiny.masked_run(), tmp_path)
    moved = shutil.copytree(tiny.model_run(), tmp_path / "moved")
    resumes(tiny.train_masked(run, init_from=moved))


def test_other_inputs_are_known_by_their_contents(tmp_path):
    config = tiny.config_of(tiny.train_tokenizer("unused", perceptual_network="a.npz"))
    experiment = build_experiment(config)  # the recipe does not read the file
    spec, schema = experiment.spec.to_json(), experiment.schema

    def prepare(path, contents):
        config.perceptual_network = path
        inputs = identity.Inputs(files={"perceptual_network": contents})
        runs.compare(tmp_path / "run", config, spec, schema, inputs).write()

    prepare("a.npz", "1")
    prepare("moved/a.npz", "1")
    with pytest.raises(InputError, match="perceptual_network 'b.npz' has other contents than 'mov"):
        prepare("b.npz", "2")
    changed = "perceptual_network 'moved/a.npz' was changed since the run started"
    with pytest.raises(InputError, match=f"{changed}.* or delete .*, which has no checkpoint yet"):
        prepare("moved/a.npz", "2")


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("folder:images", "folder:images/", True),
        ("folder:images", "folder:./x/../images", True),
        ("folder:images", "folder:other", False),
        ("folder:gs://bucket/a", "folder:gs://bucket/a/", True),
        ("folder:gs://bucket/a", "folder:gs://bucket/b", False),
        ("folder:images", "tokens:images", False),
        ("records:set", "tokens:set/", True),
        ("tfds:mnist@here", "tfds:mnist@./here", True),
        ("tfds:mnist@here", "tfds:cifar10@here", False),
        ("tfds:mnist", "tfds:cifar10", False),
        ("gs://bucket/run/", "gs://bucket/run", True),
        ("digits", "digits", True),
    ],
)
def test_names_of_one_place(a, b, same):
    assert identity.same_place(a, b) == same == identity.same_place(b, a)


# Fingerprints


def test_fingerprints_read_no_image(images):
    before = open_source(f"folder:{images}").fingerprint()
    assert before == open_source(f"folder:{tiny.images()}/", in_memory=True).fingerprint()
    for path in images.rglob("*.png"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert open_source(f"folder:{images}").fingerprint() == before
    (images / "train/cross/0.png").unlink()
    (images / "train/cross/0.png").symlink_to("nowhere")  # such an image is reported when read
    assert open_source(f"folder:{images}").fingerprint() != before


def test_fingerprints_of_prepared_data_sets():
    known = dict(name="tfds:x", class_names=("a",), split="train", records=range(5), version="1")
    fingerprint = lambda **changes: TfdsSource(**{**known, **changes}).fingerprint()
    assert fingerprint() == fingerprint(name="tfds:x:1.*.*")
    others = dict(name="tfds:y"), dict(version="2"), dict(records=range(6)), dict(split="test")
    assert len({fingerprint(), *(fingerprint(**change) for change in others)}) == 5
    train, validate = (open_source("digits", split) for split in ("train", "validate"))
    assert train.fingerprint() != validate.fingerprint()


def test_hosts_that_see_different_images_all_refuse(images, monkeypatch):
    def describe():
        splits = {s: open_source(f"folder:{images}", s) for s in ("train", "validate")}
        return describe_data("folder", splits)

    one = describe()
    add(images)
    other = describe()
    messages = []
    monkeypatch.setattr(processes, "gather_messages", lambda own: messages or [own])
    for data in (one, other):
        check_same_data(data)
    messages[:] = [json.dumps({k: d[k] for k in ("train", "validate")}) for d in (one, one, other)]
    for data in (one, other):
        with pytest.raises(InputError, match="process 0 sees 36 to train.* process 2 sees 37 to t"):
            check_same_data(data)


# Token sets


def tokenize(out, images, *more) -> list[str]:
    return [
        "tokenize",
        f"--tokenizer={tiny.tokenizer_run()}",
        f"--data=folder:{images}",
        f"--out={out}",
        "--transform=random_crop",
        "--batch_size=8",
        "--shard_size=20",
        *more,
    ]


def test_tokenizing_resumes_on_images_that_moved(images, tmp_path):
    out = tmp_path / "tokens"
    assert cli.main(tokenize(out, tiny.images(), "--part=0/2")) == 0
    assert cli.main(tokenize(out, f"{images}/")) == 0
    whole = tmp_path / "whole"
    assert cli.main(tokenize(whole, images)) == 0
    assert {p.name: p.read_bytes() for p in out.glob("*.array_record")} == {
        p.name: p.read_bytes() for p in whole.glob("*.array_record")
    }
    assert read_info(out) == read_info(whole)


@pytest.mark.parametrize(
    "change, words",
    [
        (add, ["36 images to train there, 37 here"]),
        (rename, ["images to train of other names, sizes or labels"]),
        (rewrite, ["images to train of other names, sizes or labels"]),
        (add_to_validation, ["9 images to validate there, 10 here"]),
        (rename_class, ["other classes: added 'zigzag', removed 'cross'"]),
    ],
)
def test_tokenizing_other_images_is_refused(change, words, images, refused, tmp_path):
    out = tmp_path / "tokens"
    assert cli.main(tokenize(out, images, "--part=0/2")) == 0
    change(images)
    refused(tokenize(out, images), out, *words)
    more = ["--seed=1", "--shard_size=10", "--splits=train", "--crops=2"]
    error = refused(tokenize(out, images, *more), out, "another seed: 0 there, 1 here; ")
    assert "another shard_size: 20 there, 10 here; " in error
    assert "other splits: train, validate there, train here" in error


def test_a_token_set_of_an_earlier_version_records_its_images(images, refused, tmp_path):
    out = tmp_path / "tokens"
    assert cli.main(tokenize(out, images)) == 0
    made = (out / "records.json").read_text()
    data = json.loads(made)
    for split in data["splits"].values():
        del split["source_fingerprint"]
    (out / "records.json").write_text(json.dumps(data))
    refused(tokenize(out, tiny.images()), out, "another source")
    assert cli.main(tokenize(out, images)) == 0
    assert (out / "records.json").read_text() == made


def test_a_run_knows_its_token_set_wherever_it_lies(images, refused, tmp_path):
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    assert cli.main(tokenize(tokens, images)) == 0
    few = dict(steps=2, eval_every=2, sample_every=2, checkpoint_every=2)
    train = lambda place: tiny.train(run, **few, data__source=f"tokens:{place}")
    assert cli.main(train(tokens)) == 0
    moved = shutil.move(tokens, tmp_path / "moved")
    assert cli.main(train(f"{moved}/")) == 0
    assert cli.main(tokenize(tokens, images, "--seed=1")) == 0
    refused(train(tokens), run, "other images: the 36 training images have other names, sizes or")
    assert cli.main(tokenize(moved, images, "--crops=2")) == 0
    refused(train(moved), run, "other images: 1 crops of each training image there, 2 here; ")
    assert cli.main([*train(moved), "--allow_data_change"]) == 0
    assert [entry["train"]["crops"] for entry in config_of(run)["data"]] == [1, 2]
    assert len(open_records(moved)) == 36


# Model directories


def test_models_are_not_written_over_runs_and_models(refused, tmp_path):
    run = copy_of(tiny.model_run(), tmp_path)
    refused(["export", f"--model={run}", f"--out={run}"], run, "contains a run: choose another")
    refused(["export", f"--model={run}", f"--out={run}/tokenizer"], run, "is not empty")
    refused(["convert", "--torch=gone.pth", f"--out={run}"], run, "contains a run: choose another")
