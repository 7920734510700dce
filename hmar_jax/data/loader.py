"""Batches of images from a source, with Grain: shuffle, shard, decode, transform, batch.

Training reads one endless stream of positions 0, 1, 2, ... Position p belongs to epoch e = p // N
and holds image shuffle_e(p mod N), transformed with random numbers that depend on (seed, p) only.
Every B * S consecutive positions are a global batch, of which shard s of S takes the s-th part. So
batches are the same, row by row, for any number of hosts, and the state of a loader is one number:
how many batches it has returned. In a run that was extended with another batch size or data set,
all positions are shifted by a number of images, `offset` (io/history.py).

Images stay uint8 until they are on the device.
"""

from __future__ import annotations

import json

import grain
import numpy as np

from hmar_jax.data.decode_errors import MAX_UNREADABLE_FRACTION, DecodeErrorLog, is_over_limit
from hmar_jax.data.seeds import SeedPurpose, derive_seed
from hmar_jax.data.sources import ImageDecodeError, InMemory, Source
from hmar_jax.data.transforms import Transform
from hmar_jax.data.workers import MultiprocessDataset
from hmar_jax.errors import InputError

ENDLESS = 2**40  # images or batches of a stream


class _ReadableImages:
    """Reads a source; the next readable image of the source replaces an unreadable one."""

    def __init__(self, source: Source):
        self.source = source
        self._errors: dict[int, ImageDecodeError] = {}  # by index; these are not decoded again

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        """Reads the first readable image at or after an index.

        Returns:
          {"image", "label", "index": the given index, "num_skipped": unreadable images skipped}.
        """
        index = int(index)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if candidate in self._errors:
                continue
            try:
                example = self.source[candidate]
            except ImageDecodeError as error:
                self._errors[candidate] = error
                continue
            return {
                "image": example["image"],
                "label": example["label"],
                "index": index,
                "num_skipped": step,
            }
        first = ", ".join(error.path for error in list(self._errors.values())[:3])
        raise InputError(
            f"{self.source.name}: none of its {len(self)} images can be read; the first: {first}"
        )

    def error(self, index: int) -> ImageDecodeError:
        """The error of an unreadable image; reads it again if another process found it."""
        if index not in self._errors:
            try:
                self.source[index]
            except ImageDecodeError as error:
                self._errors[index] = error
            else:
                self._errors[index] = ImageDecodeError(
                    f"{self.source.name}[{index}]", "was unreadable once, and is readable now"
                )
        return self._errors[index]


