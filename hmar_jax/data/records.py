"""Encoded data sets: a data set encoded by an autoencoder, on disk, read by index; their loader.

An encoded data set is a directory that `hmar_jax.data.encoding.write_record_set` writes:

    records.json                                   its description, `RecordSetInfo`
    train-crop00-00003-of-00157.array_record       a shard: one crop of a range of images
    progress/train-crop00-00003-of-00157.json      size and checksum of each finished shard

A record holds the label and the arrays of one image, as the set's `RecordSpec` says. The records of
unreadable images are empty, so that a record's position is its image's index. ArrayRecord's reader
checks a hash of each record that it reads.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import grain
import numpy as np
from array_record.python import array_record_module
from etils import epath

from hmar_jax.data import first_version
from hmar_jax.data.fingerprint import fingerprint_values
from hmar_jax.data.loader import ENDLESS, read_ahead, validate_loader_args
from hmar_jax.data.record_spec import RecordField, RecordSpec
from hmar_jax.data.seeds import SeedPurpose, derive_seed
from hmar_jax.errors import InputError
from hmar_jax.io.files import is_local, read_json, write_atomically

__all__ = [
    "RecordField",
    "RecordSet",
    "RecordSetInfo",
    "RecordSpec",
    "Records",
    "RecordsInMemory",
    "SplitInfo",
    "make_record_loader",
    "open_records",
    "read_info",
]

FORMAT = "hmar_jax records 1"
INFO_FILE, PROGRESS_FOLDER = "records.json", "progress"
_INFO_FILES = (INFO_FILE, first_version.INFO_FILE)  # the first that exists is read
# What ArrayRecord and Riegeli raise for files that changed.
_READ_ERRORS = (RuntimeError, OSError, IndexError)


# Descriptions


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """One split of an encoded data set.

    Attributes:
      num_images: N, with the unreadable ones.
      crops: number of random crops of each image.
      source_fingerprint: of the images that were encoded; "" in sets of earlier versions.
      broken: index, path and reason of each unreadable image.
      shards: {"file", "records", "bytes", "sha256"} of each shard, those of crop 0 first.
    """

    num_images: int
    crops: int
    broken: tuple[tuple[int, str, str], ...] = ()
    shards: tuple[dict[str, Any], ...] = ()
    source_fingerprint: str = ""


@dataclasses.dataclass(frozen=True)
class RecordSetInfo:
    """The contents of records.json.

    Attributes:
      autoencoder_name: what the user called the autoencoder.
      fingerprint: identifies what the autoencoder encodes an image to.
      record_spec: what a record stores.
      autoencoder: what else describes the autoencoder; values that JSON has.
      source: the data, as `open_source` takes it.
      class_names: by label.
      transform: settings of the `Transform`.
      seed: seed of the random crops.
      shard_size: images in a shard.
      splits: by name, "train" or "validate".
      complete: whether all shards are finished.
      held_out, folder_rules: see `SourceConfig`; the defaults are those of sets without them.
    """

    autoencoder_name: str
    fingerprint: str
    record_spec: RecordSpec
    autoencoder: dict[str, Any]
    source: str
    class_names: tuple[str, ...]
    transform: dict[str, Any]
    seed: int
    shard_size: int
    splits: dict[str, SplitInfo]
    complete: bool = False
    held_out: float = 0.02
    folder_rules: int = 1

    def __post_init__(self):
        # As it will be read back: for example with lists instead of tuples.
        object.__setattr__(self, "autoencoder", json.loads(json.dumps(self.autoencoder)))

    def to_json(self) -> dict[str, Any]:
        """Returns the description as JSON types."""
        fields = dataclasses.asdict(self)
        del fields["record_spec"]
        return {"format": FORMAT, "record": self.record_spec.to_json(), **fields}

    @classmethod
    def from_json(cls, data: Any, where: str) -> "RecordSetInfo":
        """Returns what `to_json` described; also reads descriptions of the first version.

        Args:
          data: the contents of the file.
          where: the file's name, for errors.

        Raises:
          InputError: `data` is not such a description.
        """
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        if found not in (FORMAT, first_version.FORMAT):
            raise InputError(
                f"{where}: not the description of an encoded data set: format must be {FORMAT!r}; "
                f"got {found!r}"
            )
        try:
            if found == first_version.FORMAT:
                fields = first_version.upgrade_description(data)
            else:
                fields = {key: value for key, value in data.items() if key != "format"}
            splits = {
                name: SplitInfo(
                    **{
                        **split,
                        "broken": tuple(map(tuple, split["broken"])),
                        "shards": tuple(split["shards"]),
                    }
                )
                for name, split in fields.pop("splits").items()
            }
            spec = RecordSpec.from_json(fields.pop("record"))
            class_names = tuple(fields.pop("class_names"))
            return cls(**fields, record_spec=spec, class_names=class_names, splits=splits)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(
                f"{where}: this version cannot read the description ({error})"
            ) from None


def has_info(directory: os.PathLike | str) -> bool:
    """Whether a directory has a description of an encoded data set."""
    return any((epath.Path(directory) / name).exists() for name in _INFO_FILES)


def read_info(directory: os.PathLike | str) -> RecordSetInfo:
    """Reads the description of an encoded data set, complete or not.

    Raises:
      InputError: there is no such set, or its description cannot be read.
    """
    folder = epath.Path(directory)
    if not folder.is_dir():
        raise InputError(
            f"there is no encoded data set {directory}; hmar tokenize --out={directory} writes one"
        )
    path = next((folder / name for name in _INFO_FILES if (folder / name).exists()), None)
    if path is None:
        raise InputError(
            f"{directory} is not an encoded data set: it has no {INFO_FILE}; hmar tokenize writes "
            "one"
        )
    data = read_json(path, f"the description of the encoded data set {directory}")
    return RecordSetInfo.from_json(data, str(path))


# Reading


class Records(Protocol):
    """Encoded images, each in several crops; several threads may read at once."""

    @property
    def name(self) -> str:
        """The name in errors."""
        ...

    @property
    def crops(self) -> int: ...

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def read(self, indices: np.ndarray, crops: np.ndarray) -> dict[str, np.ndarray]:
        """Reads crop crops[b] of image indices[b].

        Args:
          indices: (B,) int.
          crops: (B,) int.

        Returns:
          The arrays (B, *shape) by field name, and "label": (B,) int32.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RecordsInMemory:
    """Packed records in memory."""

    records: np.ndarray  # (crops, N, record_bytes) uint8
    record_spec: RecordSpec
    name: str = "the encoded images"

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], labels: np.ndarray, record_spec: RecordSpec
    ) -> "RecordsInMemory":
        """Packs arrays (N, *shape) by field name and labels (N,) of N images in one crop."""
        return cls(record_spec.pack(arrays, labels)[None], record_spec)

    @property
    def crops(self) -> int:
        return len(self.records)

    def __len__(self) -> int:
        return self.records.shape[1]

    def read(self, indices: np.ndarray, crops: np.ndarray) -> dict[str, np.ndarray]:
        """See `Records.read`."""
        return self.record_spec.unpack(self.records[crops, indices])


