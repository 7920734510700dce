"""Metrics of a run: means over steps, and where they are written: files, TensorBoard, the log."""

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from hmar_jax.io.files import AppendedFile, is_local, write_atomically

LOGGER = logging.getLogger("hmar_jax")


class Mean(NamedTuple):
    """A mean over steps or batches that not each of them contributes to.

    Such as the loss at some mask ratio.
    """

    total: Any
    count: Any  # or the sum of the weights

    @classmethod
    def of(cls, values, weights) -> "Mean":
        """The weighted mean of values; both arrays of one shape."""
        weights = weights.astype(jnp.float32)
        return cls((values * weights).sum(), weights.sum())


def average(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means by name over rows of numbers and Means; a Mean without any value is left out."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            total, count = value if isinstance(value, Mean) else (value, 1.0)
            sum_so_far = sums.setdefault(name, [0.0, 0.0])
            sum_so_far[0] += float(total)
            sum_so_far[1] += float(count)
    return {name: total / count for name, (total, count) in sums.items() if count}


class MetricsWriter:
    """Appends JSON lines to metrics.jsonl and, in local directories, writes TensorBoard."""

    def __init__(self, workdir: epath.Path, start_step: int):
        """Drops lines beyond start_step, left by a run killed after its last checkpoint."""
        self._path = workdir / "metrics.jsonl"
        _drop_after(self._path, start_step)
        self._file = AppendedFile(self._path)
        self._board = None  # its event files are appended to, which object stores cannot
        if is_local(workdir):
            self._board = _TensorBoard(workdir / "tensorboard", start_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._board is not None:
            self._board.write(step, metrics)

    def sync(self) -> None:
        """Everything written so far is in the file."""
        self._file.sync()
        if self._board is not None:
            self._board.sync()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class _TensorBoard:
    """An event file.

    tensorboardX's SummaryWriter hands events to a thread, which ends on a full disk. Then its queue
    fills up, and the training loop waits for ever.
    """

    def __init__(self, folder: epath.Path, start_step: int):
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        if start_step:  # hides what a killed run had written beyond it
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=start_step + 1, session_log=start)

    def _write(self, **fields: Any) -> None:
        self._file.write_event(event_pb2.Event(wall_time=time.time(), **fields))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._write(step=step, summary=summary.scalar(name, value))

    def sync(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a half-written last one; [] where there is no file.

    Lines that are damaged, as after a crash of the machine, are left out.

    Raises:
      OSError: the file cannot be read.
    """
    found = []
    data = path.read_bytes() if path.exists() else b""
    for text in data.decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def _drop_after(path: epath.Path, step: int) -> None:
    """Keeps the whole lines up to a step; a half-written last line is dropped too."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


@contextlib.contextmanager
def log_to_file(workdir: epath.Path) -> Iterator[None]:
    """Sends the package's log also to log.txt; no run ends because that cannot be written."""
    try:
        file = AppendedFile(workdir / "log.txt")
    except OSError as error:
        LOGGER.warning("this log is not kept in log.txt, training continues: %s", error)
        yield
        return
    handler = _LogFile(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        with contextlib.suppress(OSError):  # the terminal has had every line
            file.close()


class _LogFile(logging.StreamHandler):
    """A log that a full disk costs lines and nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drops the line; logging's own would print a traceback for each."""
