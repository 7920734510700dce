"""What `hmar sample --num=...` does: many samples to files, with little memory, resumable."""

import collections
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from hmar_jax import families
from hmar_jax.class_names import label_of
from hmar_jax.cli import arguments
from hmar_jax.errors import InputError

_DEFAULT_FORMAT = "npz"
_IMAGES_OF_A_DEVICE = 64  # in a batch, without --batch_size
_MAX_NUM = 100_000_000  # of which labels and names still fit into any memory
_FINISH_LOCK = ".lock-finish.tmp"  # of those that share a directory, one completes it


def check_options(args) -> None:
    """Raises InputError where options of `hmar sample` exclude or require each other."""
    if args.out is None and args.npz is None:
        raise InputError("--out or --npz must be given; see hmar sample --help")
    if args.num is None:
        for name in ("format", "batch_size", "part"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} requires --num, the number of images in all")
        if args.npz is not None:
            check_one_schedule("--npz", args)
        return
    if args.out is None or args.npz is not None:
        raise InputError(
            "--num writes to the directory --out and excludes --npz; for an .npz file give "
            "--format=npz --out=DIR"
        )
    if args.num > _MAX_NUM:
        raise InputError(
            f"--num must be at most {_MAX_NUM:,}; got {args.num}; take several directories, each "
            "with a --seed of its own"
        )
    if args.n is not None:
        raise InputError("--num and --n exclude each other: --num is the number of all images")
    check_one_schedule("--num", args)
    from hmar_jax.io.images import FORMATS

    ending = os.path.splitext(args.out)[1].lower()
    if ending in (".npz", *FORMATS) and not os.path.isdir(args.out):
        raise InputError(f"--out must be a directory with --num; got {args.out}")


def check_one_schedule(option: str, args) -> None:
    """Raises InputError if --schedule was given several times."""
    schedules = getattr(args, "schedule", None) or []
    if len(schedules) > 1:
        raise InputError(
            f"{option} takes the samples of one schedule; got --schedule {len(schedules)} times"
        )


