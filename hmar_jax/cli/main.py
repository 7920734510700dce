"""The command `hmar`: its arguments; what it does with them is in commands.py.

Exit status: 0 done, 2 the user's input is wrong, 1 anything else.
"""

import argparse
import errno
import json
import os
import sys

from hmar_jax.cli import commands
from hmar_jax.errors import InputError
from hmar_jax.logging import show_log

_FORMATTER = argparse.RawDescriptionHelpFormatter


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    show_log()
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [r for r in rest if r.startswith("--config.")] if hasattr(args, "config") else []
    unknown = [r for r in rest if r not in overrides]
    try:
        for text in overrides:  # first: of "--config.KEY VALUE", the value would be called unknown
            if "=" not in text:
                raise InputError(f"{text!r}: --config.KEY=VALUE is wanted")
        if unknown:
            raise InputError(f"unknown argument {unknown[0]!r} (see hmar {args.command} --help)")
        return (args.run(args, overrides) if hasattr(args, "config") else args.run(args)) or 0
    except InputError as e:
        print(f"hmar {args.command}: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:  # a run that diverged
        print(f"hmar {args.command}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"hmar {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"hmar {args.command}: cannot write {e.filename or 'a file'}: {e.strerror}",
            file=sys.stderr,
        )
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hmar",
        description="Hierarchical masked autoregressive image generation in JAX.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )

    def command(name, run, help, example):
        sub = subparsers.add_parser(
            name,
            help=help,
            description=help + ".",
            epilog=f"example:\n  {example}",
            formatter_class=_FORMATTER,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "tokenize",
        commands.tokenize,
        "turn a data set into tokens, for training from tokens:DIR",
        "hmar tokenize --tokenizer=runs/tokenizer --data=folder:IMAGES --crops=4 --out=tokens\n\n"
        "Killed at any moment, the same command goes on; on a finished set, more --crops are added.",
    )
    sub.add_argument(
        "--tokenizer", required=True, help="a bundled model, a run directory or a model directory"
    )
    sub.add_argument("--data", required=True, help="folder:DIR, tfds:NAME or digits")
    sub.add_argument("--out", type=_output, required=True, help="the directory to make, also gs://")
    sub.add_argument(
        "--crops",
        type=_positive,
        default=1,
        help="random crops of each training image (default 1); epochs take turns with them",
    )
    sub.add_argument(
        "--splits",
        default="train,validate",
        help="default train,validate; a validation image has its centre crop alone",
    )
    sub.add_argument(
        "--transform",
        default="resize_crop",
        help="resize_crop (default), random_crop, or affine for digits",
    )
    sub.add_argument(
        "--resize_ratio",
        type=float,
        default=1.125,
        help="of resize_crop: shorter side before the crop, over the crop's (default 1.125)",
    )
    sub.add_argument(
        "--flip",
        action="store_true",
        help="mirror half of the crops; the published recipe does not",
    )
    sub.add_argument("--seed", type=_seed, default=0, help="of the crops")
    sub.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default=None,
        help="of the convolutions (default: the tokenizer's own)",
    )
    sub.add_argument(
        "--batch_size",
        type=_positive,
        default=64,
        help="images encoded at once, on all devices together (default 64)",
    )
    sub.add_argument(
        "--shard_size",
        type=_positive,
        default=8192,
        help="images in a file, which is what a kill can cost (default 8192)",
    )
    sub.add_argument("--threads", type=_positive, default=2, help="that read images (default 2) …")
    sub.add_argument(
        "--workers",
        type=_whole,
        default=0,
        help="… in each of so many processes (default 0: this process alone)",
    )
    sub.add_argument(
        "--part",
        type=_part,
        default=None,
        help="I/N, from 0/N to N-1/N: make every N-th file, where N commands share the work (default: by jax.distributed, else all)",
    )
    sub.add_argument(
        "--verify",
        action="store_true",
        help="check the checksums of what is there; make damaged files anew",
    )

    for name, what, example in (
        (
            "train-tokenizer",
            "train a tokenizer",
            "hmar train-tokenizer --config=configs/tokenizer.py:digits --workdir=runs/tokenizer",
        ),
        (
            "train",
            "train a transformer on a tokenizer",
            "hmar train --config=configs/hmar.py:digits --workdir=runs/digits",
        ),
    ):
        sub = command(name, commands.train, what, example)
        sub.add_argument(
            "--config",
            required=True,
            help="FILE:NAME[,key=value…]; single values also by --config.KEY=VALUE",
        )
        sub.add_argument(
            "--workdir",
            type=_output,
            required=True,
            help="the run's directory; an existing run goes on where it ended",
        )
        hosts = sub.add_argument_group(
            "several processes",
            "on SLURM, Cloud TPU, GKE, Open MPI and Kubernetes they find each other; elsewhere give each of them "
            "the first three. See docs/training_at_scale.md",
        )
        hosts.add_argument("--coordinator", default=None, help="HOST:PORT of the first process")
        hosts.add_argument(
            "--num_processes",
            type=_positive,
            default=None,
            help="how many; 1: alone, whatever the cluster says",
        )
        hosts.add_argument(
            "--process_id", type=_whole, default=None, help="which one this is, from 0"
        )
        hosts.add_argument(
            "--local_devices",
            type=_numbers,
            default=None,
            help="numbers of this host's GPUs that the process takes, such as 0,1 (default: on SLURM and Open MPI the one "
            "of its number on the host, elsewhere all)",
        )

    sub = command(
        "plan",
        commands.plan,
        "tell whether a run fits on a TPU pod or on GPUs, and what a step costs, without them",
        "hmar plan --config=configs/hmar.py:d30_256 --topology=v5p:4x4x4 --config.mesh.data=-1 --config.mesh.fsdp=4\n\n"
        "exit status: 0 it fits, 1 it does not, 2 the input is wrong",
    )
    sub.add_argument(
        "--config",
        required=True,
        help="FILE:NAME[,key=value…]; single values also by --config.KEY=VALUE",
    )
    sub.add_argument(
        "--topology",
        required=True,
        help="CHIP:AxB[xC] of TPUs, GPU:N or GPU:MACHINESxN: v5p:4x4x4, v5e:8x8, h100:8, h100:4x8, …",
    )
    sub.add_argument(
        "--json",
        nargs="?",
        type=_output,
        const="-",
        default=None,
        help="print the figures as JSON; --json=FILE writes them to a file, beside the words",
    )

    sub = command(
        "sample",
        commands.sample,
        "draw images of classes",
        "hmar sample --model=digits --classes=0,3,7 --n=8 --out=grid.png",
    )
    _model(sub)
    sub.add_argument(
        "--classes", default=None, help="ids or names, separated by commas (default: the first ten)"
    )
    sub.add_argument("--n", type=_positive, default=8, help="images of each class (default 8)")
    _strength(sub, several_schedules=True)
    _manner(sub)
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument(
        "--out",
        type=_output,
        required=True,
        help="a .png file: a grid with a labelled row for each class",
    )
    sub.add_argument(
        "--npz",
        type=_output,
        default=None,
        help="also write images (uint8), labels and tokens to this .npz file (of one schedule)",
    )

    sub = command(
        "edit",
        commands.edit,
        "draw new content into a part of a image, without training",
        "hmar edit --model=digits --image=seven.png --box=0,11,32,21 --class=7 --out=edited.png --show=before_and_after.png",
    )
    _model(sub)
    sub.add_argument(
        "--image",
        required=True,
        help="a image file; one of another size than the model's is resized",
    )
    where = sub.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--box",
        type=_box,
        default=None,
        help="x0,y0,x1,y1 in pixels of the image, x1 and y1 the first outside",
    )
    where.add_argument(
        "--mask", default=None, help="a image file of the same size, white where new content goes"
    )
    sub.add_argument(
        "--mode",
        choices=["inpaint", "outpaint"],
        default="inpaint",
        help="inpaint: box or mask is made new (default); outpaint: it stays, and all around it is made new",
    )
    sub.add_argument(
        "--class",
        dest="class_id",
        default=None,
        help="what the new content is of: an id or name (default: no class)",
    )
    sub.add_argument(
        "--coarse",
        choices=["keep", "free"],
        default=None,
        help="the tokens of scales up to 2x2, which hold the layout: kept, or drawn anew (default: kept without --class)",
    )
    sub.add_argument(
        "--ring",
        type=_whole,
        default=0,
        help="cells around the hole that are drawn anew too (default 0)",
    )
    sub.add_argument(
        "--feather",
        type=float,
        default=0.0,
        help="pixels inside the hole over which old and new are mixed (default 0)",
    )
    sub.add_argument(
        "--no_paste",
        action="store_true",
        help="leave all pixels to the decoder, those outside the hole too",
    )
    _strength(sub)
    _manner(sub)
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--out", type=_output, required=True, help="a .png file: the edited image")
    sub.add_argument(
        "--show",
        type=_output,
        default=None,
        help="a .png file: before, mask and after, side by side",
    )

    sub = command(
        "evaluate",
        commands.evaluate,
        "judge samples against real images",
        "hmar evaluate --model=digits --reference=digits --features=classifier",
    )
    _model(sub)
    sub.add_argument(
        "--reference",
        default="digits",
        help="the data set of real images: digits, folder:DIR, tfds:NAME (default digits)",
    )
    sub.add_argument(
        "--features",
        default="classifier",
        choices=["classifier"],
        help="classifier: how an independent classifier reads samples, and nearest neighbours",
    )
    sub.add_argument("--n", type=_positive, default=500, help="samples in all (default 500)")
    _strength(sub)
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument(
        "--json", type=_output, default=None, help="also write the figures to this file"
    )

    sub = command("info", commands.info, "tell what a model is", "hmar info --model=digits")
    _model(sub)

    sub = command(
        "convert",
        commands.convert,
        "turn published PyTorch weights into a model directory",
        "hmar convert --torch=var_d16.pth --tokenizer=vae.pth --out=models/var_d16",
    )
    sub.add_argument(
        "--torch",
        default=None,
        help="the .pth file of stage 1, VAR, stage 2 or the combined model; without it the tokenizer alone is converted",
    )
    sub.add_argument(
        "--masked", default=None, help="the .pth file of a stage 2, where --torch is its stage 1"
    )
    sub.add_argument("--tokenizer", required=True, help="the tokenizer's .pth file")
    sub.add_argument(
        "--scales",
        default=None,
        help="sides, such as 1,2,3,4,6; needed where the list is not a published one",
    )
    sub.add_argument(
        "--heads",
        type=_positive,
        default=None,
        help="where the weights do not tell (default: as many as blocks)",
    )
    sub.add_argument("--out", type=_output, required=True, help="the directory to make")

    sub = command(
        "export",
        commands.export,
        "turn a finished run into a model directory, without optimizer and checkpoints",
        "hmar export --model=runs/digits --out=models/digits",
    )
    _model(sub)
    sub.add_argument(
        "--half", action="store_true", help="store parameters as float16: half the size"
    )
    sub.add_argument("--licence", default=None, help="what to write into its README")
    sub.add_argument("--out", type=_output, required=True, help="the directory to make")
    return parser