class _DecodeErrorMonitor:
    """Logs the unreadable images of each batch, and raises when there are too many.

    Other processes may read the images. So each batch carries the indices of its unreadable images,
    and this monitor runs in the main process and removes them from the batch.
    """

    def __init__(self, reader: _ReadableImages, log: DecodeErrorLog | None, epoch_size: int):
        self._reader, self._log = reader, log
        self._paths: dict[int, str] = {}  # of unreadable images, by index
        self._epoch_size = epoch_size  # images that this shard reads in an epoch
        self._num_read = self._num_replaced = 0  # in this epoch

    def __call__(self, batch: dict) -> dict:
        batch = dict(batch)
        indices, skipped = batch.pop("index"), batch.pop("num_skipped")
        for first, count in zip(indices[skipped > 0].tolist(), skipped[skipped > 0].tolist()):
            for index in ((first + step) % len(self._reader) for step in range(count)):
                if index not in self._paths:
                    error = self._reader.error(index)
                    self._paths[index] = error.path
                    if self._log is not None:
                        self._log.add(error.path, error.reason)
        self._num_replaced += int((skipped > 0).sum())
        self._check()
        self._num_read += len(indices)
        if self._num_read >= self._epoch_size:
            self._num_read = self._num_replaced = 0
        return batch

    def _check(self) -> None:
        # Two checks: all that were found, out of the whole source; and those of this epoch, out of
        # this shard's part, because one of many hosts finds few of them. Which images a shard reads
        # is random, so its limit has a margin of four standard deviations.
        allowed = MAX_UNREADABLE_FRACTION * self._epoch_size
        allowed += 4 * allowed**0.5 if self._epoch_size < len(self._reader) else 0
        for count, total, limit in (
            (len(self._paths), len(self._reader), MAX_UNREADABLE_FRACTION * len(self._reader)),
            (self._num_replaced, self._epoch_size, allowed),
        ):
            if is_over_limit(count, limit):
                raise InputError(
                    f"{self._reader.source.name}: {count} of the {total} images cannot be read; at "
                    f"most {MAX_UNREADABLE_FRACTION:.0%} may be unreadable; the first: "
                    f"{', '.join(list(self._paths.values())[:3])}"
                )


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
    offset: int = 0,
) -> grain.IterDataset:
    """Makes the batches of one shard (usually one host) of a source.

    Training: the source in a new order each epoch; over all shards together, every image once an
    epoch. Batches run across the ends of epochs. With `num_epochs`, images that do not fill the
    last batch of every shard are dropped.

    Validation: one pass in order. All shards give the same number of batches. Batches also have
    "valid", which is False for the zeros that pad the last batch and for images that replace
    unreadable ones; count only the others.

    The iterator, `iter(loader)`, has Grain's `get_state` and `set_state`; see
    `loader_state_to_bytes` and `restore_loader_state`.

    Args:
      source: the images. The next readable image of the source replaces an unreadable one.
      transform: turns an image into one of (side, side).
      batch_size: B, images in a batch of this shard.
      seed: seed of the order and of the crops, at least 0; validation uses none.
      train: whether to shuffle, repeat and augment.
      num_epochs: training only; None repeats without end.
      shard_index: the shard to read, in [0, shard_count).
      shard_count: number of shards.
      threads: threads that read ahead, each a whole batch; up to threads + 1 batches are held. 0
        reads on demand.
      workers: processes that read ahead, each with `threads` threads; 0 uses this process alone.
        Batches do not depend on the number of threads or workers.
      pad: validation only; False drops images that do not fill the last batch of every shard.
      broken: log of unreadable images.
      offset: training without `num_epochs` only; the first image of batch n has position
        n * B * S + offset, which must be at least 0 for the batches that are read.

    Returns:
      A `grain.IterDataset` of {"image": (B, side, side, 3) uint8, "label": (B,) int32} and, in
      validation, "valid": (B,) bool.

    Raises:
      InputError: an argument is out of range, or no batch could be filled. While iterating: more
        than 1 % of the source's images, and more than 10, cannot be read, or none can.
    """
    n = len(source)
    validate_loader_args(
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
            f"workers must be 0 for images in memory, or each process holds them all; got {workers}"
        )
    global_batch = batch_size * shard_count
    reader = _ReadableImages(source)

    def to_arrays(example, image):
        numbers = {key: np.int64(example[key]) for key in ("index", "num_skipped")}
        return {"image": image, "label": np.int32(example["label"]), **numbers}

    if train:
        shuffle_seed, augment_seed = (
            derive_seed(seed, purpose) for purpose in (SeedPurpose.SHUFFLE, SeedPurpose.AUGMENT)
        )

        def augment(example, rng):
            return to_arrays(example, transform(example["image"], rng))

        # Repeat before slicing: so `shuffle` and `random_map` see the position as their index.
        dataset = grain.MapDataset.source(reader).shuffle(seed=shuffle_seed).repeat(num_epochs)
        dataset = dataset.random_map(augment, seed=augment_seed)
        if num_epochs is not None:
            dataset = dataset[: len(dataset) // global_batch * global_batch]
        elif offset:
            dataset = _moved(dataset, offset)
    else:

        def example_at(position):
            if position >= n:
                image = np.zeros((transform.side, transform.side, 3), np.uint8)
                padding = to_arrays({"label": 0, "index": 0, "num_skipped": 0}, image)
                return padding | {"valid": np.bool_(False)}
            example = reader[position]
            valid = np.bool_(example["num_skipped"] == 0)
            return to_arrays(example, transform(example["image"], None)) | {"valid": valid}

        num_batches = -(-n // global_batch) if pad else n // global_batch
        dataset = grain.MapDataset.range(num_batches * global_batch).map(example_at)
    batches = shard_and_batch(dataset, batch_size, shard_index, shard_count, threads, workers)
    return batches.map(_DecodeErrorMonitor(reader, broken, max(1, n // shard_count)))


def _moved(dataset: grain.MapDataset, offset: int) -> grain.MapDataset:
    """The endless stream whose element i is the given one's i + offset.

    A slice would do for positive offsets alone.
    """
    return grain.MapDataset.range(ENDLESS).map(lambda i: dataset[int(i) + offset])


def shard_and_batch(
    dataset: grain.MapDataset,
    batch_size: int,
    shard_index: int,
    shard_count: int,
    threads: int,
    workers: int = 0,
) -> grain.IterDataset:
    """Returns the batches of one shard of a stream that has one example per position."""
    batches = dataset.batch(batch_size, drop_remainder=True)[shard_index::shard_count]
    return read_ahead(batches, threads, workers)


def read_ahead(batches: grain.MapDataset, threads: int, workers: int = 0) -> grain.IterDataset:
    """Iterates over batches, reading ahead as in `make_loader`.

    The state of the iterator is {"next_index": number of batches returned}.
    """
    # One element is a whole batch, so Grain's buffer size counts batches.
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=threads + 1 if threads else 0
    )
    if workers:
        return MultiprocessDataset(batches, options, workers)
    return batches.to_iter_dataset(options)


def validate_loader_args(
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
    noun: str = "images",
) -> None:
    """Checks the arguments of a loader.

    Args:
      n: number of examples.
      name: the source's name, for errors.
      noun: what the examples are, for errors.
      others: as in `make_loader`.

    Raises:
      InputError: an argument is out of range, or no batch could be filled.
    """
    for argument, value, minimum in (
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("threads", threads, 0),
        ("workers", workers, 0),
        ("shard_count", shard_count, 1),
    ):
        if value < minimum:
            raise InputError(f"{argument} must be at least {minimum}; got {value}")
    if not 0 <= shard_index < shard_count:
        raise InputError(f"shard_index must be in [0, {shard_count}); got {shard_index}")
    if num_epochs is not None and not train:
        raise InputError(f"num_epochs must be None for validation; got {num_epochs}")
    if num_epochs is not None and num_epochs < 1:
        raise InputError(f"num_epochs must be at least 1, or None; got {num_epochs}")
    if n == 0:
        raise InputError(f"{name} has no {noun}")
    largest = n // shard_count
    if (train or not pad) and batch_size > largest:
        share = f" in each of {shard_count} shards" if shard_count > 1 else ""
        raise InputError(
            f"{name}: batch_size must be at most {largest}, the number of {noun}{share}; "
            f"got {batch_size}"
        )


# State


def loader_state_to_bytes(iterator: grain.DatasetIterator) -> bytes:
    """Returns an iterator's state as JSON: the next batch it returns, whatever was read ahead."""
    return json.dumps(iterator.get_state()).encode()


def restore_loader_state(iterator: grain.DatasetIterator, data: bytes) -> None:
    """Restores a state of `loader_state_to_bytes`; the batches that follow are bit-identical.

    The loader must have the same source, transform, seed and global batch size (batch_size *
    shard_count). The number of shards may differ.

    Args:
      iterator: an iterator of the loader; its own state is replaced.
      data: the saved state.

    Raises:
      InputError: the bytes are not such a state, or the position is beyond the loader's end.
    """
    try:
        state = json.loads(data)
    except ValueError as error:
        raise InputError(f"the saved loader state must be JSON; got {data[:40]!r}") from error
    keys = iterator.get_state().keys()
    if not isinstance(state, dict) or state.keys() != keys:
        raise InputError(f"the saved loader state must have keys {', '.join(keys)}; got {state!r}")
    try:
        iterator.set_state(state)
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"the saved loader state {state!r} does not fit this loader: {error}"
        ) from (error)
