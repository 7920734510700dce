"""The data of a run, from its config: batches to train on, held-out images, fingerprints."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hmar_jax import autoencoders, settings
from hmar_jax.autoencoders.base import AUTOENCODER, make_encoder
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.encoding import encode_in_memory
from hmar_jax.data.fingerprint import describe_data
from hmar_jax.data.loader import make_loader
from hmar_jax.data.readable import readable_part
from hmar_jax.data.records import (
    RecordSet,
    make_record_loader,
    open_records,
)
from hmar_jax.data.sources import Source, SourceConfig, open_splits, records_directory
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError
from hmar_jax.parallel import processes, sharding
from hmar_jax.progress import phase
from hmar_jax.training.experiment import Validation
from hmar_jax.training.metrics import LOGGER
from hmar_jax.training.trainable import DataInfo, Parent

_MAX_EVAL_BATCH = 128
_SMALL_BATCH = 8


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a task trains on."""

    info: DataInfo
    kind: str  # of its batches: "image", or a kind of records
    loader: Callable[[int], grain.IterDataset]  # of an offset, see make_loader
    validation: Validation | None
    decode_errors: DecodeErrorLog
    described: dict[str, Any]  # by describe_data
    held_out: Source | None = None  # the images of `validation`; None where it has records


def open_data(
    config: ConfigDict, mesh: Mesh, side: int, parent: Parent | None, parent_params: Any
) -> TrainingData:
    """Opens the data set of a config.

    Args:
      mesh: the batches are for this host's share of it.
      side: pixels of the images that the task takes.
      parent, parent_params: the model that a task trains on top of, which may encode the images.

    Raises:
      InputError: the data set does not exist, or does not fit the config or the parent.
    """
    if records_directory(config.data.source) is not None:
        if parent is None:
            raise InputError(
                f"config.data.source must give images to train an autoencoder; "
                f"got {config.data.source!r}"
            )
        return _open_records(config, mesh, parent, parent_params)
    return _open_images(config, mesh, side, parent, parent_params)


def _open_images(
    config: ConfigDict, mesh: Mesh, side: int, parent: Parent | None, parent_params: Any
) -> TrainingData:
    if config.data.workers and config.data.in_memory:
        raise InputError(
            "config.data.workers must be 0 with data.in_memory, as each process would keep all "
            f"images; got {config.data.workers}"
        )
    transform = settings.from_group(Transform, config.data.transform, side=side)
    with phase(f"listing the images of {config.data.source}"):
        splits = open_splits(
            config.data.source,
            in_memory=config.data.in_memory,
            need_classes=parent is not None,
            config=settings.from_group(SourceConfig, config.data),
        )
    source, held_out = splits["train"], splits["validate"]
    copies = config.data.get("cached_copies", 0)
    _check_batch_size(config, len(source) * max(1, copies))
    errors = DecodeErrorLog()
    readable = _look_at(config, held_out, errors)
    validation = None
    if readable is not None:
        batch = _validation_batch(config, mesh, len(readable))
        shard, shards = sharding.host_share(mesh, batch)
        batches = make_loader(
            readable,
            transform,
            batch_size=batch // shards,
            seed=0,
            train=False,
            shard_index=shard,
            shard_count=shards,
            threads=config.data.threads,
            broken=errors,
        )
        validation = Validation(batches, batch, len(readable))
    shard, shards = sharding.host_share(mesh, config.batch_size)

    def loader(offset: int):
        if copies:
            return _cached_loader(
                config, source, transform, parent, parent_params, shard, shards, errors, offset
            )
        return make_loader(
            source,
            transform,
            batch_size=config.batch_size // shards,
            seed=config.seed,
            train=True,
            shard_index=shard,
            shard_count=shards,
            threads=config.data.threads,
            workers=config.data.workers,
            broken=errors,
            offset=offset,
        )

    kind = "image"
    if copies:
        kind = autoencoders.make_autoencoder(parent.spec.autoencoder).record_spec.kind
    described = describe_data(config.data.source, {"train": source, "validate": held_out})
    info = _info(config, source)
    return TrainingData(info, kind, loader, validation, errors, described, readable)


def _look_at(config: ConfigDict, held_out: Source, errors: DecodeErrorLog) -> Source | None:
    """The held-out images without those that cannot be read; None if none can."""
    readable = readable_part(held_out, errors, config.data.threads)
    if readable is None:
        path, reason = errors.items[0]
        LOGGER.warning(
            "none of the %d held-out images of %s can be read (%s: %s): this run has no validation "
            "and no previews of them; repair them and rerun the command to have both",
            len(held_out),
            config.data.source,
            path,
            reason,
        )
    return readable


