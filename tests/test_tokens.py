"""Encoded data sets: the record schema, writing that survives kills and damage, the loader.

Also `hmar tokenize` and training from its tokens.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import time

import grain
import jax
import numpy as np
import pytest
from array_record.python import array_record_module

from hmar_jax.autoencoders.vq import VQAutoencoder
from hmar_jax.cli import main as cli
from hmar_jax.data.encoding import (
    count_unfinished,
    describe,
    encode_in_memory,
    list_shards,
    write_record_set,
)
from hmar_jax.data.loader import loader_state_to_bytes, restore_loader_state
from hmar_jax.data.record_spec import RecordField, RecordSpec
from hmar_jax.data.records import (
    RecordSetInfo,
    RecordsInMemory,
    SplitInfo,
    make_record_loader,
    open_records,
    read_info,
)
from hmar_jax.data.seeds import SeedPurpose, derive_seed
from hmar_jax.data.sources import ImageDecodeError
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError
from hmar_jax.experiment import build_experiment
from hmar_jax.io.models import save_model
from hmar_jax.loading import load_spec_and_params
from hmar_jax.training.step import eval_step, init_state, train_step
from tests import tiny

SCALES, SIDE = (1, 2, 3), 4
LENGTH = sum(s**2 for s in SCALES)
SHARD = 16


def token_spec(length, vocab_size):
    return RecordSpec("tokens", (RecordField("tokens", (length,), "int32", vocab_size),))


TOKENS = token_spec(LENGTH, 4096)
MOMENTS = RecordSpec(  # of two views: as the image is, and at half its resolution
    "moments",
    (
        RecordField("dense", (4, 4, 6), "float16"),
        RecordField("low_resolution", (2, 2, 3), "float16"),
    ),
)


@dataclasses.dataclass
class Images:
    """n images of noise, the same in every process. Those in `broken` cannot be read."""

    n: int
    broken: tuple = ()
    name: str = "noise"
    class_names: tuple = ("even", "odd")
    slow: float = 0.0

    def fingerprint(self):
        return f"{self.n} of noise"

    @property
    def num_classes(self):
        return 2

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        time.sleep(self.slow)
        if index in self.broken:
            raise ImageDecodeError(f"{index}.jpg", "truncated")
        return {
            "image": np.random.default_rng(index).integers(0, 256, (6, 7, 3), dtype=np.uint8),
            "label": index % 2,
        }


_WEIGHTS = np.random.default_rng(5).integers(0, 4096, (SIDE * SIDE * 3, LENGTH))


def encode(images):
    """Returns tokens that identify the crop: each is a hash of the image's bytes."""
    return {"tokens": images.reshape(len(images), -1).astype(np.int64) @ _WEIGHTS % 4096}


def encode_moments(images):
    dense = images.astype(np.float32) / 255  # (B, 4, 4, 3)
    low_resolution = dense.reshape(-1, 2, 2, 2, 2, 3).mean((2, 4))
    return {"dense": np.concatenate([dense, dense**2], -1), "low_resolution": low_resolution}


TRANSFORM = Transform(SIDE, "random_crop")


def info(n=50, held_out=20, crops=2, **changes):
    base = RecordSetInfo(
        autoencoder_name="none",
        fingerprint="0" * 16,
        record_spec=TOKENS,
        autoencoder=dict(dtype="float32", scales=SCALES, vocab_size=4096, image_side=SIDE),
        source="noise",
        class_names=("even", "odd"),
        transform=dataclasses.asdict(TRANSFORM),
        seed=3,
        shard_size=SHARD,
        splits={"train": SplitInfo(n, crops), "validate": SplitInfo(held_out, 1)},
    )
    return dataclasses.replace(base, **changes)


def write(directory, n=50, held_out=20, broken=(), crops=2, changes=None, encode=encode, **options):
    sources = {"train": Images(n, broken), "validate": Images(held_out)}
    return write_record_set(
        directory,
        encode,
        sources,
        TRANSFORM,
        info(n, held_out, crops, **(changes or {})),
        batch_size=8,
        threads=0,
        **options,
    )


