"""From pictures to tokens, with a frozen tokenizer: kept in memory, or written as a token set (data/tokens.py).

Writing a token set can be interrupted at any moment and goes on with the same call: a shard is written beside its place,
read back, and renamed; then its length and checksum are noted, and only what is noted counts. What a row of tokens is
depends on the seed, the picture's index and the crop's alone, so neither interruptions nor the number of processes that
share the work change a bit of it.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from hmar_jax.autoencoders.vq import Tokenizer, TokenizerConfig, fingerprint, to_float
from hmar_jax.data.decode_errors import MAX_UNREADABLE_FRACTION, is_over_limit
from hmar_jax.data.loader import make_loader, shard_and_batch
from hmar_jax.data.records import (
    INFO_FILE,
    PROGRESS_FOLDER,
    SplitInfo,
    TokenSetInfo,
    TokensInMemory,
    pack,
    read_info,
)
from hmar_jax.data.seeds import SeedPurpose, derive_seed
from hmar_jax.data.sources import ImageDecodeError, Source
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError
from hmar_jax.io.files import absolute, is_local, read_json, write_atomically

_log = logging.getLogger(__name__)

_RECORDS = "group_size:1,uncompressed"  # one by one, for reading at random; tokens do not compress
_LOG_SECONDS = 60


def tokenize(
    encode: Callable[[np.ndarray], jax.Array],
    source: Source,
    transform: Transform,
    *,
    copies: int,
    seed: int,
    batch_size: int = 64,
    progress: bool = False,
) -> TokensInMemory:
    """Encodes every picture of a source `copies` times, each time cropped and turned anew.

    Args:
      encode: uint8 pictures (B, side, side, 3) -> tokens (B, L).
      copies: how many random versions of each picture.
      seed: of the versions; the result depends on nothing else.
      batch_size: pictures encoded at once, at most.

    Returns:
      len(source) * copies rows of tokens, less at most a thousandth that does not fill the last batch.
    """
    rows = len(source) * copies
    batch_size = next(
        b for b in range(min(batch_size, len(source)), 0, -1) if rows % b <= rows // 1000
    )
    loader = make_loader(
        source,
        transform,
        batch_size=batch_size,
        seed=derive_seed(seed, SeedPurpose.ENCODE),
        train=True,
        num_epochs=copies,
    )
    total = rows // batch_size
    tokens, labels = [], []
    for batch in tqdm(
        loader, total=total, desc="tokens", disable=None if progress else True, leave=False
    ):
        tokens.append(np.asarray(encode(batch["image"])))
        labels.append(batch["label"])
    return TokensInMemory.of(np.concatenate(tokens), np.concatenate(labels))


# ---------------------------------------------------------------------------------------------------------------------
# Token sets


class Shard(NamedTuple):
    """A range of pictures in one crop: a file of a token set."""

    split: str
    crop: int
    start: int  # pictures start, …, stop - 1
    stop: int
    file: str


def describe(
    name: str,
    config: TokenizerConfig,
    params: dict,
    spec: str,
    sources: Mapping[str, Source],
    transform: Transform,
    *,
    crops: int,
    seed: int,
    shard_size: int,
) -> TokenSetInfo:
    """What a token set of these sources and this tokenizer shall be; `name` and `spec` are what they were called."""
    kind, _, place = spec.partition(":")
    if kind == "folder":  # the same from any current directory
        spec = f"folder:{absolute(epath.Path(place).expanduser())}"
    splits = {
        split: SplitInfo(len(source), crops if split == "train" else 1)
        for split, source in sources.items()
    }
    return TokenSetInfo(
        tokenizer=name,
        fingerprint=fingerprint(config, params),
        dtype=config.dtype,
        scales=config.scales,
        vocab_size=config.vocab_size,
        image_side=config.image_side,
        source=spec,
        class_names=next(iter(sources.values())).class_names,
        transform=dataclasses.asdict(transform),
        seed=seed,
        shard_size=shard_size,
        splits=splits,
    )


def make_encoder(
    config: TokenizerConfig, params: dict, batch_size: int, devices: Sequence[jax.Device]
):
    """`encode` as `write_token_set` takes it, a batch divided among the devices, and its batch size, rounded up to fit."""
    mesh = Mesh(np.array(devices), ("data",))
    constrain_batch, whole = (
        NamedSharding(mesh, PartitionSpec("data")),
        NamedSharding(mesh, PartitionSpec()),
    )
    known = {part: params[part] for part in ("encoder", "quant_conv", "quantizer")}
    known = jax.device_put(jax.tree.map(jnp.asarray, known), whole)
    run = jax.jit(
        lambda known, images: Tokenizer(config).apply(
            {"params": known}, to_float(images), method="encode"
        ),
        in_shardings=(whole, constrain_batch),
        out_shardings=constrain_batch,
    )
    return (lambda images: run(known, images)), -(-batch_size // len(devices)) * len(devices)


def shards_of(split: str, pictures: int, crops: int, shard_size: int) -> list[Shard]:
    """All shards of a split, those of crop 0 first. Names do not depend on the number of crops: more can be added."""
    count = -(-pictures // shard_size)
    return [
        Shard(
            split,
            crop,
            i * shard_size,
            min(pictures, (i + 1) * shard_size),
            f"{split}-crop{crop:02d}-{i:05d}-of-{count:05d}.array_record",
        )
        for crop in range(crops)
        for i in range(count)
    ]


def write_token_set(
    directory: os.PathLike | str,
    encode: Callable[[np.ndarray], jax.Array],
    sources: Mapping[str, Source],
    transform: Transform,
    info: TokenSetInfo,
    *,
    batch_size: int = 64,
    part: tuple[int, int] = (0, 1),
    threads: int = 2,
    workers: int = 0,
    verify: bool = False,
    progress: bool = False,
) -> TokenSetInfo:
    """Writes one part of a token set, or what is missing of it.

    Whoever finds all shards finished, whichever part that is, marks the set complete.

    Args:
      directory: of the set; an unfinished one goes on, and a finished one gets the crops that it has not.
      encode: uint8 pictures (batch_size, side, side, 3) -> tokens (batch_size, L).
      sources: the pictures of each split in `info`.
      transform: in training splits with random numbers for every crop, in "validate" without any.
      info: what the set shall be, with pictures and crops of each split.
      part: (index, count): this process writes every count-th shard.
      threads, workers: as in `make_loader`.
      verify: check finished shards by their checksums, not by their sizes alone; damaged ones are written again.

    Returns:
      The description of the set as it is now; `complete` is False while other parts are not done.

    Raises:
      InputError: the directory holds another set, or cannot be written; or more than 1 % of the pictures (and more than
        10) cannot be read. Finished shards stay.
    """
    folder = epath.Path(directory)
    info = _begin(folder, info)
    for split, source in sources.items():
        asked = info.splits[split]
        shards = shards_of(split, asked.pictures, asked.crops, info.shard_size)[part[0] :: part[1]]
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
            )
    return finish(folder, info)


def _begin(folder: epath.Path, info: TokenSetInfo) -> TokenSetInfo:
    """Makes the directory, or checks that it is of this set."""
    try:
        if (folder / INFO_FILE).exists():
            found = read_info(folder)
            _check_same(folder, found, info)
            # More crops may be asked for than there are, never fewer: others may be reading them.
            splits = {
                name: dataclasses.replace(split, crops=max(split.crops, found.splits[name].crops))
                for name, split in info.splits.items()
            }
            info = dataclasses.replace(info, tokenizer=found.tokenizer, splits=splits)
            if all(found.splits[name].crops == split.crops for name, split in splits.items()):
                return dataclasses.replace(info, complete=found.complete)
        elif folder.is_dir() and any(not path.name.endswith(".tmp") for path in folder.iterdir()):
            raise InputError(
                f"{folder} is neither empty nor a token set (no {INFO_FILE}): take another --out"
            )
        elif folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: name a directory")
        (folder / PROGRESS_FOLDER).mkdir(parents=True, exist_ok=True)
        _write_info(folder, info)
    except OSError as error:
        raise InputError(
            f"the token set {folder} cannot be written: {error.strerror or error}"
        ) from None
    return info


def _check_same(folder: epath.Path, found: TokenSetInfo, asked: TokenSetInfo) -> None:
    if found.fingerprint != asked.fingerprint:
        raise InputError(
            f"{folder} holds tokens of another tokenizer: {found.tokenizer!r} with fingerprint {found.fingerprint}, not "
            f"{asked.tokenizer!r} with {asked.fingerprint}; take another --out"
        )
    for field in ("source", "dtype", "seed", "shard_size", "transform", "class_names"):
        theirs, ours = getattr(found, field), getattr(asked, field)
        if theirs != ours:
            if field == "class_names":
                theirs, ours = (
                    f"{len(names)} classes" if len(theirs) != len(ours) else names
                    for names in (theirs, ours)
                )
            raise InputError(
                f"{folder} holds a token set with another {field}: {theirs!r} there and {ours!r} here; take another --out"
            )
    if found.splits.keys() != asked.splits.keys():
        raise InputError(
            f"{folder} holds a token set of the splits {', '.join(found.splits)}, not {', '.join(asked.splits)}; take another --out"
        )
    for name, split in asked.splits.items():
        if found.splits[name].pictures != split.pictures:
            raise InputError(
                f"{folder} was begun when {asked.source} had {found.splits[name].pictures} pictures to {name}; it has "
                f"{split.pictures} now: take another --out"
            )


def finish(directory: os.PathLike | str, info: TokenSetInfo) -> TokenSetInfo:
    """Marks the set complete if all its shards are finished; returns its description.

    Raises:
      InputError: more than 1 % of the pictures of a split, and more than 10, cannot be read.
    """
    folder, splits = epath.Path(directory), {}
    for name, split in info.splits.items():
        notes = [
            _note(folder, shard)
            for shard in shards_of(name, split.pictures, split.crops, info.shard_size)
        ]
        if not all(notes):
            return dataclasses.replace(info, complete=False)
        broken = {entry[0]: tuple(entry) for note in notes for entry in note["broken"]}
        _check_broken(folder, info.source, list(broken.values()), split.pictures)
        shards = tuple(
            {key: note[key] for key in ("file", "records", "bytes", "sha256")} for note in notes
        )
        splits[name] = SplitInfo(
            split.pictures, split.crops, tuple(broken[i] for i in sorted(broken)), shards
        )
    info = dataclasses.replace(info, splits=splits, complete=True)
    _write_info(folder, info)
    return info


def count_unfinished(directory: os.PathLike | str, info: TokenSetInfo) -> tuple[int, int]:
    """Shards still to be made, by any part, and shards in all."""
    shards = [
        s
        for name, split in info.splits.items()
        for s in shards_of(name, split.pictures, split.crops, info.shard_size)
    ]
    return sum(_note(epath.Path(directory), shard) is None for shard in shards), len(shards)


def _write_info(folder: epath.Path, info: TokenSetInfo) -> None:
    write_atomically(folder / INFO_FILE, json.dumps(info.to_json(), indent=1) + "\n")


def _note_path(folder: epath.Path, shard: Shard) -> epath.Path:
    return folder / PROGRESS_FOLDER / shard.file.replace(".array_record", ".json")


def _note(folder: epath.Path, shard: Shard) -> dict[str, Any] | None:
    """What is noted of a finished shard."""
    path = _note_path(folder, shard)
    return (
        read_json(path, f"the note on a shard of the token set {folder}") if path.exists() else None
    )


def _is_finished(folder: epath.Path, shard: Shard, source: Source, verify: bool) -> bool:
    note = _note(folder, shard)
    if note is None:
        return False
    path = folder / shard.file
    if not path.exists():
        problem = "is missing"
    elif path.stat().length != note["bytes"]:
        problem = f"has {path.stat().length} bytes instead of {note['bytes']}"
    elif verify and _sha256(path) != note["sha256"]:
        problem = "has another checksum"
    elif any(_reads(source, index) for index, *_ in note["broken"]):
        problem = "lacks a picture that can be read now"
    else:
        return True
    _log.warning("%s %s: it is made anew", path, problem)
    _note_path(folder, shard).unlink()
    return False


def _reads(source: Source, index: int) -> bool:
    try:
        source[index]
    except ImageDecodeError:
        return False
    return True


def _sha256(path: os.PathLike | str) -> str:
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_broken(folder, source: str, broken: list, pictures: int) -> None:
    if is_over_limit(len(broken), MAX_UNREADABLE_FRACTION * pictures):
        raise InputError(
            f"{source}: {len(broken)} of the {pictures} pictures cannot be read (at most {MAX_UNREADABLE_FRACTION:.0%} may be broken); the "
            f"first: {', '.join(path for _, path, _ in broken[:3])}. What is done of {folder} is kept: mend them, and the same command goes on"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _write_shards(
    folder: epath.Path,
    encode: Callable,
    source: Source,
    transform: Transform,
    info: TokenSetInfo,
    todo: list[Shard],
    batch_size: int,
    threads: int,
    workers: int,
    progress: bool,
) -> None:
    split, pictures = todo[0].split, sum(shard.stop - shard.start for shard in todo)
    rows = _records(encode, source, transform, info, todo, batch_size, threads, workers)
    broken: dict[int, tuple[int, str, str]] = {}
    started, done, told = time.monotonic(), 0, time.monotonic()
    with tqdm(
        total=pictures,
        desc=f"{split}",
        unit="picture",
        disable=None if progress else True,
        dynamic_ncols=True,
    ) as bar:
        for number, shard in enumerate(todo, 1):
            writer = _ShardWriter(folder, shard)
            try:
                for picture in range(shard.start, shard.stop):
                    record = next(rows)
                    if record is None:
                        if picture not in broken:
                            broken[picture] = _reason(source, picture)
                            _log.warning("skipped %s: %s", *broken[picture][1:])
                            _check_broken(folder, info.source, list(broken.values()), len(source))
                        writer.skip(broken[picture])
                    else:
                        writer.add(record)
                    bar.update()
                writer.commit()
            except OSError as error:
                raise InputError(
                    f"the token set {folder} cannot be written: {error.strerror or error}; the same command goes on"
                ) from error
            finally:
                writer.close()
            done += shard.stop - shard.start
            if bar.disable and (time.monotonic() - told > _LOG_SECONDS or number == len(todo)):
                told = time.monotonic()
                _log.info(
                    "%s: %d of %d shards, %d of %d pictures, %.0f a second",
                    split,
                    number,
                    len(todo),
                    done,
                    pictures,
                    done / (told - started),
                )


def _reason(source: Source, index: int) -> tuple[int, str, str]:
    """The picture may have been read by another process: what is wrong with it is found out again."""
    try:
        source[index]
    except ImageDecodeError as error:
        return index, error.path, error.reason
    return index, f"{source.name}[{index}]", "was unreadable once, and is readable now"


def _records(
    encode: Callable,
    source: Source,
    transform: Transform,
    info: TokenSetInfo,
    todo: list[Shard],
    batch_size: int,
    threads: int,
    workers: int,
) -> Iterator[bytes | None]:
    """The record of every picture of the shards, in order; None of those that cannot be read."""
    crops = np.concatenate([np.full(shard.stop - shard.start, shard.crop) for shard in todo])
    pictures = np.concatenate([np.arange(shard.start, shard.stop) for shard in todo])
    crop_seed, random = derive_seed(info.seed, SeedPurpose.CROPS), todo[0].split != "validate"

    def example_at(position):
        image, label, readable = np.zeros((transform.side, transform.side, 3), np.uint8), 0, False
        if position < len(pictures):  # others fill the last batch
            picture, crop = int(pictures[position]), int(crops[position])
            try:
                example = source[picture]
            except ImageDecodeError:
                pass
            else:
                rng = np.random.default_rng([crop_seed, crop, picture]) if random else None
                image, label, readable = transform(example["image"], rng), example["label"], True
        return {"image": image, "label": np.int64(label), "readable": np.bool_(readable)}

    batches = -(-len(pictures) // batch_size)
    loader = iter(
        shard_and_batch(
            grain.MapDataset.range(batches * batch_size).map(example_at),
            batch_size,
            0,
            1,
            threads,
            workers,
        )
    )

    def rows(batch, tokens):
        packed = pack(np.asarray(tokens), batch["label"], info.vocab_size)
        yield from (
            row.tobytes() if readable else None
            for row, readable in zip(packed, batch["readable"].tolist())
        )

    before = None
    for batch in loader:  # the device works on one batch while the one before is written
        encoded = encode(batch["image"])
        if before is not None:
            yield from rows(*before)
        before = batch, encoded
    yield from rows(*before)
    loader.close()


class _ShardWriter:
    """Writes one shard so that it appears whole, after it has been read back, or not at all."""

    def __init__(self, folder: epath.Path, shard: Shard):
        self._folder, self._shard = folder, shard
        beside = os.fspath(folder) if is_local(folder) else tempfile.gettempdir()
        if is_local(folder):
            for leftover in folder.glob(f".{shard.file}.*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
        self._temporary = os.path.join(beside, f".{shard.file}.{secrets.token_hex(4)}.tmp")
        self._writer = array_record_module.ArrayRecordWriter(self._temporary, _RECORDS)
        self._records, self._contents, self._broken = 0, hashlib.sha256(), []

    def add(self, record: bytes) -> None:
        with _as_os_errors():
            self._writer.write(record)
        self._contents.update(record)
        self._records += 1

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
        note = {
            "file": self._shard.file,
            "records": self._records,
            "bytes": os.path.getsize(self._temporary),
            "sha256": _sha256(self._temporary),
            "broken": self._broken,
        }
        target = self._folder / self._shard.file
        if is_local(self._folder):
            os.replace(self._temporary, target)
        else:
            epath.Path(self._temporary).copy(target, overwrite=True)
        write_atomically(_note_path(self._folder, self._shard), json.dumps(note) + "\n")

    def _read_back(self) -> None:
        reader = array_record_module.ArrayRecordReader(self._temporary)
        contents = hashlib.sha256()
        for record in reader.read_all():
            contents.update(record)
        count = reader.num_records()
        reader.close()
        if (count, contents.digest()) != (self._records, self._contents.digest()):
            raise OSError(f"{self._shard.file} does not read back as it was written")

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # that it could not be written has been said
                self._writer.close()
        if os.path.exists(self._temporary):
            os.unlink(self._temporary)


@contextlib.contextmanager
def _as_os_errors():
    """ArrayRecord raises RuntimeError where a file cannot be written, as on a full disk."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(" ".join(str(error).split())[:300]) from error
