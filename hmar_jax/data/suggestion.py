"""Which kind of source a path is, for messages to those who named another."""

import os
import zipfile

from hmar_jax.io.files import is_local

_HF_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")  # of save_to_disk
_HF_ENDINGS = (".parquet", ".arrow", ".tar")


def suggest(path: str) -> str:
    """What a local path would be as a source, such as "zip:FILE"; "" if it does not exist."""
    if not path.strip() or not is_local(path):
        return ""
    if os.path.isdir(path):
        return _suggest_for_folder(path)
    if not os.path.isfile(path):
        return ""
    if zipfile.is_zipfile(path):
        return f"zip:{path}"
    return f"hf:{os.path.dirname(path) or os.curdir}" if path.endswith(_HF_ENDINGS) else ""


def _suggest_for_folder(path: str) -> str:
    try:
        names = [name for name in os.listdir(path) if not name.startswith(".")]
        if "data" in names and os.path.isdir(os.path.join(path, "data")):  # as on the Hub
            names += os.listdir(os.path.join(path, "data"))
    except OSError:
        return f"folder:{path}"
    if any(name in _HF_FILES or name.endswith(_HF_ENDINGS) for name in names):
        return f"hf:{path}"
    zips = [name for name in names if name.lower().endswith(".zip")]
    return f"zip:{os.path.join(path, zips[0])}" if len(zips) == 1 else f"folder:{path}"