def files_of(directory):
    """Checksums of all shards."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pathlib.Path(directory).glob("*.array_record")
    }


def rows_of(source, crop):
    n = len(source)
    return source.read(np.arange(n), np.full(n, crop))


def records_of(directory, shard):
    """The bytes of the records of a shard."""
    reader = array_record_module.ArrayRecordReader(str(directory / shard))
    return reader.read_all()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


# The record schema


@pytest.mark.parametrize(
    "vocab, size", [(2, 684), (256, 684), (257, 1024), (4096, 1024), (4097, 1364), (65537, 2724)]
)
@pytest.mark.parametrize("length", [680, 679, 1, 2])
def test_token_records_unpack_to_what_was_packed(vocab, size, length):
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, vocab, (5, length))
    tokens[0], tokens[1] = vocab - 1, 0
    labels = rng.integers(0, 2**31, 5)
    spec = token_spec(length, vocab)
    records = spec.pack({"tokens": tokens}, labels)
    assert records.dtype == np.uint8 and records.shape == (5, spec.record_bytes)
    if length == 680:
        assert records.shape[1] == size
    assert_same(
        spec.unpack(records),
        {"tokens": tokens.astype(np.int32), "label": labels.astype(np.int32)},
    )


def test_the_bytes_of_a_record():
    spec = RecordSpec(
        "mixed",
        (
            RecordField("odd", (3,), "int32", 4096),  # 12 bits
            RecordField("half", (1, 2), "float16"),
            RecordField("number", (), "int32"),
            RecordField("wide", (1,), "int64", 2**20),  # 32 bits
        ),
    )
    arrays = {
        "odd": np.array([[0x123, 0xABC, 0x456]], np.int32),
        "half": np.array([[[1.0, -2.0]]], np.float16),
        "number": np.array([-2], np.int32),
        "wide": np.array([[0xABCDE]], np.int64),
    }
    records = spec.pack(arrays, np.array([0x01020304]))
    assert records.tobytes().hex(" ", 1) == (
        "04 03 02 01 " + "23 c1 ab 56 04 " + "00 3c 00 c0 " + "fe ff ff ff " + "de bc 0a 00"
    )
    assert spec.record_bytes == records.shape[1]
    assert_same(spec.unpack(records), {**arrays, "label": np.array([0x01020304], np.int32)})
    big_endian = {key: value.astype(value.dtype.newbyteorder(">")) for key, value in arrays.items()}
    np.testing.assert_array_equal(spec.pack(big_endian, np.array([0x01020304])), records)


def test_a_schema_as_json():
    for spec in (TOKENS, MOMENTS):
        assert RecordSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_schema_checks_its_fields_and_arrays():
    with pytest.raises(ValueError, match="dtype of field 'x' must be an integer type; got 'float"):
        RecordField("x", (1,), "float32", vocab_size=8)
    with pytest.raises(ValueError, match="integers or floats; got 'complex64'"):
        RecordField("x", (1,), "complex64")
    for names in (("a", "a"), ("a", "label")):
        with pytest.raises(ValueError, match="names of fields must differ and not be label or va"):
            RecordSpec("x", tuple(RecordField(name, (1,), "int32") for name in names))
    labels = np.zeros(2, int)
    with pytest.raises(ValueError, match=r"must be of shape \(B, 14\); got \(2, 13\)"):
        TOKENS.pack({"tokens": np.zeros((2, 13), int)}, labels)
    with pytest.raises(ValueError, match="must have keys tokens; got moments"):
        TOKENS.pack({"moments": np.zeros((2, 14), int)}, labels)


def test_imagenet_fits_in_3_gb_a_crop(tmp_path):
    n, length = 2000, 680
    rng = np.random.default_rng(0)
    made = dataclasses.replace(
        info(n),
        record_spec=token_spec(length, 4096),
        shard_size=8192,
        splits={"train": SplitInfo(n, 1)},
    )
    write_record_set(
        tmp_path / "set",
        lambda images: {"tokens": rng.integers(0, 4096, (len(images), length))},
        {"train": Images(n)},
        TRANSFORM,
        made,
        batch_size=500,
        threads=0,
    )
    (shard,) = (tmp_path / "set").glob("*.array_record")
    assert shard.stat().st_size / n * 1_281_167 < 1.6e9


# Writing


def test_a_set_holds_every_crop_of_every_image(tmp_path):
    made = write(tmp_path / "set")
    assert made.complete and read_info(tmp_path / "set") == made
    train, validate = (open_records(tmp_path / "set", split) for split in ("train", "validate"))
    assert (len(train), train.crops, len(validate), validate.crops, train.class_names) == (
        50,
        2,
        20,
        1,
        ("even", "odd"),
    )
    for source, crops in ((train, 2), (validate, 1)):
        rows = [rows_of(source, crop) for crop in range(crops)]
        for i in range(len(source)):
            image = Images(99)[i]["image"]
            cut = [image[y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(4)]
            known = {tuple(row) for row in encode(np.stack(cut))["tokens"]}
            center = tuple(encode(TRANSFORM(image, None)[None])["tokens"][0])
            for row in rows:
                assert tuple(row["tokens"][i]) in known and row["label"][i] == i % 2
                assert source is train or tuple(row["tokens"][i]) == center
    first, second = (rows_of(train, crop)["tokens"] for crop in range(2))
    assert 40 < (first != second).any(axis=1).sum()  # of 50, by chance 4 with the same of 12 crops


def test_neither_parts_nor_batches_nor_crops_added_later_change_a_bit(tmp_path):
    write(tmp_path / "whole")
    for index in (2, 0, 1):
        part = write(tmp_path / "parts", part=(index, 3))
    assert part.complete
    one = write(tmp_path / "later", crops=1)
    assert one.complete and len(one.splits["train"].shards) == 4
    write(tmp_path / "later", crops=2)
    assert (
        files_of(tmp_path / "whole") == files_of(tmp_path / "parts") == files_of(tmp_path / "later")
    )
    described = [
        (tmp_path / name / "records.json").read_text() for name in ("whole", "parts", "later")
    ]
    assert len(set(described)) == 1 and len(files_of(tmp_path / "whole")) == 10
    assert (
        write(tmp_path / "later", crops=1).splits["train"].crops == 2
    )  # never fewer, since others may be reading them
    other = write(tmp_path / "other", changes={"seed": 4})
    assert other.complete and files_of(tmp_path / "other") != files_of(tmp_path / "whole")


def test_an_unfinished_set_is_not_read(tmp_path):
    made = write(tmp_path / "set", part=(0, 2))
    assert not made.complete and count_unfinished(tmp_path / "set", made) == (5, 10)
    with pytest.raises(
        InputError, match="not complete; run the same hmar tokenize again to resume"
    ):
        open_records(tmp_path / "set")


_SLOW_WRITER = """
    import sys
    from tests.test_tokens import *
    sources = {"train": Images(50, slow=0.01), "validate": Images(20, slow=0.01)}
    print("ready", flush=True)
    write_record_set(sys.argv[1], encode, sources, TRANSFORM, info(), batch_size=8, threads=0)
