"""Where the figures of a run go: metrics.jsonl, TensorBoard, log.txt and a line on the terminal."""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import tensorboardX
from etils import epath

from hmar_jax.io.files import AppendedFile, is_local, write_atomically

LOGGER = logging.getLogger("hmar_jax")


class Mean(NamedTuple):
    """A mean that goes on over steps or batches: figures that not every step has, such as the loss at some mask ratio."""

    total: Any
    count: Any  # or the sum of the weights

    @classmethod
    def of(cls, values, weights) -> "Mean":
        """Of arrays of one shape; where the weight is 0 the value does not count."""
        weights = weights.astype(jnp.float32)
        return cls((values * weights).sum(), weights.sum())


def average(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means by name over rows of numbers and of Means; a Mean that never had a value is left out."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            total, count = value if isinstance(value, Mean) else (value, 1.0)
            sum_so_far = sums.setdefault(name, [0.0, 0.0])
            sum_so_far[0] += float(total)
            sum_so_far[1] += float(count)
    return {name: total / count for name, (total, count) in sums.items() if count}


class MetricsWriter:
    """Appends one JSON object a line to metrics.jsonl and, in local directories, the same figures to TensorBoard."""

    def __init__(self, workdir: epath.Path, start_step: int):
        """Lines beyond start_step, left by a run that was killed after its last checkpoint, are dropped."""
        self._path = workdir / "metrics.jsonl"
        _drop_after(self._path, start_step)
        self._file = AppendedFile(self._path)
        self._board = None  # its event files are appended to, which object stores cannot
        if is_local(workdir):
            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None
            )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Everything written so far is in the file."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _drop_after(path: epath.Path, step: int) -> None:
    """Keeps the whole lines up to a step; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))


@contextlib.contextmanager
def log_to_file(workdir: epath.Path) -> Iterator[None]:
    """Sends the package's log also to log.txt."""
    with AppendedFile(workdir / "log.txt") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(handler)
        try:
            yield
        finally:
            LOGGER.removeHandler(handler)