class RecordSet:
    """One split of an encoded data set on disk, without its unreadable images.

    Attributes:
      info: the description of the set, a `RecordSetInfo`.
      crops: number of crops of each image.
      name, class_names, num_classes: as those of a source of images.
    """

    def __init__(self, directory: os.PathLike | str, info: RecordSetInfo, split: str):
        self._directory, self.info = os.fspath(directory), info
        self.name, self.class_names = f"records:{self._directory}", info.class_names
        self._split = info.splits[split]
        self.crops = self._split.crops
        broken = np.array([index for index, *_ in self._split.broken], np.int64)
        self._readable = np.setdiff1d(np.arange(self._split.num_images), broken)
        if is_local(directory):
            folder = self._directory
        else:
            folder = _download_shards(self._directory, info, split)
        self._paths = [os.path.join(folder, shard["file"]) for shard in self._split.shards]
        for shard, path in zip(self._split.shards, self._paths):
            _check_size(path, shard["bytes"], self._directory)
        # Opened on demand; several threads may use one.
        self._readers: list[Any] = [None] * len(self._paths)
        self._lock = threading.Lock()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._readable)

    def fingerprint(self) -> str:
        """See `data.sources.Source.fingerprint`. It covers every crop, and the contents too."""
        shards = [[shard["records"], shard["sha256"]] for shard in self._split.shards]
        broken = [index for index, *_ in self._split.broken]
        return fingerprint_values(
            self.info.fingerprint, self.info.record_spec.to_json(), shards, broken
        )

    def read(self, indices: np.ndarray, crops: np.ndarray) -> dict[str, np.ndarray]:
        """See `Records.read`.

        Raises:
          InputError: a record is damaged.
        """
        shards_per_crop = -(-self._split.num_images // self.info.shard_size)
        shards, positions = np.divmod(self._readable[indices], self.info.shard_size)
        shards = shards + crops * shards_per_crop
        try:
            # Read ranges of one record: for a list of positions, ArrayRecord goes through the index
            # of all records of the file, each time.
            records = [
                self._reader(shard).read(position, position + 1)[0]
                for shard, position in zip(shards.tolist(), positions.tolist())
            ]
        except _READ_ERRORS as error:
            raise self._damaged(error) from error
        return self.info.record_spec.unpack(self._as_array(records))

    def in_memory(self) -> RecordsInMemory:
        """Reads all records to memory, where they stay packed.

        Raises:
          InputError: a record is damaged.
        """
        size = self.info.record_spec.record_bytes
        packed = np.empty((self.crops, self._split.num_images, size), np.uint8)
        shards_per_crop = len(self._paths) // self.crops
        for number, path in enumerate(self._paths):
            crop, start = divmod(number, shards_per_crop)
            start *= self.info.shard_size
            try:
                reader = array_record_module.ArrayRecordReader(path)
                records = [record or bytes(size) for record in reader.read_all()]
                reader.close()
            except _READ_ERRORS as error:
                raise self._damaged(error) from error
            packed[crop, start : start + len(records)] = self._as_array(records)
        if len(self._readable) < self._split.num_images:
            packed = packed[:, self._readable]
        return RecordsInMemory(packed, self.info.record_spec, self.name)

    def _as_array(self, records: list[bytes]) -> np.ndarray:
        size = self.info.record_spec.record_bytes
        if any(len(record) != size for record in records):
            raise self._damaged(ValueError(f"a record does not have {size} bytes"))
        return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), size)

    def _damaged(self, error: Exception) -> InputError:
        return InputError(
            f"{self._directory} is damaged: {' '.join(str(error).split())}; hmar tokenize with "
            "--verify repairs it"
        )

    def _reader(self, shard: int):
        if self._readers[shard] is None:
            with self._lock:
                if self._readers[shard] is None:
                    self._readers[shard] = array_record_module.ArrayRecordReader(
                        self._paths[shard],
                        options="readahead_buffer_size:0,max_parallelism:0",
                        file_reader_buffer_size=2048,
                    )
        return self._readers[shard]


