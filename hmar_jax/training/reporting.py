"""What a run reports while it trains: metrics, progress, times, images that cannot be read."""

import contextlib
import dataclasses
import time
from collections.abc import Callable

import jax
from etils import epath

from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.progress import Progress
from hmar_jax.training.metrics import LOGGER, MetricsWriter, average
from hmar_jax.training.step import MAX_SKIPPED_IN_ROW
from hmar_jax.training.weights_and_biases import WandbRun

_IN_FLIGHT = 2  # steps the device may lag behind: it stays busy, and errors are known soon


@dataclasses.dataclass
class Reporter:
    """Writes metrics to files and, in short, to the terminal."""

    directory: epath.Path
    start: int
    steps: int
    name: str
    wandb: WandbRun | None = None

    def __post_init__(self):
        self._failed: set[str] = set()
        self._writer: MetricsWriter | None = None
        self._try("writing metrics", self._open)
        self._progress = Progress(
            self.name, self.steps, "step", start=self.start, opening=False, line_seconds=120
        )

    def _open(self) -> None:
        self._writer = MetricsWriter(self.directory, self.start)

    def _try(self, what: str, do: Callable[[], object]) -> None:
        """Nothing that is reported is worth a training step; a failure is named once."""
        try:
            do()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                LOGGER.warning("%s failed, training continues: %s", what, error)

    def advance(self) -> None:
        self._try("showing the progress", self._progress.advance)

    def report(self, step: int, means: dict[str, float]) -> None:
        if not means:
            return
        if self._writer is not None:
            writer = self._writer
            self._try("writing metrics", lambda: writer.write(step, means))
        if self.wandb is not None:
            wandb = self.wandb
            self._try("sending metrics to Weights & Biases", lambda: wandb.write(step, means))
        short = ("loss", "accuracy", "psnr", "usage/any", "images_per_second")
        words = [
            f"{name} {value:.4g}"
            for name, value in means.items()
            if name.removeprefix("validation/") in short
        ]
        self._try("showing the progress", lambda: self._progress.show(", ".join(words)))
        if left := self._progress.time_left():
            words.append(f"{left} left")
        LOGGER.info("step %d of %d: %s", step, self.steps, ", ".join(words))

    def sync(self) -> None:
        if self._writer is not None:
            self._try("writing metrics", self._writer.sync)

    def close(self) -> None:
        self._try("showing the progress", self._progress.close)
        if self._writer is not None:
            self._try("writing metrics", self._writer.close)
        if self.wandb is not None:
            self._try("sending metrics to Weights & Biases", self.wandb.close)


def log_first_step(step: int, steps: int, metrics: dict) -> None:
    """At once: what is wrong from the start need not run until the first log line."""
    loss = jax.device_get(metrics).get("loss")
    if loss is not None:
        LOGGER.info("step %d of %d: loss %.4g", step, steps, float(loss))


def report_decode_errors(errors: DecodeErrorLog, num_reported: int) -> int:
    """Names the images that could not be decoded since the last call; returns how many by now."""
    items = errors.items
    for path, reason in items[num_reported:]:
        LOGGER.warning("skipped %s: %s", path, reason)
    if len(items) > num_reported:
        LOGGER.warning("images that could not be decoded: %d", len(items))
    return len(items)


class Meter:
    """Means of the metrics since the last report, and where the time was spent."""

    def __init__(self, batch_size: int, peak_images_per_second: float | None = None):
        self._batch_size, self._peak = batch_size, peak_images_per_second
        self._restart()

    def _restart(self):
        self._metrics, self._steps = [], []
        self._started, self._seconds = time.perf_counter(), {"data": 0.0, "excluded": 0.0}

    def add(self, step: int, metrics) -> None:
        """Takes a step's metrics, which may still be in computation; waits for an earlier step."""
        self._steps.append(step)
        self._metrics.append(metrics)
        if len(self._steps) > _IN_FLIGHT:
            self._check_row(-1 - _IN_FLIGHT)

    @contextlib.contextmanager
    def time(self, purpose: str):
        """Counts the time inside as waiting for "data", or as "excluded" from training."""
        start = time.perf_counter()
        yield
        self._seconds[purpose] += time.perf_counter() - start

    def _check_row(self, row: int) -> None:
        in_row = int(self._metrics[row]["skipped_in_row"])
        if in_row >= MAX_SKIPPED_IN_ROW:
            raise FloatingPointError(
                f"loss or gradient was not finite in the last {in_row} steps, up to step "
                f"{self._steps[row]}: the run stops. Those steps changed nothing and the last "
                "checkpoint is good; try a lower learning rate or stronger clipping"
            )

    def check(self) -> None:
        """Waits for the device. Raises FloatingPointError after too many skipped steps in a row."""
        for row in range(len(self._steps)):
            self._check_row(row)

    def read(self) -> dict[str, float]:
        """Means over the finite steps, the number of the others, and times; then it restarts."""
        self.check()
        self._metrics = jax.device_get(self._metrics)
        seconds = time.perf_counter() - self._started - self._seconds["excluded"]
        finite = [row for row in self._metrics if not row["skipped"]]
        pairs = zip(self._steps, self._metrics, strict=True)
        skipped = [step for step, row in pairs if row["skipped"]]
        if skipped:
            LOGGER.warning(
                "loss or gradient was not finite, nothing changed: step %s",
                ", ".join(map(str, skipped)),
            )
        counters = ("skipped", "skipped_in_row")
        means = average({n: v for n, v in row.items() if n not in counters} for row in finite)
        rate = len(self._metrics) * self._batch_size / seconds
        means |= {
            "skipped": len(skipped),
            "time": time.time(),
            "images_per_second": rate,
            "device_seconds": seconds - self._seconds["data"],
            "host_wait_seconds": self._seconds["data"],
        }
        if self._peak is not None:
            means["mfu"] = rate / self._peak
        self._restart()
        return means
