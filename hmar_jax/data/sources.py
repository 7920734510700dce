"""Sources of images: read by index and decoded to RGB bytes at their native size.

A source is what a loader shuffles, shards and batches. A string names one:

    digits              scikit-learn's 1,797 handwritten digits at 32x32; requires no download
    folder:DIR          a folder of images, with class folders as ImageNet has them, or without
    zip:FILE            a zip archive of such a folder, read in place
    hf:NAME_OR_DIR      a data set of the Hugging Face library `datasets`, from the Hub or local
    tfds:NAME[@DIR]     a TensorFlow Datasets data set, prepared on disk as array_record

Opening a source lists file names and reads no image. Reading an unreadable image raises
`ImageDecodeError`; loaders replace such images.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from hmar_jax.data.decoding import ImageDecodeError, decode_image
from hmar_jax.data.digits import open_digits
from hmar_jax.data.folder import is_among_images, is_below, open_folder
from hmar_jax.data.hf_source import open_hf, parse_hf
from hmar_jax.data.source_config import SourceConfig
from hmar_jax.data.suggestion import suggest
from hmar_jax.data.tfds import open_tfds
from hmar_jax.data.zip_source import open_zip
from hmar_jax.errors import InputError
from hmar_jax.io.files import absolute, expand, is_local

__all__ = [
    "KNOWN_SPECS",
    "SPLITS",
    "ImageDecodeError",
    "InMemory",
    "Source",
    "SourceConfig",
    "decode_image",
    "open_source",
    "open_splits",
    "records_directory",
]

SPLITS = ("train", "validate")
_RECORD_PREFIXES = ("records", "tokens")  # of encoded data sets; see data/records.py
KNOWN_SPECS = "digits, folder:DIR, zip:FILE, hf:NAME_OR_DIR, tfds:NAME, tfds:NAME@DATA_DIR"


@runtime_checkable
class Source(Protocol):
    """Labeled images, read by index; several threads may read at once.

    `source[i]` is {"image": (h, w, 3) uint8, RGB at the image's native size, "label": int in
    [0, num_classes)}. It raises `ImageDecodeError` if image i cannot be decoded.
    """

    @property
    def name(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label. They may repeat: ImageNet has two classes "crane"."""
        ...

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    def fingerprint(self) -> str:
        """Hexadecimal digits that depend on names, sizes, labels and order of the examples.

        They do not depend on where the data lie, nor on contents: no image is read.
        """
        ...


def open_source(
    spec: str,
    split: str = "train",
    *,
    in_memory: bool = False,
    need_classes: bool = False,
    config: SourceConfig | None = None,
) -> Source:
    """Opens one split of a source of images.

    Args:
      spec: one of
        `digits`: scikit-learn's handwritten digits, gray, enlarged from 8x8 to 32x32; 1,437 for
          training and 360 for validation.
        `folder:DIR`: images in DIR/train/CLASS with DIR/validate/CLASS (or val, validation, valid);
          or in DIR/CLASS; or directly in DIR (one class, "all"). Folders below a class folder are
          searched too; hidden files and what operating systems leave are ignored. The label of a
          class is the index of its folder among the sorted folder names. Its name is, in this
          order: what DIR/class_names.txt or ImageNet's DIR/LOC_synset_mapping.txt calls it (lines
          of folder and name); the readable part of its file names
          (n01440764/n01440764_tench.jpg is "tench"); the folder's name. Without a validation
          folder, a share of each class is held out (`hmar_jax.data.held_out`).
          A file DIR/dataset.json, as StyleGAN and EDM have it, labels the images of all folders
          below DIR instead.
        `zip:FILE`: a local zip archive of a folder as above, or of one with another folder around
          it. Images, order, names and held-out images are those of the folder.
        `hf:NAME_OR_DIR`: what `datasets.load_dataset` or `load_from_disk` opens: a name on the
          Hugging Face Hub, or a folder of Parquet files, WebDataset shards (.tar), class folders or
          of `save_to_disk`; also one .parquet or .tar file. Options follow after commas, as in
          `hf:NAME,config=NAME,revision=NAME,train=SPLIT,validate=SPLIT,image=COLUMN,label=COLUMN`.
          Validation uses the split validation, or else test; without one that has labels, a share
          of each class is held out. Labels are class labels, integers or strings; classes of the
          last two are sorted.
        `tfds:NAME` or `tfds:NAME@DATA_DIR`: a TensorFlow Datasets data set with features `image`
          and `label`, prepared with file format array_record. Validation uses its validation split,
          or else its test split.
      split: "train" or "validate".
      in_memory: keep every decoded image after it was first read (h * w * 3 bytes each).
      need_classes: reject a folder with images outside class folders. Such a folder, given by
        mistake, would train all of its classes as one.
      config: what is read of the data; None: the defaults.

    Raises:
      InputError: the spec or the split is unknown, or there is no such data.
    """
    opened = open_splits(
        spec, (split,), in_memory=in_memory, need_classes=need_classes, config=config
    )
    return opened[split]


