"""What the commands of `hmar` do with their arguments (main.py): check, call, print.

Each is a function of the parsed arguments, and of the --config.KEY=VALUE texts for those with a
--config. Nothing heavy is imported before the arguments have been checked, so that mistakes and
--help cost no time.
"""

import ctypes
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from hmar_jax import families, settings
from hmar_jax.cli import arguments, outputs
from hmar_jax.errors import InputError
from hmar_jax.logging import TERMINAL

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def plan(args, overrides) -> int:
    """Prints whether a run fits a topology; returns 0 if it does, otherwise 1."""
    from hmar_jax.planning import topology

    target = topology.parse(args.topology)
    from hmar_jax.io import files
    from hmar_jax.planning import plan, report

    if args.json != "-":
        outputs.check({"json": args.json}, {"config": args.config.partition(":")[0]})

    plan.prepare_environment()
    config = _config(args, overrides)
    name = " ".join([args.config, *overrides])
    found = plan.make_plan(config, target, name=name, parent_config=_parent_config(args, config))
    if args.json == "-":
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(report.format_plan(found))
        if args.json:
            files.write_atomically(args.json, json.dumps(found.to_json(), indent=1) + "\n")
    return 0 if found.fits else 1


def _config(args, overrides):
    """The config that --config names, with the values that --config.KEY=VALUE give."""
    from hmar_jax import config_files
    from hmar_jax.experiment import task_kind

    config = config_files.load_config(args.config)
    former = task_kind(config)[1].schema.former_names()
    for text in overrides:
        key, _, value = text.removeprefix("--config.").partition("=")
        config_files.override(config, key, value, former)
    return config


def _parent_config(args, config):
    """The config of the parent that a plan assumes: another NAME of the same file."""
    from hmar_jax import config_files

    name = config.get("stage1_config", "")
    return config_files.load_config(f"{args.config.partition(':')[0]}:{name}") if name else None


def train(args, overrides) -> None:
    """Starts or resumes a run: `train` and `train-tokenizer`."""
    _retain_freed_memory()
    config = _config(args, overrides)
    from hmar_jax.experiment import task_kind

    command = task_kind(config)[1].command
    if command != args.command:
        raise InputError(f"config {args.config!r} is for hmar {command}")

    from hmar_jax.parallel import processes

    processes.initialize(args.coordinator, args.num_processes, args.process_id, args.local_devices)
    if not processes.is_primary():
        TERMINAL.setLevel(logging.WARNING)
    from hmar_jax.experiment import build_experiment
    from hmar_jax.training import loop

    experiment, error = None, None
    try:
        experiment = build_experiment(config, args.workdir)
    except InputError as e:
        error = e
    processes.raise_on_all_processes(error)  # if one cannot start, the others must not wait for it
    assert experiment is not None
    step, steps = int(loop.run(config, experiment, args.workdir).step), experiment.task.steps
    if processes.is_primary():
        state = "complete" if step == steps else f"stopped at step {step} of {steps}"
        print(f"{args.workdir}: {config.task} run {state}")


