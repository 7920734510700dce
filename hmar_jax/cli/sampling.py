"""What `hmar sample` and `evaluate` do with their arguments (sampling_arguments.py).

Nothing heavy is imported before the arguments have been checked.
"""

import json
import logging
import os

from hmar_jax import families, settings
from hmar_jax.cli import arguments, many_samples, outputs
from hmar_jax.errors import InputError

_log = logging.getLogger(__name__)

_IMAGES_OF_EACH_CLASS = 8  # without --n


def sample(args) -> None:
    """Samples images of classes: a grid, single files, or arrays; or many of them (--num)."""
    many_samples.check_options(args)
    if args.num is not None:
        many_samples.sample_many(args, _load_sampler)
        return
    from hmar_jax.io import files, images

    directory = args.out if args.out and outputs.is_directory(args.out, images.FORMATS) else None
    grid = None if directory else args.out
    outputs.check({"out": grid, "npz": args.npz}, out=tuple(images.FORMATS), npz=(".npz",))
    if not directory:
        _sample_few(args, grid, None)
        return
    many_samples.check_one_schedule("--out=DIR", args)
    files.check_new_directory(directory)
    from hmar_jax.io import locks

    with locks.lock_together(directory, "--out"):
        files.check_new_directory(directory)  # again: now no other command writes there
        _sample_few(args, None, directory)


def _sample_few(args, grid: str | None, directory: str | None) -> None:
    """Samples images that memory holds.

    Args:
      grid: the file of the grid.
      directory: of single files, whose lock is held.
    """
    import io

    import jax
    import numpy as np

    from hmar_jax.class_names import file_stem, label_of, resolve_classes
    from hmar_jax.io import files, images
    from hmar_jax.progress import Progress, phase

    pipe = _load_sampler(args)
    spec, n = pipe.spec, args.n or _IMAGES_OF_EACH_CLASS
    options = arguments.given_options(args, "SamplingConfig")
    schedules = options.pop("schedule", None) or [None]
    classes = list(range(min(10, spec.num_classes)))
    if args.classes is not None:
        classes = resolve_classes(args.classes, spec.num_classes, spec.class_names)
    variants = [options | ({"schedule": s} if s is not None else {}) for s in schedules]
    for variant in variants:  # all are checked before the first is sampled
        pipe.sampling_config(families.get_family(spec.family).SamplingConfig, variant)
    total = len(variants) * len(classes) * n
    _check_memory(total, pipe.image_side, "; --num keeps none in memory")
    ids = np.repeat(classes, n)
    layout = images.GridLayout(
        total,
        (pipe.image_side, pipe.image_side),
        columns=len(schedules) * n,
        labels=[label_of(c, spec.class_names) for c in classes],
        titles=[f"schedule {s}" for s in schedules] if len(schedules) > 1 else (),
        substitutes=list(map(str, classes)),
    )
    if grid:  # whether it fits into the file is known before the first image is sampled
        layout.check_file(grid)
    key = jax.random.key(args.seed)
    with (
        phase(f"compiling, then sampling {total} images"),
        Progress("sampling", total, "image", opening=False) as done,
    ):
        results = [
            pipe.sample(key, ids, return_tokens=True, on_progress=done.advance, **variant)
            for variant in variants
        ]
    pixels = np.stack([np.asarray(pixels) for pixels, _ in results])  # (schedules, B, h, w, 3)
    if grid:
        rows = pixels.reshape(len(schedules), len(classes), n, *pixels.shape[2:]).swapaxes(0, 1)
        images.save_image(grid, images.draw_grid(layout, rows.reshape(-1, *pixels.shape[2:])))
    if directory:
        stems = [file_stem(c, spec.num_classes, spec.class_names) for c in ids]
        images.save_numbered(directory, pixels[0], stems)
    if args.npz:
        arrays = io.BytesIO()
        tokens = np.asarray(results[0][1])
        np.savez(arrays, images=images.to_uint8(pixels[0]), labels=ids, tokens=tokens)
        files.write_atomically(args.npz, arrays.getvalue())
    written = "; ".join(path for path in (args.out, args.npz) if path)
    count = f"{total} images of {len(classes)} classes"
    print(f"{written}: {count}", file=outputs.stream_for_words(grid, args.npz))


