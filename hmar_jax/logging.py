"""The package's log on the terminal."""

import logging
import sys


class _Terminal(logging.StreamHandler):
    """Writes to what sys.stderr is at the time."""

    stream = property(lambda self: sys.stderr)

    def __init__(self):
        logging.Handler.__init__(self, logging.INFO)


TERMINAL = _Terminal()


def show_log() -> None:
    """The package's own log goes to stderr; the libraries' only where something is wrong."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    log = logging.getLogger("hmar_jax")
    log.addHandler(TERMINAL)  # does nothing the second time
    log.setLevel(logging.DEBUG)  # a run's log.txt has more
    log.propagate = False
