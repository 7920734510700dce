"""Encodes the images of a source with an autoencoder: to memory, or to an encoded data set on disk.

Writing an encoded data set is safe to interrupt: run the same call to resume. A shard is written to
a temporary file, read back and renamed. Then its size and checksum are written to the progress
folder, and only shards listed there count as finished. A record depends only on the seed and on the
image's index and crop. So neither interruptions nor the number of processes that share the work
change a bit of the set.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python import array_record_module
from etils import epath

from hmar_jax.data.decode_errors import (
    MAX_UNREADABLE_FRACTION,
    DecodeErrorLog,
    is_over_limit,
)
from hmar_jax.data.loader import make_loader, shard_and_batch
from hmar_jax.data.record_spec import RecordSpec
from hmar_jax.data.records import (
    INFO_FILE,
    PROGRESS_FOLDER,
    RecordSetInfo,
    RecordsInMemory,
    SplitInfo,
    has_info,
    read_info,
)
from hmar_jax.data.seeds import SeedPurpose, derive_seed
from hmar_jax.data.source_config import FOLDER_RULES
from hmar_jax.data.sources import ImageDecodeError, Source, SourceConfig, absolute_spec
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError
from hmar_jax.io.files import is_local, read_json, write_atomically
from hmar_jax.io.identity import class_differences, same_place
from hmar_jax.progress import Progress

_log = logging.getLogger(__name__)

# Images (B, side, side, 3) uint8 -> arrays (B, *shape) by field name.
Encode = Callable[[np.ndarray], Mapping[str, Any]]

# One record in a group, for random access. Encoded images hardly compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def encode_in_memory(
    encode: Encode,
    source: Source,
    transform: Transform,
    *,
    record_spec: RecordSpec,
    copies: int,
    seed: int,
    batch_size: int = 64,
    progress: bool = False,
    broken: DecodeErrorLog | None = None,
) -> RecordsInMemory:
    """Encodes every image of a source several times, each time with another random transform.

    Args:
      encode: images (B, side, side, 3) uint8 -> arrays (B, *shape) by field name.
      source: the images.
      transform: turns an image into one of (side, side).
      record_spec: the arrays that `encode` returns.
      copies: how often to encode each image.
      seed: seed of the random transforms; the result depends on no other random numbers.
      batch_size: most images to encode at once.
      progress: whether to say how far it is.
      broken: log of unreadable images; the next readable image replaces each.

    Returns:
      len(source) * copies records, each an image of its own. Up to a thousandth of them, which do
      not fill the last batch, are dropped.
    """
    num_records = len(source) * copies
    batch_size = next(
        b
        for b in range(min(batch_size, len(source)), 0, -1)
        if num_records % b <= num_records // 1000
    )
    loader = make_loader(
        source,
        transform,
        batch_size=batch_size,
        seed=derive_seed(seed, SeedPurpose.ENCODE),
        train=True,
        num_epochs=copies,
        broken=broken,
    )
    record_spec = record_spec.without_packing()  # few enough to be encoded at each start
    records = []
    total = num_records // batch_size * batch_size
    with Progress("encoding", total, "crop", show=progress) as done:
        for batch in loader:
            records.append(record_spec.pack(encode(batch["image"]), batch["label"]))
            done.advance(batch_size)
    return RecordsInMemory(np.concatenate(records)[None], record_spec)


# Encoded data sets


class Shard(NamedTuple):
    """A file of an encoded data set: one crop of images start, ..., stop - 1."""

    split: str
    crop: int
    start: int
    stop: int
    file: str


def describe(
    name: str,
    fingerprint: str,
    record_spec: RecordSpec,
    autoencoder: Mapping[str, Any],
    spec: str,
    sources: Mapping[str, Source],
    transform: Transform,
    *,
    crops: int,
    seed: int,
    shard_size: int,
    config: SourceConfig | None = None,
) -> RecordSetInfo:
    """Describes the encoded data set to write.

    Args:
      name: what the user called the autoencoder.
      fingerprint: identifies what the autoencoder encodes an image to.
      record_spec: what a record stores.
      autoencoder: what else describes the autoencoder; values that JSON has.
      spec: the data, as `open_source` takes it.
      sources: its splits.
      transform: turns an image into the autoencoder's input.
      crops: number of random crops of each training image.
      seed: seed of the crops.
      shard_size: images in a shard.
      config: what is read of the data; None: the defaults.
    """
    config = SourceConfig() if config is None else config
    splits = {
        split: SplitInfo(
            len(source),
            crops if split == "train" else 1,
            source_fingerprint=source.fingerprint(),
        )
        for split, source in sources.items()
    }
    return RecordSetInfo(
        autoencoder_name=name,
        fingerprint=fingerprint,
        record_spec=record_spec,
        autoencoder=dict(autoencoder),
        source=absolute_spec(spec),
        class_names=next(iter(sources.values())).class_names,
        transform=dataclasses.asdict(transform),
        seed=seed,
        shard_size=shard_size,
        splits=splits,
        held_out=config.held_out,
        folder_rules=config.folder_rules or FOLDER_RULES,
    )


def settle(directory: os.PathLike | str, config: SourceConfig) -> SourceConfig:
    """The settings with the folder rules of the set in a directory, or those of a new set.

    Raises:
      InputError: the description of the set cannot be read.
    """
    if config.folder_rules is not None:
        return config
    rules = read_info(directory).folder_rules if has_info(directory) else FOLDER_RULES
    return dataclasses.replace(config, folder_rules=rules)


def list_shards(split: str, num_images: int, crops: int, shard_size: int) -> list[Shard]:
    """Lists all shards of a split, those of crop 0 first.

    Names do not depend on the number of crops, so that more can be added.
    """
    count = -(-num_images // shard_size)
    return [
        Shard(
            split,
            crop,
            i * shard_size,
            min(num_images, (i + 1) * shard_size),
            f"{split}-crop{crop:02d}-{i:05d}-of-{count:05d}.array_record",
        )
        for crop in range(crops)
        for i in range(count)
    ]


def write_record_set(
    directory: os.PathLike | str,
    encode: Encode,
    sources: Mapping[str, Source],
    transform: Transform,
    info: RecordSetInfo,
    *,
    batch_size: int = 64,
    part: tuple[int, int] = (0, 1),
    threads: int = 2,
    workers: int = 0,
    verify: bool = False,
    progress: bool = False,
    check: Callable[[], None] = lambda: None,
) -> RecordSetInfo:
    """Writes one part of an encoded data set, or what is missing of it.

    The process that finds all shards finished, of whichever part, marks the set complete.

    Args:
      directory: the set. An unfinished one is resumed; a finished one gets the crops that it lacks.
      encode: images (batch_size, side, side, 3) uint8 -> arrays (batch_size, *shape) by field name.
      sources: the images of each split in `info`.
      transform: random for every crop of training images; not random in split "validate".
      info: what the set is, with images and crops of each split; see `describe`.
      batch_size: images to encode at once.
      part: (index, count): this process writes every count-th shard.
      threads, workers: as in `make_loader`.
      verify: whether to check finished shards by checksum and not only by size. Damaged shards are
        written again.
      progress: whether to say how far it is.
      check: called before each image; what it raises ends the call. Finished shards stay.

    Returns:
      The description of the set as it is now; `complete` is False while other parts are missing.

    Raises:
      InputError: the directory holds another set, or cannot be written; or more than 1 % of the
        images (and more than 10) cannot be read. Finished shards stay.
    """
    folder = epath.Path(directory)
    info = _prepare_directory(folder, info)
    for split, source in sources.items():
        s = info.splits[split]
        shards = list_shards(split, s.num_images, s.crops, info.shard_size)[part[0] :: part[1]]
        todo = [shard for shard in shards if not _is_finished(folder, shard, source, verify)]
        if todo:
            _write_shards(
                folder,
                encode,
                source,
                transform,
                info,
                todo,
                batch_size,
                threads,
                workers,
                progress,
                check,
            )
    return finish(folder, info)


def _prepare_directory(folder: epath.Path, info: RecordSetInfo) -> RecordSetInfo:
    """Makes the directory, or checks that it holds this set; returns the set's description."""
    try:
        if has_info(folder):
            found = read_info(folder)
            _check_same_set(folder, found, info)
            # A call may add crops but never remove any: others may be reading them.
            splits = {
                name: dataclasses.replace(split, crops=max(split.crops, found.splits[name].crops))
                for name, split in info.splits.items()
            }
            info = dataclasses.replace(
                info,
                autoencoder_name=found.autoencoder_name,
                autoencoder=found.autoencoder | info.autoencoder,
                splits=splits,
            )
            if all(found.splits[name].crops == split.crops for name, split in splits.items()):
                return dataclasses.replace(info, complete=found.complete)
        elif folder.is_dir() and any(not path.name.endswith(".tmp") for path in folder.iterdir()):
            raise InputError(
                f"{folder} must be empty or an encoded data set (it has no {INFO_FILE}); choose "
                "another --out"
            )
        elif folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} must be a directory; it is a file")
        (folder / PROGRESS_FOLDER).mkdir(parents=True, exist_ok=True)
        _write_info(folder, info)
    except OSError as error:
        raise InputError(
            f"the encoded data set {folder} cannot be written: {error.strerror or error}"
        ) from None
    return info