def _retain_freed_memory() -> None:
    """Tells glibc to keep what a step frees for the next one.

    XLA's CPU backend allocates its temporaries again each step. By default glibc returns such sizes
    to the system at once, and page faults took a third of the digits' training time
    (benchmarks/RESULTS.md).
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc accepts
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 256 << 20)


def tokenize(args) -> None:
    """Encodes a data set, or resumes that."""
    _retain_freed_memory()
    import jax

    from hmar_jax import autoencoders, loading
    from hmar_jax.autoencoders.base import AUTOENCODER, config_to_json, make_encoder
    from hmar_jax.data import encoding
    from hmar_jax.data.sources import SPLITS, open_source
    from hmar_jax.data.transforms import Transform
    from hmar_jax.parallel import processes

    splits = args.splits.split(",")
    if not set(splits) <= set(SPLITS):
        raise InputError(f"--splits must be train, validate or both; got {args.splits}")
    if args.part is None:
        processes.initialize()
    spec, params = loading.load_spec_and_params(args.tokenizer)
    changes = {"dtype": args.dtype} if args.dtype else {}
    config = dataclasses.replace(spec.autoencoder, **changes)
    autoencoder, params = autoencoders.make_autoencoder(config), params[AUTOENCODER]
    transform = Transform(
        autoencoder.image_side, args.transform, resize_ratio=args.resize_ratio, flip=args.flip
    )
    sources = {
        split: open_source(args.data, split, need_classes=True)
        for split in SPLITS
        if split in splits
    }
    part = args.part or (jax.process_index(), jax.process_count())
    info = encoding.describe(
        args.tokenizer,
        autoencoder.fingerprint(params),
        autoencoder.record_spec,
        config_to_json(config),
        args.data,
        sources,
        transform,
        crops=args.crops,
        seed=args.seed,
        shard_size=args.shard_size,
    )
    encode, batch_size = make_encoder(autoencoder, params, args.batch_size, jax.local_devices())
    info = encoding.write_record_set(
        args.out,
        encode,
        sources,
        transform,
        info,
        batch_size=batch_size,
        part=part,
        threads=args.threads,
        workers=args.workers,
        verify=args.verify,
        progress=True,
    )
    if not info.complete:
        missing, total = encoding.count_unfinished(args.out, info)
        print(
            f"{args.out}: part {part[0]}/{part[1]} is complete; {missing} of {total} files are "
            "left to other parts"
        )
        return
    print(f"{args.out}: {_describe_records(info)}")


def _describe_records(info) -> str:
    splits = []
    for name, split in info.splits.items():
        crops = f" in {split.crops} crops" if split.crops > 1 else ""
        broken = f" ({len(split.broken)} could not be decoded)" if split.broken else ""
        splits.append(f"{split.num_images - len(split.broken)} images to {name}{crops}{broken}")
    size = sum(shard["bytes"] for split in info.splits.values() for shard in split.shards)
    return (
        f"{', '.join(splits)}; {len(info.class_names)} classes, {size / 1e6:.1f} MB, "
        f"tokenizer {info.fingerprint}"
    )


def sample(args) -> None:
    """Samples images of classes into an image file, and their arrays into an .npz file."""
    from hmar_jax.io import files, images

    outputs.check({"out": args.out, "npz": args.npz}, out=tuple(images.FORMATS), npz=(".npz",))
    import io

    import jax
    import numpy as np

    from hmar_jax.class_names import label_of, split_classes

    pipe = _load_sampler(args)
    spec = pipe.spec
    options = _options(args, "SamplingConfig")
    schedules = options.pop("schedule", None) or [None]
    given: Sequence[int | str] = range(min(10, spec.num_classes))
    if args.classes is not None:
        given = split_classes(args.classes, spec.class_names)
    classes = [pipe.resolve_class(c) for c in given]
    if args.npz and len(schedules) > 1:
        raise InputError(
            f"--npz takes the samples of one schedule; got --schedule {len(schedules)} times"
        )
    variants = [options | ({"schedule": s} if s is not None else {}) for s in schedules]
    for variant in variants:  # all are checked before the first is sampled
        pipe.sampling_config(families.get_family(spec.family).SamplingConfig, variant)
    ids = np.repeat(classes, args.n)
    key = jax.random.key(args.seed)
    results = [pipe.sample(key, ids, return_tokens=True, **variant) for variant in variants]
    pixels = np.stack([np.asarray(pixels) for pixels, _ in results])  # (schedules, B, h, w, 3)
    rows = pixels.reshape(len(schedules), len(classes), args.n, *pixels.shape[2:]).swapaxes(0, 1)
    titles = [f"schedule {s}" for s in schedules] if len(schedules) > 1 else ()
    grid = images.make_grid(
        rows.reshape(-1, *pixels.shape[2:]),
        columns=len(schedules) * args.n,
        labels=[label_of(c, spec.class_names) for c in classes],
        titles=titles,
        substitutes=list(map(str, classes)),
    )
    images.save_image(args.out, grid)
    if args.npz:
        arrays = io.BytesIO()
        np.savez(
            arrays,
            images=(pixels[0] * 255).round().astype(np.uint8),
            labels=ids,
            tokens=np.asarray(results[0][1]),
        )
        files.write_atomically(args.npz, arrays.getvalue())
    written = f"{args.out}; {args.npz}" if args.npz else args.out
    print(f"{written}: {len(schedules) * len(ids)} images of {len(classes)} classes")


def _load_sampler(args):
    """The pipeline of --model on all devices; InputError if it cannot sample."""
    import jax

    from hmar_jax import pipeline

    pipe = pipeline.load(args.model, devices=jax.devices(), checkpoint=args.checkpoint)
    if not pipe.can_sample:
        raise InputError(f"model {args.model!r} is an autoencoder alone: it cannot sample")
    return pipe


def add_composite_options(parser) -> None:
    """Options of editing that every family has."""
    from hmar_jax.io.masks import CompositeConfig

    settings.add_arguments(parser, CompositeConfig)


def _options(args, kind: str) -> dict[str, Any]:
    """The options of the families' classes that were given."""
    names = {
        field.name
        for cls in families.option_classes(kind).values()
        for field in dataclasses.fields(cls)
    }
    given = {name: getattr(args, name, None) for name in sorted(names)}
    return {name: value for name, value in given.items() if value is not None}


