"""`hmar sample` to directories: single files, and many samples that can be resumed."""

import errno
import functools
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

import hmar_jax
from hmar_jax import loading, pipeline, progress
from hmar_jax.cli import main as cli
from hmar_jax.data.sources import open_splits
from hmar_jax.io import files, sample_files
from tests import tiny
from tests.test_class_names import renamed
from tests.test_interruptions import digests, start
from tests.test_locks import hold
from tests.test_progress import Terminal

NUM, BATCH = 23, 4


_load = functools.cache(  # most of the time of a command this small
    lambda name, devices, checkpoint: pipeline.Pipeline(
        *loading.load_spec_and_params(name, checkpoint), devices=list(devices)
    )
)


def load(name, dtype="auto", devices=None, checkpoint="latest"):
    return _load(name, tuple(devices or jax.devices()), checkpoint)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own; models are loaded and compiled once."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with tiny.cached():
        tiny.masked_run()  # and its parent
        monkeypatch.setattr(pipeline, "load", load)
        yield folder


def sample(*options, out="out", model=None):
    model = model or tiny.model_run()
    return ["sample", f"--model={model}", *([f"--out={out}"] if out else []), *options]


def many(*options, num=NUM, file_format="npz", out="out", model=None):
    options = (f"--num={num}", f"--format={file_format}", f"--batch_size={BATCH}", *options)
    return sample(*options, out=out, model=model)


