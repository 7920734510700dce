"""Sources of pictures: read by index, decoded to RGB bytes at their native size.

A source is what the pipeline shuffles, shards and batches. Three exist, chosen by a string:

    digits              scikit-learn's 1,797 handwritten digits at 32x32: no download, for demos and tests
    folder:DIR          a folder of pictures, in the ImageNet layout or without classes
    tfds:NAME[@DIR]     a TensorFlow Datasets data set prepared on disk as array_record

Opening lists file names and nothing else. A file that cannot be read raises `ImageDecodeError` when it is asked for; the
pipeline replaces it.
"""

from __future__ import annotations

import dataclasses
import io
import os
import threading
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from hmar_jax.data.decoding import ImageDecodeError, decode_image
from hmar_jax.data.folder import EXTENSIONS, open_folder
from hmar_jax.errors import InputError

__all__ = [
    "EXTENSIONS",
    "SPLITS",
    "ArraySource",
    "ImageDecodeError",
    "InMemory",
    "Source",
    "TfdsSource",
    "decode_image",
    "open_source",
]

SPLITS = ("train", "validate")
KNOWN_SPECS = "digits, folder:DIR, tfds:NAME, tfds:NAME@DATA_DIR"

_TFDS_VALIDATE_SPLITS = ("validation", "validate", "val", "test")
_DIGITS_VALIDATE = 360  # 1,437 are left to train
_DIGITS_SPLIT_SEED = (
    0  # fixed: two runs with different seeds must still be compared on the same digits
)


@runtime_checkable
class Source(Protocol):
    """Labelled pictures read by index; reading may happen from several threads at once.

    `source[i]` is {"image": uint8 (h, w, 3), RGB at the picture's native size, "label": int in [0, num_classes)} and
    raises `ImageDecodeError` if picture i cannot be decoded.
    """

    name: str
    class_names: tuple[
        str, ...
    ]  # by label; two classes may share a name (ImageNet has two called "crane")

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def open_source(
    spec: str,
    split: str = "train",
    *,
    in_memory: bool = False,
    need_classes: bool = False,
) -> Source:
    """Opens a source of pictures.

    Args:
      spec: one of
        `digits`: scikit-learn's handwritten digits, grey, enlarged from 8x8 to 32x32; 1,437 train and 360 validate.
        `folder:DIR`: pictures under DIR/train/CLASS with DIR/validate/CLASS (or val, validation); or under DIR/CLASS;
          or directly in DIR (then there is one class, "all"). Folders below a class folder are searched too, hidden
          files are skipped. A class's label is its place among the sorted folder names; its name is the folder's, or
          the readable part of its file names where they have one (n01440764/n01440764_tench.jpg is "tench"), or what
          DIR/class_names.txt or ImageNet's DIR/LOC_synset_mapping.txt calls it (lines of folder and name). Without a
          validation folder, a fixed 2 % of the files (at least one) validate and are left out of training.
        `tfds:NAME` or `tfds:NAME@DATA_DIR`: a TensorFlow Datasets data set with features `image` and `label`, already
          prepared with file format array_record. Its validation split is used to validate, or else its test split.
      split: "train" or "validate".
      in_memory: keep every decoded picture after its first reading (h * w * 3 bytes each).
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
        source = open_folder(rest, split, need_classes)
    elif kind == "tfds" and rest:
        source = _open_tfds(rest, split)
    elif kind == "tokens" and rest:
        raise InputError(f"{spec} is a set of tokens: pictures are wanted here, {KNOWN_SPECS}")
    else:
        raise InputError(
            f"unknown data {spec!r}: it is one of {KNOWN_SPECS}, and to train a transformer tokens:DIR"
        )
    return InMemory(source) if in_memory else source


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
    grey = np.array(
        picture.resize((32, 32), Image.Resampling.BICUBIC)
    )  # bicubic overshoots, hence the clip
    grey = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """bool (N,) with `count` True, shared over the classes in proportion (largest remainders round up)."""
    sizes = np.bincount(labels)
    quota = sizes * count / len(labels)
    share = np.floor(quota).astype(int)
    by_remainder = np.argsort(share - quota, kind="stable")
    share[by_remainder[: count - share.sum()]] += 1
    rng = np.random.RandomState(
        seed
    )  # numpy promises this old generator's stream for good, unlike default_rng's
    chosen = np.zeros(len(labels), bool)
    for label, n in enumerate(share):
        chosen[rng.permutation(np.flatnonzero(labels == label))[:n]] = True
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# TensorFlow Datasets


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A prepared TensorFlow Datasets data set, read without TensorFlow."""

    name: str
    class_names: tuple[str, ...]
    split: str  # as the data set calls it
    records: object  # tfds.data_source: records[i] is {"image": bytes of the encoded picture, "label": int}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        path = f"{self.name}/{self.split}[{index}]"
        return {
            "image": decode_image(io.BytesIO(record["image"]), path),
            "label": int(record["label"]),
        }


def _open_tfds(rest: str, split: str) -> TfdsSource:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"tfds:{rest} needs tensorflow-datasets: pip install tensorflow-datasets"
        ) from error
    name, _, data_dir = rest.partition("@")
    where = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    not_prepared = (
        f"tfds:{name} is not prepared as array_record in {where}: run "
        f"tfds build {name} --file_format=array_record --data_dir={where} (this needs TensorFlow, once)"
    )
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) if data_dir else None)
    except (
        Exception
    ) as error:  # unknown name, no such version, another file format: all are answered the same way
        raise InputError(not_prepared) from error
    splits = builder.info.splits
    if not splits:
        raise InputError(not_prepared)

    features = builder.info.features
    if "image" not in features or "label" not in features:
        raise InputError(
            f"tfds:{name} has features {', '.join(features)}: it needs `image` and `label`"
        )
    wanted = ("train",) if split == "train" else _TFDS_VALIDATE_SPLITS
    tfds_split = next((candidate for candidate in wanted if candidate in splits), None)
    if tfds_split is None:
        raise InputError(
            f"tfds:{name} has splits {', '.join(splits)}: to {split}, it needs one of {', '.join(wanted)}"
        )
    try:
        records = builder.as_data_source(tfds_split, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:
        raise InputError(not_prepared) from error
    return TfdsSource(f"tfds:{name}", tuple(features["label"].names), tfds_split, records)


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
            example = self.source[
                index
            ]  # outside of the lock: two threads may read the same picture, harmlessly
            example["image"].setflags(write=False)
            with self._lock:
                self._examples[index] = example
        return dict(example)