def _check_same_set(folder: epath.Path, found: RecordSetInfo, given: RecordSetInfo) -> None:
    """Raises InputError unless a call that writes set `given` may write to set `found`.

    The images may lie elsewhere than before, if their fingerprints are known.
    """
    if found.fingerprint != given.fingerprint:
        raise InputError(
            f"{folder} was encoded by another autoencoder: {found.autoencoder_name!r} with "
            f"fingerprint {found.fingerprint}, not {given.autoencoder_name!r} with "
            f"{given.fingerprint}; choose another --out"
        )
    compared = {
        name: (getattr(found, name), getattr(given, name))
        for name in ("held_out", "folder_rules", "seed", "shard_size", "transform")
    }
    known = all(split.source_fingerprint for split in found.splits.values())
    if not known and not same_place(found.source, given.source):
        compared["source"] = (found.source, given.source)
    compared["record"] = (found.record_spec.to_json(), given.record_spec.to_json())
    # An older or newer version may describe more of the same autoencoder.
    for name in found.autoencoder.keys() & given.autoencoder.keys():
        compared[name] = (found.autoencoder[name], given.autoencoder[name])
    differences = [
        f"another {name}: {theirs!r} there, {ours!r} here"
        for name, (theirs, ours) in compared.items()
        if theirs != ours
    ]
    if found.splits.keys() != given.splits.keys():
        there, here = (", ".join(info.splits) for info in (found, given))
        differences.append(f"other splits: {there} there, {here} here")
    if classes := class_differences(found.class_names, given.class_names):
        differences.append(f"other classes: {', '.join(classes)}")
    for name in found.splits.keys() & given.splits.keys():
        a, b = found.splits[name], given.splits[name]
        if a.num_images != b.num_images:
            differences.append(f"{a.num_images} images to {name} there, {b.num_images} here")
        elif a.source_fingerprint and a.source_fingerprint != b.source_fingerprint:
            differences.append(f"images to {name} of other names, sizes or labels")
    if differences:
        raise InputError(
            f"{folder} holds an encoded data set with {'; with '.join(differences)}; choose "
            "another --out"
        )


