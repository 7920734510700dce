"""Folders as people have them: many formats, files that are no images, links, odd names."""

import logging
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image

from hmar_jax.data.decoding import ImageDecodeError, decode_image, image_endings
from hmar_jax.data.listing import describe_skipped
from hmar_jax.data.sources import SourceConfig, open_source, open_splits
from hmar_jax.errors import InputError, printable
from tests import tiny


def save(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (200, 100, 50)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images."""
    for name in ("a", "b"):
        for i in range(3):
            save(tmp_path / "train" / name / f"{i}.png")
        save(tmp_path / "validate" / name / "0.png")
    return tmp_path


def files(folder, **config):
    return list(open_source(f"folder:{folder}", config=SourceConfig(**config)).files)


UNCHANGED = [f"{name}/{i}.png" for name in ("a", "b") for i in range(3)]


# Endings


@pytest.mark.parametrize(
    "ending",
    "jfif jpe JPG JpEg avif jp2 j2k ppm pgm pnm tif TIFF webp bmp dib gif apng tga ico pcx sgi qoi "
    "icns xbm".split(),
)
def test_every_format_that_is_decoded_is_listed(folder, ending):
    path = folder / "train" / "a" / f"x.{ending}"
    image = Image.new("1" if ending == "xbm" else "RGB", (16, 16), "white")
    formats = {".apng": "PNG", ".jfif": "JPEG", ".jpe": "JPEG", ".j2k": "JPEG2000"}
    image.save(path, format=formats.get(path.suffix))
    assert f"a/x.{ending}" in files(folder)
    assert decode_image(str(path)).shape[2] == 3


def test_formats_without_decoder_are_not_listed():
    endings = image_endings()
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"} <= endings
    # Pillow lists these: programs, films, containers that it only recognises, files that it writes.
    assert not endings & {".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".wmf", ".pdf"}


def test_skipped_files_are_counted_once_by_ending(folder, caplog):
    for name in ("notes.txt", "more.TXT", "x.json", "Makefile"):
        (folder / "train" / "a" / name).write_text("x")
    (folder / "validate" / "b" / "x.json").write_text("x")
    with caplog.at_level(logging.INFO, "hmar_jax"):
        open_splits(f"folder:{folder}")
    (message,) = caplog.messages
    assert message == (
        f"folder:{folder}: skipped 5 files that are not images (2 .json, 2 .txt, 1 without ending)"
    )


def test_a_folder_of_images_alone_says_nothing(folder, caplog):
    (folder / "train" / "class_names.txt").write_text("a cat\nb dog\n")
    with caplog.at_level(logging.INFO, "hmar_jax"):
        open_splits(f"folder:{folder}")
    assert caplog.messages == []


def test_heic_files_are_named_with_the_cure(folder, caplog):
    if ".heic" in image_endings():
        pytest.skip("pillow-heif is installed")
    for name in ("x.heic", "y.HEIC"):
        (folder / "train" / "a" / name).write_bytes(b"x")
    with caplog.at_level(logging.INFO, "hmar_jax"):
        open_source(f"folder:{folder}")
    assert "2 .heic" in caplog.text and "pip install pillow-heif" in caplog.text

    only = folder / "only"
    (only / "a").mkdir(parents=True)
    (only / "a" / "x.heic").write_bytes(b"x")
    with pytest.raises(InputError, match="no images in .*1 .heic.* pip install pillow-heif"):
        open_source(f"folder:{only}")


def test_heic_files_are_read_with_pillow_heif(folder):
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    save(folder / "train" / "a" / "x.heic")
    assert "a/x.heic" in files(folder)
    assert abs(decode_image(str(folder / "train/a/x.heic"))[5, 5].astype(int) - 100).max() < 120


def test_many_kinds_are_summed_up():
    text = describe_skipped({f".{letter}": 1 for letter in "abcdefghij"})
    assert text.startswith("10 files that are not images (1 .a, ") and "2 other kinds" in text


# Folders and files that are not the user's


def test_what_systems_leave_is_ignored(folder, caplog):
    for name in (
        "__MACOSX/a/0.png",
        ".git/0.png",
        ".ipynb_checkpoints/0-checkpoint.png",
        "@eaDir/0.png",
        "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "a/._0.png",
        "$RECYCLE.BIN/0.png",
        "System Volume Information/0.png",
        "lost+found/0.png",
    ):
        save(folder / "train" / name, format="PNG")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (folder / "train" / name).write_text("x")
        (folder / "train" / "a" / name).write_text("x")
    with caplog.at_level(logging.INFO, "hmar_jax"):
        source = open_source(f"folder:{folder}")
    assert source.class_names == ("a", "b") and list(source.files) == UNCHANGED
    assert caplog.messages == []


def test_class_folders_without_images_are_refused_unless_allowed(folder):
    (folder / "train" / "c").mkdir()
    (folder / "train" / "d").mkdir()
    (folder / "train" / "d" / "x.heif").write_text("x")
    with pytest.raises(InputError, match="there are none in c, d; .*allow_empty_classes.*1 .heif"):
        open_source(f"folder:{folder}")
    allowed = open_source(f"folder:{folder}", config=SourceConfig(allow_empty_classes=True))
    assert allowed.class_names == ("a", "b", "c", "d") and list(allowed.files) == UNCHANGED


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="/train/b cannot be listed: Permission denied"):
        open_source(f"folder:{folder}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to read as")
def test_folders_and_files_of_another_user(folder):
    """A real process of a user who may not read them."""
    program = (
        "import os, sys\n"
        "from hmar_jax.data.sources import open_source\n"
        "open_source(sys.argv[2])[0]  # whatever is imported late\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    source = open_source(sys.argv[1]); print(len(source)); source[0]\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    with tempfile.TemporaryDirectory() as other:  # pytest's own are for its user alone
        os.chmod(other, 0o755)
        theirs = shutil.copytree(folder, pathlib.Path(other) / "images")
        theirs.chmod(0o755)
        command = [sys.executable, "-c", program, f"folder:{theirs}", f"folder:{folder}"]

        def read():
            return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

        (theirs / "train" / "a" / "0.png").chmod(0)
        text = read()
        assert text.startswith("6\nImageDecodeError") and text.endswith(": Permission denied\n")
        (theirs / "train" / "b").chmod(0)
        assert "InputError" in (text := read()) and "/train/b cannot be listed: Perm" in text


@pytest.mark.parametrize("names", [("Train", "Val"), ("TRAIN", "test"), ("training", "valid")])
def test_splits_by_other_names_are_no_classes(tmp_path, names):
    for name in names:
        save(tmp_path / name / "a" / "0.png")
        save(tmp_path / name / "b" / "0.png")
    with pytest.raises(InputError, match=f"must be classes, or .*got {', '.join(sorted(names))}"):
        open_source(f"folder:{tmp_path}")


def test_a_class_called_train_is_not_taken_as_all_images(tmp_path):
    """CIFAR-100, COCO and PASCAL VOC have one."""
    for name, folder in zip(tiny.CLASSES, ("bus", "train", "tree")):
        shutil.copytree(tiny.images() / "train" / name, tmp_path / "a" / folder)
    archive = shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "a")
    for spec in (f"folder:{tmp_path / 'a'}", f"zip:{archive}"):
        with pytest.raises(InputError, match="if train is a class, rename its folder to train_"):
            open_splits(spec)
    (tmp_path / "a" / "train").rename(tmp_path / "a" / "train_")
    (tmp_path / "a" / "class_names.txt").write_text("train_ train\n")
    found = open_splits(f"folder:{tmp_path / 'a'}")["train"]
    assert found.class_names == ("bus", "train", "tree")


def test_valid_is_a_validation_folder(folder):
    (folder / "validate").rename(folder / "valid")
    assert [len(s) for s in open_splits(f"folder:{folder}").values()] == [6, 2]


# Links


def test_broken_links_to_images_are_unreadable_images(folder):
    (folder / "train" / "a" / "gone.png").symlink_to("nowhere.png")
    (folder / "train" / "a" / "self.png").symlink_to("self.png")
    source = open_source(f"folder:{folder}")
    for name, reason in (("gone", "No such file"), ("self", "Too many levels of symbolic links")):
        with pytest.raises(ImageDecodeError, match=reason):
            source[source.files.index(f"a/{name}.png")]


def test_a_broken_link_in_place_of_a_class_is_refused(folder):
    (folder / "train" / "c").symlink_to(folder / "nowhere")
    with pytest.raises(InputError, match="leads nowhere, c; repair or remove it"):
        open_source(f"folder:{folder}")


def test_links_to_class_folders_and_loops(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "0.png")
    (folder / "train" / "c").symlink_to(elsewhere)
    (folder / "train" / "loop").symlink_to(folder / "train")
    (folder / "train" / "a" / "up").symlink_to(folder / "train")
    (folder / "train" / "b" / "other").symlink_to(folder / "train" / "b")
    source = open_source(f"folder:{folder}")
    assert source.class_names == ("a", "b", "c")
    assert list(source.files) == [*UNCHANGED, "c/0.png"]


def test_pipes_are_not_opened(folder, caplog):
    os.mkfifo(folder / "train" / "a" / "pipe.png")
    assert stat.S_ISFIFO((folder / "train" / "a" / "pipe.png").stat().st_mode)
    with caplog.at_level(logging.INFO, "hmar_jax"):
        assert files(folder) == UNCHANGED
    assert "1 pipe or device" in caplog.text


def test_the_same_image_in_nested_folders_counts_twice(folder):
    save(folder / "train" / "a" / "more" / "0.png")
    assert files(folder) == [*UNCHANGED[:3], "a/more/0.png", *UNCHANGED[3:]]


# Names


def test_names_of_any_bytes(folder):
    save(folder / "train" / "two words" / "x y.png")
    save(folder / "train" / "two\nlines" / "0.png")
    latin = os.fsencode(folder / "train") + b"/caf\xe9"
    os.mkdir(latin)
    with open(latin + b"/brok\xe9n.png", "wb"):
        pass
    persian = "\u0645\u06cc\u200c\u0631\u0648"  # with a joiner, which is not a letter
    save(folder / "train" / persian / "0.png")
    source = open_source(f"folder:{folder}")
    assert source.class_names == ("a", "b", r"caf\xe9", r"two\nlines", "two words", persian)
    for index, file in enumerate(source.files):
        if not file.endswith("n.png"):
            assert source[index]["image"].shape == (10, 12, 3)
    broken = next(i for i, file in enumerate(source.files) if file.endswith("n.png"))
    with pytest.raises(ImageDecodeError) as error:
        source[broken]
    assert str(error.value).endswith(r"train/caf\xe9/brok\xe9n.png: the file is empty")
    str(error.value).encode()  # can be written to a log


def test_printable_names():
    assert printable("a b é 猫") == "a b é 猫"
    assert printable("a\nb\x1b[31m\udcff\u2028") == r"a\nb\x1b[31m\xff\u2028"


# As version 0.1 listed folders


def test_rules_of_version_0_1_list_what_they_listed(folder):
    for name in ("x.jfif", "y.JPEG", ".z.png", "m.avif"):
        save(folder / "train" / "a" / name, format="JPEG")
    save(folder / "train" / "__MACOSX" / "0.png")
    (folder / "train" / "c").mkdir()
    (folder / "train" / "loop").symlink_to(folder / "train")
    source = open_source(f"folder:{folder}", config=SourceConfig(folder_rules=1))
    assert source.class_names == ("__MACOSX", "a", "b", "c", "loop")
    assert list(source.files) == ["__MACOSX/0.png", *UNCHANGED[:3], "a/y.JPEG", *UNCHANGED[3:]]
    np.testing.assert_array_equal(source.labels, [0, 1, 1, 1, 1, 2, 2, 2])
