"""Images in a zip archive, read in place: in class folders, or labeled by a dataset.json."""

import dataclasses
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable

import numpy as np

from hmar_jax.data.archives import Archive, ArchiveFile, check_file
from hmar_jax.data.class_folders import SplitFiles, find_splits
from hmar_jax.data.dataset_json import LABELS_FILE
from hmar_jax.data.decoding import MAX_PIXELS, ImageDecodeError, decode_image
from hmar_jax.data.fingerprint import fingerprint_listed
from hmar_jax.data.listing import CLASS_NAME_FILES, listed_endings
from hmar_jax.data.source_config import FOLDER_RULES, SourceConfig
from hmar_jax.errors import InputError, printable
from hmar_jax.io.files import expand

_HEADER_BYTES = 30  # before name and extra field, whose lengths are in it
_MAX_HEADER_BYTES = _HEADER_BYTES + 2 * 65535
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flags of a member
_MADE_BY_WINDOWS = 0
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}
_FILE_KINDS = (0, 0o100000)  # bits of the mode: unknown, and a regular file

# What is kept of a member: a table, so that a million of them travel to worker processes quickly.
_MEMBER = np.dtype(
    [
        ("offset", np.int64),  # of its header, in bytes
        ("extent", np.int64),  # bytes from there that hold header and contents
        ("packed", np.int64),  # bytes of its contents, as they are stored
        ("size", np.int64),  # bytes of its contents
        ("crc", np.uint32),
        ("method", np.uint16),
        ("flags", np.uint16),
    ]
)