def read(path="out/samples.npz"):
    arrays = np.load(path)
    return arrays["arr_0"], arrays["arr_1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed("npz") -> the directory of a job that ran without interruption."""
    found = {}

    def of(file_format):
        if file_format not in found:
            folder = tmp_path_factory.mktemp(file_format) / "out"
            assert cli.main(many(file_format=file_format, out=folder)) == 0
            found[file_format] = folder
        return found[file_format]

    return of


@pytest.fixture
def refused(here, capfd):
    """refused(arguments, words) checks an input error: one line, and no file changed."""

    def run(arguments, *words):
        before = digests(here)
        capfd.readouterr()
        try:
            status = cli.main(arguments)
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        assert status == 2 and out == "" and err.count("\n") == 1, err
        assert not [word for word in words if word not in err], err
        assert digests(here) == before

    return run


# Single files


def test_a_file_for_each_image(here, capfd):
    model = renamed(here / "model", "tench, Tinca tinca", "a/b-c", "2")
    assert cli.main(sample("--n=2", "--seed=5", "--classes=2,0-1", out="new", model=model)) == 0
    assert capfd.readouterr().out == "new: 6 images of 3 classes\n"
    names = ["0_tench_Tinca_tinca_00.png", "0_tench_Tinca_tinca_01.png"]
    names += ["1_a_b_c_00.png", "1_a_b_c_01.png", "2_00.png", "2_01.png"]
    assert sorted(os.listdir("new")) == names
    expected = load(str(model)).sample(5, [2, 2, 0, 0, 1, 1])
    found = [np.asarray(Image.open(f"new/{name}")) for name in (*names[4:], *names[:4])]
    assert np.array_equal(found, (np.asarray(expected) * 255).round().astype(np.uint8))


def test_what_is_a_directory(here):
    options = ("--classes=0", "--n=1")
    (here / "v1.5").mkdir()
    (here / "v1.5/.DS_Store").write_text("")
    for out in ("a.b/", "v1.5", "x/y/z", "grid.png/"):
        assert cli.main(sample(*options, out=out)) == 0
        assert (here / out / "0_circle_00.png").is_file()


def test_arrays_alone(here, capfd):
    assert cli.main(sample("--classes=all", "--n=1", "--npz=x.npz", out=None)) == 0
    assert capfd.readouterr().out == "x.npz: 3 images of 3 classes\n"
    assert os.listdir() == ["x.npz"] and np.load("x.npz")["labels"].tolist() == [0, 1, 2]


def test_a_failure_leaves_no_single_file(here, monkeypatch, capfd):
    replace = os.replace

    def full(source, target):
        if target.endswith("2_stripes_00.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    assert cli.main(sample("--n=1", out="new")) == 2
    assert "cannot write new/2_stripes_00.png: No space left" in capfd.readouterr().err
    assert os.listdir() == []


# Many samples


def test_an_npz_file_as_adms_evaluator_reads_it(undisturbed, here):
    pixels, labels = read(undisturbed("npz") / "samples.npz")
    assert pixels.shape == (NUM, tiny.SIDE, tiny.SIDE, 3) and pixels.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [i % 3 for i in range(NUM)]
    expected = np.asarray(load(str(tiny.model_run())).sample(0, labels))
    assert np.abs(pixels - expected * 255).max() < 0.6  # rounded; another batch shape
    assert len(np.unique(pixels, axis=0)) > NUM // 2
    with zipfile.ZipFile(undisturbed("npz") / "samples.npz") as archive:
        assert [item.date_time[0] for item in archive.infolist()] == [1980, 1980]
        assert archive.testzip() is None
        for name in ("arr_0.npy", "arr_1.npy"):  # the evaluator reads this version as a stream
            with archive.open(name) as member:
                assert np.lib.format.read_magic(member) == (1, 0)
    assert sorted(os.listdir(undisturbed("npz"))) == ["samples.json", "samples.npz"]


def test_png_files_in_one_folder(undisturbed):
    folder, (pixels, labels) = undisturbed("png"), read(undisturbed("npz") / "samples.npz")
    rows = json.loads((folder / "dataset.json").read_text())["labels"]
    assert rows == [[f"{i:06d}.png", label] for i, label in enumerate(labels)]
    assert np.array_equal([np.asarray(Image.open(folder / name)) for name, _ in rows], pixels)
    others = {"dataset.json", "samples.json"}
    assert {path.name for path in folder.iterdir()} == {name for name, _ in rows} | others
    splits = open_splits(f"folder:{folder}").values()  # as this package reads a plain folder
    assert sum(map(len, splits)) == NUM


def test_a_finished_directory_stays_as_it_is(undisturbed, here, capfd, monkeypatch):
    for file_format in ("npz", "png"):
        folder = shutil.copytree(undisturbed(file_format), here / file_format)
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        with monkeypatch.context() as patch:
            patch.setattr(hmar_jax.Pipeline, "sample_batches", None)
            assert cli.main(many(file_format=file_format, out=folder)) == 0
        assert "23 images of 3 classes, complete already" in capfd.readouterr().out
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_classes_in_equal_numbers(here):
    assert cli.main(many("--classes=stripes,0", num=7)) == 0
    assert read()[1].tolist() == [2, 0, 2, 0, 2, 0, 2]


def test_seed_and_options_reach_the_sampler(here):
    assert cli.main(many("--seed=3", "--temperature=9", num=4)) == 0
    expected = load(str(tiny.model_run())).sample(3, [0, 1, 2, 0], temperature=9.0)
    assert np.abs(read()[0] - np.asarray(expected) * 255).max() < 0.6


# What it says


def test_lines_in_a_log(here, capfd):
    assert cli.main(many()) == 0
    out, err = capfd.readouterr()
    assert out == "out/samples.npz: 23 images of 3 classes\n"
    assert err == "sampling 23 images ...\n"


def test_a_bar_on_a_terminal(here, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    assert cli.main(many()) == 0
    time.sleep(0.05)
    shown = sys.stderr.getvalue()
    assert "compiling the sampler ..." in shown and re.search(r"sampling: +\d+%.*/23", shown)


# Interruptions


def test_a_killed_job_resumes_to_the_same_bits(here):
    command = many(num=120, out=here / "killed")
    process = start(command)
    pieces = here / "killed/pieces"
    while not (pieces.is_dir() and len(os.listdir(pieces)) > 3):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not (here / "killed/samples.npz").exists() and len(os.listdir(pieces)) < 29
    (pieces / ".000020.npy.0123abcd.tmp").write_bytes(b"half")
    shutil.copy(pieces / "000001.npy", pieces / "000019.npy")
    os.truncate(pieces / "000019.npy", 100)
    assert cli.main(command) == 0
    assert sorted(os.listdir("killed")) == ["samples.json", "samples.npz"]
    assert cli.main(many(num=120)) == 0
    assert digests(here / "killed") == digests(here / "out")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_order(undisturbed, here, monkeypatch, capfd, number, status):
    write, written = sample_files.PngFiles.write, []

    def write_and_signal(self, index, pixels):
        written.append(index)
        if len(written) == 3:
            signal.raise_signal(number)
        write(self, index, pixels)

    monkeypatch.setattr(sample_files.PngFiles, "write", write_and_signal)
    before = signal.signal(number, signal.default_int_handler)  # perhaps ignored
    try:
        assert cli.main(many(file_format="png")) == status
    finally:
        signal.signal(number, before)
    assert f"hmar sample: interrupted by {signal.Signals(number).name}" in capfd.readouterr().err
    assert sorted(os.listdir("out")) == [*(f"{i:06d}.png" for i in range(12)), "samples.json"]
    assert cli.main(many(file_format="png")) == 0 and written == [0, 1, 2, 3, 4, 5]
    assert "sampling 23 images; 12 are written already ..." in capfd.readouterr().err
    assert digests(here / "out") == digests(undisturbed("png"))


def test_missing_and_truncated_png_files_are_made_again(undisturbed, here):
    folder = shutil.copytree(undisturbed("png"), here / "out")
    (folder / "000001.png").unlink()
    os.truncate(folder / "000009.png", 60)
    os.truncate(folder / "000022.png", 0)
    (folder / ".000001.png.0123abcd.tmp").write_bytes(b"half")
    assert cli.main(many(file_format="png")) == 0
    assert digests(folder) == digests(undisturbed("png"))


def test_a_damaged_result_is_reported_once_and_made_again(undisturbed, here, capfd):
    folder = shutil.copytree(undisturbed("npz"), here / "out")
    os.truncate(folder / "samples.npz", 1000)
    capfd.readouterr()  # of the undisturbed job
    assert cli.main(many()) == 0
    assert capfd.readouterr().err.count("out/samples.npz cannot be read") == 1
    assert digests(folder) == digests(undisturbed("npz"))


def test_a_disk_that_is_full_costs_nothing(undisturbed, here, monkeypatch, capfd):
    write, count = files.write_atomically, []

    def full(path, data):
        count.append(path)
        if len(count) == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        assert cli.main(many()) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert "cannot write out/pieces/000003.npy: No space left on device" in err
    assert err.endswith("run the same command again to resume")
    assert cli.main(many()) == 0
    assert digests(here / "out") == digests(undisturbed("npz"))


def test_parts_make_the_same_file(undisturbed, here, capfd):
    for part, left in ((0, 4), (2, 2)):
        assert cli.main(many(f"--part={part}/3")) == 0
        words = f"out: part {part}/3 is complete; {left} of 6 batches are left to other parts\n"
        assert capfd.readouterr().out == words and not (here / "out/samples.npz").exists()
    assert cli.main(many("--part=1/3")) == 0
    assert digests(here / "out") == digests(undisturbed("npz"))
    assert cli.main(many("--part=0/2")) == 0
    assert "complete already" in capfd.readouterr().out


@pytest.mark.parametrize(
    "file_format, name", [("npz", "pieces/.000001.npy"), ("png", ".000004.png")]
)
def test_a_part_leaves_what_another_part_is_writing(here, file_format, name):
    command = functools.partial(many, file_format=file_format)
    assert cli.main(command("--part=0/3")) == 0
    temporary = here / f"out/{name}.0123abcd.tmp"
    temporary.write_bytes(b"half")
    assert cli.main(command("--part=2/3")) == 0 and temporary.exists()
    assert cli.main(command("--part=1/3")) == 0 and not temporary.exists()


@pytest.mark.parametrize("file_format", ["npz", "png"])
def test_a_directory_that_is_moved_is_not_made_again(here, monkeypatch, capfd, file_format):
    kind = {"npz": sample_files.NpzFiles, "png": sample_files.PngFiles}[file_format]
    write = kind.write

    def move_and_write(self, index, pixels):
        if index == 2:
            os.rename("out", "moved")
        write(self, index, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "write", move_and_write)
        assert cli.main(many(file_format=file_format)) == 2
    assert f"out was moved to {here / 'moved'} while" in capfd.readouterr().err
    assert os.listdir() == ["moved"]
    assert cli.main(many(file_format=file_format, out="moved")) == 0
    assert "sampling 23 images; 8 are written already ..." in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [many(), sample("--n=1")])
def test_a_second_command_is_refused(here, capfd, arguments):
    process = hold(here / "out")
    try:
        assert cli.main(arguments) == 2
        assert f"--out out is in use by process {process.pid}" in capfd.readouterr().err
        assert os.listdir("out") == [".lock.tmp"]
    finally:
        process.kill()
        process.wait()
    assert cli.main(arguments) == 0


# Memory


def test_few_batches_are_in_memory_at_once(here, monkeypatch):
    seen = []
    gc.collect()  # images of other tests

    def write(self, index, pixels):
        shape = (tiny.SIDE, tiny.SIDE, 3)
        seen.append(sum(x.shape[1:] == shape for x in jax.live_arrays()))

    monkeypatch.setattr(sample_files.NpzFiles, "write", write)
    monkeypatch.setattr(sample_files.NpzFiles, "finish", lambda self, check: None)
    assert cli.main(many(num=160)) == 0
    assert len(seen) == 40 and max(seen) <= 4


@pytest.mark.parametrize("file_format", ["npz", "png"])
def test_files_are_written_without_being_held(here, file_format):
    side, batch_size = 128, 8  # 0.4 MB a batch
    (here / "out").mkdir()
    peaks = []
    for num_batches in (4, 40):
        labels = np.zeros(num_batches * batch_size, np.int32)
        output = sample_files.open_files(file_format, "out", labels, side, batch_size)
        tracemalloc.start()
        for index in output.missing(range(num_batches)):
            output.write(index, np.full((batch_size, side, side, 3), index, np.uint8))
        output.finish()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        output.close()
    assert peaks[1] < peaks[0] + 1e6 and peaks[1] < 8e6  # of 16 MB
    if file_format == "npz":
        pixels, _ = read()
        assert np.array_equal(pixels[:, 0, 0, 0], np.repeat(np.arange(40), batch_size))


def test_an_archive_of_more_than_4_gigabytes_has_the_same_form(here, monkeypatch):
    """With the limit of 32-bit archives lowered to 4 kB."""
    for name in ("ZIP64_LIMIT", "ZIP_FILECOUNT_LIMIT"):
        monkeypatch.setattr(zipfile, name, 4096)
    assert cli.main(many()) == 0
    monkeypatch.undo()
    assert np.array_equal(read(here / "out/samples.npz")[1], np.arange(NUM) % 3)


# Mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sample", "--model=nope"], ["--out or --npz must be given"]),
        (sample("--format=png", model="nope"), ["--format requires --num"]),
        (sample("--part=0/2", model="nope"), ["--part requires --num"]),
        (sample("--batch_size=2", model="nope"), ["--batch_size requires --num"]),
        (sample("--num=5", out=None, model="nope"), ["--out or --npz must be given"]),
        (sample("--num=5", "--npz=x.npz", model="nope"), ["excludes --npz", "--format=npz"]),
        (sample("--num=5", "--n=2", model="nope"), ["--num and --n exclude each other"]),
        (sample("--num=5", out="x.npz", model="nope"), ["must be a directory with --num"]),
        (sample("--num=5", out="grid.png", model="nope"), ["must be a directory with --num"]),
        (sample("--num=200000000", model="nope"), ["at most 100,000,000", "--seed"]),
        (sample("--num=0", model="nope"), ["--num: must be an integer of at least 1"]),
        (sample("--num=5", out="gs://bucket/x", model="nope"), ["must be a local directory"]),
        (
            sample("--num=5", "--schedule=none", "--schedule=default", model="nope"),
            ["--num takes the samples of one schedule"],
        ),
        (
            sample("--schedule=none", "--schedule=default", model="nope"),
            ["--out=DIR takes the samples of one schedule"],
        ),
        (sample("--num=5", out="full", model="nope"), ["must be a new or an empty directory", "x"]),
        (sample(out="full", model="nope"), ["must be a new or an empty directory", "contains x"]),
        (sample("--num=5", out="full/x", model="nope"), ["is a file, not a folder"]),
        (sample(out="full/x/y", model="nope"), ["is a file, not a folder"]),
    ],
)
def test_mistakes_found_without_a_model(here, refused, monkeypatch, arguments, words):
    monkeypatch.setattr(pipeline, "load", None)
    (here / "full").mkdir()
    (here / "full/x").write_text("")
    refused(arguments, *words)


