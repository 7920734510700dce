"""Encoded data sets that the first version wrote: tokens of images, described by tokens.json.

Their shards are those of a set of kind "tokens"; only the description has other keys. They can be
read, completed and extended. Whatever changes such a set writes a description of today's format,
which then takes precedence; tokens.json stays for older programs.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from hmar_jax.data.record_spec import RecordField, RecordSpec

FORMAT = "hmar_jax tokens 1"
INFO_FILE = "tokens.json"
_KEYS_FILE = pathlib.Path(__file__).with_name("first_version_keys.json")  # old key: new key


def upgrade_description(data: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the contents of tokens.json to those of today's description, except for "format".

    Raises:
      AttributeError, KeyError, TypeError: `data` is not such a description.
    """
    keys = json.loads(_KEYS_FILE.read_text())
    old = {key: value for key, value in data.items() if key != "format"}
    new = _rename(old, keys["description"])
    new["splits"] = {name: _rename(s, keys["split"]) for name, s in old["splits"].items()}
    num_tokens = sum(side**2 for side in new["autoencoder"]["scales"])
    field = RecordField("tokens", (num_tokens,), "int32", new["autoencoder"]["vocab_size"])
    return {**new, "record": RecordSpec("tokens", (field,)).to_json()}


def _rename(data: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Renames keys; a new key "group.name" puts the value into a group."""
    renamed: dict[str, Any] = {}
    for key, value in data.items():
        group, _, name = keys.get(key, key).rpartition(".")
        (renamed.setdefault(group, {}) if group else renamed)[name] = value
    return renamed