def finish(directory: os.PathLike | str, info: RecordSetInfo) -> RecordSetInfo:
    """Marks the set complete if all its shards are finished; returns its description.

    Raises:
      InputError: more than 1 % of the images of a split, and more than 10, cannot be read.
    """
    folder, splits = epath.Path(directory), {}
    for name, split in info.splits.items():
        shards = list_shards(name, split.num_images, split.crops, info.shard_size)
        entries = [entry for shard in shards if (entry := _read_progress(folder, shard))]
        if len(entries) < len(shards):
            return dataclasses.replace(info, complete=False)
        broken = {item[0]: tuple(item) for entry in entries for item in entry["broken"]}
        _check_unreadable(folder, info.source, list(broken.values()), split.num_images)
        splits[name] = dataclasses.replace(
            split,
            broken=tuple(broken[i] for i in sorted(broken)),
            shards=tuple(
                {key: entry[key] for key in ("file", "records", "bytes", "sha256")}
                for entry in entries
            ),
        )
    info = dataclasses.replace(info, splits=splits, complete=True)
    _write_info(folder, info)
    return info


def count_unfinished(directory: os.PathLike | str, info: RecordSetInfo) -> tuple[int, int]:
    """Counts the shards that no part has finished yet, and all shards."""
    folder = epath.Path(directory)
    shards = [
        shard
        for name, split in info.splits.items()
        for shard in list_shards(name, split.num_images, split.crops, info.shard_size)
    ]
    return sum(_read_progress(folder, shard) is None for shard in shards), len(shards)