"""


def kill_and_resume(directory, kills, seed):
    """Runs a slow writer and kills it at random moments, each after another shard; then resumes it.

    Returns:
      Finished shards after each kill and at the end.
    """
    rng = np.random.default_rng(seed)
    num_finished = lambda: len(list(pathlib.Path(directory, "progress").glob("*.json")))
    finished = []
    for kill in range(kills + 1):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_SLOW_WRITER), str(directory)],
            env=tiny.ENVIRONMENT,
            stdout=subprocess.PIPE,
        ) as process:
            process.stdout.readline()  # ready
            if kill < kills:
                target = min(8, num_finished() + int(rng.integers(1, 4 if kills > 1 else 7)))
                while num_finished() < target:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.15))  # a shard takes longer
                process.kill()
        assert process.returncode == (-signal.SIGKILL if kill < kills else 0)
        finished.append(num_finished())
    return finished


def check_killed(tmp_path, kills, seed):
    write(tmp_path / "whole")
    finished = kill_and_resume(tmp_path / "killed", kills, seed)
    assert finished[-1] == 10 and finished == sorted(finished)
    assert all(0 < count < 10 for count in finished[:-1]), finished  # killed before the end
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert (tmp_path / "killed" / "records.json").read_text() == (
        tmp_path / "whole" / "records.json"
    ).read_text()
    assert not list((tmp_path / "killed").glob(".*.tmp"))  # nothing is left over


def test_sigkill_at_a_random_moment(tmp_path):
    check_killed(tmp_path, 1, seed=1)


@pytest.mark.slow
def test_sigkill_at_21_random_moments(tmp_path):
    for seed in range(7):  # 3 kills each, as a set has 10 shards
        (tmp_path / str(seed)).mkdir()
        check_killed(tmp_path / str(seed), 3, seed)


_DISTRIBUTED = """
    import sys, jax
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    from hmar_jax.cli import main as cli
    sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_two_processes_of_jax_distributed_share_the_work(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with tiny.cached():
        assert cli.main(command(tmp_path / "one")) == 0
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(_DISTRIBUTED),
                address,
                str(i),
                *command(tmp_path / "two"),
            ],
            env=tiny.ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert any("36 images to train in 2 crops" in text for text in output), output
    assert (
        files_of(tmp_path / "two") == files_of(tmp_path / "one")
        and len(files_of(tmp_path / "one")) == 5
    )
    assert read_info(tmp_path / "two") == read_info(tmp_path / "one")


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove"])
def test_damage_is_found_and_repaired(tmp_path, damage):
    write(tmp_path / "set")
    before = files_of(tmp_path / "set")
    shard = tmp_path / "set" / "train-crop01-00002-of-00004.array_record"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        train = open_records(tmp_path / "set")
        rows = rows_of(train, 1)
        labels = rows.pop("label")
        record = TOKENS.pack(rows, labels)[40].tobytes()
        data[data.find(record) + 5] ^= 1
        shard.write_bytes(data)
        source = open_records(tmp_path / "set")  # the size is right
        source.read(np.array([39]), np.array([1]))
        with pytest.raises(InputError, match="damaged.*hash mismatch.*--verify"):
            source.read(np.array([40]), np.array([1]))
    elif damage == "shorten":
        shard.write_bytes(data[:1000])
        with pytest.raises(InputError, match="train-crop01-00002.* has 1000 bytes instead of"):
            open_records(tmp_path / "set")
    else:
        shard.unlink()
        with pytest.raises(InputError, match="train-crop01-00002.* is missing"):
            open_records(tmp_path / "set")
    write(tmp_path / "set", verify=damage == "flip")
    assert files_of(tmp_path / "set") == before


