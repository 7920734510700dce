"""Arguments of `hmar sample`, `edit` and `evaluate`; what they do with them is in sampling.py."""

import argparse

from hmar_jax.cli import arguments, sampling


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
        help="names or ids, separated by commas (default: the first ten). A text is looked up as a "
        "name first; id:2 and name:2 say which. A name with a comma stands between double quotes: "
        "'\"great white, shark\",3'",
    )
    sub.add_argument(
        "--n", type=arguments.positive, default=8, help="images of each class (default 8)"
    )
    sub.add_argument("--seed", type=arguments.seed, default=0, help=arguments.SEED_HELP)
    sub.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        help="a .png, .jpg or .webp file: a grid with a labelled row for each class",
    )
    sub.add_argument(
        "--npz",
        type=arguments.path,
        default=None,
        help="also write images (uint8), labels and tokens to this .npz file (of one schedule)",
    )
    arguments.add_options(sub, "SamplingConfig", several=("schedule",))


def add_edit(command) -> None:
    sub = command(
        "edit",
        sampling.edit,
        "regenerate a region of an image, without extra training",
        "hmar edit --model=digits --image=seven.png --box=0,11,32,21 --class=7 --out=edited.png "
        "--show=before_and_after.png",
    )
    arguments.add_model(sub)
    sub.add_argument(
        "--image",
        type=arguments.path,
        required=True,
        help="an image file; of another size than the model's: resized",
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
        help="an image file: before, mask and after, side by side",
    )
    sub.add_argument("--coarse", choices=["keep", "free"], default=None, help=argparse.SUPPRESS)
    arguments.add_composite_options(sub)
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
