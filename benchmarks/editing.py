"""In-painting held-out digits: is the class still read, and does new content fit what stayed?

    python benchmarks/editing.py --model=digits [--n=200] [--image=docs/images/editing.png]

For each third of the image that is removed, and for each way of filling it: the share of images that the independent
classifier reads as their class (it never sees a sample), and the error inside the hole against the real image, root mean
square of pixels in [0, 1]. With a hole filled by chance the error is that of another image of the class.
"""

import argparse

import jax
import numpy as np

import hmar_jax
from hmar_jax.data.sources import open_source
from hmar_jax.evaluation.classifier import accuracy, fit_classifier, read_all
from hmar_jax.io import images as image_files

_SHOWN = (1, 3, 7, 8)  # classes of the digits in the image
_WAYS = {
    "class given": {},
    "class given, coarse scales kept": dict(keep_coarse=True),
    "class given, next-scale passes only": dict(schedule="none"),
    "class given, masked passes guided": dict(masked_guidance=0.75),
    "class given, ring of one cell": dict(ring=1),
    "no class": dict(no_class=True),
    "no class, coarse scales free": dict(no_class=True, keep_coarse=False),
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
        help="a .png file to write: the middle rows of some digits, as each class",
    )
    args = parser.parse_args()
    pipe = hmar_jax.load(args.model)
    classifier = fit_classifier(*read_all(open_source("digits", "train")))
    images, labels = (x[: args.n] for x in read_all(open_source("digits", "validate")))
    side = images.shape[1]
    third = slice(round(side / 3), round(2 * side / 3))
    print(
        f"{len(images)} held-out digits, read correctly as they are: {accuracy(classifier, images, labels):.1%}; "
        f"through the tokenizer: {accuracy(classifier, np.asarray(pipe.decode(pipe.encode(images))), labels):.1%}"
    )
    for name, region in {
        "middle rows": np.s_[third, :],
        "middle columns": np.s_[:, third],
        "middle square": np.s_[third, third],
    }.items():
        hole = np.zeros((side, side), bool)
        hole[region] = True
        removed = np.where(hole[..., None], np.uint8(0), images)
        print(
            f"\n{name} removed; left black, read as their class: {accuracy(classifier, removed, labels):.1%}"
        )
        for way, options in _WAYS.items():
            options = dict(options)
            classes = None if options.pop("no_class", False) else labels
            edited = np.asarray(pipe.edit(jax.random.key(0), images, hole, classes, **options))
            error = np.sqrt(np.mean((edited - images / 255)[:, hole] ** 2))
            print(
                f"  {way:<38} {accuracy(classifier, edited, labels):6.1%}   error in the hole {error:.3f}"
            )
    if args.image:
        hole = np.zeros((side, side), bool)
        hole[third] = True
        draw(pipe, images[[int(np.argmax(labels == c)) for c in _SHOWN]], hole).save(args.image)


def draw(pipe, images, hole):
    """Before, mask, and the hole filled with each of ten classes: a row for each image (h, w, 3) uint8."""
    mask = np.repeat(hole[..., None], 3, -1)
    rows = [
        np.stack(
            [
                image / 255,
                mask,
                *np.asarray(pipe.edit(jax.random.key(1), image, hole, list(range(10)))),
            ]
        )
        for image in images
    ]
    return image_files.make_grid(
        np.concatenate(rows), columns=12, titles=["before", "mask", *(f"as {c}" for c in range(10))]
    )


if __name__ == "__main__":
    main()
