"""Measures how fast training data is read, in images/s per core: from images and from records.

    python benchmarks/loader.py --data=IMAGES [--side=256] [--images=200000] [--workers=2]

IMAGES is a folder in the ImageNet layout, or a .zip of one. Its images are decoded, resized
(Lanczos), cropped at random and batched: from the folder, from a zip archive of it and, if the
library `datasets` is installed, from Parquet files and WebDataset shards.

The encoded data set has random tokens, as many per image and of the same vocabulary as the
published tokenizer at 256 pixels. It lies in a temporary folder and, once written, in the page
cache.

"per core" counts seconds of CPU time of this process and its threads, whatever else the machine
does; the rate by wall time follows it. The CPU time of worker processes is not visible here, so
measurements with workers have only the rate by wall time.
"""

import argparse
import contextlib
import io
import os
import pathlib
import tarfile
import tempfile
import time
import zipfile

import numpy as np

from hmar_jax.autoencoders.scales import PUBLISHED_SIDES
from hmar_jax.data.digits import ArraySource
from hmar_jax.data.encoding import write_record_set
from hmar_jax.data.loader import make_loader
from hmar_jax.data.record_spec import RecordField, RecordSpec
from hmar_jax.data.records import RecordSetInfo, SplitInfo, make_record_loader, open_records
from hmar_jax.data.sources import open_source
from hmar_jax.data.transforms import Transform
from hmar_jax.training import trainable

VOCAB = 4096
IMAGENET = trainable.IMAGENET.num_images


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        required=True,
        help="a folder of photographs in the ImageNet layout, or a .zip of one",
    )
    parser.add_argument("--side", type=int, default=256, help="side of the crops, in pixels")
    parser.add_argument(
        "--images", type=int, default=200_000, help="images of the encoded data set"
    )
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes, in the measurement with workers"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.suppress(KeyboardInterrupt):
            root = unpack(args.data, scratch)
            for spec in (f"folder:{root}", *write_others(root, scratch)):
                measure_images(spec, args)
            measure_records(os.path.join(scratch, "records"), args)


def unpack(data: str, scratch: str) -> str:
    if not (os.path.isfile(data) and zipfile.is_zipfile(data)):
        return data
    target = pathlib.Path(scratch, "images")
    with zipfile.ZipFile(data) as archive:
        archive.extractall(target)
    inside = list(target.iterdir())
    return str(
        inside[0]
        if len(inside) == 1 and inside[0].name not in ("train", "val", "validate")
        else target
    )


def write_others(root: str, scratch: str) -> list[str]:
    """Writes the images that are trained on in other forms; returns these as data sources."""
    folder = open_source(f"folder:{root}")
    archive, shards = pathlib.Path(scratch, "images.zip"), pathlib.Path(scratch, "shards")
    files = [pathlib.Path(folder.root, file) for file in folder.files]
    with zipfile.ZipFile(archive, "w") as members:
        for file, name in zip(files, folder.files):
            members.write(file, name)
    try:
        import datasets
    except ImportError:
        return [f"zip:{archive}"]
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = pathlib.Path(scratch, "cache")
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    columns = {"image": rows, "label": folder.labels.tolist()}
    parquet = pathlib.Path(scratch, "train.parquet")
    datasets.Dataset.from_dict(columns).to_parquet(parquet)
    shards.mkdir()
    with tarfile.open(shards / "train-000000.tar", "w") as tar:
        for number, (file, label) in enumerate(zip(files, folder.labels)):
            tar.add(file, f"{number:08d}{file.suffix.lower()}")
            member = tarfile.TarInfo(f"{number:08d}.cls")
            member.size = len(text := b"%d" % label)
            tar.addfile(member, io.BytesIO(text))
    return [f"zip:{archive}", f"hf:{parquet}", f"hf:{shards}"]


def measure_images(spec: str, args) -> None:
    source, transform = open_source(spec), Transform(args.side, "resize_crop")
    kind = spec.partition(":")[0]
    batch_size = min(32, len(source))
    print(
        f"{kind}:{os.path.basename(spec)}: {len(source)} images, resized to "
        f"{transform.resize_ratio} x {args.side} pixels, random crop; batches of {batch_size}"
    )
    for threads, workers in ((0, 0), (1, 0), (2, 0), (1, args.workers)):
        loader = make_loader(
            source,
            transform,
            batch_size=batch_size,
            seed=0,
            train=True,
            threads=threads,
            workers=workers,
        )
        report(loader, batch_size, args.seconds, threads, workers)


def measure_records(directory: str, args) -> None:
    sides = PUBLISHED_SIDES[256]
    rng = np.random.default_rng(0)
    length = sum(side**2 for side in sides)
    # The same image everywhere: its pixels do not matter.
    images = np.broadcast_to(np.zeros((16, 16, 3), np.uint8), (args.images, 16, 16, 3))
    source = ArraySource(
        "blank", tuple(map(str, range(1000))), images, np.arange(args.images) % 1000
    )
    spec = RecordSpec("tokens", (RecordField("tokens", (length,), "int32", VOCAB),))
    info = RecordSetInfo(
        autoencoder_name="none",
        fingerprint="0" * 16,
        record_spec=spec,
        autoencoder={},
        source="blank",
        class_names=source.class_names,
        transform={},
        seed=0,
        shard_size=8192,
        splits={"train": SplitInfo(args.images, 1)},
    )
    start = time.perf_counter()
    info = write_record_set(
        directory,
        lambda images: {"tokens": rng.integers(0, VOCAB, (len(images), length))},
        {"train": source},
        Transform(16, "random_crop"),
        info,
        batch_size=512,
        threads=0,
    )
    seconds = time.perf_counter() - start
    shards = info.splits["train"].shards
    size = sum(shard["bytes"] for shard in shards) / args.images
    print(
        f"records: {args.images} images of {length} tokens, vocabulary {VOCAB}, in {len(shards)} "
        f"files; {spec.record_bytes} bytes per record, {size:.0f} on disk: "
        f"{size * IMAGENET / 1e9:.2f} GB for {IMAGENET:,} images; written at "
        f"{args.images / seconds:,.0f} images/s without encoding; batches of {args.batch_size}"
    )
    source = open_records(directory)
    for name, read_from, threads in (
        ("on disk", source, 0),
        ("on disk", source, 1),
        ("on disk", source, 2),
        ("in memory", source.in_memory(), 0),
    ):
        loader = make_record_loader(read_from, batch_size=args.batch_size, seed=0, threads=threads)
        report(loader, args.batch_size, args.seconds, threads, name=name)


def report(
    loader, batch_size: int, seconds: float, threads: int, workers: int = 0, name: str = ""
) -> None:
    """Prints the rate of a loader after its first batches, which start threads and processes."""
    batches = iter(loader)
    for _ in range(4 + 2 * workers):
        next(batches)
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        next(batches)
        count += batch_size
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    per_core = f"{count / cpu:9,.0f} images/s per core" if not workers else " " * 27
    print(
        f"  {name + ', ' if name else ''}{threads} threads, {workers} workers: {per_core}, "
        f"{count / wall:9,.0f} images/s"
    )
    batches.close()


if __name__ == "__main__":
    main()
