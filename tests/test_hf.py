"""hf:NAME_OR_DIR: data sets of the Hugging Face library `datasets`, all of them local here."""

import io
import os
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from hmar_jax.data.sources import (
    SPLITS,
    ImageDecodeError,
    SourceConfig,
    check_outside,
    open_source,
    open_splits,
)
from hmar_jax.errors import InputError
from tests import tiny
from tests.test_zip import assert_alike

datasets = pytest.importorskip("datasets", reason="requires datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 100, 50)).save(file, "PNG")
    return file.getvalue()


def table(files=True, **columns):
    """A data set of single-colored images; columns: as they are given, equally long."""
    count = len(next(iter(columns.values()))) if columns else 10
    images = [{"bytes": png(i), "path": f"{i}.png" if files else None} for i in range(count)]
    made = datasets.Dataset.from_dict({"image": images, **columns})
    return made.cast_column("image", datasets.Image(decode=False))


def saved(made, path) -> str:
    """Its spec, after it was written: a folder of save_to_disk, which needs no cache."""
    made.save_to_disk(str(path))
    return f"hf:{path}"


def colors(source) -> list[int]:
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


def tables_of(folder, order=0) -> "datasets.DatasetDict":
    """The images of a folder with train and validate, in another order of rows."""
    splits = {}
    for split, name in (("train", "train"), ("validate", "validation")):
        files = sorted((folder / split).glob("*/*"))
        np.random.default_rng(order).shuffle(files)
        rows = {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "label": [tiny.CLASSES.index(file.parent.name) for file in files],
        }
        label = datasets.ClassLabel(names=list(tiny.CLASSES))
        features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
        splits[name] = datasets.Dataset.from_dict(rows, features)
    return datasets.DatasetDict(splits)


def write_parquet(tables, folder) -> str:
    (folder / "data").mkdir(parents=True)
    for name, made in tables.items():
        made.to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    return f"hf:{folder}"


# Alike


def test_parquet_files_are_read_as_the_folder(tmp_path, capfd):
    spec = write_parquet(tables_of(tiny.images()), tmp_path / "parquet")
    capfd.readouterr()
    found = open_splits(spec)
    assert capfd.readouterr() == ("", "")  # no progress bars of the library
    assert_alike(open_splits(f"folder:{tiny.images()}"), found)
    pickled = {split: pickle.dumps(source) for split, source in found.items()}
    assert len(pickled["train"]) < 20_000  # no images
    assert_alike(found, {split: pickle.loads(data) for split, data in pickled.items()})


def test_other_local_data_sets_are_read_as_the_folder(tmp_path):
    folder = open_splits(f"folder:{tiny.images()}")
    assert_alike(folder, open_splits(saved(tables_of(tiny.images()), tmp_path / "saved")))
    images = shutil.copytree(tiny.images(), tmp_path / "images")
    (images / "validate").rename(images / "validation")  # as this library calls it
    assert_alike(folder, open_splits(f"hf:{images}"))


def test_the_same_images_are_held_out(tmp_path):
    spec = saved(tables_of(tiny.images())["train"], tmp_path / "saved")
    config = SourceConfig(held_out=0.3)
    folder = open_splits(f"folder:{tiny.images() / 'train'}", config=config)
    assert_alike(folder, open_splits(spec, config=config))


def test_webdataset_shards(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"train-{shard:06d}.tar", "w") as archive:
            for i in range(shard * 5, shard * 5 + 5):
                for ending, data in (("png", png(i)), ("cls", b"%d" % (i % 2))):
                    member = tarfile.TarInfo(f"{i:05d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    (tmp_path / "shards" / "class_names.txt").write_text("1 cat\n")
    train = open_source(f"hf:{tmp_path / 'shards'}", config=SourceConfig(held_out=0.2))
    assert train.class_names == ("0", "cat")
    assert len(train) == 8 and [color % 2 for color in colors(train)] == train.labels.tolist()
    one = open_source(f"hf:{tmp_path / 'shards' / 'train-000001.tar'}")
    assert set(colors(one)) < {5, 6, 7, 8, 9}


def test_rows_without_file_names_are_known_by_number(tmp_path):
    labels = [1, 0] * 6
    first, second = (
        open_splits(saved(table(files, label=labels), tmp_path / str(files)))
        for files in (False, True)
    )
    assert {s: len(first[s]) for s in SPLITS} == {"train": 10, "validate": 2}
    assert first["train"].files[:2] == ("0/000000001", "0/000000005")
    assert first["train"].fingerprint() != second["train"].fingerprint()
    for source in first.values():
        assert [1 - color % 2 for color in colors(source)] == source.labels.tolist()
    rows = [{"bytes": png(i), "path": "image.png"} for i in range(4)]
    same_name = datasets.Dataset.from_dict({"image": rows, "label": [0, 0, 1, 1]})
    assert open_source(saved(same_name, tmp_path / "same")).files[0].startswith("0/00000000")


# Columns


@pytest.mark.parametrize(
    "labels, classes",
    [
        ([10, 9, 10, 9], ("9", "10")),
        (["b", "a", "b", "a"], ("a", "b")),
        ([True, False, True, False], ("False", "True")),
    ],
)
def test_labels_without_declared_classes_are_sorted(tmp_path, labels, classes):
    train, validate = open_splits(saved(table(label=labels), tmp_path / "x")).values()
    assert train.class_names == classes
    known = {
        color: int(label) for s in (train, validate) for color, label in zip(colors(s), s.labels)
    }
    assert known == {0: 1, 1: 0, 2: 1, 3: 0}


def test_columns_are_found_by_type_then_by_name(tmp_path):
    coarse, fine = datasets.ClassLabel(names=["x"]), datasets.ClassLabel(names=["a", "b"])
    made = table(number=[5, 6, 7, 8], fine=[0, 1, 0, 1])
    spec = saved(made.cast_column("fine", fine), tmp_path / "one")
    assert open_source(spec).class_names == ("a", "b")
    assert open_source(f"{spec},label=number").class_names == ("5", "6", "7", "8")
    two = made.cast_column("fine", fine).add_column("coarse", [0] * 4).cast_column("coarse", coarse)
    spec = saved(two, tmp_path / "two")
    with pytest.raises(
        InputError, match=f"columns of labels: fine, coarse; give {spec},label=fine"
    ):
        open_source(spec)
    assert open_source(f"{spec},label=coarse").class_names == ("x",)
    named = two.rename_column("coarse", "label")
    assert open_source(saved(named, tmp_path / "three")).class_names == ("x",)
    for option in ("image=fine", "label=image", "label=none", "train=none", "color=red", "label="):
        with pytest.raises(InputError, match=option.replace("=", ".*")) as error:
            open_source(f"{spec},{option}")
        assert "\n" not in str(error.value)


def test_bytes_without_the_type_of_an_image(tmp_path):
    """As other programs write Parquet files."""
    made = datasets.Dataset.from_dict({"img": [png(i) for i in range(4)], "label": [0, 0, 1, 1]})
    found = open_splits(saved(made, tmp_path / "bytes"))
    assert sorted(color for source in found.values() for color in colors(source)) == [0, 1, 2, 3]
    rows = [{"bytes": png(i), "path": f"{i}.png"} for i in range(4)]
    made = datasets.Dataset.from_dict({"img": rows, "label": [0, 0, 1, 1]})
    made.to_parquet(str(tmp_path / "x.parquet"))
    assert open_source(f"hf:{tmp_path / 'x.parquet'}").files[-1] == "1/3.png"
    none = datasets.Dataset.from_dict({"a": [1], "b": ["x"]})
    with pytest.raises(InputError, match="must have a column of images; it has a, b"):
        open_source(saved(none, tmp_path / "none"))


def test_a_data_set_without_labels(tmp_path):
    spec = saved(table(text=["a picture"] * 10), tmp_path / "x")
    assert open_source(spec).class_names == ("all",)
    with pytest.raises(InputError, match=f"columns image, text; if .* give {spec},label=COLUMN"):
        open_source(spec, need_classes=True)


def test_splits(tmp_path):
    label = datasets.ClassLabel(names=["a", "b"])
    made = lambda labels: table(label=labels).cast_column("label", label)
    tables = {"train": made([0, 1] * 5), "test": made([-1] * 3)}
    spec = saved(datasets.DatasetDict(tables), tmp_path / "contest")
    assert {s: len(x) for s, x in open_splits(spec).items()} == {"train": 8, "validate": 2}
    with pytest.raises(InputError, match="must have a label; 3 of the 3 in its split test"):
        open_splits(f"{spec},validate=test")
    more = {"other": made([0, 1] * 3), "test": made([0, 1]), "val": made([1])}
    spec = saved(datasets.DatasetDict(more), tmp_path / "more")
    with pytest.raises(InputError, match="must have a split train; it has other, test, val"):
        open_splits(spec)
    found = open_splits(f"{spec},train=other")
    assert {s: len(x) for s, x in found.items()} == {"train": 6, "validate": 1}
    found = open_splits(f"{spec},train=other,validate=test")
    assert {s: len(x) for s, x in found.items()} == {"train": 6, "validate": 2}
    foreign = datasets.DatasetDict(train=table(label=["a"] * 9), test=table(label=["b"]))
    with pytest.raises(InputError, match="split test has class 'b' and its split train does not"):
        open_splits(saved(foreign, tmp_path / "foreign"))


def test_declared_classes_without_rows(tmp_path):
    label = datasets.ClassLabel(names=["a", "b", "c"])
    spec = saved(table(label=[0, 2] * 3).cast_column("label", label), tmp_path / "x")
    with pytest.raises(InputError, match="each class of .* there are none in b"):
        open_source(spec)
    source = open_source(spec, config=SourceConfig(allow_empty_classes=True))
    assert source.class_names == ("a", "b", "c") and set(source.labels.tolist()) == {0, 2}


# Reading


def test_unreadable_rows_are_broken_images(tmp_path):
    rows = [{"bytes": png(i), "path": f"{i:02d}.png"} for i in range(60)]
    rows[3] = {"bytes": b"<html>", "path": "03.png"}
    rows[5] = {"bytes": None, "path": str(tmp_path / "05.png")}
    rows[7] = None
    made = datasets.Dataset.from_dict({"image": rows})
    made.to_parquet(str(tmp_path / "x.parquet"))
    spec = f"hf:{tmp_path / 'x.parquet'}"
    errors = []
    for source in open_splits(spec).values():
        for i in range(len(source)):
            try:
                source[i]
            except ImageDecodeError as error:
                errors.append(str(error))
    first, second, third = sorted(errors)
    assert first.startswith(f"{spec}/train[3] 03.png: not an image of a known format")
    assert second.startswith(f"{spec}/train[5] 05.png: No such file")
    assert third == f"{spec}/train[7]: the row has no image"


def test_max_pixels(tmp_path):
    spec = saved(table(label=[0] * 4), tmp_path / "x")
    with pytest.raises(ImageDecodeError, match="6 x 5 pixels are more than max_pixels=29"):
        open_source(spec, config=SourceConfig(max_pixels=29))[0]


# Errors


def refused(spec, *words):
    with pytest.raises(InputError) as error:
        open_source(spec)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    refused("hf:user/name", "hf:user/name cannot be loaded: the Hub cannot be reached")
    refused(f"hf:{tmp_path / 'gone'}", "gone does not exist", "USER/NAME")
    (tmp_path / "empty").mkdir()
    refused(f"hf:{tmp_path / 'empty'}", "empty cannot be loaded")
    (tmp_path / "x.json").write_text("{}")
    refused(f"hf:{tmp_path / 'x.json'}", "must be a folder, or a file that ends with .parquet")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1 and no more")
    refused(f"hf:{tmp_path / 'bad'}", "bad cannot be loaded")
    refused(f"folder:{tmp_path / 'bad'}", "no images in", f"did you mean hf:{tmp_path / 'bad'}?")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hf:user/name", 'requires datasets: pip install "hmar_jax[hf]"')


def test_nothing_is_written_into_a_data_set(tmp_path):
    for spec in (f"hf:{tmp_path}", f"hf:{tmp_path},label=x"):
        with pytest.raises(InputError, match="workdir must not lie in hf:"):
            check_outside(spec, tmp_path / "runs" / "one", "workdir")
    check_outside("hf:user/name", tmp_path, "workdir")
    check_outside(f"hf:{tmp_path / 'data'}", os.fspath(tmp_path / "run"), "workdir")


def test_a_validation_split_that_the_library_passes_over_is_refused(tmp_path):
    """Its images would be neither trained on nor validated on."""
    root = tmp_path / "images"
    shutil.copytree(tiny.images(), root)
    with pytest.raises(InputError, match="does not read .*validate, .*give folder:"):
        open_splits(f"hf:{root}")
    (root / "validate").rename(root / "validation")
    assert len(open_splits(f"hf:{root}")["validate"]) == 9


def test_classes_with_names_of_splits_are_refused(tmp_path):
    """The library would read these images alone."""
    for name, folder in zip(tiny.CLASSES, ("bus", "train", "tree")):
        shutil.copytree(tiny.images() / "train" / name, tmp_path / "images" / folder)
    with pytest.raises(InputError, match="does not read .*bus, .*if these are classes, give fol"):
        open_splits(f"hf:{tmp_path / 'images'}")
