"""Token sets: the tokens of a whole data set on disk, read by index, and the loader of them.

A token set is a directory that data/tokenize.py writes:

    tokens.json                                    what it is (`TokenSetInfo`) and, once all of it is there, its shards
    train-crop00-00003-of-00157.array_record       one crop of a range of pictures
    progress/train-crop00-00003-of-00157.json      each finished shard's length and checksum

A record is one picture's label (uint32, little endian) and its tokens, scales in order, in the fewest of 8, 12, 16 or 32
bits that hold the vocabulary: 1,024 bytes at 680 tokens of 4,096 words. Records of pictures that could not be read are
empty, so that a record's place tells its picture. ArrayRecord's reader checks a hash of each record that it reads.
"""

import dataclasses
import hashlib
import os
import tempfile
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import grain
import numpy as np
from array_record.python import array_record_module
from etils import epath

from hmar_jax.data.loader import read_ahead, validate_loader_args
from hmar_jax.data.seeds import SeedPurpose, derive_seed
from hmar_jax.errors import InputError
from hmar_jax.io.files import is_local, read_json, write_atomically

FORMAT = "hmar_jax tokens 1"
INFO_FILE, PROGRESS_FOLDER = "tokens.json", "progress"
_LABEL_BYTES = 4
_ENDLESS = 2**40  # batches
_READ_ERRORS = (
    RuntimeError,
    OSError,
    IndexError,
)  # what ArrayRecord and Riegeli raise on files that changed


# ---------------------------------------------------------------------------------------------------------------------
# Records


def token_bits(vocab_size: int) -> int:
    """Bits a token takes in a record."""
    return next(bits for bits in (8, 12, 16, 32) if vocab_size <= 2**bits)