def test_classes_named_twice(refused):
    refused(many("--classes=0-1,circle"), "must name each class once", "circle is named twice")
    refused(many("--classes="), "each class must be a name or an id")


def test_another_job_is_refused(undisturbed, here, refused, monkeypatch):
    shutil.copytree(undisturbed("npz"), here / "out")
    other_model = renamed(here / "model", "a", "b", "c")
    other = "out holds samples of another job: "
    refused(many("--guidance=2.5"), other + "guidance is 1.0 there and 2.5 here; choose another")
    refused(many("--classes=0-1"), other + "classes is [0, 1, 2] there and [0, 1] here")
    refused(many(model=other_model), other + "the model is ")
    monkeypatch.setattr(hmar_jax, "__version__", "9.9")
    refused(many(), other + "hmar_jax is ", "'9.9' here")
    monkeypatch.setattr(pipeline, "load", None)  # known without the model:
    refused(many(num=24), other + "num is 23 there and 24 here")
    refused(many("--seed=1"), other + "seed is 0 there and 1 here")
    refused(many(file_format="png"), other + "file_format is 'npz' there and 'png' here")
    refused([*many()[:-1], "--batch_size=8"], other + "batch_size is 4 there and 8 here")
    (here / "out/samples.json").write_text('{"format": "other"}')
    refused(many(), "out/samples.json must describe samples (format 'hmar_jax samples 1')")


