"""Inpainting held-out digits: is the class recognised, and does new content fit the rest?

    python benchmarks/editing.py --model=digits [--n=200] [--image=docs/images/editing.png]

A third of each image is removed and filled in several ways. For each way: the class accuracy of an
independent classifier, which never sees a sample, and the error inside the mask against the real
image (root mean square of pixels in [0, 1]). A random filling has the error of another image of the
class.
"""

import argparse

import jax
import numpy as np

import hmar_jax
from hmar_jax.data.sources import open_source
from hmar_jax.evaluation.classifier import accuracy, fit_classifier, read_all
from hmar_jax.io import images as image_files

_SHOWN = (1, 3, 7, 8)  # classes in the image of --image
_WAYS = {
    "class given": {},
    "class given, coarse scales kept": dict(keep_coarse=True),
    "class given, next-scale passes only": dict(schedule="none"),
    "class given, masked passes guided": dict(masked_guidance=0.75),
    "class given, mask dilated by one cell": dict(dilation=1),
    "no class": dict(no_class=True),
    "no class, coarse scales editable": dict(no_class=True, keep_coarse=False),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument(
        "--image",
        default=None,
        help="a .png file to write: some digits with the middle rows filled as each class",
    )
    args = parser.parse_args()
    pipe = hmar_jax.load(args.model)
    classifier = fit_classifier(*read_all(open_source("digits", "train")))
    images, labels = (x[: args.n] for x in read_all(open_source("digits", "validate")))
    side = images.shape[1]
    third = slice(round(side / 3), round(2 * side / 3))
    print(
        f"{len(images)} held-out digits, class accuracy: "
        f"{accuracy(classifier, images, labels):.1%}; "
        "after the tokenizer: "
        f"{accuracy(classifier, np.asarray(pipe.decode(pipe.encode(images))), labels):.1%}"
    )
    for name, region in {
        "middle rows": np.s_[third, :],
        "middle columns": np.s_[:, third],
        "middle square": np.s_[third, third],
    }.items():
        mask = np.zeros((side, side), bool)
        mask[region] = True
        removed = np.where(mask[..., None], np.uint8(0), images)
        print(
            f"\n{name} removed; class accuracy with black in their place: "
            f"{accuracy(classifier, removed, labels):.1%}"
        )
        for way, options in _WAYS.items():
            options = dict(options)
            classes = None if options.pop("no_class", False) else labels
            edited = np.asarray(pipe.edit(jax.random.key(0), images, mask, classes, **options))
            error = np.sqrt(np.mean((edited - images / 255)[:, mask] ** 2))
            print(
                f"  {way:<38} {accuracy(classifier, edited, labels):6.1%}   "
                f"error inside the mask {error:.3f}"
            )
    if args.image:
        mask = np.zeros((side, side), bool)
        mask[third] = True
        make_rows(pipe, images[[int(np.argmax(labels == c)) for c in _SHOWN]], mask).save(
            args.image
        )


def make_rows(pipe, images, mask):
    """A row per image (h, w, 3) uint8: before, mask, and filled as each of ten classes."""
    shown = np.repeat(mask[..., None], 3, -1)
    rows = [
        np.stack(
            [
                image / 255,
                shown,
                *np.asarray(pipe.edit(jax.random.key(1), image, mask, list(range(10)))),
            ]
        )
        for image in images
    ]
    return image_files.make_grid(
        np.concatenate(rows), columns=12, titles=["before", "mask", *(f"as {c}" for c in range(10))]
    )


if __name__ == "__main__":
    main()
