"""What `hmar sample`, `edit` and `evaluate` do with their arguments (sampling_arguments.py).

Nothing heavy is imported before the arguments have been checked.
"""

import json
import os
import sys
from collections.abc import Sequence

from hmar_jax import families, settings
from hmar_jax.cli import arguments, outputs
from hmar_jax.errors import InputError


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
    options = arguments.given_options(args, "SamplingConfig")
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
    options = arguments.given_options(args, "EditingConfig")
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
    options = arguments.given_options(args, "SamplingConfig")
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
