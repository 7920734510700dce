"""What `hmar edit` does with its arguments (sampling_arguments.py).

Nothing heavy is imported before the arguments have been checked.
"""

import dataclasses
import os
import sys

from hmar_jax import settings
from hmar_jax.cli import arguments, outputs
from hmar_jax.errors import InputError

_LISTED = 10  # squares that are listed in full
_OUTLINE = (255, 0, 80)


def edit(args) -> None:
    """Regenerates a region of an image."""
    from hmar_jax.io import images

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
    from hmar_jax.data.decoding import DecodeConfig, decode_image, read_profile
    from hmar_jax.io import crops, masks
    from hmar_jax.progress import phase

    decoding = settings.from_arguments(DecodeConfig(), args)
    with phase(f"reading {args.image}"):
        image = _read("--image", args.image, decode_image, decoding)  # uint8 (h, w, 3)
        mask = _read_mask(args, image, decoding)
    blending = settings.from_arguments(masks.CompositeConfig(), args)
    cropping = settings.from_arguments(crops.CropConfig(), args)
    options = arguments.given_options(args, "EditingConfig")
    if args.coarse:
        settings.warn_renamed("--coarse", "--keep_coarse or --no_keep_coarse")
        options["keep_coarse"] = args.coarse == "keep"
    if not cropping.resize:
        images.check_size(args.out, *mask.shape)
    pipe = pipeline.load(args.model, checkpoint=args.checkpoint)
    side = pipe.image_side
    is_cropped = not cropping.resize and mask.shape != (side, side)
    windows = crops.find_windows(mask, side, cropping.context) if is_cropped else []
    own = {**dataclasses.asdict(blending), **dataclasses.asdict(cropping)}
    with warnings.catch_warnings(record=True) as notices, phase("compiling, then editing"):
        warnings.simplefilter("always", UserWarning)
        key = jax.random.key(args.seed)
        edited = np.asarray(pipe.edit(key, image, mask, args.class_id, **own, **options))
    messages = _describe_losses(args.image, mask, decoding)
    messages += [str(notice.message) for notice in notices]
    if images.is_lossy(args.out) and blending.paste and edited.shape == image.shape:
        messages.append(
            f"{args.out}: JPEG changes pixels outside the mask a little; .png and .webp keep them"
        )
    for message in messages:
        print(f"hmar edit: {message}", file=sys.stderr)
    with phase(f"writing {args.out}"):
        images.save_image(args.out, edited, _read("--image", args.image, read_profile, decoding))
        if args.show:
            images.save_image(args.show, before_and_after(image, mask, edited, windows))
    written = args.out + (f"; {args.show}" if args.show else "")
    words = f"{written}: new content in {mask.sum():,} of {mask.size:,} pixels"
    words = "\n".join([words, *_describe_windows(windows, mask.shape, side)])
    print(words, file=outputs.stream_for_words(args.out, args.show))


def _describe_losses(path: str, mask, decoding) -> list[str]:
    """What the pixels outside the mask lose where the file has more than 8-bit RGB."""
    from hmar_jax.data import decoding as decoders
    from hmar_jax.data import mask_images

    losses = _read("--image", path, decoders.describe_losses, decoding)
    transparent = _read("--image", path, mask_images.find_transparent, decoding)
    if (count := (transparent & ~mask).sum()) > 0:
        losses.append(f"{count:,} transparent pixels outside the mask become white")
    return [f"{path}: {loss}" for loss in losses]


def _describe_windows(windows, shape, side: int) -> list[str]:
    """A line for each square that was edited: where, and at which scale."""
    lines = []
    for top, left, length in windows[:_LISTED]:
        scale = "generated at its own scale"
        if length != side:
            change, factor = (
                ("enlarged", length / side) if length > side else ("reduced", side / length)
            )
            scale = f"generated at {side}x{side} and {change} {factor:.3g} times"
        beyond = min(top, left) < 0 or top + length > shape[0] or left + length > shape[1]
        note = "; the part inside the image is used" if beyond else ""
        lines.append(f"  square {left},{top},{left + length},{top + length}: {scale}{note}")
    if len(windows) > _LISTED:
        lines.append(f"  and {len(windows) - _LISTED} more")
    return lines


def before_and_after(image, mask, edited, windows, shown_side: int = 640):
    """Image, mask and result side by side, as a PIL image.

    Args:
      image: (h, w, 3) uint8.
      mask: (h, w) bool.
      edited: (h, w, 3) float in [0, 1], or of the model's size.
      windows: squares of the image that were edited; they are outlined in the mask.
      shown_side: pixels; larger images are reduced to it.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    from hmar_jax.io import images, masks

    height, width = edited.shape[:2]
    before = image / np.float32(255)
    if before.shape != edited.shape:  # the model is square, and the result has its size
        before, mask = images.resize_image(before, width), masks.resize_mask(mask[None], width)[0]
    selected = np.repeat(mask[..., None], 3, -1).astype(np.float32)
    factor = min(1, shown_side / max(height, width))
    shown = max(1, round(factor * height)), max(1, round(factor * width))
    panels = np.stack([images.resize_to(x, *shown) for x in (before, selected, edited)])
    outlined = Image.fromarray(images.to_uint8(panels[1]))
    draw = ImageDraw.Draw(outlined)
    for top, left, length in windows:
        corners = (left, top, left + length, top + length)
        x0, y0, x1, y1 = (round(factor * c) for c in corners)
        limits = (max(x0, 0), max(y0, 0), min(x1, shown[1]) - 1, min(y1, shown[0]) - 1)
        draw.rectangle(limits, outline=_OUTLINE, width=2)
    panels[1] = np.asarray(outlined) / np.float32(255)
    return images.make_grid(panels, columns=3, titles=["before", "mask", "after"])


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
            turned = mask.shape[::-1] == image.shape[:2]
            hint = "; an image's EXIF orientation is applied: turn the mask" if turned else ""
            raise InputError(
                f"mask {args.mask} must have the image's size, {image.shape[1]} x "
                f"{image.shape[0]} pixels; got {mask.shape[1]} x {mask.shape[0]}{hint}"
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
