"""Directories of many samples: what they are made from, and what may resume them.

`samples.json` describes the job. It is written first, so a directory with it belongs to one job
only. sample_files.py writes the images.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hmar_jax import config_files
from hmar_jax.errors import InputError
from hmar_jax.io import files, identity

_log = logging.getLogger(__name__)

INFO_FILE = "samples.json"
FORMAT = "hmar_jax samples 1"
# Where they differ, the images differ in the last bits at most: that is said, not refused. The
# model is compared by its fingerprint.
_NOT_COMPARED = ("devices", "model", "class_names")


def describe(
    *,
    file_format: str,
    num: int,
    seed: int,
    classes: Sequence[int],
    batch_size: int,
    model: str,
    fingerprint: str,
    dtype: str,
    class_names: Sequence[str],
    sampling: Mapping[str, Any],
    versions: Mapping[str, str],
    devices: str,
) -> dict[str, Any]:
    """The contents of samples.json.

    Args:
      file_format: "npz" or "png".
      num: of images.
      seed: of the random numbers; image i has the i-th key of it.
      classes: ids; image i is of class classes[i % len(classes)].
      batch_size: images that are sampled at once, on which rounding depends.
      model: what the user called it.
      fingerprint: of the model, see loading.fingerprint.
      dtype: of matrix products.
      class_names: of all classes of the model.
      sampling: all options of sampling.
      versions: of the packages that decide what is computed, by name.
      devices: what computes, in words.
    """
    contents = {
        "format": FORMAT,
        "file_format": file_format,
        "num": num,
        "seed": seed,
        "classes": list(classes),
        "batch_size": batch_size,
        "model": model,
        "fingerprint": fingerprint,
        "dtype": dtype,
        "sampling": dict(sampling),
        "versions": dict(versions),
        "devices": [devices],
        "class_names": list(class_names),
    }
    return json.loads(json.dumps(contents))


def check(directory: os.PathLike | str, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compares a directory with a job. Writes nothing.

    Args:
      directory: local; it need not exist.
      known: those contents of samples.json that are known so far.

    Returns:
      Its samples.json; None if it is new or empty.

    Raises:
      InputError: it holds something else or another job, or it cannot be written.
    """
    path = os.path.join(directory, INFO_FILE)
    if not os.path.exists(path):
        files.check_new_directory(directory)
        return None
    found = files.read_json(path, "the description of a set of samples")
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        raise InputError(f"{path} must describe samples (format {FORMAT!r}); choose another --out")
    differences = _differences(found, known)
    if differences:
        raise InputError(
            f"{directory} holds samples of another job: {identity.shorten(differences)}; choose "
            "another --out, or the options of that job to resume it"
        )
    files.check_directory_writable(directory)
    return dict(found)


def _differences(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    differences = []
    for name, here in known.items():
        there = found.get(name)
        if name in _NOT_COMPARED or there == here:
            continue
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            a, b = dict(config_files.flatten(there)), dict(config_files.flatten(here))
            differences += [
                f"{key} is {_shown(a.get(key))} there and {_shown(b.get(key))} here"
                for key in sorted(a.keys() | b.keys())
                if a.get(key) != b.get(key)
            ]
        elif name == "fingerprint":
            models = [
                f"{each.get('model')!r} ({each.get('fingerprint')})" for each in (found, known)
            ]
            differences.append(f"the model is {models[0]} there and {models[1]} here")
        else:
            differences.append(f"{name} is {_shown(there)} there and {_shown(here)} here")
    return differences


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def prepare(directory: os.PathLike | str, job: Mapping[str, Any]) -> None:
    """Makes the directory of a job, or checks that it is this job's. Call it with the lock held.

    Args:
      job: as `describe` returns it.

    Raises:
      InputError: as `check`.
    """
    found = check(directory, job)
    path = os.path.join(directory, INFO_FILE)
    files.remove_leftovers(path)
    contents = dict(job)
    if found is not None:
        before = found.get("devices") or []
        now = job["devices"][0]
        if before and now not in before:
            _log.warning(
                "%s was sampled on %s and resumes on %s: images may differ in the last bits from "
                "those of one device",
                directory,
                " and ".join(before),
                now,
            )
        contents = found | {"devices": [*before, *([] if now in before else [now])]}
    if contents != found:
        text = json.dumps(contents, indent=1) + "\n"
        files.write_atomically(path, text)
