"""Unreadable images: how many a data set may have, and the log that names each of them once."""

import threading

MAX_UNREADABLE_FRACTION = 0.01  # reading stops above this fraction ...
MAX_UNREADABLE_FILES = 10  # ... if there are also more files than this


def is_over_limit(num_unreadable: int, allowed: float) -> bool:
    """Whether there are too many unreadable images: more than allowed and more than 10.

    Args:
      num_unreadable: unreadable images.
      allowed: usually `MAX_UNREADABLE_FRACTION` of all images.
    """
    return num_unreadable > max(MAX_UNREADABLE_FILES, allowed)


class DecodeErrorLog:
    """The unreadable images found so far, each path once. Thread-safe; loaders may share one."""

    def __init__(self):
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}

    def add(self, path: str, reason: str) -> None:
        with self._lock:
            self._reasons.setdefault(path, reason)

    @property
    def count(self) -> int:
        with self._lock:
            return len(self._reasons)

    @property
    def items(self) -> list[tuple[str, str]]:
        """(path, reason) pairs, in the order they were found."""
        with self._lock:
            return list(self._reasons.items())
