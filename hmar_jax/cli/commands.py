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
from typing import Any

from hmar_jax import families, settings
from hmar_jax.errors import InputError
from hmar_jax.logging import TERMINAL

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def plan(args, overrides) -> int:
    """Prints whether a run fits a topology; returns 0 if it does, otherwise 1."""
    from hmar_jax.planning import topology

    target = topology.parse(args.topology)
    from hmar_jax.io import files
    from hmar_jax.planning import advice, plan, report

    if args.json not in (None, "-"):
        files.check_writable(args.json)

    plan.prepare_environment()
    config = _config(args, overrides)
    name = " ".join([args.config, *overrides])
    parent_config = _parent_config(args, config)
    found = plan.make_plan(config, target, name=name, parent_config=parent_config)
    changes = advice.find_advice(config, target, found, parent_config)
    data = found.to_json() | {"advice": [dataclasses.asdict(one) for one in changes]}
    if args.json == "-":
        print(json.dumps(data, indent=1))
    else:
        print(report.format_plan(found, changes))
        if args.json:
            files.write_atomically(args.json, json.dumps(data, indent=1) + "\n")
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
    """Samples images of classes into a .png file, and their arrays into an .npz file."""
    from hmar_jax.io import files

    for path in filter(None, (args.out, args.npz)):
        files.check_writable(path)
    import io

    import jax
    import numpy as np

    from hmar_jax.io import images

    pipe = _load_sampler(args)
    spec = pipe.spec
    options = _options(args, "SamplingConfig")
    schedules = options.pop("schedule", None) or [None]
    given = range(min(10, spec.num_classes)) if args.classes is None else args.classes.split(",")
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
    names = [spec.class_names[c] if spec.class_names else str(c) for c in classes]
    titles = [f"schedule {s}" for s in schedules] if len(schedules) > 1 else ()
    grid = images.make_grid(
        rows.reshape(-1, *pixels.shape[2:]),
        columns=len(schedules) * args.n,
        labels=names,
        titles=titles,
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
    from hmar_jax.io import files

    for path in filter(None, (args.out, args.show)):
        files.check_writable(path)
    import warnings

    import jax
    import numpy as np

    from hmar_jax import pipeline
    from hmar_jax.io import images, masks

    image = _read_image("--image", args.image)  # uint8 (h, w, 3)
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
    print(args.out + (f"; {args.show}" if args.show else ""))


def _read_mask(args, image):
    """bool (h, w): True where new content goes, from --box or --mask and --mode."""
    from hmar_jax.io import masks

    if args.box:
        mask = masks.box_mask(args.box, *image.shape[:2])
    else:
        pixels = _read_image("--mask", args.mask)
        if pixels.shape != image.shape:
            raise InputError(
                f"mask {args.mask} must have the image's size, {image.shape[1]} x "
                f"{image.shape[0]} pixels; got {pixels.shape[1]} x {pixels.shape[0]}"
            )
        mask = pixels.mean(-1) >= 128
    if args.mode == "outpaint":
        mask = ~mask
    if mask.any():
        return mask
    if args.box:
        raise InputError("--box must leave pixels outside to outpaint; it is the whole image")
    white, black = "new content goes", "the image stays"
    if args.mode == "outpaint":
        white, black = black, white
    raise InputError(
        f"mask {args.mask} selects nothing; it must be white (at least 128) where {white}, and "
        f"black where {black}"
    )


def _read_image(option: str, path: str):
    """uint8 (h, w, 3)"""
    from hmar_jax.data.decoding import ImageDecodeError, decode_image

    if not os.path.isfile(path):
        raise InputError(f"{option} {path}: no such file")
    try:
        return decode_image(path)
    except ImageDecodeError as e:
        raise InputError(f"{option} {path} cannot be decoded as an image ({e.reason})") from None


def evaluate(args) -> None:
    """Evaluates samples against real images."""
    from hmar_jax.io import files

    if args.json:
        files.check_writable(args.json)
    import jax
    import numpy as np

    from hmar_jax.data.sources import open_source
    from hmar_jax.evaluation.classifier import read_all
    from hmar_jax.evaluation.report import classifier_report, format_report

    pipe = _load_sampler(args)
    options = _options(args, "SamplingConfig")
    pipe.sampling_config(families.get_family(pipe.spec.family).SamplingConfig, options)
    real = [open_source(args.reference, split) for split in ("train", "validate")]
    if real[0].num_classes != pipe.spec.num_classes:
        raise InputError(
            f"reference {args.reference!r} must have the model's {pipe.spec.num_classes} classes; "
            f"it has {real[0].num_classes}"
        )
    ids = np.arange(args.n) % pipe.spec.num_classes
    images = np.asarray(pipe.sample(jax.random.key(args.seed), ids, **options))
    report = classifier_report(images, ids, *[read_all(r) for r in real], seed=args.seed)
    if args.json:
        files.write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    print(format_report(report))


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
