"""Run directories with files that are damaged, or are something else than they should be."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from hmar_jax.cli import main as cli
from hmar_jax.data import encoding
from hmar_jax.data.folder import is_among_images
from hmar_jax.io import checkpoints
from hmar_jax.io.locks import DirectoryLock
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    """A run that was interrupted after step 60 of 80."""
    workdir = shutil.copytree(tiny.model_run(), tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "80")
    return workdir


def resume(workdir) -> int:
    with tiny.cached():
        return cli.main(tiny.train(workdir))


def replace_by_folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").touch()


def test_no_log_that_cannot_be_written_keeps_a_run_from_resuming(run, capfd):
    replace_by_folder(run / "metrics.jsonl")
    replace_by_folder(run / "log.txt")
    assert resume(run) == 0
    text = capfd.readouterr().err
    assert "warning: this log is not kept in log.txt, training continues: " in text
    assert text.count("warning: writing metrics failed, training continues: ") == 1
    assert checkpoints.steps_of_run(run)[-1] == 80
    with tiny.cached():
        assert cli.main(["info", f"--model={run}"]) == 0
    assert "finished, step 80 of 80" in capfd.readouterr().out


def test_metrics_with_damaged_lines_are_read_without_them(run, capfd):
    """A machine that crashes leaves blocks of null bytes, or those of another file."""
    path = run / "metrics.jsonl"
    good = [line for line in path.read_bytes().splitlines() if b'"step": 20,' in line]
    path.write_bytes(b"\xff\xfe\x80 not text\n" + b"\n".join(good) + b"\n" + b"\0" * 600 + b"\n")
    with tiny.cached():
        assert cli.main(["info", f"--model={run}"]) == 0
    assert "(step 20)" in capfd.readouterr().out
    assert resume(run) == 0
    lines = path.read_bytes().splitlines()
    assert lines[0] == good[0] and b'"step": 80,' in lines[-1]


def test_a_file_in_place_of_the_checkpoints_is_refused_before_training(run, capfd):
    """It was found at the first save, by a traceback."""
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("moved to the other disk")
    assert resume(run) == 2
    text = capfd.readouterr().err
    assert f"{run}/checkpoints must be a directory; it is a file" in text.splitlines()[-1]
    assert "step 1 of" not in text


def test_a_file_in_place_of_the_samples_is_named(run, capfd):
    shutil.rmtree(run / "samples")
    (run / "samples").touch()
    assert resume(run) == 2
    assert f"cannot write {run}/samples in workdir" in capfd.readouterr().err


def test_a_name_that_the_libraries_cannot_take_is_refused(tmp_path, capfd):
    workdir = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with tiny.cached():
        assert cli.main(tiny.train(workdir)) == 2
    assert (
        f"the name of workdir must be UTF-8 text, which the libraries that write there need; "
        f"got {tmp_path}/\\xff" in capfd.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_images_without_its_kind_gets_a_suggestion(tmp_path, capfd):
    with tiny.cached():
        assert cli.main(tiny.train(tmp_path / "run", data__source=tiny.images())) == 2
    assert f"did you mean folder:{tiny.images()}?" in capfd.readouterr().err


@pytest.mark.parametrize("change", [dict(steps=2**31), dict(steps=0, epochs=2**31)])
def test_more_steps_than_the_devices_count(change, tmp_path, capfd):
    with tiny.cached():
        assert cli.main(tiny.train(tmp_path / "run", **change)) == 2
    assert "2147483647" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_command_without_standard_streams_trains(tmp_path):
    """Its files took the numbers of the closed streams, and it ended with status 1."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "hmar_jax", *tiny.train(workdir, steps=4)]
    shell = ["bash", "-c", f"{shlex.join(command)} <&- >&- 2>&-"]
    assert subprocess.run(shell, env=tiny.ENVIRONMENT, cwd=ROOT, timeout=120).returncode == 0
    assert checkpoints.steps_of_run(workdir)[-1] == 4
    assert "step 4 of 4: " in (workdir / "log.txt").read_text()


@pytest.fixture
def class_folders(tmp_path):
    return shutil.copytree(tiny.images() / "train", tmp_path / "images")


def tokenize(images, out, *more) -> list[str]:
    data = [f"--tokenizer={tiny.tokenizer_run()}", f"--data=folder:{images}", f"--out={out}"]
    return ["tokenize", *data, "--transform=random_crop", *more]


def test_results_do_not_become_a_class(class_folders, capfd):
    """A run or a token set among the class folders was a class at the next start."""
    before = sorted(class_folders.rglob("*"))
    with tiny.cached():
        run = tiny.train(class_folders / "run", data__source=f"folder:{class_folders}")
        for command in (run, tokenize(class_folders, class_folders / "tokens")):
            assert cli.main(command) == 2
            expected = f" must not lie among the images of folder:{class_folders}, where"
            assert expected in capfd.readouterr().err
    assert sorted(class_folders.rglob("*")) == before


@pytest.mark.parametrize(
    "place, among",
    [
        ("run", False),  # beside train and validate
        ("train/run", True),
        ("validate/circle/run", True),
        ("../run", False),
        (".cache/run", False),
        ("train/.run", False),
    ],
)
def test_where_results_may_lie(place, among, tmp_path):
    images = shutil.copytree(tiny.images(), tmp_path / "images")
    assert is_among_images(images, images / place) == among
    assert is_among_images(images / "train", images / "train" / "run")


def test_the_same_part_twice_at_once(class_folders, tmp_path, capfd):
    """The second command removed what the first was writing; it ended with a traceback."""
    out = tmp_path / "tokens"
    with tiny.cached():
        with DirectoryLock(out, "part 0/2 of --out", ".lock-0-of-2.tmp"):
            assert cli.main(tokenize(class_folders, out, "--part=0/2")) == 2
            assert f"part 0/2 of --out {out} is in use by process" in capfd.readouterr().err
            assert cli.main(tokenize(class_folders, out, "--part=1/2")) == 0
        assert cli.main(tokenize(class_folders, out, "--part=0/2")) == 0
    assert "3 classes" in capfd.readouterr().out
    assert not list(out.glob(".lock*"))


def test_a_token_set_that_is_moved_while_it_is_written(class_folders, tmp_path, monkeypatch, capfd):
    out, moved = tmp_path / "tokens", tmp_path / "moved"
    read_back = encoding._ShardWriter._read_back

    def move_and_read_back(self):
        if out.exists():
            out.rename(moved)
        read_back(self)

    command = tokenize(class_folders, out)
    monkeypatch.setattr(encoding._ShardWriter, "_read_back", move_and_read_back)
    with tiny.cached():
        assert cli.main(command) == 2
        assert f"the encoded data set {out} cannot be written: " in capfd.readouterr().err
        assert cli.main(tokenize(class_folders, moved)) == 0
