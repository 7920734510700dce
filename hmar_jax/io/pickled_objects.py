"""What a checkpoint may contain beside tensors: the classes that the unpickler of weights allows.

Settings of a training script, times, paths and numbers. Nothing here runs code of the file, opens
a path or trusts a size that the file states. For numpy, classes of this module stand in: numpy's
own constructors trust flags in the pickle, with which bytes can pass for Python objects.
"""

import argparse
import datetime
import decimal
import pathlib
import re
import types
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from hmar_jax.errors import InputError

_NUMBERS = re.compile(r"[biufcSU]\d*|\?")  # dtypes without Python objects and without fields


class PickledDtype:
    """Stands in for numpy.dtype: numbers, booleans and text."""

    def __init__(self, code: Any, align: bool = False, copy: bool = False):
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise InputError(f"numpy values beside weights must be numbers or text; got {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, subarray, names, fields, size, *_ = state
        order = order.decode("ascii") if isinstance(order, bytes) else order
        if subarray is not None or names or fields:
            raise InputError("numpy values beside weights must be numbers or text; got records")
        if self.dtype.kind in "SU" and size > 0:
            self.dtype = np.dtype((self.dtype.type, size // (4 if self.dtype.kind == "U" else 1)))
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class PickledArray:
    """Stands in for numpy.ndarray; numpy.asarray gives its values."""

    def __init__(self):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        values = np.frombuffer(_as_bytes(data), dtype.dtype)
        self.array = values.reshape(shape, order="F" if fortran else "C")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.array if dtype is None else self.array.astype(dtype)


def _make_array(cls: type, shape: tuple, code: Any) -> PickledArray:
    return PickledArray()


def _make_scalar(dtype: PickledDtype, data: Any = b"") -> Any:
    return np.frombuffer(_as_bytes(data), dtype.dtype)[0]


def _as_bytes(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def allowed_globals() -> list[Callable | tuple[Callable, str]]:
    """For torch.serialization.safe_globals: classes, or pairs of a class and its pickled name."""
    plain = [
        argparse.Namespace,
        types.SimpleNamespace,
        datetime.date,
        datetime.datetime,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
        decimal.Decimal,
        uuid.UUID,
    ]
    posix, windows = pathlib.PurePosixPath, pathlib.PureWindowsPath  # never touch the file system
    paths = {
        "PosixPath": posix,
        "WindowsPath": windows,
        "PurePosixPath": posix,
        "PureWindowsPath": windows,
    }
    numbers = [
        (PickledDtype, "numpy.dtype"),
        (PickledArray, "numpy.ndarray"),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since numpy 2
        numbers += [(_make_scalar, f"{module}.scalar"), (_make_array, f"{module}._reconstruct")]
    named = [
        (cls, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")  # the second: pickled by Python 3.13
        for name, cls in paths.items()
    ]
    return [*plain, *named, *numbers]