def edit(args) -> None:
    """Regenerates a region of an image."""
    from hmar_jax.io import images, masks

    endings = tuple(images.FORMATS)
    outputs.check(
        {"out": args.out, "show": args.show},
        {"image": args.image, "mask": args.mask},
        out=endings,
        show=endings,
    )
    import warnings

    import jax
    import numpy as np

    from hmar_jax import pipeline
    from hmar_jax.data.decoding import decode_image

    image = _read("--image", args.image, decode_image)  # uint8 (h, w, 3)
    mask = _read_mask(args, image)
    options = _options(args, "EditingConfig")
    for name in ("paste", "feather"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.coarse:
        settings.warn_renamed("--coarse", "--keep_coarse or --no_keep_coarse")
        options["keep_coarse"] = args.coarse == "keep"
    pipe = pipeline.load(args.model, checkpoint=args.checkpoint)
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always", UserWarning)
        key = jax.random.key(args.seed)
        edited = np.asarray(pipe.edit(key, image, mask, args.class_id, **options))
    for notice in notices:
        print(f"hmar edit: {notice.message}", file=sys.stderr)
    images.save_image(args.out, edited)
    if args.show:
        side = edited.shape[0]
        before = images.resize_image(image / np.float32(255), side)
        shown = masks.resize_mask(mask[None], side)[0]
        sheet = np.stack([before, np.repeat(shown[..., None], 3, -1), edited])
        titles = ["before", "mask", "after"]
        images.save_image(args.show, images.make_grid(sheet, columns=3, titles=titles))
    written = args.out + (f"; {args.show}" if args.show else "")
    print(f"{written}: new content in {mask.sum():,} of {mask.size:,} pixels")


def _read_mask(args, image):
    """bool (h, w): True where new content goes, from --box or --mask and --mode."""
    from hmar_jax.data import mask_images
    from hmar_jax.io import masks

    own = args.mask == arguments.OWN_TRANSPARENCY
    if args.box:
        mask = masks.box_mask(args.box, *image.shape[:2])
    elif own:
        mask = _read("--image", args.image, mask_images.read_transparency)
    else:
        mask = _read("--mask", args.mask, mask_images.read_mask)
        if mask.shape != image.shape[:2]:
            raise InputError(
                f"mask {args.mask} must have the image's size, {image.shape[1]} x "
                f"{image.shape[0]} pixels; got {mask.shape[1]} x {mask.shape[0]}"
            )
    if args.mode == "outpaint":
        mask = ~mask
    if mask.any():
        return mask
    nothing = f"selects 0 of {mask.size:,} pixels"
    if args.box:
        raise InputError(
            f"--box must leave pixels outside to outpaint; it is the whole image and {nothing}"
        )
    if own:
        raise InputError(f"--mask=alpha {nothing}: all of image {args.image} is transparent")
    white, black = "new content goes", "the image stays"
    if args.mode == "outpaint":
        white, black = black, white
    raise InputError(
        f"mask {args.mask} {nothing} ({mask_images.describe_values(args.mask)}); it must be white "
        f"(at least 128) where {white}, and black or transparent where {black}"
    )


def _read(option: str, path: str, decode):
    """decode(path); InputError if that is no image."""
    from hmar_jax.data.decoding import ImageDecodeError

    if not os.path.isfile(path):
        raise InputError(f"{option} {path}: no such file")
    try:
        return decode(path)
    except ImageDecodeError as e:
        raise InputError(f"{option} {path} cannot be decoded as an image ({e.reason})") from None


def evaluate(args) -> None:
    """Evaluates samples against real images."""
    outputs.check({"json": args.json})
    import jax
    import numpy as np

    from hmar_jax.data.sources import open_source
    from hmar_jax.evaluation.classifier import read_all
    from hmar_jax.evaluation.report import classifier_report, format_report
    from hmar_jax.io import files

    pipe = _load_sampler(args)
    options = _options(args, "SamplingConfig")
    pipe.sampling_config(families.get_family(pipe.spec.family).SamplingConfig, options)
    real = [open_source(args.reference, split) for split in ("train", "validate")]
    if real[0].num_classes != pipe.spec.num_classes:
        raise InputError(
            f"reference {args.reference!r} must have the model's {pipe.spec.num_classes} classes; "
            f"it has {real[0].num_classes}"
        )
    _compare_class_names(pipe.spec.class_names, real[0].class_names, args.reference)
    ids = np.arange(args.n) % pipe.spec.num_classes
    images = np.asarray(pipe.sample(jax.random.key(args.seed), ids, **options))
    report = classifier_report(images, ids, *[read_all(r) for r in real], seed=args.seed)
    if args.json:
        files.write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    print(format_report(report))


def _compare_class_names(ours: Sequence[str], theirs: Sequence[str], reference: str) -> None:
    """Raises InputError if a reference has the model's classes in another order.

    Other names are reported: one data set may be called by its folders or by readable names.
    """
    different = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if different is None:
        return
    names = f"class {different} is {ours[different]!r} of the model and {theirs[different]!r} there"
    if sorted(ours) == sorted(theirs):
        raise InputError(f"reference {reference!r} must have the model's order of classes; {names}")
    print(f"hmar evaluate: reference {reference!r} has other class names: {names}", file=sys.stderr)


def info(args) -> None:
    """Prints what a model is."""
    from hmar_jax import loading
    from hmar_jax.autoencoders import models

    spec, params = loading.load_spec_and_params(args.model, args.checkpoint)
    rows = [("model", f"{args.model}: {spec.kind}"), *models.describe(spec.autoencoder, params)]
    if spec.sampling is not None:
        rows += families.get_family(spec.family).describe(spec, params)
    rows += [("origin", spec.origin), ("licence", spec.licence)]
    for name, text in rows:
        if text:
            print(f"{name:12} {text}")


def convert(args) -> None:
    """Published PyTorch weights become a model directory."""
    from hmar_jax import loading
    from hmar_jax.io import models

    models.check_new_model(args.out)
    options = _options(args, "ConvertConfig")
    try:
        spec, params = loading.convert_torch_files(args.torch, args.family, **options)
    except ImportError as e:
        raise InputError(str(e)) from None
    models.save_model(args.out, spec.to_json(), params, _readme(args.out, spec))
    print(f"{args.out}: {spec.kind}, {spec.origin}. {spec.licence}.")


def export(args) -> None:
    """A run or a model becomes a model directory."""
    import jax
    import numpy as np

    from hmar_jax import loading
    from hmar_jax.io import models

    models.check_new_model(args.out)
    spec, params = loading.load_spec_and_params(args.model, args.checkpoint)
    if args.licence is not None:
        spec = dataclasses.replace(spec, licence=args.licence)
    if args.half:
        halve = lambda x: x.astype(np.float16) if x.dtype == np.float32 else x
        params = jax.tree.map(lambda x: halve(np.asarray(x)), params)
    models.save_model(args.out, spec.to_json(), params, _readme(args.out, spec))
    print(f"{args.out}: {spec.kind}")


def _readme(directory: str, spec) -> str:
    licence = f"\nLicence: {spec.licence}.\n" if spec.licence else ""
    return f"# {pathlib.Path(directory).name}\n\n{spec.kind}, {spec.origin}.\n{licence}"
