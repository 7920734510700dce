"""What the commands of `hmar` do with their arguments (cli.py): check, call, print.

Each is a function of the parsed arguments, and of the --config.KEY=VALUE texts for those with a --config. Nothing heavy is
imported before the arguments have been looked at, so that mistakes and --help cost no time.
"""

import ctypes
import dataclasses
import json
import logging
import os
import pathlib
import sys

from hmar_jax.errors import InputError
from hmar_jax.logging import TERMINAL

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def plan(args, overrides) -> int:
    """Prints whether a run fits a topology; returns 0 if it does, otherwise 1."""
    from hmar_jax.planning import chips

    topology = chips.parse(args.topology)
    from hmar_jax.io import files
    from hmar_jax.planning import plan

    if args.json not in (None, "-"):
        files.check_writable(args.json)

    plan.prepare_environment()
    config, stage1 = _config(args, overrides), plan.stage1_of(args.config)
    found = plan.make_plan(
        config, topology, name=" ".join([args.config, *overrides]), stage1=stage1
    )
    if args.json == "-":
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(plan.report(found))
        if args.json:
            files.write_atomically(args.json, json.dumps(found.to_json(), indent=1) + "\n")
    return 0 if found.fits else 1


def _config(args, overrides):
    """The config that --config names, with the values that --config.KEY=VALUE give."""
    from hmar_jax import config_files

    config = config_files.load_config(args.config)
    for text in overrides:
        key, _, value = text.removeprefix("--config.").partition("=")
        config_files.override(config, key, value)
    return config


def train(args, overrides) -> None:
    """Begins a run, or goes on with it: `train` and `train-tokenizer`."""
    _retain_freed_memory()
    config = _config(args, overrides)
    commands = {"tokenizer": "train-tokenizer", "next_scale": "train", "masked": "train"}
    task = config.get("task")
    if task not in commands:
        raise InputError(f"config.task={task!r}: known are {', '.join(commands)}")
    if commands[task] != args.command:
        raise InputError(f"config {args.config!r} is for hmar {commands[task]}")

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
    processes.raise_on_all_processes(
        error
    )  # where one cannot begin, the others should not wait for it
    step, steps = int(loop.run(config, experiment, args.workdir).step), experiment.task.steps
    if processes.is_primary():
        print(
            f"{args.workdir}: {task} run "
            + ("complete" if step == steps else f"stopped at step {step} of {steps}")
        )


