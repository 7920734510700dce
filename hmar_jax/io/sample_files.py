"""Many samples as files: an .npz file as ADM's evaluator reads, or numbered PNG files.

Samples arrive in batches, each of which is on the disk, complete, before it counts as finished. So
what was interrupted resumes with the batches that are missing, and nothing of the whole is held in
memory.

Letters: N images, b images of a batch, h = w sides of an image.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import BinaryIO, Protocol

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.io import files, images

_log = logging.getLogger(__name__)

NPZ_FILE = "samples.npz"
LABEL_FILE = "dataset.json"  # as in the data sets of StyleGAN and EDM
_PIECES_FOLDER = "pieces"
_THREADS = min(8, os.cpu_count() or 1)
_BLOCK = 4096  # bytes that file systems allocate at once
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG file


class SampleFiles(Protocol):
    """The files of N samples in a local directory."""

    def missing(self, batches: Iterable[int]) -> list[int]:
        """Those batches that are not finished. Changes nothing: others may be writing some."""
        ...

    def write(self, index: int, pixels: np.ndarray) -> None:
        """Writes a batch, (b, h, w, 3) uint8, which is finished then.

        Removes what a killed process left of it, as far as `missing` has seen that.

        Raises:
          OSError: it cannot be written.
        """
        ...

    def check_space(self, num_left: int) -> None:
        """Raises InputError unless so many images that are not written yet fit on the disk."""
        ...

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        """Completes the set, of which every batch is finished. The second time, nothing changes.

        Args:
          check: called now and then; what it raises ends the call.

        Raises:
          OSError: it cannot be written.
        """
        ...

    def close(self) -> None: ...

    @property
    def result(self) -> str:
        """The file or directory that users read."""
        ...


def open_files(
    file_format: str, directory: str, labels: np.ndarray, side: int, batch_size: int
) -> SampleFiles:
    """The files of a set of samples.

    Args:
      file_format: "npz" or "png".
      directory: local; made when it is first written to.
      labels: (N,) class ids.
      side: h = w, pixels.
      batch_size: of all batches but the last one.
    """
    kind = {"npz": NpzFiles, "png": PngFiles}[file_format]
    return kind(directory, labels, side, batch_size)


class PngFiles:
    """`000000.png`, `000001.png`, ... in one folder, and their labels in `dataset.json`."""

    def __init__(self, directory: str, labels: np.ndarray, side: int, batch_size: int):
        self._directory, self._labels, self._batch_size = directory, labels, batch_size
        self._digits = max(6, len(str(len(labels) - 1)))
        self._num_written, self._bytes_written = 0, 0
        self._begun: set[str] = set()
        self._pool = futures.ThreadPoolExecutor(_THREADS)  # zlib and fsync leave Python's lock

    @property
    def result(self) -> str:
        return self._directory

    def _name(self, i: int) -> str:
        return f"{i:0{self._digits}d}.png"

    def _indices(self, batch: int) -> range:
        start = batch * self._batch_size
        return range(start, min(start + self._batch_size, len(self._labels)))

    def missing(self, batches: Iterable[int]) -> list[int]:
        batches = list(batches)
        names = set(os.listdir(self._directory))
        self._begun |= _begun(names)
        sound = self._pool.map(lambda batch: self._is_finished(batch, names), batches)
        return [batch for batch, is_sound in zip(batches, sound, strict=True) if not is_sound]

    def _is_finished(self, batch: int, names: set[str]) -> bool:
        of_batch = [self._name(i) for i in self._indices(batch)]
        return names.issuperset(of_batch) and all(map(self._is_sound, of_batch))

    def _is_sound(self, name: str) -> bool:
        """False for a file that was truncated after it was written, as by a power failure."""
        with open(os.path.join(self._directory, name), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(_PNG_END)))
            return file.read() == _PNG_END

    def write(self, index: int, pixels: np.ndarray) -> None:
        start = index * self._batch_size

        def write_one(i: int) -> int:
            data, name = images.encode_image(pixels[i]), self._name(start + i)
            path = os.path.join(self._directory, name)
            if name in self._begun:
                files.remove_leftovers(path)
            files.write_atomically(path, data)
            return -(-len(data) // _BLOCK) * _BLOCK

        sizes = list(self._pool.map(write_one, range(len(pixels))))
        self._num_written += len(sizes)
        self._bytes_written += sum(sizes)

    def check_space(self, num_left: int) -> None:
        """How well images are compressed is known from the first batch on."""
        if self._num_written:
            needed = self._bytes_written / self._num_written * num_left
            _check_space(self._directory, needed, f"{num_left:,} more PNG files")

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        path = os.path.join(self._directory, LABEL_FILE)
        files.remove_leftovers(path)
        if os.path.exists(path):
            return
        with files.open_atomically(path) as file:
            file.write(b'{"labels": [')
            for i, label in enumerate(self._labels.tolist()):
                comma = "," if i else ""
                file.write(f"{comma}\n{json.dumps([self._name(i), label])}".encode())
            file.write(b"\n]}\n")

    def close(self) -> None:
        self._pool.shutdown()


class NpzFiles:
    """`samples.npz` with `arr_0` (N, h, w, 3) uint8 and `arr_1` (N,) int64, the class ids.

    Until all batches are finished they are files in `pieces/`, so that together they take twice the
    size of the result. The result depends on images and labels alone: it has no times in it.
    """

    def __init__(self, directory: str, labels: np.ndarray, side: int, batch_size: int):
        self._directory, self._labels, self._batch_size = directory, labels, batch_size
        self._image_shape = (side, side, 3)
        self._pieces = os.path.join(directory, _PIECES_FOLDER)
        self._is_reported = False  # that the result is damaged
        self._begun: set[str] = set()

    @property
    def result(self) -> str:
        return os.path.join(self._directory, NPZ_FILE)

    @property
    def _num_batches(self) -> int:
        return -(-len(self._labels) // self._batch_size)

    def _piece(self, batch: int) -> str:
        return os.path.join(self._pieces, f"{batch:06d}.npy")

    def _batch_shape(self, batch: int) -> tuple[int, ...]:
        left = len(self._labels) - batch * self._batch_size
        return min(self._batch_size, left), *self._image_shape

    def _is_complete(self) -> bool:
        if not os.path.exists(self.result):
            return False
        try:
            with zipfile.ZipFile(self.result) as archive:
                sizes = {item.filename: item.file_size for item in archive.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            if not self._is_reported:
                _log.warning("%s cannot be read (%s); making it again", self.result, error)
            self._is_reported = True
            return False
        return sizes == {name: _npy_size(shape, kind) for name, shape, kind in self._members()}

    def _members(self) -> tuple[tuple[str, tuple[int, ...], type], ...]:
        """Name, shape and type of the arrays in the result."""
        num = len(self._labels)
        shape = (num, *self._image_shape)
        return ("arr_0.npy", shape, np.uint8), ("arr_1.npy", (num,), np.int64)

    def missing(self, batches: Iterable[int]) -> list[int]:
        if self._is_complete():
            return []
        with contextlib.suppress(FileNotFoundError):  # new
            self._begun |= _begun(os.listdir(self._pieces))
        return [batch for batch in batches if not self._is_finished(batch)]

    def _is_finished(self, batch: int) -> bool:
        try:
            size = os.path.getsize(self._piece(batch))
        except FileNotFoundError:
            return False
        return size == _npy_size(self._batch_shape(batch), np.uint8)

    def write(self, index: int, pixels: np.ndarray) -> None:
        data = io.BytesIO()
        np.save(data, pixels)
        path = self._piece(index)
        if os.path.basename(path) in self._begun:
            files.remove_leftovers(path)
        with contextlib.suppress(FileExistsError):  # not its parents, which may have been moved
            os.mkdir(self._pieces)
        files.write_atomically(path, data.getvalue())

    def check_space(self, num_left: int) -> None:
        if self._is_complete():
            return
        result = sum(_npy_size(shape, kind) for _, shape, kind in self._members())
        needed = result + num_left * int(np.prod(self._image_shape))
        what = f"{NPZ_FILE} of {_gigabytes(result)} and the images of which it is made"
        _check_space(self._directory, needed, what)

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        files.remove_leftovers(self.result)
        if not self._is_complete():
            with files.open_atomically(self.result) as file:
                self._write_archive(file, check)
        if os.path.isdir(self._pieces):
            shutil.rmtree(self._pieces)

    def _write_archive(self, file: BinaryIO, check: Callable[[], None]) -> None:
        (pixels, *pixels_type), (labels, *labels_type) = self._members()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            # Of a ZipInfo without a date, which is that of numpy.savez too.
            with archive.open(zipfile.ZipInfo(pixels), "w", force_zip64=True) as member:
                _write_npy_header(member, *pixels_type)
                for batch in range(self._num_batches):
                    check()
                    member.write(self._read_piece(batch).tobytes())
            with archive.open(zipfile.ZipInfo(labels), "w", force_zip64=True) as member:
                _write_npy_header(member, *labels_type)
                member.write(self._labels.astype(np.int64).tobytes())

    def _read_piece(self, batch: int) -> np.ndarray:
        path = self._piece(batch)
        try:
            pixels = np.load(path)
        except ValueError:
            pixels = np.empty(0)
        if (pixels.shape, pixels.dtype) != (self._batch_shape(batch), np.uint8):
            os.unlink(path)
            raise InputError(f"{path} was damaged; run the same command again to sample it again")
        return pixels

    def close(self) -> None:
        pass


def _begun(names: Iterable[str]) -> set[str]:
    """The files of whose writing a temporary file tells, see io.files."""
    return {name[1:].rsplit(".", 2)[0] for name in names if name.endswith(".tmp")}


def _write_npy_header(file, shape: tuple[int, ...], kind: type) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(kind))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _npy_size(shape: tuple[int, ...], kind: type) -> int:
    """Bytes of an array in an .npy file."""
    header = io.BytesIO()
    _write_npy_header(header, shape, kind)
    return header.tell() + int(np.prod(shape)) * np.dtype(kind).itemsize


def _check_space(directory: str, needed: float, what: str) -> None:
    """Raises InputError unless so many bytes are free."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"not enough disk space for {what} in {directory}: {_gigabytes(needed)} needed, "
            f"{_gigabytes(free)} free"
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
