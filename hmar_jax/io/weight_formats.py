"""Which kind of file a file of weights is, by its first bytes.

Downloads that went wrong and formats of other programs are named, each with its cure, before a
reader fails on them with words of its own.
"""

import json
import os
import pathlib
import re
import struct
import zipfile
from typing import Any

from hmar_jax import errors
from hmar_jax.errors import InputError
from hmar_jax.io.files import is_local

TORCH, SAFETENSORS, INDEX = "torch", "safetensors", "index"

_COMPRESSED = {
    b"\xfd7zXZ": "xz",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
_FOREIGN = {
    b"\x89HDF\r\n": "an HDF5 file (Keras or TensorFlow)",
    b"\x93NUMPY": "a NumPy file",
    b"GGUF": "a GGUF file (llama.cpp)",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF document",
}
# TensorFlow's own files have no mark at their beginning.
_FOREIGN_NAMES = {
    r".*\.data-\d+-of-\d+|.*\.ckpt\.(index|meta)|checkpoint": "a TensorFlow checkpoint",
    r".*\.pb": "a TensorFlow graph",
    r".*\.onnx": "an ONNX model",
    r".*\.tflite": "a TensorFlow Lite model",
    r".*\.msgpack": "a Flax file",
}
_AGAIN = "download it again"
_READABLE = "give a .pth file of PyTorch or a .safetensors file"
_MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors format


def recognize(path: str | os.PathLike) -> str:
    """TORCH, SAFETENSORS, or INDEX: the .json file that lists the parts of a safetensors model.

    Raises:
      InputError: there is no such file, or it is something else.
    """
    if not is_local(path):
        raise InputError(f"{path}: weights must be a local file; download it first")
    if os.path.isdir(path):
        raise InputError(f"{path}: must be a .pth file; got a directory{_content(path)}")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(1024)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not size:
        raise InputError(f"{path}: is empty; {_AGAIN}")
    _refuse_downloads_gone_wrong(path, start)
    _refuse_other_formats(path, start)
    if start[:1] in (b"{", b"["):
        return _recognize_json(path)
    if len(start) > 8 and start[8:9] == b"{":
        if struct.unpack("<Q", start[:8])[0] > min(size - 8, _MAX_HEADER):
            raise InputError(f"{path}: is cut short ({size:,} bytes); {_AGAIN}")
        return SAFETENSORS
    if start.startswith(b"PK"):
        _check_zip(path, size)
        return TORCH
    if start.startswith(b"\x80"):  # a pickle: torch.save before PyTorch 1.6
        return TORCH
    kind = "is text" if _is_text(start) else "begins as none of the known formats"
    raise InputError(f"{path}: not a file of PyTorch weights (it {kind}); {_READABLE}")


def printable(text: Any, limit: int = 80) -> str:
    """A name from a file, for messages: without control characters, and not longer than a line."""
    return errors.printable(str(text)[:limit])


def _content(directory: str | os.PathLike) -> str:
    """What a directory has that could be meant, for an error."""
    names = sorted(os.listdir(directory))
    if "saved_model.pb" in names:
        return f" of TensorFlow (saved_model.pb); {_READABLE}"
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return (
            " of torch.distributed.checkpoint; join it first: python -m torch.distributed."
            f"checkpoint.format_utils dcp_to_torch {directory} weights.pth"
        )
    if "config.json" in names and "params" in names:
        return ", a model directory of this program: it needs no conversion"
    files = [n for n in names if n.endswith((".pth", ".pt", ".ckpt", ".safetensors", ".bin"))]
    index = [n for n in names if n.endswith(".safetensors.index.json")]
    meant = [os.path.join(directory, name) for name in (index or files)[:3]]
    return f"; name a file in it: {', '.join(meant)}" if meant else ""


def _refuse_downloads_gone_wrong(path: str | os.PathLike, start: bytes) -> None:
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d+)", start)
        of = f" of a file of {int(size[1]):,} bytes" if size else ""
        raise InputError(
            f"{path}: is a Git LFS pointer{of}, not the weights; run git lfs pull in the clone, "
            "or download the file itself"
        )
    if re.match(rb"\s*<(!doctype|html|head|body|\?xml|!--)", start.lstrip(b"\xef\xbb\xbf"), re.I):
        raise InputError(
            f"{path}: is a web page, not weights; download from the address of the file itself "
            "(on huggingface.co …/resolve/main/FILE, not …/blob/main/FILE), logged in where "
            "the page asks for it"
        )