def test_files_that_cannot_grow_as_on_a_full_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot be written: .*; run the same command again"):
            write(tmp_path / "set", n=2000, changes={"shard_size": 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "set").glob(".*.tmp"))
    assert write(tmp_path / "set", n=2000, changes={"shard_size": 1000}).complete


def test_broken_images_are_left_out_and_named(tmp_path):
    made = write(tmp_path / "set", broken=(7, 17))
    assert [entry[:2] for entry in made.splits["train"].broken] == [(7, "7.jpg"), (17, "17.jpg")]
    train = open_records(tmp_path / "set")
    assert len(train) == 48
    rows = rows_of(train, 1)
    write(tmp_path / "readable")
    expected = rows_of(open_records(tmp_path / "readable"), 1)
    readable = np.setdiff1d(np.arange(50), (7, 17))
    np.testing.assert_array_equal(rows["tokens"], expected["tokens"][readable])
    np.testing.assert_array_equal(rows["label"], readable % 2)
    memory = rows_of(train.in_memory(), 1)
    np.testing.assert_array_equal(memory["tokens"], rows["tokens"])

    write(tmp_path / "set")  # the two are readable now
    assert (
        files_of(tmp_path / "set") == files_of(tmp_path / "readable")
        and len(open_records(tmp_path / "set")) == 50
    )


def test_too_many_broken_images_stop_the_writer_and_finished_shards_stay(tmp_path):
    broken = tuple(range(30, 41))
    with pytest.raises(
        InputError,
        match="noise: 11 of the 50 images cannot be read; .*: 30.jpg, 31.jpg, 32.jpg; .*to resume",
    ):
        write(tmp_path / "set", broken=broken)
    kept = {name: sha for name, sha in files_of(tmp_path / "set").items() if "-00000-of" in name}
    assert len(kept) == 1 and not list((tmp_path / "set").glob(".*.tmp"))
    time_of = lambda name: (tmp_path / "set" / name).stat().st_mtime_ns
    before = {name: time_of(name) for name in kept}
    write(tmp_path / "set")
    assert kept.items() <= files_of(tmp_path / "set").items() and before == {
        name: time_of(name) for name in kept
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"fingerprint": "1" * 16, "autoencoder_name": "other"},
            "another autoencoder: 'none' with fingerprint 0+, not 'other' with 1+",
        ),
        ({"seed": 5}, "another seed: 3 there, 5 here"),
        ({"shard_size": 5}, "another shard_size"),
        ({"source": "folder:x"}, "another source: 'noise' there, 'folder:x' here"),
        ({"class_names": ("even", "odd", "more")}, "other classes: added 'more'"),
        ({"transform": {}}, "another transform"),
        ({"record_spec": MOMENTS}, "another record: .*'tokens'.* there, .*'moments'.* here"),
        ({"autoencoder": {"dtype": "bfloat16"}}, "another dtype: 'float32' there, 'bfloat16' here"),
    ],
)
def test_another_set_is_not_overwritten(tmp_path, change, message):
    write(tmp_path / "set", n=5, held_out=5)
    before = files_of(tmp_path / "set")
    with pytest.raises(InputError, match=message):
        write(tmp_path / "set", n=5, held_out=5, changes=change)
    with pytest.raises(InputError, match="5 images to train there, 6 here"):
        write(tmp_path / "set", n=6, held_out=5)
    assert files_of(tmp_path / "set") == before


