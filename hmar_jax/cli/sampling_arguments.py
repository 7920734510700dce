"""Arguments of `hmar sample`, `edit` and `evaluate`; what they do with them is in
sampling.py and editing.py."""

import argparse

from hmar_jax.cli import arguments, editing, sampling


def add_sample(command) -> None:
    sub = command(
        "sample",
        sampling.sample,
        "sample images of classes",
        "hmar sample --model=digits --classes=0,3,7 --n=8 --out=grid.png",
    )
    arguments.add_model(sub)
    sub.add_argument(
        "--classes",
        default=None,
        help="names, ids, ranges of ids such as 0-9, or all; separated by commas (default: the "
        "first ten; with --num, all). A text is looked up as a name first; id:2 and name:2 say "
        "which. A name with a comma stands between double quotes: '\"great white, shark\",3'",
    )
    sub.add_argument(
        "--n", type=arguments.positive, default=None, help="images of each class (default 8)"
    )
    sub.add_argument("--seed", type=arguments.seed, default=0, help=arguments.SEED_HELP)
    sub.add_argument(
        "--out",
        type=arguments.path,
        default=None,
        help="a .png, .jpg or .webp file: a grid with a labelled row for each class. A directory, "
        "new or empty (a name without ending, or with / at its end): a PNG file for each image, "
        "such as 3_cat_00.png",
    )
    sub.add_argument(
        "--npz",
        type=arguments.path,
        default=None,
        help="write images (uint8), labels and tokens to this .npz file (of one schedule); also "
        "beside --out",
    )
    many = sub.add_argument_group(
        "many images",
        "classes are taken in turns, so that their numbers differ by one at most; memory does\n"
        "not depend on --num; safe to interrupt: rerun the same command to resume",
    )
    many.add_argument(
        "--num",
        type=arguments.positive,
        default=None,
        help="images in all, written to the directory --out, without a grid",
    )
    many.add_argument(
        "--format",
        choices=["npz", "png"],
        default=None,
        help="npz (default): samples.npz with arr_0 (pixels, uint8) and arr_1 (class ids), as "
        "ADM's evaluator reads; until it is complete, twice its size is needed. png: 000000.png, "
        "... in one folder, and the class ids in dataset.json",
    )
    many.add_argument(
        "--batch_size",
        type=arguments.positive,
        default=None,
        help="images sampled at once, on all devices together (default 64 for each device)",
    )
    many.add_argument(
        "--part",
        type=arguments.part,
        default=None,
        help="I/N, from 0/N to N-1/N: sample every N-th batch, where N commands share the work on "
        "one directory",
    )
    arguments.add_options(sub, "SamplingConfig", several=("schedule",))


def add_edit(command) -> None:
    sub = command(
        "edit",
        editing.edit,
        "regenerate a region of an image, without extra training",
        "hmar edit --model=digits --image=seven.png --box=0,11,32,21 --class=7 --out=edited.png "
        "--show=before_and_after.png",
    )
    arguments.add_model(sub)
    sub.add_argument(
        "--image",
        type=arguments.path,
        required=True,
        help="an image file of any size, which it keeps: the model sees and edits a square around "
        "the mask",
    )
    region = sub.add_mutually_exclusive_group(required=True)
    region.add_argument(
        "--box",
        type=arguments.box,
        default=None,
        help="x0,y0,x1,y1 in pixels of the image; x1 and y1 are the first outside",
    )
    region.add_argument(
        "--mask",
        type=arguments.path,
        default=None,
        help="an image file of the same size: white where new content goes, black or transparent "
        "where the image stays; --mask=alpha: new content goes where --image is transparent",
    )
    sub.add_argument(
        "--mode",
        choices=["inpaint", "outpaint"],
        default="inpaint",
        help="inpaint: regenerate box or mask (default); outpaint: keep it, regenerate the rest",
    )
    sub.add_argument(
        "--class",
        dest="class_id",
        default=None,
        help="class of the new content: a name or id, also name:2 and id:2 (default: no class)",
    )
    sub.add_argument("--seed", type=arguments.seed, default=0, help=arguments.SEED_HELP)
    sub.add_argument(
        "--out", type=arguments.path, required=True, help="the edited image: .png, .jpg or .webp"
    )
    sub.add_argument(
        "--show",
        type=arguments.path,
        default=None,
        help="an image file: before, mask and after, side by side; the squares that the model saw "
        "are outlined",
    )
    sub.add_argument("--coarse", choices=["keep", "free"], default=None, help=argparse.SUPPRESS)
    arguments.add_editing_options(sub)
    arguments.add_decode_options(sub)
    arguments.add_options(sub, "EditingConfig")


def add_evaluate(command) -> None:
    sub = command(
        "evaluate",
        sampling.evaluate,
        "evaluate samples against real images",
        "hmar evaluate --model=digits --reference=digits --features=classifier",
    )
    arguments.add_model(sub)
    sub.add_argument(
        "--reference",
        default="digits",
        help="the data set of real images: digits, folder:DIR, zip:FILE, hf:NAME_OR_DIR, tfds:NAME "
        "(default digits)",
    )
    sub.add_argument(
        "--features",
        default="classifier",
        choices=["classifier"],
        help="classifier: class accuracy by an independent classifier, and nearest neighbours",
    )
    sub.add_argument(
        "--n", type=arguments.positive, default=500, help="samples in all (default 500)"
    )
    sub.add_argument("--seed", type=arguments.seed, default=0, help=arguments.SEED_HELP)
    sub.add_argument(
        "--json", type=arguments.path, default=None, help="also write the metrics to this file"
    )
    arguments.add_source_options(sub.add_argument_group("options of the reference"))
    arguments.add_options(sub, "SamplingConfig")
