"""The record schema: which arrays an encoded data set stores for one image, and their bytes.

A record is the image's label (uint32, little-endian), followed by the fields in order, each from a
whole byte on. Integers of a known vocabulary take the fewest of 8, 12, 16 or 32 bits: a record of
680 tokens out of 4,096 is 1,024 bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_LABEL_BYTES = 4
_RESERVED_NAMES = ("label", "valid")  # what loaders add to a batch


@dataclasses.dataclass(frozen=True)
class RecordField:
    """An array that a record stores.

    Attributes:
      name: key of the array in batches.
      shape: shape of the array of one image.
      dtype: NumPy's name of the type in batches, such as "int32" or "float16".
      vocab_size: V, for integers in [0, V), which are stored in as few bits as hold them. 0 stores
        numbers as `dtype`, little-endian.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    vocab_size: int = 0

    def __post_init__(self):
        kind = np.dtype(self.dtype).kind
        if kind not in "iuf" or (self.vocab_size and kind == "f"):
            what = "an integer type" if self.vocab_size else "a type of integers or floats"
            raise ValueError(f"dtype of field {self.name!r} must be {what}; got {self.dtype!r}")

    @functools.cached_property
    def size(self) -> int:
        """Numbers in the array of one image."""
        return math.prod(self.shape)

    @functools.cached_property
    def bits(self) -> int:
        """Bits that one number takes."""
        if not self.vocab_size:
            return 8 * np.dtype(self.dtype).itemsize
        return next(bits for bits in (8, 12, 16, 32) if self.vocab_size <= 2**bits)

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes that the array of one image takes."""
        return -(-self.size * self.bits // 8)

    def pack(self, values: Any) -> np.ndarray:
        """Packs arrays into bytes.

        Args:
          values: (B, *shape), also of another type.

        Returns:
          (B, num_bytes) uint8.
        """
        values = np.asarray(values)
        if values.shape[1:] != self.shape:
            expected = ", ".join(map(str, ("B", *self.shape)))
            raise ValueError(f"{self.name} must be of shape ({expected}); got {values.shape}")
        rows = values.reshape(len(values), self.size)
        if self.bits == 12:
            return _pack_12_bits(rows)[:, : self.num_bytes]
        return np.ascontiguousarray(rows.astype(self._stored_dtype)).view(np.uint8)

    def unpack(self, data: np.ndarray) -> np.ndarray:
        """Unpacks (B, num_bytes) uint8 to (B, *shape)."""
        if self.bits == 12:
            rows = _unpack_12_bits(data, self.size, self.dtype)
        else:
            rows = np.ascontiguousarray(data).view(self._stored_dtype)
            rows = rows.astype(self.dtype, copy=False)
        return rows.reshape(len(data), *self.shape)

    @functools.cached_property
    def _stored_dtype(self) -> np.dtype:
        if self.vocab_size:
            return np.dtype(f"<u{self.bits // 8}")
        return np.dtype(self.dtype).newbyteorder("<")


@dataclasses.dataclass(frozen=True)
class RecordSpec:
    """What a record stores.

    Attributes:
      kind: what the arrays are, such as "tokens".
      fields: the arrays, in the order of their bytes.
    """

    kind: str
    fields: tuple[RecordField, ...]

    def __post_init__(self):
        names = [field.name for field in self.fields]
        if len({*names, *_RESERVED_NAMES}) != len(names) + len(_RESERVED_NAMES):
            raise ValueError(
                f"names of fields must differ and not be {' or '.join(_RESERVED_NAMES)}; got "
                f"{', '.join(names)}"
            )

    @functools.cached_property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return _LABEL_BYTES + sum(field.num_bytes for field in self.fields)

    def without_packing(self) -> "RecordSpec":
        """The same arrays, each number stored in its own type: larger, and faster to unpack."""
        fields = tuple(dataclasses.replace(field, vocab_size=0) for field in self.fields)
        return RecordSpec(self.kind, fields)

    def pack(self, arrays: Mapping[str, Any], labels: np.ndarray) -> np.ndarray:
        """Packs the arrays of images into records.

        Args:
          arrays: (B, *shape) by field name.
          labels: (B,) int.

        Returns:
          (B, record_bytes) uint8; a row is a record.
        """
        names = [field.name for field in self.fields]
        if arrays.keys() != set(names):
            raise ValueError(f"arrays must have keys {', '.join(names)}; got {', '.join(arrays)}")
        label_bytes = np.ascontiguousarray(np.asarray(labels).astype("<u4"))[:, None].view(np.uint8)
        parts = [field.pack(arrays[field.name]) for field in self.fields]
        return np.concatenate([label_bytes, *parts], axis=1)

    def unpack(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Unpacks records.

        Args:
          records: (B, record_bytes) uint8.

        Returns:
          The arrays (B, *shape) by field name, and "label": (B,) int32.
        """
        arrays, start = {}, _LABEL_BYTES
        for field in self.fields:
            arrays[field.name] = field.unpack(records[:, start : start + field.num_bytes])
            start += field.num_bytes
        labels = np.ascontiguousarray(records[:, :_LABEL_BYTES]).view("<u4")[:, 0]
        return {**arrays, "label": labels.astype(np.int32)}

    def to_json(self) -> dict[str, Any]:
        """Returns the schema as JSON types."""
        fields = [{**dataclasses.asdict(f), "shape": list(f.shape)} for f in self.fields]
        return {"kind": self.kind, "fields": fields}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RecordSpec":
        """Returns the schema that `to_json` described.

        Raises:
          KeyError, TypeError, ValueError: `data` is not such a description.
        """
        fields = (RecordField(**{**f, "shape": tuple(f["shape"])}) for f in data["fields"])
        return cls(data["kind"], tuple(fields))


def _pack_12_bits(rows: np.ndarray) -> np.ndarray:
    """Packs (B, n) integers into bytes: two in three bytes, the first in the lower half."""
    padded = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).astype(np.uint16)
    low, high = padded.reshape(len(rows), -1, 2).transpose(2, 0, 1)
    triples = np.stack([low & 255, low >> 8 | (high & 15) << 4, high >> 4], axis=-1)
    return triples.astype(np.uint8).reshape(len(rows), -1)


def _unpack_12_bits(data: np.ndarray, size: int, dtype: str) -> np.ndarray:
    """Unpacks the first `size` integers of each row of `_pack_12_bits`."""
    rows = np.empty((len(data), size + size % 2), dtype)
    first, middle, last = (data[:, i::3].astype(np.uint16) for i in range(3))
    rows[:, 0::2] = first | (middle & 15) << 8
    rows[:, 1 : 2 * last.shape[1] : 2] = middle[:, : last.shape[1]] >> 4 | last << 4
    return rows[:, :size]
