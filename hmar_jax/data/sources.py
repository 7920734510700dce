"""Sources of pictures: read by index, decoded to RGB bytes at their native size.

A source is what the pipeline shuffles, shards and batches. Three exist, chosen by a string:

    digits              scikit-learn's 1,797 handwritten digits at 32x32: no download, for demos and tests
    folder:DIR          a folder of pictures, in the ImageNet layout or without classes
    tfds:NAME[@DIR]     a TensorFlow Datasets data set prepared on disk as array_record

Opening lists file names and nothing else. A file that cannot be read raises `BrokenPicture` when it is asked for; the
pipeline replaces it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import threading
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps

from hmar_jax.errors import InputError

SPLITS = ("train", "validate")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KNOWN_SPECS = "digits, folder:DIR, tfds:NAME, tfds:NAME@DATA_DIR"

_VALIDATE_FOLDERS = ("validate", "val", "validation")
_TFDS_VALIDATE_SPLITS = ("validation", "validate", "val", "test")
_HELD_OUT = 0.02  # share of the files that validate when a folder has no validation pictures of its own
_DIGITS_VALIDATE = 360  # 1,437 are left to train
_DIGITS_SPLIT_SEED = 0  # fixed: two runs with different seeds must still be compared on the same digits


@runtime_checkable
class Source(Protocol):
    """Labelled pictures read by index; reading may happen from several threads at once.

    `source[i]` is {"image": uint8 (h, w, 3), RGB at the picture's native size, "label": int in [0, num_classes)} and
    raises `BrokenPicture` if picture i cannot be decoded.
    """

    name: str
    class_names: tuple[str, ...]  # by label; two classes may share a name (ImageNet has two called "crane")

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


class BrokenPicture(Exception):
    """A picture that cannot be decoded. Attributes: `path` (str; which picture) and `reason` (str; one line)."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both as arguments, so that the error survives pickling
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_source(
    spec: str, split: str = "train", *, in_memory: bool = False, decode_side: int | None = None,
    need_classes: bool = False) -> Source:
    """Opens a source of pictures.

    Args:
      spec: one of
        `digits`: scikit-learn's handwritten digits, grey, enlarged from 8x8 to 32x32; 1,437 train and 360 validate.
        `folder:DIR`: pictures under DIR/train/CLASS with DIR/validate/CLASS (or val, validation); or under DIR/CLASS;
          or directly in DIR (then there is one class, "all"). Folders below a class folder are searched too, hidden
          files are skipped. A class's label is its place among the sorted folder names; its name is the folder's, or
          the readable part of its file names where they have one (n01440764/n01440764_tench.jpg is "tench"). Without a
          validation folder, a fixed 2 % of the files (at least one) validate and are left out of training.
        `tfds:NAME` or `tfds:NAME@DATA_DIR`: a TensorFlow Datasets data set with features `image` and `label`, already
          prepared with file format array_record. Its validation split is used to validate, or else its test split.
      split: "train" or "validate".
      in_memory: keep every decoded picture after its first reading (h * w * 3 bytes each).
      decode_side: pixels; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side stays at
        least this long, which is faster. `Transform.decode_side` is what a transform can bear. None: full size.
      need_classes: refuse a folder that holds pictures without class folders: one given by mistake would train all of its
        classes as one.

    Raises:
      InputError: the spec or the split is unknown, or there is no such data.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: it is one of {', '.join(SPLITS)}")
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        source: Source = _open_digits(split)
    elif kind == "folder" and rest:
        source = _open_folder(rest, split, decode_side, need_classes)
    elif kind == "tfds" and rest:
        source = _open_tfds(rest, split, decode_side)
    elif kind == "tokens" and rest:
        raise InputError(f"{spec} is a set of tokens: pictures are wanted here, {KNOWN_SPECS}")
    else:
        raise InputError(f"unknown data {spec!r}: it is one of {KNOWN_SPECS}, and to train a transformer tokens:DIR")
    return InMemory(source) if in_memory else source


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def decode_picture(file: str | BinaryIO, decode_side: int | None = None, path: str | None = None) -> np.ndarray:
    """Decodes any picture that PIL reads to RGB.

    CMYK, palette and 16-bit grey pictures are converted, transparency is laid over white, the first frame of an
    animation is taken, and the EXIF orientation is applied.

    Args:
      file: a path or an open binary file.
      decode_side: as in `open_source`.
      path: how errors name the picture; the path itself when `file` is one.

    Returns:
      uint8 (h, w, 3).

    Raises:
      BrokenPicture: it cannot be decoded completely.
    """
    try:
        with Image.open(file) as picture:
            if decode_side is not None and min(picture.size) > decode_side:
                picture.draft(None, (decode_side, decode_side))  # does nothing unless it is a JPEG
            return np.array(_to_rgb(_upright(picture)))
    except MemoryError:
        raise  # the machine's fault, not the picture's
    except Exception as error:  # PIL's decoders raise nearly every built-in exception on damaged input
        reason = " ".join(str(error).split()) or type(error).__name__
        if path is None:
            path = str(file)
        raise BrokenPicture(path, reason) from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turned = picture.getexif().get(0x0112, 1) != 1  # 0x0112: orientation
    except Exception:  # unreadable EXIF does not make the pixels unreadable
        return picture
    return ImageOps.exif_transpose(picture) if turned else picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode == "F":
        raise ValueError("floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if mode == "I" or mode.startswith("I;16"):  # "I" is what some 16-bit formats open as
        grey = np.clip(np.array(picture).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if mode == "RGB" else picture.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# Digits


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Pictures that are already an array."""

    name: str
    class_names: tuple[str, ...]
    images: np.ndarray  # uint8 (N, h, w, 3)
    labels: np.ndarray  # int (N,)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index])}


def _open_digits(split: str) -> ArraySource:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError('digits need scikit-learn: pip install "hmar_jax[demo]"') from error
    digits = load_digits()
    validate = _stratified(digits.target, _DIGITS_VALIDATE, _DIGITS_SPLIT_SEED)
    chosen = validate if split == "validate" else ~validate
    images = np.stack([_enlarge_digit(digit) for digit in digits.images[chosen]])
    images.setflags(write=False)
    return ArraySource("digits", tuple("0123456789"), images, digits.target[chosen])


def _enlarge_digit(digit: np.ndarray) -> np.ndarray:
    """(8, 8) with values 0..16 to uint8 (32, 32, 3)."""
    picture = Image.fromarray((digit * (255 / 16)).astype(np.float32))
    grey = np.array(picture.resize((32, 32), Image.Resampling.BICUBIC))  # bicubic overshoots, hence the clip
    grey = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """bool (N,) with `count` True, shared over the classes in proportion (largest remainders round up)."""
    sizes = np.bincount(labels)
    quota = sizes * count / len(labels)
    share = np.floor(quota).astype(int)
    by_remainder = np.argsort(share - quota, kind="stable")
    share[by_remainder[: count - share.sum()]] += 1
    rng = np.random.RandomState(seed)  # numpy promises this old generator's stream for good, unlike default_rng's
    chosen = np.zeros(len(labels), bool)
    for label, n in enumerate(share):
        chosen[rng.permutation(np.flatnonzero(labels == label))[:n]] = True
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Picture files on disk."""

    name: str
    class_names: tuple[str, ...]
    root: str
    files: tuple[str, ...]  # relative to root, in label order and sorted inside a class
    labels: np.ndarray  # int32 (N,)
    decode_side: int | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        image = decode_picture(os.path.join(self.root, self.files[index]), self.decode_side)
        return {"image": image, "label": int(self.labels[index])}


def _open_folder(root: str, split: str, decode_side: int | None, need_classes: bool) -> FolderSource:
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise InputError(f"{root} {what}: folder:DIR takes a folder with pictures in DIR/train/CLASS, DIR/CLASS or DIR")

    has_train = os.path.isdir(os.path.join(root, "train"))
    train_root = os.path.join(root, "train") if has_train else root
    classes = _list_classes(train_root)
    if not any(classes.values()):
        raise InputError(f"no pictures in {train_root}: wanted files ending in {' '.join(EXTENSIONS)}")
    if need_classes and "" in classes:
        raise InputError(
            f"{train_root} has pictures but no class folders: {train_root}/CLASS/{classes[''][0]} is wanted; to train "
            "without classes, put all of them into one folder")
    names = tuple("all" if folder == "" else _readable_name(folder, files) for folder, files in classes.items())

    validate_root = None
    if has_train:
        candidates = (os.path.join(root, folder) for folder in _VALIDATE_FOLDERS)
        validate_root = next((folder for folder in candidates if os.path.isdir(folder)), None)

    files_root = train_root
    if validate_root is None:
        held_out = _held_out([file for files in classes.values() for file in files], train_root)
        keep_held_out = split == "validate"
        classes = {folder: [f for f in files if (f in held_out) == keep_held_out] for folder, files in classes.items()}
    elif split == "validate":
        found = _list_classes(validate_root)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            first = f"class folder {unknown[0]!r}" if unknown[0] else "pictures outside of class folders"
            raise InputError(f"{validate_root} has {first}, which {train_root} has not: both need the same classes")
        if not any(found.values()):
            raise InputError(f"no pictures in {validate_root}: fill it, or remove it to hold out 2 % of {train_root}")
        classes = {folder: found.get(folder, []) for folder in classes}
        files_root = validate_root

    files = tuple(file for files in classes.values() for file in files)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(files) for files in classes.values()])
    return FolderSource(f"folder:{root}", names, files_root, files, labels, decode_side)


def _list_classes(root: str) -> dict[str, list[str]]:
    """Class folder name to its files, relative to root, all sorted; {"": files} if root holds the pictures itself."""
    loose: list[str] = []
    classes: dict[str, list[str]] = {}
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                classes[entry.name] = _list_pictures(entry.path, entry.name, (os.path.realpath(root),))
            elif _is_picture(entry.name):
                loose.append(entry.name)
    filled = [folder for folder, files in classes.items() if files]
    if loose and filled:
        raise InputError(
            f"{root} has pictures ({loose[0]}) beside folders of pictures ({filled[0]}): "
            "put every picture into its class's folder, or all of them into one folder without classes"
        )
    return {"": loose} if loose else classes


def _list_pictures(folder: str, relative: str, parents: tuple[str, ...]) -> list[str]:
    real = os.path.realpath(folder)
    if real in parents:  # a link to a folder that contains it
        return []
    found = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _list_pictures(entry.path, f"{relative}/{entry.name}", (*parents, real))
            elif _is_picture(entry.name):
                found.append(f"{relative}/{entry.name}")
    return found


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _readable_name(folder: str, files: list[str]) -> str:
    """`tench` for folder n01440764 when its files are n01440764_tench.jpg, n01440764_tench_2.jpg; else the folder."""
    parts = set()
    for file in files:
        stem = os.path.splitext(os.path.basename(file))[0]
        if not stem.startswith(folder + "_"):
            return folder
        parts.add(re.sub(r"[_-]*\d+$", "", stem[len(folder) + 1 :]))
        if len(parts) > 1:  # numbers such as n01440764_10026.JPEG leave one empty part
            return folder
    name = parts.pop() if parts else ""
    return name if re.search("[^\\W\\d_]", name) else folder


def _held_out(files: list[str], root: str) -> set[str]:
    """The 2 % of the files that validate: those whose names hash lowest, so adding pictures moves few of the others."""
    if len(files) < 2:
        raise InputError(f"{root} has only one picture: at least two are needed, as one is held out to validate")
    count = max(1, round(_HELD_OUT * len(files)))
    return set(sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(file), digest_size=8).digest())[:count])


# ---------------------------------------------------------------------------------------------------------------------
# TensorFlow Datasets


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A prepared TensorFlow Datasets data set, read without TensorFlow."""

    name: str
    class_names: tuple[str, ...]
    split: str  # as the data set calls it
    records: object  # tfds.data_source: records[i] is {"image": bytes of the encoded picture, "label": int}
    decode_side: int | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        path = f"{self.name}/{self.split}[{index}]"
        return {
            "image": decode_picture(io.BytesIO(record["image"]), self.decode_side, path),
            "label": int(record["label"]),
        }


def _open_tfds(rest: str, split: str, decode_side: int | None) -> TfdsSource:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"tfds:{rest} needs tensorflow-datasets: pip install tensorflow-datasets") from error
    name, _, data_dir = rest.partition("@")
    where = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    not_prepared = (
        f"tfds:{name} is not prepared as array_record in {where}: run "
        f"tfds build {name} --file_format=array_record --data_dir={where} (this needs TensorFlow, once)"
    )
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) if data_dir else None)
    except Exception as error:  # unknown name, no such version, another file format: all are answered the same way
        raise InputError(not_prepared) from error
    splits = builder.info.splits
    if not splits:
        raise InputError(not_prepared)

    features = builder.info.features
    if "image" not in features or "label" not in features:
        raise InputError(f"tfds:{name} has features {', '.join(features)}: it needs `image` and `label`")
    wanted = ("train",) if split == "train" else _TFDS_VALIDATE_SPLITS
    tfds_split = next((candidate for candidate in wanted if candidate in splits), None)
    if tfds_split is None:
        raise InputError(f"tfds:{name} has splits {', '.join(splits)}: to {split}, it needs one of {', '.join(wanted)}")
    try:
        records = builder.as_data_source(tfds_split, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:
        raise InputError(not_prepared) from error
    return TfdsSource(f"tfds:{name}", tuple(features["label"].names), tfds_split, records, decode_side)


# ---------------------------------------------------------------------------------------------------------------------
# In memory


class InMemory:
    """Keeps the examples of another source after their first reading; the kept pictures are read-only."""

    def __init__(self, source: Source):
        self.source = source
        self.name = source.name
        self.class_names = source.class_names
        self._examples: list[dict | None] = [None] * len(source)
        self._lock = threading.Lock()

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        example = self._examples[index]
        if example is None:
            example = self.source[index]  # outside of the lock: two threads may read the same picture, harmlessly
            example["image"].setflags(write=False)
            with self._lock:
                self._examples[index] = example
        return dict(example)
