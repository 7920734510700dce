"""Images and encoded data sets in gs:// buckets, against a local emulator of Google's storage."""

import io
import logging
import socket

import numpy as np
import pytest
from etils import epath
from PIL import Image

from hmar_jax.data.records import open_records, read_info
from hmar_jax.data.sources import ImageDecodeError, open_source
from hmar_jax.errors import InputError
from tests.test_tokens import rows_of, write

pytest.importorskip("gcsfs", reason="gs:// requires gcsfs")
emulator = pytest.importorskip(
    "gcp_storage_emulator.server",
    reason="no emulator: pip install gcp-storage-emulator",
    exc_type=ImportError,
)


@pytest.fixture(scope="module")
def bucket():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    patch = pytest.MonkeyPatch()
    patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    # Clients that disconnect early are no errors.
    patch.setattr("socketserver.BaseServer.handle_error", lambda *_: None)
    for name in ("gcsfs", "fsspec", "gcp_storage_emulator"):
        logging.getLogger(name).setLevel(logging.ERROR)
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield "gs://bucket"
    server.stop()
    patch.undo()


def test_a_folder_of_images(bucket, tmp_path):
    root = epath.Path(bucket) / "images"
    rng = np.random.default_rng(0)
    images = {}
    for split, names in (
        ("train", ("a/1.png", "a/deep/2.png", "b/3.png", "b/notes.txt", "b/.hidden.png")),
        ("val", ("b/4.png",)),
    ):
        for name in names:
            images[name] = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(images[name]).save(file, format="PNG")
            (root / split / name).write_bytes(file.getvalue())
    (root / "class_names.txt").write_text("b Golden retriever, a dog\n")
    train, validate = (open_source(f"folder:{root}", split) for split in ("train", "validate"))
    assert train.files == ("a/1.png", "a/deep/2.png", "b/3.png")
    assert train.labels.tolist() == [0, 0, 1]
    assert validate.files == ("b/4.png",) and validate.labels.tolist() == [1]
    assert train.class_names == ("a", "Golden_retriever")
    for source in (train, validate):
        for i, name in enumerate(source.files):
            np.testing.assert_array_equal(source[i]["image"], images[name])
    for name in images:  # a copy on disk has the same fingerprint
        path = tmp_path / ("val" if name == "b/4.png" else "train") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((root / path.relative_to(tmp_path)).read_bytes())
    copies = [open_source(f"folder:{tmp_path}", split) for split in ("train", "validate")]
    fingerprints = [source.fingerprint() for source in (train, validate)]
    assert [source.fingerprint() for source in copies] == fingerprints
    (tmp_path / "train/a/1.png").write_bytes(b"")
    assert copies[0].fingerprint() != fingerprints[0]
    (root / "train" / "b" / "3.png").unlink()
    with pytest.raises(ImageDecodeError, match="gs://bucket/images/train/b/3.png"):
        train[2]
    with pytest.raises(InputError, match="gs://bucket/nothing does not exist"):
        open_source("folder:gs://bucket/nothing")


def test_what_else_is_in_a_bucket(bucket, caplog):
    """Names tell folders and objects apart only in part: LICENSE, St. Bernard."""
    root = epath.Path(bucket) / "odd"
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="PNG")
    for name in ("a/1.png", "a/2.jfif", "St. Bernard/1.png", "St. Bernard/2.png", "@eaDir/x.jpg"):
        (root / "train" / name).write_bytes(file.getvalue())
    for name in ("LICENSE", "a/README", "a/1.json", "a/2.json", "Thumbs.db"):
        (root / "train" / name).write_bytes(b"x")
    (root / "val" / "a" / "3.png").write_bytes(file.getvalue())
    with caplog.at_level(logging.INFO, "hmar_jax"):
        source = open_source(f"folder:{root}")
    assert source.class_names == ("St. Bernard", "a")
    assert source.files == ("St. Bernard/1.png", "St. Bernard/2.png", "a/1.png", "a/2.jfif")
    assert "skipped 4 files that are not images (2 .json, 2 without ending)" in caplog.text


def test_an_encoded_data_set(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    directory = f"{bucket}/tokens"
    assert not write(directory, part=(0, 2)).complete
    assert write(directory, part=(1, 2)).complete
    assert not list((tmp_path / "scratch").iterdir())  # shards are written there first, and removed
    write(tmp_path / "local")
    train, local = open_records(directory), open_records(tmp_path / "local")
    for crop in range(2):
        np.testing.assert_array_equal(
            rows_of(train, crop)["tokens"], rows_of(local, crop)["tokens"]
        )

    shard = epath.Path(directory) / read_info(directory).splits["train"].shards[2]["file"]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    open_records(directory)  # from the local copy
    (copy,) = (tmp_path / "scratch").iterdir()
    (copy / shard.name).unlink()
    with pytest.raises(InputError, match="has another checksum"):
        open_records(directory)
    write(directory, verify=True)
    np.testing.assert_array_equal(
        rows_of(open_records(directory), 0)["tokens"], rows_of(local, 0)["tokens"]
    )