def _model(sub) -> None:
    sub.add_argument(
        "--model",
        required=True,
        help="a bundled model (digits), a run directory or a model directory",
    )
    sub.add_argument(
        "--checkpoint",
        type=_checkpoint,
        default="latest",
        help="of a run: latest (default), best (of least validation loss) or a step",
    )


def _checkpoint(text: str) -> int | str:
    if text in ("latest", "best"):
        return text
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r}: latest, best or the number of a step is wanted"
        )
    return int(text)


def _strength(sub, several_schedules: bool = False) -> None:
    sub.add_argument(
        "--guidance", type=float, default=None, help="0 is none (default: the model's own)"
    )
    sub.add_argument("--top_k", type=int, default=None, help="0 is off (default: the model's own)")
    sub.add_argument(
        "--top_p", type=float, default=None, help="0 is off (default: the model's own)"
    )
    sub.add_argument(
        "--masked_guidance",
        type=float,
        default=None,
        help="guidance of masked passes, 0 is none (default: the model's own)",
    )
    sub.add_argument(
        "--confidence_noise",
        type=float,
        default=None,
        help="chance in the order in which masked passes fix tokens, 0 is none (default: the model's own)",
    )
    sub.add_argument(
        "--schedule",
        type=_schedule,
        default=None,
        action="append" if several_schedules else "store",
        help="passes of each scale: none (one each), default, cosine:N, or counts such as [[1],[1,3],[9],[16]] (default: "
        "the model's own)" + ("; given several times: side by side" if several_schedules else ""),
    )


def _manner(sub) -> None:
    sub.add_argument("--greedy", action="store_true", help="the likeliest token everywhere")
    sub.add_argument(
        "--smooth",
        action="store_true",
        help="mixtures of tokens: smoother images, to look at and not to measure",
    )


def _box(text: str) -> tuple[int, ...]:
    try:
        box = tuple(int(part) for part in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4:
        raise argparse.ArgumentTypeError(f"{text!r}: four whole numbers x0,y0,x1,y1 are wanted")
    return box


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of 0 or more is wanted")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: I/N is wanted, I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of 1 or more is wanted")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:  # what numpy and JAX both take
        raise argparse.ArgumentTypeError(
            f"{text!r}: a whole number from 0 to {2**32 - 1} is wanted"
        )
    return int(text)


def _schedule(text: str):
    """A name, or JSON; what it means is checked against the model's scales."""
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: a list of lists is wanted, such as [[1],[1,3],[9],[16]]"
        ) from None


def _output(text: str) -> str:
    if not text:  # would be the current directory
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def run() -> None:
    """The console command."""
    sys.exit(main())
