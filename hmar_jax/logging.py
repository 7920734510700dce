"""Shows the log of the package on the terminal."""

import logging
import sys

from tqdm import tqdm


class _Terminal(logging.StreamHandler):
    """Writes to the current sys.stderr, which tests and notebooks replace."""

    stream = property(lambda self: sys.stderr)

    def __init__(self):
        logging.Handler.__init__(self, logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):  # a line does not cut through a bar
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        return mark + super().format(record)


TERMINAL = _Terminal()


def show_log() -> None:
    """Shows the package's messages of INFO and above on stderr, and errors of other libraries."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    log = logging.getLogger("hmar_jax")
    log.addHandler(TERMINAL)  # has no effect the second time
    log.setLevel(logging.DEBUG)  # log.txt of a run also has DEBUG
    log.propagate = False