def _write_info(folder: epath.Path, info: RecordSetInfo) -> None:
    write_atomically(folder / INFO_FILE, json.dumps(info.to_json(), indent=1) + "\n")


# Progress


def _progress_path(folder: epath.Path, shard: Shard) -> epath.Path:
    return folder / PROGRESS_FOLDER / shard.file.replace(".array_record", ".json")


def _read_progress(folder: epath.Path, shard: Shard) -> dict[str, Any] | None:
    """Reads the size, checksum and unreadable images of a finished shard; None if unfinished."""
    path = _progress_path(folder, shard)
    if not path.exists():
        return None
    return read_json(path, f"the progress of a shard of the encoded data set {folder}")


def _is_finished(folder: epath.Path, shard: Shard, source: Source, verify: bool) -> bool:
    """Whether a shard is written and sound; one that is damaged or outdated becomes unfinished."""
    entry = _read_progress(folder, shard)
    if entry is None:
        return False
    path = folder / shard.file
    if not path.exists():
        problem = "is missing"
    elif path.stat().length != entry["bytes"]:
        problem = f"has {path.stat().length} bytes instead of {entry['bytes']}"
    elif verify and _sha256(path) != entry["sha256"]:
        problem = "has another checksum"
    elif any(_is_readable(source, index) for index, *_ in entry["broken"]):
        problem = "lacks an image that is readable now"
    else:
        return True
    _log.warning("%s %s; writing it again", path, problem)
    _progress_path(folder, shard).unlink()
    return False


def _is_readable(source: Source, index: int) -> bool:
    try:
        source[index]
    except ImageDecodeError:
        return False
    return True


def _sha256(path: os.PathLike | str) -> str:
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_unreadable(folder, source: str, broken: list, num_images: int) -> None:
    """Raises InputError if too many images of a split cannot be read."""
    if is_over_limit(len(broken), MAX_UNREADABLE_FRACTION * num_images):
        raise InputError(
            f"{source}: {len(broken)} of the {num_images} images cannot be read; at most "
            f"{MAX_UNREADABLE_FRACTION:.0%} may be unreadable; the first: "
            f"{', '.join(path for _, path, _ in broken[:3])}; repair them and run the same command "
            f"again to resume {folder}"
        )


# Writing


def _write_shards(
    folder: epath.Path,
    encode: Encode,
    source: Source,
    transform: Transform,
    info: RecordSetInfo,
    todo: list[Shard],
    batch_size: int,
    threads: int,
    workers: int,
    progress: bool,
    check: Callable[[], None],
) -> None:
    """Writes shards of one split, in order."""
    split, num_images = todo[0].split, sum(shard.stop - shard.start for shard in todo)
    records = _encode_shards(encode, source, transform, info, todo, batch_size, threads, workers)
    broken: dict[int, tuple[int, str, str]] = {}
    with Progress(f"encoding images to {split}", num_images, "image", show=progress) as done:
        for shard in todo:
            writer = _ShardWriter(folder, shard)
            try:
                for index in range(shard.start, shard.stop):
                    check()
                    record = next(records)
                    if record is None:
                        if index not in broken:
                            broken[index] = _find_reason(source, index)
                            _log.warning("skipped %s: %s", *broken[index][1:])
                            _check_unreadable(
                                folder, info.source, list(broken.values()), len(source)
                            )
                        writer.skip(broken[index])
                    else:
                        writer.add(record)
                    done.advance()
                writer.commit()
            except OSError as error:
                raise InputError(
                    f"the encoded data set {folder} cannot be written: {error.strerror or error}; "
                    "run the same command again to resume"
                ) from error
            finally:
                writer.close()


def _find_reason(source: Source, index: int) -> tuple[int, str, str]:
    """Returns index, path and reason of an unreadable image.

    Another process may have read the image, so this reads it again.
    """
    try:
        source[index]
    except ImageDecodeError as error:
        return index, error.path, error.reason
    return index, f"{source.name}[{index}]", "was unreadable once, and is readable now"