def test_a_directory_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="must be empty or an encoded data set"):
        write(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    (tmp_path / "records.json").write_text("{}")
    with pytest.raises(InputError, match="not the description of an encoded data set"):
        open_records(tmp_path)


# Moments


def test_moments_on_disk_and_in_memory(tmp_path):
    options = dict(changes={"record_spec": MOMENTS}, encode=encode_moments, broken=(7,))
    write(tmp_path / "whole", **options)
    assert not write(tmp_path / "set", part=(1, 2), **options).complete
    (tmp_path / "set" / "train-crop01-00001-of-00004.array_record").write_bytes(b"damaged")
    assert write(tmp_path / "set", **options).complete  # resumes, and repairs
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")
    assert read_info(tmp_path / "set") == read_info(tmp_path / "whole")

    train = open_records(tmp_path / "set")
    assert train.info.record_spec == MOMENTS and len(train) == 49
    readable = np.setdiff1d(np.arange(50), [7])
    for crop in range(2):
        rows = rows_of(train, crop)
        assert rows["dense"].shape == (49, 4, 4, 6) and rows["dense"].dtype == np.float16
        assert rows["low_resolution"].shape == (49, 2, 2, 3)
        assert rows["label"].tolist() == (readable % 2).tolist()
        images = np.rint(rows["dense"][..., :3].astype(np.float32) * 255).astype(np.uint8)
        for i, image in zip(readable, images):
            native = Images(99)[i]["image"]
            cut = [native[y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(4)]
            assert any(np.array_equal(image, crop_of_it) for crop_of_it in cut)
        expected = {k: v.astype(np.float16) for k, v in encode_moments(images).items()}
        assert_same(rows, {**expected, "label": rows["label"]})
        assert_same(rows, rows_of(train.in_memory(), crop))


def test_moments_in_batches(tmp_path):
    write(tmp_path / "set", changes={"record_spec": MOMENTS}, encode=encode_moments)
    train, held_out = (open_records(tmp_path / "set", split) for split in ("train", "validate"))
    first = iter(make_record_loader(train, batch_size=8, seed=0, threads=1))
    for _ in range(9):
        assert next(first).keys() == {"dense", "low_resolution", "label"}
    second = iter(make_record_loader(train.in_memory(), batch_size=8, seed=0))
    restore_loader_state(second, loader_state_to_bytes(first))
    for _ in range(4):
        assert_same(next(second), next(first))
    batches = list(make_record_loader(held_out, batch_size=8, train=False))
    assert [int(batch["valid"].sum()) for batch in batches] == [8, 8, 4]
    assert batches[2]["dense"].shape == (8, 4, 4, 6)


# In memory


def test_encode_in_memory():
    def run(seed=0, encode=encode, spec=TOKENS):
        return encode_in_memory(
            encode, Images(10), TRANSFORM, record_spec=spec, copies=3, seed=seed, batch_size=8
        )

    encoded = run()
    rows = rows_of(encoded, 0)
    assert (len(encoded), encoded.crops) == (30, 1)
    assert sorted(rows["label"].tolist()) == 15 * [0] + 15 * [1]
    known = {}
    for i in range(10):
        image = Images(99)[i]["image"]
        cut = [image[y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(4)]
        known |= {tuple(row): i for row in encode(np.stack(cut))["tokens"]}
    numbers = [known[tuple(row)] for row in rows["tokens"]]
    assert sorted(numbers) == sorted(3 * list(range(10)))
    assert rows["label"].tolist() == [number % 2 for number in numbers]
    assert_same(rows, rows_of(run(), 0))
    assert not np.array_equal(rows["tokens"], rows_of(run(seed=1), 0)["tokens"])
    moments = rows_of(run(encode=encode_moments, spec=MOMENTS), 0)
    np.testing.assert_array_equal(moments["label"], rows["label"])
    assert moments["dense"].shape == (30, 4, 4, 6)


# Descriptions


def test_describe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = {"train": Images(50), "validate": Images(20)}
    options = dict(crops=2, seed=3, shard_size=SHARD)
    autoencoder = info().autoencoder
    arguments = "none", "0" * 16, TOKENS, autoencoder
    described = describe(*arguments, "noise", sources, TRANSFORM, **options)
    assert [s.source_fingerprint for s in described.splits.values()] == [
        "50 of noise",
        "20 of noise",
    ]
    without = {
        name: dataclasses.replace(split, source_fingerprint="")
        for name, split in described.splits.items()
    }
    expected = dataclasses.replace(info(), folder_rules=2)
    assert dataclasses.replace(described, splits=without) == expected
    folder = describe(*arguments, "folder:here", sources, TRANSFORM, **options)
    assert folder.source == f"folder:{tmp_path / 'here'}"
    assert [(s.num_images, s.crops) for s in folder.splits.values()] == [(50, 2), (20, 1)]


def test_the_description_file(tmp_path):
    write(tmp_path / "set")
    data = json.loads((tmp_path / "set" / "records.json").read_text())
    assert data["format"] == "hmar_jax records 1"
    assert data["record"] == {
        "kind": "tokens",
        "fields": [{"name": "tokens", "shape": [14], "dtype": "int32", "vocab_size": 4096}],
    }
    assert (data["autoencoder_name"], data["fingerprint"]) == ("none", "0" * 16)
    assert data["autoencoder"]["scales"] == [1, 2, 3]
    assert data["splits"]["train"]["num_images"] == 50
    del data["record"]["fields"][0]["dtype"]
    (tmp_path / "set" / "records.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="records.json: this version cannot read the description"):
        open_records(tmp_path / "set")


# Sets that the first version wrote: 40 images with image 7 unreadable, 6 to validate, one crop


@pytest.fixture
def first_version(tmp_path):
    archive = pathlib.Path(__file__).parent / "fixtures" / "first_version_tokens.tar.xz"
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "first", filter="data")
    return tmp_path / "first" / "set"


def write_like_first_version(directory, crops=1):
    return write(directory, n=40, held_out=6, crops=crops, broken=(7,))


def test_a_set_of_the_first_version_is_read(first_version, tmp_path):
    assert {path.name for path in first_version.iterdir()} >= {"tokens.json", "progress"}
    found = read_info(first_version)
    now = write_like_first_version(tmp_path / "now")
    assert found.record_spec == TOKENS and found.autoencoder == info().autoencoder
    # The files may differ with the version of ArrayRecord; the records do not.
    without_shards = lambda set_info: dataclasses.replace(
        set_info,
        splits={k: dataclasses.replace(s, shards=()) for k, s in set_info.splits.items()},
    )
    assert without_shards(found) == without_shards(now)
    for split in ("train", "validate"):
        old, new = (open_records(path, split) for path in (first_version, tmp_path / "now"))
        assert_same(rows_of(old, 0), rows_of(new, 0))
        for shard in old.info.splits[split].shards:
            assert records_of(first_version, shard["file"]) == records_of(
                tmp_path / "now", shard["file"]
            )


def test_a_set_of_the_first_version_is_completed(first_version, tmp_path):
    data = json.loads((first_version / "tokens.json").read_text())
    data["complete"] = False
    for split in data["splits"].values():
        split.update(broken=[], shards=[])  # as the first version wrote it before the end
    (first_version / "tokens.json").write_text(json.dumps(data))
    for path in (first_version / "progress").glob("train-crop00-00001-*"):
        path.unlink()
    with pytest.raises(InputError, match="not complete"):
        open_records(first_version)
    assert count_unfinished(first_version, read_info(first_version)) == (1, 4)
    assert write_like_first_version(first_version).complete
    write_like_first_version(tmp_path / "now")
    assert_same(rows_of(open_records(first_version), 0), rows_of(open_records(tmp_path / "now"), 0))


def test_a_set_of_the_first_version_gets_more_crops(first_version, tmp_path):
    shards = [shard.file for shard in list_shards("train", 40, 1, SHARD)]
    before = {name: (first_version / name).stat().st_mtime_ns for name in shards}
    write_like_first_version(first_version, crops=2)
    write_like_first_version(tmp_path / "now", crops=2)
    assert before == {name: (first_version / name).stat().st_mtime_ns for name in shards}
    old, new = open_records(first_version), open_records(tmp_path / "now")
    assert (old.crops, len(old)) == (2, 39)
    for crop in range(2):
        assert_same(rows_of(old, crop), rows_of(new, crop))


def test_another_set_of_the_first_version_is_not_overwritten(first_version):
    with pytest.raises(InputError, match="another dtype: 'float32' there, 'bfloat16' here"):
        write(first_version, n=40, held_out=6, changes={"autoencoder": {"dtype": "bfloat16"}})
    with pytest.raises(InputError, match="another record"):
        write(first_version, n=40, held_out=6, changes={"record_spec": token_spec(9, 4096)})
    assert not (first_version / "records.json").exists()


# The loader


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens") / "set"
    write(directory, crops=3)
    return open_records(directory)


def identify(source, batch):
    """(image, crop) of every row of a batch; of crops that are equal, the first."""
    known = {}
    for crop in reversed(range(source.crops)):
        for i, row in enumerate(rows_of(source, crop)["tokens"]):
            known[tuple(row)] = (i, crop)
    return [known[tuple(row)] for row in batch["tokens"]]


def test_every_image_once_an_epoch_and_crops_take_turns(tokens):
    loader = iter(make_record_loader(tokens, batch_size=10, seed=0))
    epochs = [[row for _ in range(5) for row in identify(tokens, next(loader))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(image for image, _ in epoch) == list(range(50))
        assert len({crop for _, crop in epoch}) == 3
    assert len({tuple(image for image, _ in epoch) for epoch in epochs}) == 3
    seen = {}
    for epoch in epochs:
        for image, crop in epoch:
            seen.setdefault(image, set()).add(crop)
    distinct = {
        i: len({tuple(rows_of(tokens, crop)["tokens"][i]) for crop in range(3)}) for i in range(50)
    }
    assert {
        i: len(crops) for i, crops in seen.items()
    } == distinct  # all crops of each image in three epochs


def test_the_order_is_that_of_grains_shuffle(tokens):
    order = grain.MapDataset.range(50).shuffle(seed=derive_seed(7, SeedPurpose.ORDER)).repeat(2)
    loader = iter(make_record_loader(tokens, batch_size=20, seed=7))
    got = [image for _ in range(5) for image, _ in identify(tokens, next(loader))]
    assert got == list(order)


def test_shards_of_the_loader_are_parts_of_one_stream(tokens):
    whole = iter(make_record_loader(tokens, batch_size=12, seed=0))
    parts = [
        iter(
            make_record_loader(
                tokens, batch_size=4, seed=0, shard_index=s, shard_count=3, threads=s
            )
        )
        for s in range(3)
    ]
    for _ in range(10):
        batch = next(whole)
        for shard, part in enumerate(parts):
            mine = next(part)
            rows = slice(4 * shard, 4 * shard + 4)
            np.testing.assert_array_equal(mine["tokens"], batch["tokens"][rows])
            np.testing.assert_array_equal(mine["label"], batch["label"][rows])


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_loaders_state_restores_its_batches(tokens, in_memory):
    source = tokens.in_memory() if in_memory else tokens
    first = iter(make_record_loader(source, batch_size=8, seed=0, threads=2))
    for _ in range(9):
        next(first)
    saved = loader_state_to_bytes(first)
    assert json.loads(saved) == {"next_index": 9}  # as for a loader of images
    second = iter(make_record_loader(tokens, batch_size=8, seed=0))
    restore_loader_state(second, saved)
    for _ in range(4):
        np.testing.assert_array_equal(next(second)["tokens"], next(first)["tokens"])


def test_validation_tokens(tokens):
    parts = [
        batch
        for shard in range(3)
        for batch in make_record_loader(
            tokens, batch_size=4, train=False, shard_index=shard, shard_count=3
        )
    ]
    assert len(parts) == 3 * 5
    valid = np.concatenate([batch["valid"] for batch in parts])
    rows = np.concatenate([batch["tokens"] for batch in parts])[valid]
    assert valid.sum() == 50
    assert sorted(map(tuple, rows.tolist())) == sorted(
        map(tuple, rows_of(tokens, 0)["tokens"].tolist())
    )


def test_one_row_is_a_data_set():
    tokens = {"tokens": np.array([[1, 2, 3]])}
    source = RecordsInMemory.from_arrays(tokens, np.array([4]), token_spec(3, 4))
    batch = next(iter(make_record_loader(source, batch_size=1)))
    assert batch["tokens"].tolist() == [[1, 2, 3]] and batch["label"].tolist() == [4]


# The command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An encoded data set that the command wrote with the tiny tokenizer."""
    directory = tmp_path_factory.mktemp("command") / "set"
    with tiny.cached():
        assert cli.main(command(directory)) == 0
    return directory


def command(out, *more, tokenizer=None):
    return [
        "tokenize",
        f"--tokenizer={tokenizer or tiny.tokenizer_run()}",
        f"--data=folder:{tiny.images()}",
        f"--out={out}",
        "--crops=2",
        "--transform=random_crop",
        "--batch_size=8",
        "--shard_size=20",
        *more,
    ]


def test_tokenize(made, capsys):
    spec, params = load_spec_and_params(str(tiny.tokenizer_run()))
    info = read_info(made)
    assert info.complete
    assert info.fingerprint == VQAutoencoder(spec.autoencoder).fingerprint(params["tokenizer"])
    assert info.class_names == tiny.CLASSES and info.autoencoder["scales"] == [1, 2]
    train = open_records(made)
    assert (len(train), train.crops, len(open_records(made, "validate"))) == (36, 2, 9)
    assert rows_of(train, 0)["label"].tolist() == [0] * 12 + [1] * 12 + [2] * 12
    before = files_of(made)
    with tiny.cached():
        assert cli.main(command(made, "--verify")) == 0
    assert (
        "36 images to train in 2 crops, 9 images to validate; 3 classes" in capsys.readouterr().out
    )
    assert files_of(made) == before


def test_training_from_tokens_needs_no_encoder(made, tmp_path):
    experiment = build_experiment(
        tiny.config_of(tiny.train(tmp_path / "run", data__source=f"tokens:{made}"))
    )
    known = experiment.frozen["tokenizer"]
    assert known.keys() == {"decoder", "post_quant_conv", "quantizer"}
    assert "encoder" in experiment.parent.params["tokenizer"]  # the run keeps it, for editing
    assert experiment.spec.class_names == tiny.CLASSES
    task, batch, rng = experiment.task, next(iter(experiment.loader())), jax.random.key(0)
    tokens = rows_of(open_records(made), 0)["tokens"], rows_of(open_records(made), 1)["tokens"]
    assert {tuple(row) for row in batch["tokens"]} <= {
        tuple(row) for crop in tokens for row in crop
    }
    # Traced, not run: the programs find all that they take from the tokenizer.
    frozen, validation = experiment.frozen, next(iter(experiment.validation.loader))
    state = jax.eval_shape(functools.partial(init_state, task), rng, frozen)
    jax.eval_shape(functools.partial(train_step, task), state, frozen, batch, rng)
    jax.eval_shape(functools.partial(eval_step, task), state, frozen, validation)
    autoencoder = VQAutoencoder(experiment.spec.autoencoder)
    jax.eval_shape(autoencoder.decode, known, {"tokens": batch["tokens"]})


@pytest.mark.slow
def test_both_stages_from_tokens_on_disk_and_in_memory(made, tmp_path):
    steps = dict(data__source=f"tokens:{made}", eval_every=3, sample_every=3, checkpoint_every=3)
    with tiny.cached():
        assert cli.main(tiny.train(tmp_path / "whole", **steps, steps=6)) == 0
        assert (
            cli.main(tiny.train(tmp_path / "memory", **steps, steps=6, data__in_memory=True)) == 0
        )
        assert (
            cli.main(
                tiny.train_masked(
                    tmp_path / "masked", **steps, steps=3, init_from=tmp_path / "whole"
                )
            )
            == 0
        )
        (_, whole), (_, memory) = (
            load_spec_and_params(str(tmp_path / name)) for name in ("whole", "memory")
        )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(memory)):
        np.testing.assert_array_equal(a, b)
    assert len(list((tmp_path / "masked" / "samples").iterdir())) == 1
    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert any("validation/loss" in line for line in lines)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    """The tiny tokenizer with one number changed."""
    directory = tmp_path_factory.mktemp("tokenizer") / "other"
    spec, params = load_spec_and_params(str(tiny.tokenizer_run()))
    params["tokenizer"]["quantizer"]["codebook"] = np.array(
        params["tokenizer"]["quantizer"]["codebook"]
    )
    params["tokenizer"]["quantizer"]["codebook"][3, 0] += 0.01
    save_model(directory, spec.to_json(), params, "")
    return directory


def test_tokens_of_another_tokenizer(made, other_tokenizer, tmp_path, capsys):
    assert (
        cli.main(
            tiny.train(tmp_path / "run", data__source=f"tokens:{made}", tokenizer=other_tokenizer)
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search("another (tokenizer|autoencoder)", error)
    assert read_info(made).fingerprint in error and str(other_tokenizer) in error
    assert not (tmp_path / "run").exists()
    before = files_of(made)
    assert cli.main(command(made, tokenizer=other_tokenizer)) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "was encoded by another autoencoder" in error
        and files_of(made) == before
    )


def test_bad_input(made, tmp_path, capsys):
    flat = tmp_path / "flat"
    shutil.copytree(tiny.images() / "train" / "circle", flat)
    run, tokenizer = tmp_path / "run", tiny.tokenizer_run()
    for arguments, message in (
        (
            tiny.train(run, data__source=f"folder:{flat}"),
            f"{flat} has images but no class folders; .* {flat}/CLASS/",
        ),
        (
            ["tokenize", f"--tokenizer={tokenizer}", f"--data=folder:{flat}", f"--out={run}"],
            "has images but no class folders",
        ),
        (tiny.train(run, data__source="tokens:nowhere"), "there is no encoded data set nowhere"),
        (
            tiny.train(run, data__source=f"tokens:{flat}"),
            "is not an encoded data set: it has no records.json",
        ),
        (
            tiny.train_tokenizer(run, data__source=f"tokens:{made}"),
            "config.data.source must give images to train an autoencoder; got 'tokens:",
        ),
        (
            tiny.train(run, data__source=f"tokens:{made}", batch_size=37),
            "batch_size.*37.*36|batch_size.*36.*37",
        ),
        (command(run, "--splits=test"), "--splits.*test|splits.*train.*validate"),
        (command(run, "--transform=crop"), "transform.kind must be one of .*; got 'crop'"),
        (command(made, "--seed=1"), "another seed"),
    ):
        assert cli.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(message, error), error
    assert not run.exists()
    with pytest.raises(SystemExit):
        cli.main(command(run, "--part=2/2"))
    assert "I/N" in capsys.readouterr().err


def test_the_fingerprint_depends_on_what_determines_tokens():
    spec, params = load_spec_and_params("digits")
    config, params = spec.autoencoder, params["tokenizer"]
    fingerprint = lambda config, params: VQAutoencoder(config).fingerprint(params)
    known = fingerprint(config, params)
    assert len(known) == 16
    assert fingerprint(dataclasses.replace(config, dtype="bfloat16", dropout=0.1), params) == known
    assert fingerprint(config, {**params, "decoder": None}) == known
    assert fingerprint(dataclasses.replace(config, distance="cosine"), params) != known
    quantizer = {**params["quantizer"], "codebook": np.array(params["quantizer"]["codebook"])}
    quantizer["codebook"][0, 0] += 1e-3
    assert fingerprint(config, {**params, "quantizer": quantizer}) != known