def open_records(directory: os.PathLike | str, split: str = "train") -> RecordSet | None:
    """Opens one split of an encoded data set.

    A set in an object store is first copied to this machine's temporary folder, once; later runs
    find the copy there. The records of a batch lie in all shards of a set, so reading them over the
    network would be slow.

    Args:
      directory: the set.
      split: "train" or "validate".

    Returns:
      The split, or None if the set was written without it.

    Raises:
      InputError: there is no such set, it is not complete, or files are missing or of another size.
    """
    info = read_info(directory)
    if not info.complete:
        raise InputError(
            f"the encoded data set {directory} is not complete; run the same hmar tokenize again "
            "to resume"
        )
    return RecordSet(directory, info, split) if split in info.splits else None


def _check_size(path: str, size: int, directory: str) -> None:
    found = os.path.getsize(path) if os.path.isfile(path) else None
    if found != size:
        problem = "is missing" if found is None else f"has {found} bytes instead of {size}"
        raise InputError(
            f"the encoded data set {directory} is damaged: {os.path.basename(path)} {problem}; run "
            "the same hmar tokenize again to repair it"
        )


def _download_shards(directory: str, info: RecordSetInfo, split: str) -> str:
    """Copies the shards of a split to a local folder, unless they are there; returns the folder."""
    identity = hashlib.sha256(repr((directory, info)).encode()).hexdigest()[:16]
    folder = os.path.join(tempfile.gettempdir(), f"hmar_records_{identity}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    for shard in info.splits[split].shards:
        target = os.path.join(folder, shard["file"])
        if os.path.isfile(target) and os.path.getsize(target) == shard["bytes"]:
            continue
        data = (epath.Path(directory) / shard["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise InputError(
                f"the encoded data set {directory} is damaged: {shard['file']} has another "
                "checksum; hmar tokenize with --verify repairs it"
            )
        write_atomically(target, data)
    return folder


# Batches


def make_record_loader(
    source: Records,
    *,
    batch_size: int,
    seed: int = 0,
    train: bool = True,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 0,
    offset: int = 0,
) -> grain.IterDataset:
    """Makes the batches of one shard (usually one host) of encoded images.

    Training: endless; over all shards together, every image once an epoch, in a new order each
    epoch. The crops of an image take turns from epoch to epoch.

    Validation: one pass over the first crops in order. All shards give the same number of batches.
    Batches also have "valid", which is False for what pads the last batch.

    The iterator's state is that of `make_loader`.

    Args:
      source: the encoded images.
      batch_size: B, images in a batch of this shard.
      seed: seed of the order, at least 0; validation uses none.
      train: whether to shuffle and repeat.
      shard_index: the shard to read, in [0, shard_count).
      shard_count: number of shards.
      threads: threads that read ahead, each a whole batch; 0 reads on demand.
      offset: see `make_loader`.

    Returns:
      A `grain.IterDataset` of the arrays (B, *shape) by field name, "label": (B,) int32 and, in
      validation, "valid": (B,) bool.

    Raises:
      InputError: an argument is out of range, or no batch could be filled. While iterating: a
        record is damaged.
    """
    n, num_crops = len(source), source.crops
    validate_loader_args(
        n,
        source.name,
        batch_size=batch_size,
        seed=seed,
        train=train,
        num_epochs=None,
        shard_index=shard_index,
        shard_count=shard_count,
        threads=threads,
        pad=True,
        noun="records" if num_crops == 1 else "images",
    )
    order_seed, global_batch = derive_seed(seed, SeedPurpose.ORDER), batch_size * shard_count
    own_rows = shard_index * batch_size + np.arange(batch_size)  # rows of the global batch

    def training_batch(number):
        epochs, positions = np.divmod(number * global_batch + offset + own_rows, n)
        # What MapDataset.shuffle does, for a whole batch. One element at a time would take as long
        # as reading the records.
        indices = np.array(
            [
                grain.experimental.index_shuffle(
                    position, max_index=n - 1, seed=(order_seed + epoch) % 2**32, rounds=4
                )
                for epoch, position in zip(epochs.tolist(), positions.tolist())
            ]
        )
        return source.read(indices, (epochs + indices) % num_crops)

    def validation_batch(number):
        indices = number * global_batch + own_rows
        valid = indices < n
        return {**source.read(np.where(valid, indices, 0), np.zeros_like(indices)), "valid": valid}

    batches = grain.MapDataset.range(ENDLESS if train else -(-n // global_batch))
    return read_ahead(batches.map(training_batch if train else validation_batch), threads)