def _encode_shards(
    encode: Encode,
    source: Source,
    transform: Transform,
    info: RecordSetInfo,
    todo: list[Shard],
    batch_size: int,
    threads: int,
    workers: int,
) -> Iterator[bytes | None]:
    """Yields the record of every image of the shards, in order; None for an unreadable image."""
    crops = np.concatenate([np.full(shard.stop - shard.start, shard.crop) for shard in todo])
    indices = np.concatenate([np.arange(shard.start, shard.stop) for shard in todo])
    crop_seed = derive_seed(info.seed, SeedPurpose.CROPS)
    is_random = todo[0].split != "validate"

    def example_at(position):
        image, label, readable = np.zeros((transform.side, transform.side, 3), np.uint8), 0, False
        if position < len(indices):  # the others pad the last batch
            index, crop = int(indices[position]), int(crops[position])
            try:
                example = source[index]
            except ImageDecodeError:
                pass
            else:
                rng = np.random.default_rng([crop_seed, crop, index]) if is_random else None
                image, label, readable = transform(example["image"], rng), example["label"], True
        return {"image": image, "label": np.int64(label), "readable": np.bool_(readable)}

    num_batches = -(-len(indices) // batch_size)
    dataset = grain.MapDataset.range(num_batches * batch_size).map(example_at)
    loader = iter(shard_and_batch(dataset, batch_size, 0, 1, threads, workers))

    def to_records(batch, encoded):
        packed = info.record_spec.pack(encoded, batch["label"])
        for row, readable in zip(packed, batch["readable"].tolist()):
            yield row.tobytes() if readable else None

    previous = None
    with contextlib.closing(loader):
        for batch in loader:  # the device encodes one batch while the previous one is written
            encoded = encode(batch["image"])
            if previous is not None:
                yield from to_records(*previous)
            previous = batch, encoded
        yield from to_records(*previous)


class _ShardWriter:
    """Writes one shard. Its file appears complete, after it was read back, or not at all."""

    def __init__(self, folder: epath.Path, shard: Shard):
        self._folder, self._shard = folder, shard
        temporary_folder = os.fspath(folder) if is_local(folder) else tempfile.gettempdir()
        if is_local(folder):
            for leftover in folder.glob(f".{shard.file}.*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
        name = f".{shard.file}.{secrets.token_hex(4)}.tmp"
        self._temporary = os.path.join(temporary_folder, name)
        self._writer: Any = array_record_module.ArrayRecordWriter(self._temporary, _WRITER_OPTIONS)
        self._num_records, self._contents, self._broken = 0, hashlib.sha256(), []

    def add(self, record: bytes) -> None:
        with _as_os_errors():
            self._writer.write(record)
        self._contents.update(record)
        self._num_records += 1

    def skip(self, broken: tuple[int, str, str]) -> None:
        self._broken.append(broken)
        self.add(b"")

    def commit(self) -> None:
        with _as_os_errors():
            self._writer.close()
        self._writer = None
        self._read_back()
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        entry = {
            "file": self._shard.file,
            "records": self._num_records,
            "bytes": os.path.getsize(self._temporary),
            "sha256": _sha256(self._temporary),
            "broken": self._broken,
        }
        target = self._folder / self._shard.file
        if is_local(self._folder):
            os.replace(self._temporary, target)
        else:
            epath.Path(self._temporary).copy(target, overwrite=True)
        write_atomically(_progress_path(self._folder, self._shard), json.dumps(entry) + "\n")

    def _read_back(self) -> None:
        contents = hashlib.sha256()
        with _as_os_errors():
            reader = array_record_module.ArrayRecordReader(self._temporary)
            for record in reader.read_all():
                contents.update(record)
            count = reader.num_records()
            reader.close()
        if (count, contents.digest()) != (self._num_records, self._contents.digest()):
            raise OSError(f"{self._shard.file} does not read back as it was written")

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # that it cannot be written was raised before
                self._writer.close()
        if os.path.exists(self._temporary):
            os.unlink(self._temporary)


@contextlib.contextmanager
def _as_os_errors():
    """Turns the RuntimeError that ArrayRecord raises, as on a full disk, into an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(" ".join(str(error).split())[:300]) from error
