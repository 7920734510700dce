"""How fast training data is read: images a second a core, from a folder of photographs and from a token set.

    python benchmarks/loader.py --data=IMAGES [--side=256] [--images=200000] [--workers=2]

IMAGES is a folder in the ImageNet layout, or a .zip of one. From the folder: decode, resize (Lanczos), random crop, stack.
The token set is made of random tokens, as many for a image and from as large a vocabulary as the published tokenizer's at
256 pixels; it lies in a temporary folder, and after the writing in the system's page cache.

A core is a second of CPU time of this process and its threads, whatever else the machine does; seconds on the clock stand
beside it. Worker processes' CPU time is not seen from here, so for them only the clock's are given.
"""

import argparse
import contextlib
import os
import pathlib
import tempfile
import time
import zipfile

import numpy as np

from hmar_jax.autoencoders.scales import PUBLISHED_SIDES
from hmar_jax.data.encoding import write_token_set
from hmar_jax.data.loader import make_loader
from hmar_jax.data.records import (
    SplitInfo,
    TokenSetInfo,
    make_token_loader,
    open_tokens,
    record_bytes,
)
from hmar_jax.data.sources import ArraySource, open_source
from hmar_jax.data.transforms import Transform

VOCAB = 4096
IMAGENET = 1_281_167  # images to train


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        required=True,
        help="a folder of photographs in the ImageNet layout, or a .zip of one",
    )
    parser.add_argument("--side", type=int, default=256, help="of the crops, pixels")
    parser.add_argument("--images", type=int, default=200_000, help="in the token set")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes, in the measurement that uses some"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.suppress(KeyboardInterrupt):
            folder(unpacked(args.data, scratch), args)
            tokens(os.path.join(scratch, "tokens"), args)


def unpacked(data: str, scratch: str) -> str:
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


def folder(root: str, args) -> None:
    source, transform = open_source(f"folder:{root}"), Transform(args.side, "resize_crop")
    batch_size = min(32, len(source))
    print(
        f"folder: {len(source)} images to {args.side} pixels, {transform.resize_ratio} and a random crop; batches of {batch_size}"
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


def tokens(directory: str, args) -> None:
    sides = PUBLISHED_SIDES[256]
    rng = np.random.default_rng(0)
    length = sum(side**2 for side in sides)
    # One image, seen everywhere: what is encoded is not looked at.
    images = np.broadcast_to(np.zeros((16, 16, 3), np.uint8), (args.images, 16, 16, 3))
    source = ArraySource(
        "blank", tuple(map(str, range(1000))), images, np.arange(args.images) % 1000
    )
    info = TokenSetInfo(
        tokenizer="none",
        fingerprint="0" * 16,
        dtype="float32",
        scales=sides,
        vocab_size=VOCAB,
        image_side=256,
        source="blank",
        class_names=source.class_names,
        transform={},
        seed=0,
        shard_size=8192,
        splits={"train": SplitInfo(args.images, 1)},
    )
    start = time.perf_counter()
    info = write_token_set(
        directory,
        lambda images: rng.integers(0, VOCAB, (len(images), length)),
        {"train": source},
        Transform(16, "random_crop"),
        info,
        batch_size=512,
        threads=0,
    )
    seconds = time.perf_counter() - start
    size = sum(shard["bytes"] for shard in info.splits["train"].shards) / args.images
    print(
        f"tokens: {args.images} images of {length} tokens of {VOCAB} words in {len(info.splits['train'].shards)} files; records of "
        f"{record_bytes(length, VOCAB)} bytes take {size:.0f} on disk: {size * IMAGENET / 1e9:.2f} GB for {IMAGENET:,} images; "
        f"written at {args.images / seconds:,.0f} a second, without encoding; batches of {args.batch_size}"
    )
    source = open_tokens(directory)
    for name, read_from, threads in (
        ("on disk", source, 0),
        ("on disk", source, 1),
        ("on disk", source, 2),
        ("in memory", source.in_memory(), 0),
    ):
        loader = make_token_loader(read_from, batch_size=args.batch_size, seed=0, threads=threads)
        report(loader, args.batch_size, args.seconds, threads, name=name)


def report(
    loader, batch_size: int, seconds: float, threads: int, workers: int = 0, name: str = ""
) -> None:
    """Counts for so many seconds, after the first batches: those start threads, processes and file handles."""
    batches = iter(loader)
    for _ in range(4 + 2 * workers):
        next(batches)
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        next(batches)
        count += batch_size
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    a_core = f"{count / cpu:9,.0f} a second a core" if not workers else " " * 26
    print(
        f"  {name + ', ' if name else ''}{threads} threads, {workers} workers: {a_core}, {count / wall:9,.0f} a second"
    )
    batches.close()


if __name__ == "__main__":
    main()