def sample_many(args, load_sampler) -> None:
    """Samples --num images into a directory, or those that are missing.

    Args:
      load_sampler: from args to the pipeline.
    """
    from hmar_jax.io import sample_sets

    known = {"file_format": args.format or _DEFAULT_FORMAT, "num": args.num, "seed": args.seed}
    known |= {"batch_size": args.batch_size} if args.batch_size else {}
    found = sample_sets.check(args.out, known)  # before a model is loaded
    import numpy as np

    from hmar_jax.io import locks, sample_files
    from hmar_jax.progress import phase

    pipe = load_sampler(args)
    job, options = _describe(args, pipe, found)
    sample_sets.check(args.out, job)
    batch_size, classes = job["batch_size"], job["classes"]
    labels = np.asarray(classes, np.int32)[np.arange(args.num) % len(classes)]
    part, count = args.part or (0, 1)
    what = f"part {part}/{count} of --out" if args.part else "--out"
    file = f".lock-{part}-of-{count}.tmp" if args.part else locks.LOCK_FILE
    with (
        locks.lock_together(args.out, what, file) as lock,
        args.interruptions.deferred(),
    ):

        def check() -> None:
            args.interruptions.check()
            lock.check()

        output = sample_files.open_files(
            job["file_format"], args.out, labels, pipe.image_side, batch_size
        )
        with contextlib.closing(output), _as_input_errors(output.result, lock):
            every = range(-(-args.num // batch_size))
            of_part = every[part::count]
            with phase(f"looking for finished images in {args.out}"):
                missing = output.missing(of_part)
            output.check_space(_count(missing, job))  # before anything is written
            sample_sets.prepare(args.out, job)
            if missing:
                _write(pipe, job, labels, output, of_part, missing, options, check)
            left = output.missing(every) if args.part else []
            if not left:
                left_to_others = not _finish(args.out, output, check, may_be_busy=bool(args.part))
    if left:
        rest = f"{len(left)} of {len(every)} batches are left to other parts"
        print(f"{args.out}: part {part}/{count} is complete; {rest}")
    elif left_to_others:
        print(f"{args.out}: part {part}/{count} is complete; another part completes the set")
    else:
        already = "" if missing else ", complete already"
        print(f"{output.result}: {args.num} images of {len(classes)} classes{already}")


def _describe(args, pipe, found: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job of these arguments, and its options of sampling.

    Args:
      found: what the directory says of its job.

    Raises:
      InputError: an option or a class does not fit the model.
    """
    import jax

    import hmar_jax
    from hmar_jax import loading
    from hmar_jax.class_names import resolve_classes
    from hmar_jax.io import sample_sets
    from hmar_jax.progress import phase

    spec, devices = pipe.spec, jax.devices()
    options = arguments.given_options(args, "SamplingConfig")
    if "schedule" in options:
        (options["schedule"],) = options["schedule"]
    config = pipe.sampling_config(families.get_family(spec.family).SamplingConfig, options)
    given = "id:all" if args.classes is None else args.classes
    classes = resolve_classes(given, spec.num_classes, spec.class_names)
    if twice := [c for c, times in collections.Counter(classes).items() if times > 1]:
        raise InputError(
            f"--classes must name each class once with --num, which takes equal numbers; class "
            f"{label_of(twice[0], spec.class_names)} is named twice"
        )
    batch_size = args.batch_size or (found or {}).get("batch_size")
    with phase("computing the fingerprint of the model"):
        fingerprint = loading.fingerprint(spec, pipe.params)
    job = sample_sets.describe(
        file_format=args.format or _DEFAULT_FORMAT,
        num=args.num,
        seed=args.seed,
        classes=classes,
        batch_size=batch_size or _IMAGES_OF_A_DEVICE * len(devices),
        model=args.model,
        fingerprint=fingerprint,
        dtype=pipe.dtype,
        class_names=spec.class_names,
        sampling=dataclasses.asdict(config),
        versions={"hmar_jax": hmar_jax.__version__, "jax": jax.__version__},
        devices=f"{len(devices)} x {devices[0].device_kind}",
    )
    return job, options


def _count(batches: Sequence[int], job: dict[str, Any]) -> int:
    """The images of some batches."""
    return sum(min(job["batch_size"], job["num"] - i * job["batch_size"]) for i in batches)


def _write(pipe, job, labels, output, of_part, missing, options, check) -> None:
    """Samples the missing ones of the batches of this part."""
    import numpy as np

    from hmar_jax.io.images import to_uint8
    from hmar_jax.progress import Progress, announce, phase

    total, num_left = _count(of_part, job), _count(missing, job)
    written = f"; {total - num_left} are written already" if num_left < total else ""
    announce(f"sampling {total} images{written}")
    batches = pipe.sample_batches(
        job["seed"], labels, batch_size=job["batch_size"], which=missing, **options
    )
    with Progress("sampling", total, "image", start=total - num_left, opening=False) as done:
        with phase("compiling the sampler"):
            first = next(batches)
        for batch in itertools.chain([first], batches):
            pixels = to_uint8(np.asarray(batch.images))
            output.write(batch.number, pixels)
            num_left -= len(pixels)
            done.advance(len(pixels))
            if batch is first:  # how large files are is known now
                output.check_space(num_left)
            check()


def _finish(directory: str, output, check, may_be_busy: bool) -> bool:
    """Completes a set; False: another part that found it ready for that is doing so.

    Raises:
      InputError: another process is doing so, unless it may be another part.
    """
    from hmar_jax.io.locks import DirectoryLock
    from hmar_jax.progress import phase

    lock = DirectoryLock(directory, "--out", _FINISH_LOCK)
    try:
        lock.acquire()
    except InputError:
        if may_be_busy:
            return False
        raise
    with phase(f"writing {output.result}"):
        try:
            output.finish(check)
        finally:
            lock.release()
    return True


@contextlib.contextmanager
def _as_input_errors(path: str, lock) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        lock.check(look=True)  # of a directory that was moved, it tells where to
        raise InputError(
            f"cannot write {error.filename or path}: {error.strerror or error}; what is complete "
            "stays: run the same command again to resume"
        ) from error
