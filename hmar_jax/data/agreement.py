"""Processes that work on one data set must see the same: they read by index."""

import json
from collections.abc import Mapping
from typing import Any

from hmar_jax.errors import InputError
from hmar_jax.parallel import processes

_SPLITS = ("train", "validate")


def check_same_data(data: Mapping[str, Any] | None) -> None:
    """Compares the data set of all processes; every process must call it.

    Args:
      data: as data/fingerprint.py: describe_data gives it, or None.

    Raises:
      InputError: on every process, where one sees another data set than the first one.
    """
    own = {split: (data or {}).get(split) for split in _SPLITS}
    seen = [json.loads(text) for text in processes.gather_messages(json.dumps(own))]
    for process, found in enumerate(seen):
        if found != seen[0]:
            raise InputError(
                "all processes must see the same images, by names and sizes; process 0 sees "
                f"{_describe(seen[0])}, process {process} sees {_describe(found)}: copy the data "
                "set to every host again, or use a directory that all hosts share"
            )


def _describe(splits: Mapping[str, Any]) -> str:
    parts = [
        f"{split['images']} to {name} ({split['fingerprint']})"
        for name, split in splits.items()
        if split
    ]
    return " and ".join(parts) or "none"