def test_other_devices_resume_with_a_warning(undisturbed, here, capfd):
    shutil.copytree(undisturbed("npz"), here / "out")
    info = json.loads((here / "out/samples.json").read_text())
    info["devices"] = ["8 x TPU v5e"]
    (here / "out/samples.json").write_text(json.dumps(info))
    (here / "out/samples.npz").unlink()
    command = [word for word in many() if "batch_size" not in word]  # that of the directory
    assert cli.main(command) == 0
    err = capfd.readouterr().err
    assert "out was sampled on 8 x TPU v5e and resumes on 1 x cpu: images may differ" in err
    assert json.loads((here / "out/samples.json").read_text())["devices"][1] == "1 x cpu"
    assert np.array_equal(read()[0], read(undisturbed("npz") / "samples.npz")[0])


def test_space_is_checked_before_anything_is_written(here, refused, monkeypatch):
    needed = 2 * NUM * tiny.SIDE**2 * 3
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    refused(many(), "not enough disk space for samples.npz", " MB free")
    assert not (here / "out").exists()


def test_png_files_that_will_not_fit_are_known_after_the_first_batch(here, monkeypatch, capfd):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=18 * 4096))
    assert cli.main(many(file_format="png")) == 2
    assert "not enough disk space for 19 more PNG files" in capfd.readouterr().err
    assert len(list((here / "out").glob("*.png"))) == BATCH


# With the bundled model, in real processes


def run(*arguments):
    """Runs a command; returns the peak of its memory in MB."""
    command = [sys.executable, "-m", "hmar_jax", "sample", "--model=digits", *arguments]
    process = subprocess.Popen(command, env=tiny.ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss / 1024


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["npz", "png"])
def test_five_thousand_samples(here, file_format):
    few = run("--num=500", f"--format={file_format}", f"--out={here / 'few'}")
    options = ("--num=5000", f"--format={file_format}")
    peak = run(*options, f"--out={here / 'whole'}")
    assert peak < few + 40, "the pixels alone would be 61 MB"

    killed = here / "killed"
    process = start(["sample", "--model=digits", *options, f"--out={killed}"])
    half = {"npz": ("pieces/*.npy", 40), "png": ("*.png", 2500)}[file_format]
    while len(list(killed.glob(half[0]))) < half[1]:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    run(*options, f"--out={killed}")
    assert digests(killed) == digests(here / "whole")
