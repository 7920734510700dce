"""Progress of long operations: a bar on a terminal, lines in the log elsewhere.

Only the first process of a run says anything.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from hmar_jax.parallel import processes

LOGGER = logging.getLogger("hmar_jax")
QUIET_SECONDS = 3.0  # of a phase that needs no line
_LINE_SECONDS = 30.0  # between lines, where there is no terminal


def announce(what: str) -> None:
    """One line on what begins now and may take long, such as "compiling the training step"."""
    if processes.is_primary():
        LOGGER.info("%s ...", what)


@contextlib.contextmanager
def phase(what: str, *, at_once: bool = False) -> Iterator[None]:
    """Around what may take long: that line once it has taken a few seconds, then how long it took.

    Args:
      what: such as "compiling the training step".
      at_once: the first line comes at once: the next line of the log is far away.
    """
    began, timer = time.monotonic(), threading.Timer(QUIET_SECONDS, announce, (what,))
    timer.daemon = True
    if at_once:
        announce(what)
    else:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
    seconds = time.monotonic() - began
    if seconds >= QUIET_SECONDS and processes.is_primary():
        LOGGER.info("%s: %s", what, describe_seconds(seconds))


class Progress:
    """The progress of one loop; use it in a `with` block, or close it.

    Args:
      what: what is done, such as "encode".
      total: how often `advance` will count.
      unit: what it counts, in the singular: "step", "image".
      start: how many were done before.
      show: False: nothing is said at all.
      opening: whether the log says that it begins, and how long it took.
      line_seconds: between lines in the log, where there is no terminal.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        start: int = 0,
        show: bool = True,
        opening: bool = True,
        line_seconds: float = _LINE_SECONDS,
    ):
        self._what, self._total, self._unit, self._done = what, total, unit, start
        self._start = start
        self._line_seconds, self._last_line = line_seconds, time.monotonic()
        self._clock = _Clock(total)
        show = show and processes.is_primary()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=what,
            unit=unit,
            disable=None if show else True,  # None: where stderr is no terminal
            dynamic_ncols=True,
            leave=False,
        )
        self._writes_lines = show and self._bar.disable
        self._opening, self._began = opening and self._writes_lines, time.monotonic()
        if self._opening:
            announce(f"{what}: {total} {unit}s")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        self._clock.read(self._done)
        self._bar.update(count)
        if self._writes_lines and time.monotonic() - self._last_line >= self._line_seconds:
            self._write_line()

    def _write_line(self) -> None:
        left = f", {left} left" if (left := self.time_left()) else ""
        words = f"{self._what}: {self._done} of {self._total} {self._unit}s"
        LOGGER.info("%s%s", words, left)
        self._last_line = time.monotonic()

    def show(self, text: str) -> None:
        """Puts a text behind the bar. The caller logs it, so no line is due for a while."""
        self._last_line = time.monotonic()
        if not self._bar.disable:
            self._bar.set_postfix_str(text)

    def time_left(self) -> str:
        """In words, at the rate so far; "" where it is not known, or nothing is left."""
        seconds = self._clock.seconds_left()
        return describe_seconds(seconds) if seconds else ""

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()
        if self._opening:
            took = describe_seconds(time.monotonic() - self._began)
            count, done = self._done - self._start, self._done
            left = "" if done == self._total else f", {done} of {self._total} are done"
            LOGGER.info("%s: %d %ss in %s%s", self._what, count, self._unit, took, left)
            self._opening = False


class _Clock:
    """Estimates the time left from the time since the first item, which may have compiled."""

    def __init__(self, total: int):
        self._total, self._first, self._last = total, None, None

    def read(self, done: int) -> None:
        self._last = (done, time.monotonic())
        self._first = self._first or self._last

    def seconds_left(self) -> float | None:
        if self._first is None or self._first == self._last:
            return None
        done, seconds = (b - a for a, b in zip(self._first, self._last))
        return seconds / done * (self._total - self._last[0])


def describe_seconds(seconds: float) -> str:
    """Rounded for readers: "40 s", "3 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
