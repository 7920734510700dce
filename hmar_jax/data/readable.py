"""Looks at held-out images before training, so that broken ones cost no evaluation later."""

import dataclasses
from concurrent import futures

import numpy as np

from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.sources import ImageDecodeError, Source

MAX_LOOKED_AT = 1000  # images: seconds, from an object store too


@dataclasses.dataclass(frozen=True)
class _Selection:
    """Some images of another source."""

    source: Source
    indices: np.ndarray  # (N,) int

    name = property(lambda self: self.source.name)
    class_names = property(lambda self: self.source.class_names)
    num_classes = property(lambda self: self.source.num_classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.source[int(self.indices[index])]


def readable_part(source: Source, broken: DecodeErrorLog, threads: int) -> Source | None:
    """Decodes images of a source, MAX_LOOKED_AT of them at most, evenly spread.

    Args:
      source: held-out images.
      broken: gets the unreadable ones.
      threads: that read.

    Returns:
      The source, without the images that were found unreadable; None if none of those looked at
      can be read.
    """
    count = min(len(source), MAX_LOOKED_AT)
    looked_at = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()

    def error_of(index: int) -> ImageDecodeError | None:
        try:
            source[index]
        except ImageDecodeError as error:
            return error
        return None

    with futures.ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            errors = list(pool.map(error_of, looked_at))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    bad = [index for index, error in zip(looked_at, errors) if error is not None]
    for error in errors:
        if error is not None:
            broken.add(error.path, error.reason)
    if not bad:  # an empty source has its own error
        return source
    if len(bad) == len(looked_at):
        return None
    return _Selection(source, np.setdiff1d(np.arange(len(source)), bad))