def _check_memory(count: int, side: int, cure: str = "") -> None:
    """Raises InputError unless this machine's memory holds the float32 pixels of so many images."""
    needed = 2 * count * side * side * 3 * 4  # they are put together from parts
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not known
        return
    if needed > memory:
        raise InputError(
            f"--n must be less: {count:,} images of {side} x {side} pixels need "
            f"{needed / 1e9:,.0f} GB; this machine has {memory / 1e9:,.0f} GB of memory{cure}"
        )


def _load_sampler(args):
    """The pipeline of --model on all devices; InputError if it cannot sample."""
    import jax

    from hmar_jax import pipeline

    pipe = pipeline.load(args.model, devices=jax.devices(), checkpoint=args.checkpoint)
    args.interruptions.check()  # an import may have swallowed it
    if not pipe.can_sample:
        raise InputError(f"model {args.model!r} is an autoencoder alone: it cannot sample")
    return pipe


def evaluate(args) -> None:
    """Evaluates samples against real images."""
    outputs.check({"json": args.json})
    import jax
    import numpy as np

    from hmar_jax.data.decode_errors import DecodeErrorLog
    from hmar_jax.data.sources import SourceConfig, open_splits
    from hmar_jax.evaluation.classifier import read_all
    from hmar_jax.evaluation.neighbours import equal_counts
    from hmar_jax.evaluation.report import check_reference, classifier_report, format_report
    from hmar_jax.experiment import recorded_source_config
    from hmar_jax.io import files
    from hmar_jax.io.identity import class_conflicts
    from hmar_jax.progress import Progress, phase

    pipe = _load_sampler(args)
    options = arguments.given_options(args, "SamplingConfig")
    pipe.sampling_config(families.get_family(pipe.spec.family).SamplingConfig, options)
    _check_samples_of_each_class(args.n, pipe.spec.num_classes)
    _check_memory(args.n, pipe.image_side)
    # Of a run, the images that it held out.
    recorded = recorded_source_config(args.model) or SourceConfig()
    config = settings.from_arguments(recorded, args)
    with phase(f"listing the images of {args.reference}"):
        train, held_out = open_splits(args.reference, config=config).values()
    if train.num_classes != pipe.spec.num_classes:
        raise InputError(
            f"reference {args.reference!r} must have the model's {pipe.spec.num_classes} classes; "
            f"it has {train.num_classes}"
        )
    if conflicts := class_conflicts(pipe.spec.class_names, train.class_names):
        raise InputError(
            f"reference {args.reference!r} must have the model's classes in the same order; "
            f"compared with it: {', '.join(conflicts)}"
        )
    ids = np.arange(args.n) % pipe.spec.num_classes
    if (labels := getattr(held_out, "labels", None)) is not None:
        equal_counts(ids, labels)  # before any image is read
    broken, count = DecodeErrorLog(), len(train) + len(held_out)
    with (
        phase(f"reading {count} real images"),
        Progress("reading", count, "image", opening=False) as done,
    ):
        real = [read_all(source, broken, done.advance) for source in (train, held_out)]
    for path, reason in broken.items:
        _log.warning("skipped %s: %s", path, reason)
    if broken.count:
        _log.warning("images that could not be decoded: %d", broken.count)
    check_reference(ids, *real, pipe.image_side)  # before any image is sampled
    with (
        phase(f"compiling, then sampling {args.n} images"),
        Progress("sampling", args.n, "image", opening=False) as done,
    ):
        key = jax.random.key(args.seed)
        images = np.asarray(pipe.sample(key, ids, on_progress=done.advance, **options))
    with phase("comparing"):
        report = classifier_report(images, ids, *real, seed=args.seed)
    if args.json:
        files.write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    print(format_report(report))


def _check_samples_of_each_class(count: int, num_classes: int) -> None:
    if count < 2 * num_classes:
        raise InputError(
            f"--n must be at least {2 * num_classes}, two samples of each of the model's "
            f"{num_classes} classes; got {count}"
        )
