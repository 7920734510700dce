"""What `hmar edit` does with its arguments (sampling_arguments.py).

Nothing heavy is imported before the arguments have been checked.
"""

import os
import sys

from hmar_jax import settings
from hmar_jax.cli import arguments, outputs
from hmar_jax.errors import InputError


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
    from hmar_jax.data.decoding import DecodeConfig, decode_image

    decoding = settings.from_arguments(DecodeConfig(), args)
    image = _read("--image", args.image, decode_image, decoding)  # uint8 (h, w, 3)
    mask = _read_mask(args, image, decoding)
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
    words = f"{written}: new content in {mask.sum():,} of {mask.size:,} pixels"
    print(words, file=outputs.stream_for_words(args.out, args.show))


def _read_mask(args, image, decoding):
    """bool (h, w): True where new content goes, from --box or --mask and --mode."""
    from hmar_jax.data import mask_images
    from hmar_jax.io import masks

    own = args.mask == arguments.OWN_TRANSPARENCY
    if args.box:
        mask = masks.box_mask(args.box, *image.shape[:2])
    elif own:
        mask = _read("--image", args.image, mask_images.read_transparency, decoding)
    else:
        mask = _read("--mask", args.mask, mask_images.read_mask, decoding)
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
    values = mask_images.describe_values(args.mask, decoding.max_pixels)
    white, black = "new content goes", "the image stays"
    if args.mode == "outpaint":
        white, black = black, white
    raise InputError(
        f"mask {args.mask} {nothing} ({values}); it must be white "
        f"(at least 128) where {white}, and black or transparent where {black}"
    )


def _read(option: str, path: str, decode, decoding):
    """What `decode` makes of an image file; InputError if that is no image."""
    from hmar_jax.data.decoding import ImageDecodeError

    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "no such file"
        if os.path.exists(path) and not os.path.isdir(path):  # as a shell's <(...)
            what = "must be a file that can be read twice; it is a pipe or a device"
        raise InputError(f"{option} {path}: {what}")
    try:
        return decode(path, max_pixels=decoding.max_pixels)
    except ImageDecodeError as e:
        raise InputError(f"{option} {path} cannot be decoded as an image ({e.reason})") from None