@dataclasses.dataclass(frozen=True)
class ZipSource:
    """Image files in a zip archive."""

    name: str
    class_names: tuple[str, ...]
    root: str  # the archive, and the folder in it
    files: tuple[str, ...]  # relative to root, in label order and sorted within a class
    labels: np.ndarray  # (N,) int32
    archive: ArchiveFile
    members: np.ndarray  # (N,) _MEMBER
    max_pixels: int = MAX_PIXELS

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path = os.path.join(self.root, self.files[index])
        try:
            data = _read_member(self.archive, self.members[index])
        except OSError as error:
            raise ImageDecodeError(printable(path), error.strerror or str(error)) from error
        image = decode_image(io.BytesIO(data), path, self.max_pixels)
        return {"image": image, "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        """See `data.sources.Source.fingerprint`. The folder that was archived has the same."""
        return fingerprint_listed(self.files, self.labels, self.members["size"].tolist())


def open_zip(
    path: str, splits: Iterable[str], need_classes: bool, config: SourceConfig
) -> dict[str, ZipSource]:
    """Opens a zip archive of images; reads its table once for all splits.

    Args:
      path: the archive; inside is a folder as `hmar_jax.data.sources.open_source` describes it.
      splits: "train", "validate" or both.
      need_classes: whether to reject an archive without classes.
      config: what is read of it.

    Raises:
      InputError: there is no such archive, it cannot be read in place, or it has no images in one
        of the known layouts.
    """
    path = expand(path)
    check_file(path, "zip")
    archive = ArchiveFile(path)
    members = _read_table(path)
    table = _make_table(members)
    tree = Archive(path, lambda number: _read_member(archive, table[number]))
    for number, member in enumerate(members):
        name = _name(member)
        tree.add(name, {} if name.endswith("/") else _number(member, number))
    endings = listed_endings(config.folder_rules or FOLDER_RULES)
    root = tree.data_folder((LABELS_FILE, *CLASS_NAME_FILES), endings)

    spec = f"zip:{path}"

    def source(split: SplitFiles) -> ZipSource:
        used = [split.root.member(file) for file in split.files]
        _check_readable(path, [members[number] for number in used])
        return ZipSource(
            spec,
            split.class_names,
            str(split.root),
            split.files,
            split.labels,
            archive,
            table[used],
            config.max_pixels,
        )

    found = find_splits(root, splits, need_classes, config, spec)
    return {split: source(files) for split, files in found.items()}


def _read_table(path: str) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(member.header_offset < 0 for member in members):
            raise zipfile.BadZipFile("its beginning is missing")
        return members
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, ValueError) as error:
        with open(path, "rb") as file:
            is_cut = file.read(4) == b"PK\3\4"
        if is_cut and "not a zip file" in str(error):
            reason = "its table of contents is missing, so it is incomplete; copy it again"
        elif tarfile.is_tarfile(path):
            reason = "it is a tar archive"
        elif os.path.exists(os.path.splitext(path)[0] + ".z01"):
            reason = f"it is the last part of a split one; zip -s 0 {path} --out WHOLE.zip joins it"
        else:
            reason = str(error)
        raise InputError(f"{path} must be a complete zip archive: {reason}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _make_table(members: list[zipfile.ZipInfo]) -> np.ndarray:
    """(N,) _MEMBER."""
    table = np.zeros(len(members), _MEMBER)
    table["offset"] = [member.header_offset for member in members]
    table["packed"] = [member.compress_size for member in members]
    table["size"] = [member.file_size for member in members]
    table["crc"] = [member.CRC for member in members]
    table["method"] = [member.compress_type for member in members]
    table["flags"] = [member.flag_bits for member in members]
    # Up to the next member: then one read gets a header of unknown length together with the rest.
    starts = np.unique(table["offset"])
    following = np.append(starts, np.iinfo(np.int64).max)[
        np.searchsorted(starts, table["offset"], "right")
    ]
    table["extent"] = np.minimum(following - table["offset"], table["packed"] + _MAX_HEADER_BYTES)
    return table


def _name(member: zipfile.ZipInfo) -> str:
    """A member's name in the archive, with slashes between folders.

    Names without the flag of UTF-8 are in UTF-8 too, if Unix programs made them, or in the code
    page 437, as the format says.
    """
    name = member.orig_filename.split("\0")[0]
    if not member.flag_bits & _UTF8 and not name.isascii():
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    return name.replace("\\", "/") if member.create_system == _MADE_BY_WINDOWS else name


def _number(member: zipfile.ZipInfo, number: int) -> int | None:
    """The number of a file; None for links and devices."""
    return number if (member.external_attr >> 16) & 0o170000 in _FILE_KINDS else None


def _check_readable(path: str, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        name = printable(_name(member))
        if member.flag_bits & _ENCRYPTED:
            raise InputError(
                f"{path} must not be encrypted; {name} is; unpack it, and give folder:DIR"
            )
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = _METHODS.get(member.compress_type, f"method {member.compress_type}")
            raise InputError(
                f"the images in {path} must be stored or deflated; {name} is compressed by "
                f"{method}; unpack it, and archive it again with zip -r -0"
            )


def _read_member(archive: ArchiveFile, member: np.void) -> bytes:
    """The contents of a member.

    Raises:
      OSError: it is damaged, or the archive cannot be read.
    """
    data = memoryview(archive.read(int(member["offset"]), int(member["extent"])))
    if len(data) < _HEADER_BYTES or data[:4] != b"PK\3\4":
        raise OSError("damaged in the archive: no member begins where its table says")
    start = _HEADER_BYTES + int.from_bytes(data[26:28], "little")
    start += int.from_bytes(data[28:30], "little")
    packed = data[start : start + int(member["packed"])]
    size = int(member["size"])
    if member["method"] == zipfile.ZIP_DEFLATED:
        try:
            contents = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
        except zlib.error as error:
            raise OSError(f"damaged in the archive: {error}") from error
    else:
        contents = bytes(packed)
    if len(contents) != size:
        raise OSError(f"damaged in the archive: {len(contents)} bytes in place of {size}")
    if zlib.crc32(contents) != int(member["crc"]):
        raise OSError("damaged in the archive: its checksum differs")
    return contents