def record_bytes(length: int, vocab_size: int) -> int:
    """Bytes of a record of `length` tokens."""
    return _LABEL_BYTES + -(-length * token_bits(vocab_size) // 8)


def pack(tokens: np.ndarray, labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """(B, L) tokens and (B,) labels to uint8 (B, record_bytes): a row is a record."""
    bits = token_bits(vocab_size)
    if bits == 12:  # two tokens in three bytes, the first in the lower half
        low, high = (
            np.pad(tokens, ((0, 0), (0, tokens.shape[1] % 2)))
            .astype(np.uint16)
            .reshape(len(tokens), -1, 2)
            .transpose(2, 0, 1)
        )
        body = np.stack([low & 255, low >> 8 | (high & 15) << 4, high >> 4], axis=-1).astype(
            np.uint8
        )
        body = body.reshape(len(tokens), -1)[
            :, : record_bytes(tokens.shape[1], vocab_size) - _LABEL_BYTES
        ]
    else:
        body = np.ascontiguousarray(tokens.astype(f"<u{bits // 8}")).view(np.uint8)
    return np.concatenate(
        [np.ascontiguousarray(labels.astype("<u4"))[:, None].view(np.uint8), body], axis=1
    )


def unpack(records: np.ndarray, length: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (B, L) int32 and labels (B,) int32 of uint8 (B, record_bytes)."""
    bits, body = token_bits(vocab_size), records[:, _LABEL_BYTES:]
    labels = np.ascontiguousarray(records[:, :_LABEL_BYTES]).view("<u4")[:, 0].astype(np.int32)
    if bits == 12:
        tokens = np.empty((len(records), length + length % 2), np.int32)
        first, middle, last = (body[:, i::3].astype(np.int32) for i in range(3))
        tokens[:, 0::2] = first | (middle & 15) << 8
        tokens[:, 1 : 2 * last.shape[1] : 2] = middle[:, : last.shape[1]] >> 4 | last << 4
        return tokens[:, :length], labels
    return np.ascontiguousarray(body).view(f"<u{bits // 8}").astype(np.int32), labels


# ---------------------------------------------------------------------------------------------------------------------
# What a token set is


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """One split of a token set."""

    pictures: int  # N, those that cannot be read included
    crops: int
    broken: tuple[
        tuple[int, str, str], ...
    ] = ()  # index, path and reason of pictures that cannot be read
    shards: tuple[
        dict, ...
    ] = ()  # {"file", "records", "bytes", "sha256"}: those of crop 0 in order, of crop 1, …


@dataclasses.dataclass(frozen=True)
class TokenSetInfo:
    """The contents of tokens.json."""

    tokenizer: str  # as it was named
    fingerprint: str  # of that tokenizer, see models/tokenizer.py
    dtype: str  # that it computed in
    scales: tuple[int, ...]
    vocab_size: int
    image_side: int
    source: str
    class_names: tuple[str, ...]
    transform: dict[str, Any]
    seed: int
    shard_size: int
    splits: dict[str, SplitInfo]
    complete: bool = False

    @property
    def length(self) -> int:
        """L, tokens of a picture."""
        return sum(side**2 for side in self.scales)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Any, where: str) -> "TokenSetInfo":
        """Raises InputError unless `data` is what to_json wrote; `where` names the file."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise InputError(
                f"{where}: not the description of a token set (format {found!r}, expected {FORMAT!r})"
            )
        fields = {key: value for key, value in data.items() if key != "format"}
        try:
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
            tuples = {name: tuple(fields.pop(name)) for name in ("scales", "class_names")}
            return cls(**fields, **tuples, splits=splits)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{where}: not a description that this version understands ({error})"
            ) from None


def read_info(directory: os.PathLike | str) -> TokenSetInfo:
    """The description of a token set, complete or not."""
    path = epath.Path(directory) / INFO_FILE
    if not epath.Path(directory).is_dir():
        raise InputError(
            f"there is no token set {directory}: hmar tokenize --out={directory} makes one"
        )
    if not path.exists():
        raise InputError(
            f"{directory} is not a token set: it has no {INFO_FILE}; hmar tokenize makes one"
        )
    return TokenSetInfo.from_json(
        read_json(path, f"the description of the token set {directory}"), str(path)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Tokens(Protocol):
    """Pictures as tokens, each in several crops; reading may happen from several threads at once."""

    name: str  # in errors
    crops: int

    def __len__(self) -> int:
        """Pictures."""

    def read(self, pictures: np.ndarray, crops: np.ndarray) -> dict[str, np.ndarray]:
        """Crop crops[b] of picture pictures[b], (B,) both, as {"tokens": int32 (B, L), "label": int32 (B,)}."""


@dataclasses.dataclass(frozen=True)
class TokensInMemory:
    """Tokens in memory, packed."""

    records: np.ndarray  # uint8 (crops, N, record_bytes)
    length: int  # L
    vocab_size: int
    name: str = "the tokens"

    @classmethod
    def of(
        cls, tokens: np.ndarray, labels: np.ndarray, vocab_size: int = 2**32
    ) -> "TokensInMemory":
        """Of (N, L) and (N,), each row a picture of its own."""
        return cls(pack(tokens, labels, vocab_size)[None], tokens.shape[1], vocab_size)

    @property
    def crops(self) -> int:
        return len(self.records)

    def __len__(self) -> int:
        return self.records.shape[1]

    def read(self, pictures: np.ndarray, crops: np.ndarray) -> dict[str, np.ndarray]:
        tokens, labels = unpack(self.records[crops, pictures], self.length, self.vocab_size)
        return {"tokens": tokens, "label": labels}


class TokenSet:
    """One split of a token set on disk, without the pictures that could not be read.

    Attributes: info (TokenSetInfo), crops, and name, class_names, num_classes as a source of pictures has them.
    """

    def __init__(self, directory: os.PathLike | str, info: TokenSetInfo, split: str):
        self._directory, self.info = os.fspath(directory), info
        self.name, self.class_names = f"tokens:{self._directory}", info.class_names
        self._split = info.splits[split]
        self.crops = self._split.crops
        broken = np.array([index for index, *_ in self._split.broken], np.int64)
        self._readable = np.setdiff1d(np.arange(self._split.pictures), broken)
        folder = (
            self._directory if is_local(directory) else _local_copy(self._directory, info, split)
        )
        self._paths = [os.path.join(folder, shard["file"]) for shard in self._split.shards]
        for shard, path in zip(self._split.shards, self._paths):
            _check_size(path, shard["bytes"], self._directory)
        self._readers: list[Any] = [None] * len(
            self._paths
        )  # opened when needed; each may be used by several threads
        self._lock = threading.Lock()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._readable)

    def read(self, pictures: np.ndarray, crops: np.ndarray) -> dict[str, np.ndarray]:
        """As `Tokens.read`.

        Raises:
          InputError: a record is damaged.
        """
        per_crop = -(-self._split.pictures // self.info.shard_size)
        shards, places = np.divmod(self._readable[pictures], self.info.shard_size)
        try:
            # As ranges of one: for a list of places, ArrayRecord goes through all records of the file, each time.
            records = [
                self._reader(shard).read(place, place + 1)[0]
                for shard, place in zip((shards + crops * per_crop).tolist(), places.tolist())
            ]
        except _READ_ERRORS as error:
            raise self._damaged(error) from error
        size = record_bytes(self.info.length, self.info.vocab_size)
        packed = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), size)
        tokens, labels = unpack(packed, self.info.length, self.info.vocab_size)
        return {"tokens": tokens, "label": labels}

    def in_memory(self) -> "TokensInMemory":
        """All of it in memory, as packed as on disk."""
        size = record_bytes(self.info.length, self.info.vocab_size)
        packed = np.empty((self.crops, self._split.pictures, size), np.uint8)
        broken = np.ones(self._split.pictures, bool)
        broken[self._readable] = False
        per_crop = len(self._paths) // self.crops
        for number, path in enumerate(self._paths):
            crop, start = number // per_crop, number % per_crop * self.info.shard_size
            try:
                reader = array_record_module.ArrayRecordReader(path)
                records = [r or bytes(size) for r in reader.read_all()]
                reader.close()
            except _READ_ERRORS as error:
                raise self._damaged(error) from error
            packed[crop, start : start + len(records)] = np.frombuffer(
                b"".join(records), np.uint8
            ).reshape(-1, size)
        return TokensInMemory(
            packed[:, ~broken] if broken.any() else packed, self.info.length, self.info.vocab_size
        )

    def _damaged(self, error: Exception) -> InputError:
        return InputError(
            f"{self._directory} is damaged: {' '.join(str(error).split())}; hmar tokenize with --verify makes it whole"
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


def open_tokens(directory: os.PathLike | str, split: str = "train") -> TokenSet | None:
    """Opens one split of a token set; None if the set was made without it.

    A set in an object store is first copied to this machine's temporary folder (once; later runs find it): the records
    of a batch lie in all its shards.

    Raises:
      InputError: there is no such set, it is not complete, or files are missing or of another size.
    """
    info = read_info(directory)
    if not info.complete:
        raise InputError(
            f"the token set {directory} is not complete: run the same hmar tokenize again, which goes on"
        )
    return TokenSet(directory, info, split) if split in info.splits else None


def _check_size(path: str, size: int, directory: str) -> None:
    found = os.path.getsize(path) if os.path.isfile(path) else None
    if found != size:
        problem = "is missing" if found is None else f"has {found} bytes instead of {size}"
        raise InputError(
            f"the token set {directory} is damaged: {os.path.basename(path)} {problem}; the same hmar tokenize again makes it anew"
        )


def _local_copy(directory: str, info: TokenSetInfo, split: str) -> str:
    """A folder of this machine with the shards of a split, copied unless there, each checked."""
    identity = hashlib.sha256(repr((directory, info)).encode()).hexdigest()[:16]
    folder = os.path.join(tempfile.gettempdir(), f"hmar_tokens_{identity}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    for shard in info.splits[split].shards:
        target = os.path.join(folder, shard["file"])
        if os.path.isfile(target) and os.path.getsize(target) == shard["bytes"]:
            continue
        data = (epath.Path(directory) / shard["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise InputError(
                f"the token set {directory} is damaged: {shard['file']} has another checksum; hmar tokenize with --verify makes it anew"
            )
        write_atomically(target, data)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def make_token_loader(
    source: Tokens,
    *,
    batch_size: int,
    seed: int = 0,
    train: bool = True,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 0,
) -> grain.IterDataset:
    """Batches {"tokens": int32 (B, L), "label": int32 (B,)} of one shard (usually one host) of a source.

    Training: endless, every picture once an epoch over all shards together, in a new order each; a picture's crops take
    turns from epoch to epoch. Validation: one pass over the first crops in order; all shards give the same number of
    batches, and "valid": bool (B,) is False for what pads the last. The iterator's state is as make_loader's.

    Args:
      threads: that read ahead, each a whole batch; 0: read when asked.

    Raises:
      InputError: an argument is out of range, or no batch could be filled.
    """
    n, crops = len(source), source.crops
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
        noun="rows of tokens" if crops == 1 else "pictures",
    )
    order_seed, whole = derive_seed(seed, SeedPurpose.ORDER), batch_size * shard_count
    own = shard_index * batch_size + np.arange(
        batch_size
    )  # positions of this shard in a batch of all shards

    def training_batch(number):
        epochs, places = np.divmod(number * whole + own, n)
        # What MapDataset.shuffle does, for a whole batch: one element at a time costs as much again as reading the tokens.
        pictures = np.array(
            [
                grain.experimental.index_shuffle(
                    place, max_index=n - 1, seed=(order_seed + epoch) % 2**32, rounds=4
                )
                for epoch, place in zip(epochs.tolist(), places.tolist())
            ]
        )
        return source.read(pictures, (epochs + pictures) % crops)

    def validation_batch(number):
        places = number * whole + own
        valid = places < n
        return {**source.read(np.where(valid, places, 0), np.zeros_like(places)), "valid": valid}

    batches = grain.MapDataset.range(_ENDLESS if train else -(-n // whole))
    return read_ahead(batches.map(training_batch if train else validation_batch), threads)
