"""From a source to batches, with Grain: shuffle, shard, decode, crop, stack.

Training reads one endless stream of positions 0, 1, 2, ...: position p lies in epoch e = p // N and holds the picture
shuffle_e(p mod N), cropped with random numbers that depend on (seed, p) only. The next B positions are a batch, of which
shard s of S takes the s-th part. So the batches are the same for any number of hosts that share them, row by row, and the
state of a loader is one number: how many batches it has given.

Pictures stay uint8 until they are on the device; models.tokenizer.to_float is for there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import grain
import numpy as np

from hmar_jax.data.decode_errors import MAX_UNREADABLE_FRACTION, DecodeErrorLog, is_over_limit
from hmar_jax.data.seeds import SeedPurpose, derive_seed
from hmar_jax.data.sources import ImageDecodeError, InMemory, Source
from hmar_jax.data.transforms import Transform
from hmar_jax.data.workers import ByProcesses
from hmar_jax.errors import InputError


class _Reader:
    """Reads a source, taking the next readable picture of the source in place of a broken one."""

    def __init__(self, source: Source):
        self.source = source
        self._broken: dict[int, ImageDecodeError] = {}  # by index; not to be decoded again

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        """{"image", "label", "picture": the index, "skipped": how many broken pictures, from that one on, were left out}."""
        index = int(index)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if candidate in self._broken:
                continue
            try:
                example = self.source[candidate]
            except ImageDecodeError as error:
                self._broken[candidate] = error
                continue
            return {
                "image": example["image"],
                "label": example["label"],
                "picture": index,
                "skipped": step,
            }
        first = ", ".join(error.path for error in list(self._broken.values())[:3])
        raise InputError(
            f"{self.source.name}: none of its {len(self)} pictures can be read; the first: {first}"
        )

    def why(self, index: int) -> ImageDecodeError:
        """What is wrong with a broken picture; read again where another process met it."""
        if index not in self._broken:
            try:
                self.source[index]
            except ImageDecodeError as error:
                self._broken[index] = error
            else:
                self._broken[index] = ImageDecodeError(
                    f"{self.source.name}[{index}]", "was unreadable once, and is readable now"
                )
        return self._broken[index]


class _Watch:
    """Sees every batch in the process that trains: notes the broken pictures, and stops where they are too many.

    Pictures may be read in other processes, so a batch says which were broken, and it is told apart here.
    """

    def __init__(self, reader: _Reader, log: DecodeErrorLog | None, share: int):
        self._reader, self._log = reader, log
        self._met: dict[int, str] = {}  # path by index
        self._share = share  # pictures that this shard reads in an epoch
        self._seen = self._missed = 0  # of this share

    def __call__(self, batch: dict) -> dict:
        batch = dict(batch)
        pictures, skipped = batch.pop("picture"), batch.pop("skipped")
        for picture, count in zip(pictures[skipped > 0].tolist(), skipped[skipped > 0].tolist()):
            for index in ((picture + step) % len(self._reader) for step in range(count)):
                if index not in self._met:
                    error = self._reader.why(index)
                    self._met[index] = error.path
                    if self._log is not None:
                        self._log.add(error.path, error.reason)
        self._missed += int((skipped > 0).sum())
        self._check()
        self._seen += len(pictures)
        if self._seen >= self._share:
            self._seen = self._missed = 0
        return batch

    def _check(self) -> None:
        # All that were ever met, of the whole source; and those of this shard's epoch, of its share: among many hosts none
        # meets many. Which pictures a shard gets is chance, so four standard deviations are allowed there.
        allowed = MAX_UNREADABLE_FRACTION * self._share
        allowed += 4 * allowed**0.5 if self._share < len(self._reader) else 0
        for count, of, most in (
            (len(self._met), len(self._reader), MAX_UNREADABLE_FRACTION * len(self._reader)),
            (self._missed, self._share, allowed),
        ):
            if is_over_limit(count, most):
                raise InputError(
                    f"{self._reader.source.name}: {count} of the {of} pictures cannot be read "
                    f"(at most {MAX_UNREADABLE_FRACTION:.0%} may be broken); the first: {', '.join(list(self._met.values())[:3])}"
                )


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def make_loader(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    train: bool,
    num_epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 2,
    workers: int = 0,
    pad: bool = True,
    broken: DecodeErrorLog | None = None,
) -> grain.IterDataset:
    """Batches of one shard (usually one host) of a source.

    Training: the source in a new order each epoch, every picture once an epoch over all shards together. Batches run
    across epoch ends; with `num_epochs`, what does not fill the last batch of every shard is dropped.

    Validation: one pass in order. All shards give the same number of batches. Batches also have "valid": False for
    the zeros that pad the last batch and for pictures that stand in for broken ones; count only the others.

    The iterator, `iter(loader)`, has Grain's `get_state` and `set_state`; see `loader_state_to_bytes` and `restore_loader_state`.

    Args:
      source: what to read. A broken picture is replaced by the next readable one of the source.
      transform: from a picture to (side, side).
      batch_size: B, pictures in a batch of this shard.
      seed: of the order and of the crops, 0 or more; validation uses none.
      train: whether to shuffle, repeat and randomise.
      num_epochs: training only; None: without end.
      shard_index, shard_count: which part of the data.
      threads: that read ahead, each a whole batch, holding up to threads + 1 batches; 0: read when asked.
      workers: processes that read ahead, each with so many threads; 0: this process alone. Batches are the same for any
        number of either.
      pad: validation only; False: drop what does not fill the last batch of every shard.
      broken: where broken pictures are noted.

    Returns:
      A `grain.IterDataset` of {"image": uint8 (B, side, side, 3), "label": int32 (B,)} with "valid": bool (B,) in
      validation.

    Raises:
      InputError: an argument is out of range, or no batch could be filled. While iterating: more than 1 % of the
        source's pictures, and more than 10, cannot be read, or none can.
    """
    n = len(source)
    check_loader(
        n,
        source.name,
        batch_size=batch_size,
        seed=seed,
        train=train,
        num_epochs=num_epochs,
        shard_index=shard_index,
        shard_count=shard_count,
        threads=threads,
        workers=workers,
        pad=pad,
    )
    if workers and isinstance(source, InMemory):
        raise InputError(
            f"data workers {workers} with pictures kept in memory: each process would keep all of them; 0 is wanted"
        )
    whole = batch_size * shard_count  # pictures in one batch of all shards
    reader = _Reader(source)

    def as_arrays(example, image):
        numbers = {key: np.int64(example[key]) for key in ("picture", "skipped")}
        return {"image": image, "label": np.int32(example["label"]), **numbers}

    if train:
        shuffle_seed, augment_seed = (
            derive_seed(seed, purpose) for purpose in (SeedPurpose.SHUFFLE, SeedPurpose.AUGMENT)
        )

        def augment(example, rng):
            return as_arrays(example, transform(example["image"], rng))

        # Repeating before anything is cut keeps the index that `shuffle` and `random_map` see equal to the position.
        dataset = grain.MapDataset.source(reader).shuffle(seed=shuffle_seed).repeat(num_epochs)
        dataset = dataset.random_map(augment, seed=augment_seed)
        if num_epochs is not None:
            dataset = dataset[: len(dataset) // whole * whole]
    else:

        def example_at(position):
            if position >= n:
                image = np.zeros((transform.side, transform.side, 3), np.uint8)
                return as_arrays({"label": 0, "picture": 0, "skipped": 0}, image) | {
                    "valid": np.bool_(False)
                }
            example = reader[position]
            valid = np.bool_(example["skipped"] == 0)
            return as_arrays(example, transform(example["image"], None)) | {"valid": valid}

        batches = -(-n // whole) if pad else n // whole
        dataset = grain.MapDataset.range(batches * whole).map(example_at)
    batches = shard_and_batch(dataset, batch_size, shard_index, shard_count, threads, workers)
    return batches.map(_Watch(reader, broken, max(1, n // shard_count)))


def shard_and_batch(
    dataset: grain.MapDataset,
    batch_size: int,
    shard_index: int,
    shard_count: int,
    threads: int,
    workers: int = 0,
) -> grain.IterDataset:
    """The batches of one shard of a stream with one element a position."""
    batches = dataset.batch(batch_size, drop_remainder=True)[shard_index::shard_count]
    return iterate(batches, threads, workers)


def iterate(batches: grain.MapDataset, threads: int, workers: int = 0) -> grain.IterDataset:
    """Batches one after the other, read ahead as `make_loader` says; the state is {"next_index": batches given}."""
    # One element for Grain is a whole batch, so its buffer is counted in batches.
    read_ahead = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=threads + 1 if threads else 0
    )
    return (
        ByProcesses(batches, read_ahead, workers)
        if workers
        else batches.to_iter_dataset(read_ahead)
    )


def check_loader(
    n: int,
    name: str,
    *,
    batch_size: int,
    seed: int,
    train: bool,
    num_epochs: int | None,
    shard_index: int,
    shard_count: int,
    threads: int,
    workers: int = 0,
    pad: bool,
    what: str = "pictures",
) -> None:
    """Raises InputError where a loader of n examples, called `what`, cannot be made so."""
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: it must be at least 1")
    if seed < 0:
        raise InputError(f"seed {seed}: it must be 0 or more")
    if threads < 0:
        raise InputError(f"data threads {threads}: it must be 0 or more")
    if workers < 0:
        raise InputError(f"data workers {workers}: it must be 0 or more")
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise InputError(
            f"shard {shard_index} of {shard_count}: the index must be from 0 to the count - 1"
        )
    if num_epochs is not None and not train:
        raise InputError(f"num_epochs {num_epochs} with validation: validation is always one pass")
    if num_epochs is not None and num_epochs < 1:
        raise InputError(f"num_epochs {num_epochs}: it must be at least 1, or None for no end")
    if n == 0:
        raise InputError(f"{name} has no {what}")
    if (train or not pad) and batch_size > n // shard_count:
        share = (
            f"the {n // shard_count} in each of {shard_count} shards"
            if shard_count > 1
            else f"its {n} {what}"
        )
        raise InputError(
            f"{name}: batch size {batch_size} is more than {share}; make it {n // shard_count} or less"
        )


# ---------------------------------------------------------------------------------------------------------------------
# State


def loader_state_to_bytes(iterator: grain.DatasetIterator) -> bytes:
    """Where a loader's iterator is, as JSON: the next batch it will give, whatever has been read ahead."""
    return json.dumps(iterator.get_state()).encode()


def restore_loader_state(iterator: grain.DatasetIterator, data: bytes) -> None:
    """Puts a fresh iterator where `loader_state_to_bytes` was taken; the following batches are bit-identical.

    The loader must be made with the same source, transform, seed and global batch (batch_size * shard_count); the
    number of shards may differ.

    Raises:
      InputError: the bytes are no such state, or lie beyond the loader's end.
    """
    try:
        state = json.loads(data)
    except ValueError as error:
        raise InputError(
            "the saved data position is damaged (not JSON): start the data from the beginning"
        ) from error
    if not isinstance(state, Mapping) or state.keys() != iterator.get_state().keys():
        raise InputError(f"the saved data position {state!r} is not one of this loader")
    try:
        iterator.set_state(state)
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"the saved data position {state!r} does not fit this loader: {error}"
        ) from error
