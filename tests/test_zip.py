"""zip:FILE: archives of images, read in place as the folders that they were made of."""

import io
import json
import logging
import os
import pickle
import shutil
import zipfile
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from hmar_jax.cli import main as cli
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.loader import make_loader
from hmar_jax.data.sources import (
    SPLITS,
    ImageDecodeError,
    Source,
    SourceConfig,
    open_source,
    open_splits,
)
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError
from tests import tiny


def png(value=0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 100, 50)).save(file, "PNG")
    return file.getvalue()


def write(path, names, method=zipfile.ZIP_STORED, **contents):
    """An archive of images by these names, and of other files; returns its spec."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for number, name in enumerate(names):
            archive.writestr(name, b"" if name.endswith("/") else png(number))
        for name, text in contents.items():
            archive.writestr(name.replace("__", "/").replace("_json", ".json"), text)
    return f"zip:{path}"


def archive_of(folder, path, method=zipfile.ZIP_STORED, top="", more=()):
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in folder.rglob("*"):
            archive.write(file, f"{top}{file.relative_to(folder)}")
        for name in more:
            archive.writestr(name, b"not for us")
    return f"zip:{path}"


def assert_alike(a, b):
    for split in SPLITS:
        x, y = a[split], b[split]
        assert isinstance(y, Source) and len(x) == len(y) > 0
        assert x.files == y.files and x.class_names == y.class_names
        assert x.labels.tolist() == y.labels.tolist()
        assert x.fingerprint() == y.fingerprint()
        for i in range(len(x)):
            np.testing.assert_array_equal(x[i]["image"], y[i]["image"])
            assert x[i]["label"] == y[i]["label"]


LEFTOVERS = ("__MACOSX/images/._train", ".DS_Store", "images/train/cross/._0.png")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top, more", [("", ()), ("images/", LEFTOVERS)])
def test_an_archive_is_read_as_the_folder(tmp_path, method, top, more):
    spec = archive_of(tiny.images(), tmp_path / "a.zip", method, top, more)
    assert_alike(open_splits(f"folder:{tiny.images()}"), open_splits(spec))


@pytest.mark.parametrize("rules", [1, 2])
def test_the_same_images_are_held_out(tmp_path, rules):
    folder, config = tiny.images() / "train", SourceConfig(held_out=0.3, folder_rules=rules)
    spec = archive_of(folder, tmp_path / "a.zip")
    assert_alike(
        *(open_splits(source, config=config) for source in (f"folder:{folder}", spec)),
    )


@pytest.mark.parametrize(
    "names, classes",
    [
        (("a/1.png", "a/2.png"), ("a",)),  # a single class
        (("x/a/1.png", "x/b/2.png", "README"), ("a", "b")),
        (("x/y/a/1.png", "x/y/b/2.png"), ("a", "b")),
        (("train/a/1.png", "train/b/2.png"), ("a", "b")),
        (("x/train/a/1.png", "x/train/b/2.png"), ("a", "b")),
        (("x/a/1.png", "y/a/2.png"), ("x", "y")),  # nested folders of two classes
        (("1.png", "2.png"), ("all",)),
        (("x/val/a/1.png", "x/train/a/2.png"), ("a",)),
    ],
)
def test_the_folder_around_everything_is_no_class(tmp_path, names, classes):
    source = open_source(write(tmp_path / "a.zip", names))
    assert source.class_names == classes


def test_class_names_and_skipped_files(tmp_path, caplog):
    path = tmp_path / "a.zip"
    write(path, ("data/n1/1.png", "data/n1/deep/2.PNG", "data/n2/3.png"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data/class_names.txt", "n1 golden retriever\n")
        archive.writestr("data/n2/notes.txt", "")
        archive.writestr("data/empty/", "")
        link = zipfile.ZipInfo("data/n2/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "3.png")
    with pytest.raises(InputError, match="each class folder of .*there are none in empty"):
        open_source(f"zip:{path}")
    with caplog.at_level(logging.INFO, "hmar_jax"):
        source = open_source(f"zip:{path}", config=SourceConfig(allow_empty_classes=True))
    assert source.class_names == ("empty", "golden_retriever", "n2")
    validate = open_source(f"zip:{path}", "validate", config=SourceConfig(allow_empty_classes=True))
    files = sorted(source.files + validate.files)
    assert files == ["n1/1.png", "n1/deep/2.PNG", "n2/3.png"]
    assert "2 files that are not images (1 .txt, 1 link in an archive)" in caplog.text


# dataset.json

NAMES = ("00000/img0.png", "00000/img1.png", "00001/img2.png", "00001/img3.png")
PAIRS = [["00000/img0.png", 2], ["00000/img1.png", 0], ["00001/img2.png", 2], ["00001/img3.png", 1]]


@pytest.mark.parametrize("labels", [PAIRS, dict(PAIRS), [[name, float(x)] for name, x in PAIRS]])
@pytest.mark.parametrize("top", ["", "cifar/"])
def test_labels_of_dataset_json(tmp_path, labels, top):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(NAMES):
            archive.writestr(top + name, png(number))
        archive.writestr(top + "dataset.json", json.dumps({"labels": labels}))
        archive.writestr(top + "class_names.txt", "2 ship\n")
    found = open_splits(f"zip:{path}")
    of_files = {
        file: (int(label), source[i]["label"], source[i]["image"][0, 0, 0])
        for source in found.values()
        for i, (file, label) in enumerate(zip(source.files, source.labels))
    }
    assert of_files == {name: (x, x, NAMES.index(name)) for name, x in PAIRS}
    assert found["train"].class_names == ("0", "1", "ship")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "out")
    assert_alike(found, open_splits(f"folder:{tmp_path / 'out' / top}"))


def test_dataset_json_without_labels(tmp_path):
    spec = write(tmp_path / "a.zip", NAMES, dataset_json='{"labels": null}')
    assert open_source(spec).class_names == ("all",)
    with pytest.raises(InputError, match='dataset.json must have class ids.*"labels" are null'):
        open_source(spec, need_classes=True)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1", "is not JSON"),
        ("[1]", 'must have "labels"'),
        ('{"labels": 3}', 'must have "labels".*got 3'),
        ('{"labels": [["00000/img0.png", 1]]}', "3 of 4 have none, such as 00000/img1.png"),
        ('{"labels": [["00000/img0.png", [0.5, 0.5]]]}', r"pairs of .*got \['00000/img0.png'"),
        ('{"labels": [["00000/img0.png", -1]]}', "got .*-1"),
        ('{"labels": [["00000/img0.png", 1e300]]}', "got .*1e"),
        ('{"labels": [["00000/img0.png", 1e400]]}', "got .*inf"),
        ('{"labels": [["00000/img0.png", NaN]]}', "got .*nan"),
        ('{"labels": [["00000/img0.png", 1], ["00000/img0.png", 0]]}', "one label.*has 1 and 0"),
        ('{"images": [], "annotations": []}', "another kind of file, rename it"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        open_source(write(tmp_path / "a.zip", NAMES, dataset_json=text))


def test_names_with_a_dot_in_front(tmp_path):
    """As find and glob give them."""
    labels = json.dumps({"labels": [[f"./{name}", label] for name, label in PAIRS]})
    assert open_source(write(tmp_path / "a.zip", NAMES, dataset_json=labels)).num_classes == 3


def test_one_dataset_json_does_not_mix_the_splits(tmp_path):
    """Validation images would have been trained on."""
    names = [f"{split}/{i}.png" for split in ("train", "val") for i in range(3)]
    inner = {
        split: json.dumps({"labels": [[f"{i}.png", i % 2] for i in range(3)]})
        for split in ("train", "val")
    }
    outer = json.dumps({"labels": [[name, 0] for name in names]})
    path = tmp_path / "a.zip"
    with pytest.raises(InputError, match="dataset.json in train and one in val, or neither"):
        open_source(write(path, names, dataset_json=outer))
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, png(number))
        for split, text in inner.items():
            archive.writestr(f"{split}/dataset.json", text)
    found = open_splits(f"zip:{path}")
    assert [len(found[split]) for split in ("train", "validate")] == [3, 3]


def test_labels_without_image_are_reported(tmp_path, caplog):
    labels = json.dumps({"labels": [*PAIRS, ["gone.png", 1]]})
    open_source(write(tmp_path / "a.zip", NAMES, dataset_json=labels))
    assert "1 of 5 labels name no image: 'gone.png'" in caplog.text


# Formats


def test_members_beyond_4_gib(tmp_path):
    path = tmp_path / "a.zip"
    with open(path, "wb") as file:
        file.truncate(5 << 30)  # a hole
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(3):
            with archive.open(f"a/{number}.png", "w", force_zip64=True) as member:
                member.write(png(number))
    source = open_source(f"zip:{path}")
    assert [int(source[i]["image"][0, 0, 0]) for i in range(2)] == [
        int(file[2]) for file in source.files
    ]


def test_names_of_other_systems(tmp_path):
    def member(archive, name, system, flag):
        info = zipfile.ZipInfo("x" * len(name))
        info.create_system = system
        archive.writestr(info, png())
        renamed.append((b"x" * len(name), name))

    renamed: list[tuple[bytes, bytes]] = []
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        member(archive, "café/1.png".encode(), 3, 0)
        member(archive, "cafétéria/1.png".encode("cp437"), 3, 0)
        member(archive, b"windows\\1.png", 0, 0)
        member(archive, b"unix\\folder/1.png", 3, 0)
    data = path.read_bytes()
    for old, new in sorted(renamed, key=lambda pair: -len(pair[0])):
        data = data.replace(old, new)
    path.write_bytes(data)
    names = open_source(f"zip:{path}", config=SourceConfig(allow_empty_classes=True)).class_names
    assert set(names) == {"café", "cafétéria", "windows", "unix\\folder"}


def test_damaged_members_are_broken_images(tmp_path):
    path = tmp_path / "a.zip"
    names = tuple(f"a/{number}.png" for number in range(60))
    write(path, names, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        offsets = {name: archive.getinfo(name).header_offset for name in names}
    data = bytearray(path.read_bytes())
    data[offsets["a/7.png"] + 50] ^= 0x55  # contents
    data[offsets["a/9.png"]] = 0  # header
    path.write_bytes(data)
    source, broken = open_source(f"zip:{path}"), DecodeErrorLog()
    for name in ("a/7.png", "a/9.png"):
        with pytest.raises(ImageDecodeError, match=f"{path}/{name}: damaged in the archive"):
            source[source.files.index(name)]
    batches = make_loader(
        source, Transform(4, "random_crop"), batch_size=2, seed=0, train=True, broken=broken
    )
    for batch, _ in zip(batches, range(len(source) // 2)):
        assert batch["image"].shape == (2, 4, 4, 3)
    assert {os.path.basename(file) for file, _ in broken.items} == {"7.png", "9.png"}


@pytest.mark.parametrize("method, name", [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA")])
def test_other_compression_is_refused(tmp_path, method, name):
    with pytest.raises(InputError, match=f"stored or deflated; a/0.png .* by {name}; unpack it"):
        open_splits(write(tmp_path / "a.zip", ("a/0.png", "a/1.png"), method))


def test_encrypted_archives_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    write(path, ("a/0.png", "a/1.png"))
    data = path.read_bytes().replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")
    path.write_bytes(data)
    with pytest.raises(InputError, match="must not be encrypted; a/0.png is"):
        open_splits(f"zip:{path}")


def test_what_is_no_archive_of_images(tmp_path):
    path = tmp_path / "a.zip"
    write(path, ("a/0.png", "a/1.png"))
    whole = path.read_bytes()

    def refused(words, spec=f"zip:{path}", data=None):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(InputError, match=words) as error:
            open_source(spec)
        assert "\n" not in str(error.value)

    refused("must be a complete zip archive: .*incomplete; copy it again", data=whole[:-30])
    refused("must be a complete zip archive: File is not", data=b"<html>404</html>")
    refused("must be a complete zip archive: File is not", data=b"")
    shutil.make_archive(str(tmp_path / "b"), "tar", tmp_path)
    refused("must be a complete zip archive: it is a tar", spec=f"zip:{tmp_path / 'b.tar'}")
    (tmp_path / "a.z01").touch()
    refused("the last part of a split one; zip -s 0 .*a.zip --out WHOLE.zip", data=whole[60:])
    refused("does not exist", spec=f"zip:{tmp_path / 'c.zip'}")
    refused("must be a local file", spec="zip:gs://bucket/a.zip")
    refused(f"is a folder.*did you mean folder:{tiny.images()}", spec=f"zip:{tiny.images()}")
    write(path, (), notes_json="{}")
    refused("no images in .*found 1 file that is not an image")
    write(path, ("a/0.png", "1.png"))
    refused(r"has images \(1.png\) next to folders")
    refused(f"is a file, not a folder; did you mean zip:{path}", spec=f"folder:{path}")
    refused(f"unknown data .*did you mean zip:{path}", spec=str(path))
    (tmp_path / "alone").mkdir()
    moved = path.rename(tmp_path / "alone/a.zip")
    refused(f"no images in .*did you mean zip:{moved}", spec=f"folder:{moved.parent}")


# Threads and processes


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # the child calls nothing of JAX
def test_each_process_has_its_own_handle(tmp_path):
    source = open_source(archive_of(tiny.images(), tmp_path / "a.zip", zipfile.ZIP_DEFLATED))
    want = [source[i]["image"] for i in range(len(source))]
    assert not {"_descriptor", "_lock"} & source.archive.__getstate__().keys()
    other = pickle.loads(pickle.dumps(source))
    with futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: other[i % len(other)]["image"], range(400)))
    assert all((image == want[i % len(want)]).all() for i, image in enumerate(found))
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:  # reads by the inherited handle, while this process reads too
        same = all((source[i]["image"] == want[i]).all() for i in range(len(want)))
        os.write(writer, b"1" if same else b"0")
        os._exit(0)
    assert all((source[i]["image"] == want[i]).all() for i in range(len(want)))
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    os.close(reader), os.close(writer)


def test_an_archive_that_was_replaced_is_not_read(tmp_path):
    spec = write(tmp_path / "a.zip", ("a/0.png", "a/1.png"))
    pickled = pickle.dumps(open_source(spec))
    write(tmp_path / "a.zip", ("a/0.png", "a/1.png", "a/2.png"))
    with pytest.raises(InputError, match="was changed after it had been listed"):
        pickle.loads(pickled)[0]


# Commands


@pytest.mark.slow
def test_tokens_of_an_archive_are_those_of_the_folder(tmp_path):
    archive = archive_of(tiny.images(), tmp_path / "a.zip")
    one, two = tmp_path / "one", tmp_path / "two"
    common = [
        "tokenize",
        f"--tokenizer={tiny.tokenizer_run()}",
        "--transform=random_crop",
        "--batch_size=8",
    ]
    with tiny.cached():
        assert cli.main([*common, f"--data=folder:{tiny.images()}", f"--out={one}"]) == 0
        assert cli.main([*common, f"--data={archive}", f"--out={two}"]) == 0
        # One may replace the other, also where the set is complete.
        assert cli.main([*common, f"--data=folder:{tiny.images()}", f"--out={two}"]) == 0
    files = [{p.name: p.read_bytes() for p in out.glob("*.array_record")} for out in (one, two)]
    assert files[0] == files[1] and files[0]