def _refuse_other_formats(path: str | os.PathLike, start: bytes) -> None:
    for mark, name in _COMPRESSED.items():
        if start.startswith(mark):
            raise InputError(f"{path}: is compressed ({name}); unpack it first")
    if start[257:262] == b"ustar":
        raise InputError(f"{path}: is a tar archive; unpack it first")
    for mark, what in _FOREIGN.items():
        if start.startswith(mark):
            raise InputError(f"{path}: is {what}; {_READABLE}")
    if start.startswith((b"PK", b"\x80")) or start[8:9] == b"{":
        return  # of PyTorch or safetensors by its content, whatever its name
    for pattern, what in _FOREIGN_NAMES.items():
        if re.fullmatch(pattern, os.path.basename(path), re.I):
            raise InputError(f"{path}: is {what}; {_READABLE}")


def _recognize_json(path: str | os.PathLike) -> str:
    try:
        content = json.loads(pathlib.Path(path).read_text("utf-8"))
    except ValueError:
        raise InputError(
            f"{path}: not a file of PyTorch weights (it is text); {_READABLE}"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        return INDEX
    message = content.get("error") or content.get("message") if isinstance(content, dict) else None
    said = f": {' '.join(str(message).split())[:100]!r}" if message else ""
    cure = f"the server answered the download with it; {_AGAIN}" if message else _READABLE
    raise InputError(f"{path}: is a JSON text, not weights{said}; {cure}")


def _check_zip(path: str | os.PathLike, size: int) -> None:
    """Refuses zip archives that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        raise InputError(f"{path}: is cut short or damaged ({size:,} bytes); {_AGAIN}") from None
    if any(name.endswith("/data.pkl") for name in names):
        if any(name.endswith("/constants.pkl") for name in names):
            raise InputError(
                f"{path}: is a TorchScript program, not weights; save model.state_dict() instead"
            )
        return
    if names and all(name.endswith(".npy") for name in names):
        raise InputError(f"{path}: is a NumPy archive (.npz); {_READABLE}")
    if any(name.endswith("model.weights.h5") for name in names):
        raise InputError(f"{path}: is a Keras model; {_READABLE}")
    raise InputError(f"{path}: is a zip archive, not weights; unpack it first")


def _is_text(start: bytes) -> bool:
    return b"\0" not in start and sum(b < 9 for b in start) == 0 and _decodes(start)


def _decodes(start: bytes) -> bool:
    try:
        start[:1000].decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        return error.start > len(start) - 30  # a letter that is cut
    return True


def read_index(path: str | os.PathLike) -> dict[str, list[str]]:
    """The parts of a safetensors model: paths of the files, each with the names of its tensors.

    Raises:
      InputError: a part is missing or lies outside the folder of the index.
    """
    content: Any = json.loads(pathlib.Path(path).read_text("utf-8"))
    folder, parts = pathlib.Path(path).parent, dict[str, list[str]]()
    for name, file in content["weight_map"].items():
        if not isinstance(file, str) or os.path.basename(file) != file:
            raise InputError(f"{path}: its parts must be files beside it; got {file!r}")
        parts.setdefault(str(folder / file), []).append(name)
    missing = [part for part in parts if not os.path.isfile(part)]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of its {len(parts)} parts are missing, such as {missing[0]}; "
            "download them into the same folder"
        )
    return parts