def open_splits(
    spec: str,
    splits: Sequence[str] = SPLITS,
    *,
    in_memory: bool = False,
    need_classes: bool = False,
    config: SourceConfig | None = None,
) -> dict[str, Source]:
    """Opens several splits of a source, by name, as `open_source` does; lists a folder once."""
    for split in splits:
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; must be one of {', '.join(SPLITS)}")
    config = SourceConfig() if config is None else config
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        sources: dict[str, Source] = {split: open_digits(split) for split in splits}
    elif kind == "folder" and rest:
        sources = dict(open_folder(rest, splits, need_classes, config))
    elif kind == "zip" and rest:
        sources = dict(open_zip(rest, splits, need_classes, config))
    elif kind == "hf" and rest:
        sources = dict(open_hf(rest, splits, need_classes, config))
    elif kind == "tfds" and rest:
        sources = {split: open_tfds(rest, split, config.max_pixels) for split in splits}
    elif records_directory(spec):
        raise InputError(
            f"{spec} is an encoded data set, but images are required here: {KNOWN_SPECS}"
        )
    else:
        hint = f"did you mean {suggest(spec)}? It " if suggest(spec) else ""
        raise InputError(
            f"unknown data {spec!r}; {hint}must be one of {KNOWN_SPECS}, or, where a model trains "
            "on encoded images, records:DIR (also written tokens:DIR)"
        )
    return {split: InMemory(s) if in_memory else s for split, s in sources.items()}


def check_outside(spec: str, path: os.PathLike | str, what: str) -> None:
    """Raises InputError if a directory to write to lies among the images of `folder:DIR`.

    It would be a class of its own at the next start. The same holds for `hf:DIR`, whose library
    takes every file below it for data.

    Args:
      spec: a data set, as `open_source` takes it.
      path: the directory.
      what: names it in the error.
    """
    kind, _, root = spec.partition(":")
    if not root or not is_local(root) or not is_local(path):
        return
    if kind == "folder" and is_among_images(root, path):
        raise InputError(
            f"{what} must not lie among the images of {spec}, where it would be taken for a class; "
            f"got {path}"
        )
    if kind == "hf" and is_below(parse_hf(root)[0], path):
        raise InputError(
            f"{what} must not lie in {spec}, where it would be taken for data; got {path}"
        )


def absolute_spec(spec: str) -> str:
    """A data set by the same name from any current directory, if it lies in files."""
    kind, _, place = spec.partition(":")
    if kind in ("folder", "zip"):
        return f"{kind}:{absolute(place)}"
    if kind == "hf" and os.path.exists(local := parse_hf(place)[0]):
        options = (f",{key}={value}" for key, value in parse_hf(place)[1].items())
        return f"hf:{absolute(local)}{''.join(options)}"
    return spec


def records_directory(spec: str) -> str | None:
    """Returns DIR of `records:DIR` or `tokens:DIR`, which mean the same; None for other sources."""
    kind, _, directory = spec.partition(":")
    return expand(directory) if kind in _RECORD_PREFIXES else None


# In memory


class InMemory:
    """Keeps the examples of another source once they were read; their images are read-only."""

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
            example = self.source[index]  # without the lock: reading an image twice does no harm
            example["image"].setflags(write=False)
            with self._lock:
                self._examples[index] = example
        return dict(example)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return self.source.fingerprint()
