"""Ctrl-C (SIGINT), a closed terminal (SIGHUP) and SIGTERM: a command ends in order.

Python's own answers are not enough. For SIGINT it raises KeyboardInterrupt wherever the main thread
is, also in the middle of a save. For the others the kernel ends the process. Here a signal raises
`Interrupted` where that is safe, and is only noted where the code says so (`deferred`); that code
then asks at its safe points.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


class Interrupted(KeyboardInterrupt):
    """A signal ended what was going on.

    Like KeyboardInterrupt, it is no Exception, so that nobody takes it for a failure of the work.

    Attributes:
      signal: which one.
      status: the conventional exit status, 128 + the signal's number.
    """

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        self.status = exit_status(number)
        super().__init__(f"interrupted by {self.signal.name}")


def exit_status(number: int) -> int:
    """The exit status of a process that a signal has ended, as shells report it."""
    return 128 + number


class Interruptions:
    """Handles the signals while its `with` block runs.

    The first signal raises `Interrupted` in the main thread, or is noted inside `deferred`. A
    second Ctrl-C ends the process at once. Other repeated signals have no effect: schedulers and
    launch scripts send SIGTERM more than once. A signal that was ignored before stays ignored
    (`nohup`, background jobs of scripts). Outside the main thread, which alone can install
    handlers, it does nothing.

    Attributes:
      received: the first signal, or None.
      on_signal: called with each first signal, in the handler.
    """

    def __init__(self, only_noted: bool = False):
        """Installs nothing yet.

        Args:
          only_noted: never raise, as for a caller that does not end the process with `end_now`.
        """
        self._only_noted = only_noted
        self.received: signal.Signals | None = None
        self.on_signal: Callable[[], None] | None = None
        self._num_deferred, self._num_ctrl_c = 0, 0
        self._previous: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []
        self._swallowed, self._previous_hook = False, sys.unraisablehook

    def __enter__(self) -> "Interruptions":
        self._terminals = [fd for fd in (1, 2) if _is_terminal(fd)]
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
        self.install()
        return self

    def install(self) -> None:
        """Installs the handlers, also over those that another library has installed meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            previous = signal.getsignal(number)
            # None: a handler that Python did not install.
            if previous not in (signal.SIG_IGN, None):
                signal.signal(number, self._handle)
                self._previous.setdefault(number, previous)

    def __exit__(self, *_) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)
        self._previous = {}
        if sys.unraisablehook == self._raise_again:
            sys.unraisablehook = self._previous_hook

    def release(self, number: signal.Signals) -> None:
        """Leaves a signal to a handler that another library has installed meanwhile."""
        self._previous.pop(number, None)

    def _raise_again(self, unraisable: Any) -> None:
        """Python swallows exceptions in callbacks, such as JAX's of the garbage collector."""
        error = unraisable.exc_value
        if not isinstance(error, Interrupted):
            self._previous_hook(unraisable)
            return
        self._swallowed, main = True, threading.main_thread().ident
        assert main is not None
        # Later: an exception in this function would be swallowed too.
        timer = threading.Timer(0.02, signal.pthread_kill, (main, error.signal))
        timer.daemon = True
        timer.start()

    def _handle(self, number: int, _frame: object) -> None:
        if self._swallowed:
            self._swallowed = False
            if not self._num_deferred:
                raise Interrupted(number)
            return
        self._num_ctrl_c += number == signal.SIGINT
        if self._num_ctrl_c > 1:
            os._exit(exit_status(number))
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        for fd in self._terminals:
            if not _is_terminal(fd):  # closed: every further line would raise an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        if self.on_signal is not None:
            self.on_signal()
        if not self._num_deferred and not self._only_noted:
            raise Interrupted(number)
        if number == signal.SIGINT:
            tell("ending in order; press Ctrl-C again to end at once")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are noted here, and raise nothing: ask `received` or call `check`."""
        self._num_deferred += 1
        try:
            yield
        finally:
            self._num_deferred -= 1

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Signals raise Interrupted again, inside `deferred`. The process must end by `end_now`."""
        self.check()
        before, self._num_deferred = self._num_deferred, 0
        try:
            yield
        finally:
            self._num_deferred = before

    def check(self) -> None:
        """Raises Interrupted if a signal was noted. Call it at safe points."""
        if self.received is not None:
            raise Interrupted(self.received)


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def tell(text: str) -> None:
    """Writes a line to stderr from a signal handler: print and logging may hold their locks."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nhmar: {text}\n".encode())


def end_now(status: int) -> NoReturn:
    """Ends the process without Python's finalization, once files and locks are in order.

    After an exception out of the middle of a computation, threads of XLA may still run. They would
    use what the finalization destroys.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed terminal
            stream.flush()
    os._exit(status)