def _retain_freed_memory() -> None:
    """Tells glibc to keep what a step frees for the next one.

    XLA's CPU backend allocates its temporaries anew each step. By default glibc gives such sizes back to the system at once, and
    faulting them in again took a third of the digits' training time (benchmarks/RESULTS.md).
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
    """Turns a data set into a token set, or goes on with it."""
    _retain_freed_memory()
    import jax

    from hmar_jax import pipeline
    from hmar_jax.data import encoding
    from hmar_jax.data.loader import Transform
    from hmar_jax.data.sources import SPLITS, open_source
    from hmar_jax.parallel import processes

    splits = args.splits.split(",")
    if not set(splits) <= set(SPLITS):
        raise InputError(f"--splits={args.splits}: train, validate or both are wanted")
    if args.part is None:
        processes.initialize()
    spec, params = pipeline.load_spec_and_params(args.tokenizer)
    config = dataclasses.replace(spec.tokenizer, **({"dtype": args.dtype} if args.dtype else {}))
    transform = Transform(
        config.image_side, args.transform, resize_ratio=args.resize_ratio, flip=args.flip
    )
    sources = {
        split: open_source(args.data, split, need_classes=True)
        for split in SPLITS
        if split in splits
    }
    part = args.part or (jax.process_index(), jax.process_count())
    info = encoding.describe(
        args.tokenizer,
        config,
        params["tokenizer"],
        args.data,
        sources,
        transform,
        crops=args.crops,
        seed=args.seed,
        shard_size=args.shard_size,
    )
    encode, batch_size = encoding.make_encoder(
        config, params["tokenizer"], args.batch_size, jax.local_devices()
    )
    info = encoding.write_token_set(
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
            f"{args.out}: part {part[0]}/{part[1]} is done; {missing} of {total} files are still to be made by other parts"
        )
        return
    told = [
        f"{split.images - len(split.broken)} images to {name}"
        + (f" in {split.crops} crops" if split.crops > 1 else "")
        + (f" ({len(split.broken)} could not be read)" if split.broken else "")
        for name, split in info.splits.items()
    ]
    size = sum(shard["bytes"] for split in info.splits.values() for shard in split.shards)
    print(
        f"{args.out}: {', '.join(told)}; {len(info.class_names)} classes, {size / 1e6:.1f} MB, tokenizer {info.fingerprint}"
    )


def sample(args) -> None:
    """Draws images of classes into a .png file, and their arrays into an .npz file."""
    from hmar_jax.io import files

    for path in filter(None, (args.out, args.npz)):
        files.check_writable(path)
    import io

    import jax
    import numpy as np

    from hmar_jax import pipeline
    from hmar_jax.io import image_grid

    pipe = pipeline.load(args.model, devices=jax.devices(), checkpoint=args.checkpoint)
    spec = pipe.spec
    if spec.transformer is None:
        raise InputError(f"model {args.model!r} is a tokenizer alone: it cannot sample")
    asked = (
        args.classes.split(",")
        if args.classes is not None
        else range(min(10, spec.transformer.num_classes))
    )
    classes = [spec.resolve_class(c) for c in asked]
    schedules = args.schedule or [None]
    if args.npz and len(schedules) > 1:
        raise InputError(
            f"--npz takes the samples of one schedule, --schedule is given {len(schedules)} times"
        )
    for schedule in schedules:
        pipe.schedule(schedule)  # is it one? before the first is drawn
    ids = np.repeat(classes, args.n)
    drawn = [
        pipe.sample(
            jax.random.key(args.seed),
            ids,
            schedule=schedule,
            return_tokens=True,
            **_sampling_options(args),
        )
        for schedule in schedules
    ]
    images = np.stack(
        [np.asarray(images) for images, _ in drawn]
    )  # (schedules, classes n, h, w, 3)
    rows = images.reshape(len(schedules), len(classes), args.n, *images.shape[2:]).swapaxes(0, 1)
    names = [spec.class_names[c] if spec.class_names else str(c) for c in classes]
    titles = (
        [f"schedule {args.schedule[i]}" for i in range(len(schedules))]
        if len(schedules) > 1
        else ()
    )
    _write_png(
        args.out,
        image_grid.draw(
            rows.reshape(-1, *images.shape[2:]),
            columns=len(schedules) * args.n,
            labels=names,
            titles=titles,
        ),
    )
    if args.npz:
        arrays = io.BytesIO()
        np.savez(
            arrays,
            images=(images[0] * 255).round().astype(np.uint8),
            labels=ids,
            tokens=np.asarray(drawn[0][1]),
        )
        files.write_atomically(args.npz, arrays.getvalue())
    print(
        f"{args.out}: {images.shape[0] * len(ids)} images of {len(classes)} classes"
        + (f"; {args.npz}" if args.npz else "")
    )


def edit(args) -> None:
    """Draws new content into a part of a image."""
    from hmar_jax.io import files

    for path in filter(None, (args.out, args.show)):
        files.check_writable(path)
    import warnings

    import jax
    import numpy as np
    from PIL import Image

    from hmar_jax import pipeline
    from hmar_jax.families.hmar import editing
    from hmar_jax.io import image_grid

    image = _read_image("--image", args.image)  # uint8 (h, w, 3)
    if args.box:
        hole = editing.box_mask(args.box, *image.shape[:2])
    else:
        mask = _read_image("--mask", args.mask)
        if mask.shape != image.shape:
            raise InputError(
                f"mask {args.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, the image {image.shape[1]} x {image.shape[0]}: "
                "one of the image's size is wanted"
            )
        hole = mask.mean(-1) >= 128
    if args.mode == "outpaint":
        hole = ~hole
    if not hole.any():
        raise InputError(
            "the box is the whole image: nothing around it is left to be made new"
            if args.box
            else f"mask {args.mask} selects nothing: white (128 and above) is wanted where "
            + (
                "the image stays, and black elsewhere"
                if args.mode == "outpaint"
                else "new content goes"
            )
        )
    pipe = pipeline.load(args.model, checkpoint=args.checkpoint)
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always", UserWarning)
        edited = np.asarray(
            pipe.edit(
                jax.random.key(args.seed),
                image,
                hole,
                args.class_id,
                keep_coarse=args.coarse and args.coarse == "keep",
                ring=args.ring,
                paste=not args.no_paste,
                feather=args.feather,
                schedule=args.schedule,
                **_sampling_options(args),
            )
        )
    for notice in notices:
        print(f"hmar edit: {notice.message}", file=sys.stderr)
    _write_png(args.out, Image.fromarray((edited * 255).round().astype(np.uint8)))
    if args.show:
        side = edited.shape[0]
        before = pipeline.resize_image(image / np.float32(255), side)
        shown = editing.resize_mask(hole[None], side)[0]
        sheet = np.stack([before, np.repeat(shown[..., None], 3, -1), edited])
        _write_png(args.show, image_grid.draw(sheet, columns=3, titles=["before", "mask", "after"]))
    print(args.out + (f"; {args.show}" if args.show else ""))


def _sampling_options(args) -> dict:
    names = (
        "guidance",
        "top_k",
        "top_p",
        "masked_guidance",
        "confidence_noise",
        "greedy",
        "smooth",
    )
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _write_png(path: str, image) -> None:
    import io

    from hmar_jax.io import files

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    files.write_atomically(path, buffer.getvalue())


def _read_image(option: str, path: str):
    """uint8 (h, w, 3)"""
    from hmar_jax.data.sources import ImageDecodeError, decode_image

    if not os.path.isfile(path):
        raise InputError(f"{option} {path}: no such file")
    try:
        return decode_image(path)
    except ImageDecodeError as e:
        raise InputError(f"{option} {path}: cannot be read as a image ({e.reason})") from None


def evaluate(args) -> None:
    """Judges samples beside real images."""
    from hmar_jax.io import files

    if args.json:
        files.check_writable(args.json)
    import jax
    import numpy as np

    from hmar_jax import pipeline
    from hmar_jax.data.sources import open_source
    from hmar_jax.evaluation.classifier import read_all
    from hmar_jax.evaluation.report import digit_report, format_report

    pipe = pipeline.load(args.model, devices=jax.devices(), checkpoint=args.checkpoint)
    if pipe.spec.transformer is None:
        raise InputError(f"model {args.model!r} is a tokenizer alone: it cannot sample")
    pipe.schedule(args.schedule)
    real = [open_source(args.reference, split) for split in ("train", "validate")]
    if real[0].num_classes != pipe.spec.transformer.num_classes:
        raise InputError(
            f"reference {args.reference!r} has {real[0].num_classes} classes, model {args.model!r} has "
            f"{pipe.spec.transformer.num_classes}"
        )
    ids = np.arange(args.n) % pipe.spec.transformer.num_classes
    images = np.asarray(
        pipe.sample(
            jax.random.key(args.seed), ids, schedule=args.schedule, **_sampling_options(args)
        )
    )
    report = digit_report(images, ids, *[read_all(r) for r in real], seed=args.seed)
    if args.json:
        files.write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    print(format_report(report))


def info(args) -> None:
    """Prints what a model is."""
    from hmar_jax import pipeline

    spec, params = pipeline.load_spec_and_params(args.model, args.checkpoint)
    import jax

    count = lambda part: sum(x.size for x in jax.tree.leaves(params.get(part, {})))
    t = spec.tokenizer
    scales = t.scale_list
    lines = [
        ("model", f"{args.model}: {spec.kind}"),
        ("images", f"{t.image_side} x {t.image_side} pixels, {scales.length} tokens"),
        ("scales", ", ".join(f"{s}x{s}" for s in scales.sides)),
        (
            "tokenizer",
            f"{count('tokenizer'):,} parameters, codebook {t.vocab_size} x {t.z_channels}",
        ),
    ]
    if spec.transformer is not None:
        m = spec.transformer
        lines += [
            (
                "transformer",
                f"{count('transformer'):,} parameters, depth {m.depth}, width {m.width}, {m.heads} heads, {m.pattern} attention",
            ),
            *([("stage 2", _stage2(spec, count("masked")))] if spec.masked_depth else []),
            (
                "classes",
                f"{m.num_classes}"
                + (
                    f": {', '.join(spec.class_names[:10])}{', …' if len(spec.class_names) > 10 else ''}"
                    if spec.class_names
                    else ""
                ),
            ),
            (
                "sampling",
                f"guidance {spec.guidance:g}, top-k {spec.top_k or 'off'}, top-p {spec.top_p or 'off'}"
                + (
                    f", masked guidance {spec.masked_guidance:g}, confidence noise {spec.confidence_noise:g}"
                    if spec.masked_depth
                    else ""
                ),
            ),
        ]
    lines += [
        (name, text) for name, text in (("origin", spec.origin), ("licence", spec.licence)) if text
    ]
    for name, text in lines:
        print(f"{name:12} {text}")


def _stage2(spec, parameters: int) -> str:
    if not spec.next_scale:
        return "alone: it predicts whole scales from masks, then parts of them"
    return f"{parameters:,} parameters, depth {spec.masked_depth}; the first {spec.transformer.depth - spec.masked_depth} blocks are shared"


def convert(args) -> None:
    """Published PyTorch weights become a model directory."""
    from hmar_jax import pipeline
    from hmar_jax.autoencoders.scales import ScaleList
    from hmar_jax.io import checkpoints

    checkpoints.check_new_model(args.out)
    scales = ScaleList.parse(args.scales).sides if args.scales else None
    try:
        spec, params = pipeline.convert_torch_files(
            args.torch,
            tokenizer=args.tokenizer,
            masked=args.masked,
            scales=scales,
            heads=args.heads,
        )
    except ImportError as e:
        raise InputError(str(e)) from None
    readme = f"# {pathlib.Path(args.out).name}\n\n{spec.kind}, {spec.origin}.\n\nLicence: {spec.licence}.\n"
    checkpoints.save_model(args.out, spec.to_json(), params, readme)
    print(f"{args.out}: {spec.kind}, {spec.origin}. {spec.licence}.")


def export(args) -> None:
    """A run or a model becomes a model directory."""
    import jax
    import numpy as np

    from hmar_jax import pipeline
    from hmar_jax.io import checkpoints

    checkpoints.check_new_model(args.out)
    spec, params = pipeline.load_spec_and_params(args.model, args.checkpoint)
    if args.licence is not None:
        spec = dataclasses.replace(spec, licence=args.licence)
    if args.half:
        params = jax.tree.map(
            lambda x: np.asarray(x).astype(np.float16) if np.asarray(x).dtype == np.float32 else x,
            params,
        )
    readme = f"# {pathlib.Path(args.out).name}\n\n{spec.kind}, {spec.origin}.\n" + (
        f"\nLicence: {spec.licence}.\n" if spec.licence else ""
    )
    checkpoints.save_model(args.out, spec.to_json(), params, readme)
    print(f"{args.out}: {spec.kind}")
