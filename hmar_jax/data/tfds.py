"""Data sets that TensorFlow Datasets prepared as array_record, read without TensorFlow."""

import dataclasses
import io
import os
from typing import Any

from hmar_jax.data.decoding import MAX_PIXELS, decode_image
from hmar_jax.data.fingerprint import fingerprint_values
from hmar_jax.errors import InputError
from hmar_jax.io.files import expand

_TFDS_VALIDATE_SPLITS = ("validation", "validate", "val", "test")


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A prepared TensorFlow Datasets data set, read without TensorFlow."""

    name: str
    class_names: tuple[str, ...]
    split: str  # the data set's name of the split
    records: Any  # tfds.data_source: records[i] is {"image": encoded bytes, "label": int}
    version: str = ""  # of the data set
    max_pixels: int = MAX_PIXELS

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        path = f"{self.name}/{self.split}[{index}]"
        return {
            "image": decode_image(io.BytesIO(record["image"]), path, self.max_pixels),
            "label": int(record["label"]),
        }

    def fingerprint(self) -> str:
        """See `Source.fingerprint`. A version of a data set has always the same examples."""
        name = self.name.partition(":")[2].partition(":")[0]  # without a version
        return fingerprint_values(name, self.version, self.split, len(self))


def open_tfds(rest: str, split: str, max_pixels: int) -> TfdsSource:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"tfds:{rest} requires tensorflow-datasets: pip install tensorflow-datasets"
        ) from error
    name, _, data_dir = rest.partition("@")
    where = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    not_prepared = InputError(
        f"tfds:{name} is not prepared as array_record in {where}; to prepare it (this requires "
        f"TensorFlow, once): tfds build {name} --file_format=array_record --data_dir={where}"
    )
    try:
        builder = tfds.builder(name, data_dir=expand(data_dir) if data_dir else None)
    except Exception as error:  # an unknown name or version, or another file format
        raise not_prepared from error
    splits = builder.info.splits
    if not splits:
        raise not_prepared

    features = builder.info.features
    if "image" not in features or "label" not in features:
        raise InputError(
            f"tfds:{name} must have features `image` and `label`; it has {', '.join(features)}"
        )
    candidates = ("train",) if split == "train" else _TFDS_VALIDATE_SPLITS
    tfds_split = next((candidate for candidate in candidates if candidate in splits), None)
    if tfds_split is None:
        raise InputError(
            f"tfds:{name} must have one of the splits {', '.join(candidates)} to {split}; it has "
            f"{', '.join(splits)}"
        )
    try:
        records = builder.as_data_source(tfds_split, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:
        raise not_prepared from error
    names, version = tuple(features["label"].names), str(builder.version)
    return TfdsSource(f"tfds:{name}", names, tfds_split, records, version, max_pixels)