def _cached_loader(
    config, source: Source, transform, parent: Parent, params, shard, shards, errors, offset
):
    """Encodes every image some times before training; every host encodes all of them."""
    autoencoder = autoencoders.make_autoencoder(parent.spec.autoencoder)
    encode, _ = make_encoder(autoencoder, params[AUTOENCODER], 1, jax.local_devices()[:1])
    records = encode_in_memory(
        encode,
        source,
        transform,
        record_spec=autoencoder.record_spec,
        copies=config.data.cached_copies,
        seed=config.seed,
        progress=processes.is_primary(),
        broken=errors,
    )
    return make_record_loader(
        records,
        batch_size=config.batch_size // shards,
        seed=config.seed,
        shard_index=shard,
        shard_count=shards,
        offset=offset,
    )


def _open_records(
    config: ConfigDict, mesh: Mesh, parent: Parent, parent_params: Any
) -> TrainingData:
    directory = records_directory(config.data.source)
    if not directory:
        raise InputError(
            f"config.data.source must be tokens:DIR, DIR as hmar tokenize made it; "
            f"got {config.data.source!r}"
        )
    source, held_out = (open_records(directory, split) for split in ("train", "validate"))
    if source is None:
        raise InputError(f"the data set {directory} has no training split")
    _check_fingerprint(source, directory, parent, parent_params)
    _check_batch_size(config, len(source))
    for index, path, reason in source.info.splits["train"].broken:
        LOGGER.warning("without image %d, %s, which could not be decoded: %s", index, path, reason)
    shard, shards = sharding.host_share(mesh, config.batch_size)

    def loader(offset: int):
        return make_record_loader(
            source.in_memory() if config.data.in_memory else source,
            batch_size=config.batch_size // shards,
            seed=config.seed,
            shard_index=shard,
            shard_count=shards,
            threads=config.data.threads,
            offset=offset,
        )

    info, kind = _info(config, source), source.info.record_spec.kind
    splits = {"train": source} | ({"validate": held_out} if held_out else {})
    described = describe_data(config.data.source, splits)
    if not held_out:
        return TrainingData(info, kind, loader, None, DecodeErrorLog(), described)
    batch = _validation_batch(config, mesh, len(held_out))
    own, count = sharding.host_share(mesh, batch)
    validation = make_record_loader(
        held_out,
        batch_size=batch // count,
        train=False,
        shard_index=own,
        shard_count=count,
        threads=config.data.threads,
    )
    held_out_batches = Validation(validation, batch, len(held_out))
    return TrainingData(info, kind, loader, held_out_batches, DecodeErrorLog(), described)


def _check_fingerprint(source: RecordSet, directory: str, parent: Parent, params: Any) -> None:
    autoencoder = autoencoders.make_autoencoder(parent.spec.autoencoder)
    ours, theirs = autoencoder.fingerprint(params[AUTOENCODER]), source.info.fingerprint
    if ours != theirs:
        raise InputError(
            f"the data set {directory} was encoded by another autoencoder: by "
            f"{source.info.autoencoder_name!r} with fingerprint {theirs}, while {parent.name!r} "
            f"has {ours}; name that one, or encode the images again with hmar tokenize"
        )


def _info(config: ConfigDict, source: Source | RecordSet) -> DataInfo:
    return DataInfo(config.data.source, source.num_classes, source.class_names, len(source))


def _check_batch_size(config: ConfigDict, rows: int) -> None:
    if config.batch_size > rows:
        raise InputError(
            f"config.batch_size must be at most {rows}, the images of {config.data.source}; "
            f"got {config.batch_size}; give --config.batch_size={min(rows, _SMALL_BATCH)}"
        )


def _validation_batch(config: ConfigDict, mesh: Mesh, num_images: int) -> int:
    """Images of a validation batch of all hosts; the last one is padded."""
    parts = sharding.batch_parts(mesh)
    return -(-min(config.batch_size, num_images, _MAX_EVAL_BATCH) // parts) * parts


def preview_images(
    config: ConfigDict, count: int, side: int, data: TrainingData
) -> np.ndarray | None:
    """Held-out images, the same on every host: (count, side, side, 3) uint8."""
    if not count or data.held_out is None:
        return None
    few = make_loader(  # a loader replaces images that cannot be decoded
        data.held_out,
        settings.from_group(Transform, config.data.transform, side=side),
        batch_size=min(count, len(data.held_out)),
        seed=0,
        train=False,
        threads=0,
        broken=data.decode_errors,
    )
    return next(iter(few))["image"]


def held_out_images(data: TrainingData) -> np.ndarray:
    """A few of them, (n, h, w, 3) uint8; none where there are none, or none that can be read."""
    batch: dict[str, Any] = {}
    if data.validation is not None:
        with contextlib.suppress(InputError):  # evaluation will report it
            batch = next(iter(data.validation.loader))
    if "image" not in batch:
        return np.zeros((0, 1, 1, 3), np.uint8)
    return batch["image"][np.asarray(batch["valid"], bool)]
