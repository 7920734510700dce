"""The command `hmar`: its arguments. What it does with them is in commands.py.

Exit status: 0 done, 2 the user's input is wrong, 1 anything else.
"""

import argparse
import errno
import os
import sys
import warnings

from hmar_jax import families, settings
from hmar_jax.cli import arguments, commands
from hmar_jax.errors import InputError
from hmar_jax.logging import show_log

_MODEL_HELP = "a bundled model (digits), a run directory or a model directory"
_SEED_HELP = "of the random numbers (default 0)"
_CONFIG_HELP = "FILE:NAME[,key=value...]; single values also by --config.KEY=VALUE"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    show_log()
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    has_config = hasattr(args, "config")
    overrides = [r for r in rest if r.startswith("--config.")] if has_config else []
    unknown = [r for r in rest if r not in overrides]
    try:
        for text in overrides:  # first: of "--config.KEY VALUE", the value would be called unknown
            if "=" not in text:
                raise InputError(f"overrides must be --config.KEY=VALUE; got {text!r}")
        if unknown:
            raise InputError(f"unknown argument {unknown[0]!r} (see hmar {args.command} --help)")
        return (args.run(args, overrides) if has_config else args.run(args)) or 0
    except InputError as e:
        print(f"hmar {args.command}: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:  # a run that diverged
        print(f"hmar {args.command}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"hmar {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = e.filename or "a file"
        print(f"hmar {args.command}: cannot write {what}: {e.strerror}", file=sys.stderr)
        return 2


def run() -> None:
    """The console command."""
    warnings.formatwarning = _format_warning
    sys.exit(main())


def _format_warning(message, category, filename, lineno, line=None) -> str:
    """A deprecated name in one line; other warnings as usual."""
    if category is FutureWarning:
        return f"hmar: {message}\n"
    return _format_other_warning(message, category, filename, lineno, line)


_format_other_warning = warnings.formatwarning


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
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
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    _add_tokenize(command)
    _add_train(command)
    _add_plan(command)
    _add_sample(command)
    _add_edit(command)
    _add_evaluate(command)
    _add_model(command("info", commands.info, "describe a model", "hmar info --model=digits"))
    _add_convert(command)
    _add_export(command)
    return parser


def _add_tokenize(command) -> None:
    sub = command(
        "tokenize",
        commands.tokenize,
        "encode a data set with a frozen autoencoder, to train from tokens:DIR",
        "hmar tokenize --tokenizer=runs/tokenizer --data=folder:IMAGES --crops=4 --out=tokens\n\n"
        "Safe to interrupt: rerun the same command to resume. On a finished set, more --crops are "
        "added.",
    )
    sub.add_argument("--tokenizer", required=True, help=_MODEL_HELP)
    sub.add_argument("--data", required=True, help="folder:DIR, tfds:NAME or digits")
    sub.add_argument(
        "--out", type=arguments.output, required=True, help="the directory to make, also gs://"
    )
    sub.add_argument(
        "--crops",
        type=arguments.positive,
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
        help="of resize_crop: shorter side before the crop / the crop's (default 1.125)",
    )
    sub.add_argument(
        "--flip", action="store_true", help="mirror half of the crops; not in the published recipe"
    )
    sub.add_argument("--seed", type=arguments.seed, default=0, help="of the crops")
    sub.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default=None,
        help="of the convolutions (default: the tokenizer's own)",
    )
    sub.add_argument(
        "--batch_size",
        type=arguments.positive,
        default=64,
        help="images encoded at once, on all devices together (default 64)",
    )
    sub.add_argument(
        "--shard_size",
        type=arguments.positive,
        default=8192,
        help="images in a file, which is what a kill can cost (default 8192)",
    )
    sub.add_argument(
        "--threads", type=arguments.positive, default=2, help="that read images (default 2)"
    )
    sub.add_argument(
        "--workers",
        type=arguments.whole,
        default=0,
        help="processes that read images, each with --threads threads (default 0: this one alone)",
    )
    sub.add_argument(
        "--part",
        type=arguments.part,
        default=None,
        help="I/N, from 0/N to N-1/N: make every N-th file, where N commands share the work "
        "(default: by jax.distributed, else all)",
    )
    sub.add_argument(
        "--verify",
        action="store_true",
        help="check the checksums of existing files; write damaged ones again",
    )


def _add_train(command) -> None:
    for name, what, example in (
        (
            "train-tokenizer",
            "train a tokenizer",
            "hmar train-tokenizer --config=configs/tokenizer.py:digits --workdir=runs/tokenizer",
        ),
        (
            "train",
            "train a generative model on a tokenizer",
            "hmar train --config=configs/hmar.py:digits --workdir=runs/digits",
        ),
    ):
        sub = command(
            name,
            commands.train,
            what,
            f"{example}\n\nSafe to interrupt: rerun the same command to resume.",
        )
        sub.add_argument("--config", required=True, help=_CONFIG_HELP)
        sub.add_argument(
            "--workdir",
            type=arguments.output,
            required=True,
            help="the run's directory; an existing run resumes where it ended",
        )
        hosts = sub.add_argument_group(
            "several processes",
            "on SLURM, Cloud TPU, GKE, Open MPI and Kubernetes they find each other; elsewhere "
            "give each of them the first three options. See docs/training_at_scale.md",
        )
        hosts.add_argument("--coordinator", default=None, help="HOST:PORT of the first process")
        hosts.add_argument(
            "--num_processes",
            type=arguments.positive,
            default=None,
            help="how many; 1: alone, whatever the cluster says",
        )
        hosts.add_argument(
            "--process_id", type=arguments.whole, default=None, help="of this process, from 0"
        )
        hosts.add_argument(
            "--local_devices",
            type=arguments.numbers,
            default=None,
            help="numbers of this host's GPUs that the process takes, such as 0,1 (default: on "
            "SLURM and Open MPI the one of its number on the host, elsewhere all)",
        )


def _add_plan(command) -> None:
    sub = command(
        "plan",
        commands.plan,
        "say whether a run fits on a TPU pod or on GPUs, and what a step costs, without them",
        "hmar plan --config=configs/hmar.py:d30_256 --topology=v5p:4x4x4 --config.mesh.fsdp=4\n\n"
        "exit status: 0 it fits, 1 it does not, 2 the input is wrong",
    )
    sub.add_argument("--config", required=True, help=_CONFIG_HELP)
    sub.add_argument(
        "--topology",
        required=True,
        help="CHIP:AxB[xC] or CHIP:CHIPS of TPUs or a name of Cloud TPU or GKE, GPU:N or "
        "GPU:MACHINESxN: v5p:4x4x4, v5e:64, v5litepod-64, h100:8, h100:4x8",
    )
    sub.add_argument(
        "--json",
        nargs="?",
        type=arguments.output,
        const="-",
        default=None,
        help="print the plan as JSON; --json=FILE writes it to a file, beside the text",
    )


def _add_sample(command) -> None:
    sub = command(
        "sample",
        commands.sample,
        "sample images of classes",
        "hmar sample --model=digits --classes=0,3,7 --n=8 --out=grid.png",
    )
    _add_model(sub)
    sub.add_argument(
        "--classes",
        default=None,
        help="ids or names, separated by commas (default: the first ten)",
    )
    sub.add_argument(
        "--n", type=arguments.positive, default=8, help="images of each class (default 8)"
    )
    sub.add_argument("--seed", type=arguments.seed, default=0, help=_SEED_HELP)
    sub.add_argument(
        "--out",
        type=arguments.output,
        required=True,
        help="a .png file: a grid with a labelled row for each class",
    )
    sub.add_argument(
        "--npz",
        type=arguments.output,
        default=None,
        help="also write images (uint8), labels and tokens to this .npz file (of one schedule)",
    )
    _add_options(sub, "SamplingConfig", several=("schedule",))


def _add_edit(command) -> None:
    sub = command(
        "edit",
        commands.edit,
        "regenerate a region of an image, without extra training",
        "hmar edit --model=digits --image=seven.png --box=0,11,32,21 --class=7 --out=edited.png "
        "--show=before_and_after.png",
    )
    _add_model(sub)
    sub.add_argument(
        "--image", required=True, help="an image file; of another size than the model's: resized"
    )
    region = sub.add_mutually_exclusive_group(required=True)
    region.add_argument(
        "--box",
        type=arguments.box,
        default=None,
        help="x0,y0,x1,y1 in pixels of the image; x1 and y1 are the first outside",
    )
    region.add_argument(
        "--mask", default=None, help="an image file of the same size, white where new content goes"
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
        help="class of the new content: an id or name (default: no class)",
    )
    sub.add_argument("--seed", type=arguments.seed, default=0, help=_SEED_HELP)
    sub.add_argument(
        "--out", type=arguments.output, required=True, help="a .png file: the edited image"
    )
    sub.add_argument(
        "--show",
        type=arguments.output,
        default=None,
        help="a .png file: before, mask and after, side by side",
    )
    sub.add_argument("--coarse", choices=["keep", "free"], default=None, help=argparse.SUPPRESS)
    commands.add_composite_options(sub)
    _add_options(sub, "EditingConfig")


def _add_evaluate(command) -> None:
    sub = command(
        "evaluate",
        commands.evaluate,
        "evaluate samples against real images",
        "hmar evaluate --model=digits --reference=digits --features=classifier",
    )
    _add_model(sub)
    sub.add_argument(
        "--reference",
        default="digits",
        help="the data set of real images: digits, folder:DIR, tfds:NAME (default digits)",
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
    sub.add_argument("--seed", type=arguments.seed, default=0, help=_SEED_HELP)
    sub.add_argument(
        "--json", type=arguments.output, default=None, help="also write the metrics to this file"
    )
    _add_options(sub, "SamplingConfig")


def _add_convert(command) -> None:
    sub = command(
        "convert",
        commands.convert,
        "convert published PyTorch weights to a model directory",
        "hmar convert --torch=var_d16.pth --tokenizer=vae.pth --out=models/var_d16",
    )
    sub.add_argument(
        "--torch",
        default=None,
        help="the .pth file of the model; without it the tokenizer alone is converted",
    )
    sub.add_argument(
        "--family",
        default=families.DEFAULT_FAMILY,
        help=f"whose weights they are: {', '.join(families.FAMILIES)}",
    )
    sub.add_argument("--out", type=arguments.output, required=True, help="the directory to make")
    _add_options(sub, "ConvertConfig")


def _add_export(command) -> None:
    sub = command(
        "export",
        commands.export,
        "export a run to a model directory, without optimizer and checkpoints",
        "hmar export --model=runs/digits --out=models/digits",
    )
    _add_model(sub)
    sub.add_argument(
        "--half", action="store_true", help="store parameters as float16: half the size"
    )
    sub.add_argument("--licence", default=None, help="what its README says of the licence")
    sub.add_argument("--out", type=arguments.output, required=True, help="the directory to make")


def _add_model(sub) -> None:
    sub.add_argument("--model", required=True, help=_MODEL_HELP)
    sub.add_argument(
        "--checkpoint",
        type=arguments.checkpoint,
        default="latest",
        help="of a run: latest (default), best (of least validation loss) or a step",
    )


def _add_options(sub, kind: str, several: tuple[str, ...] = ()) -> None:
    """The options that each family declares; those of the same name are shared."""
    for name, cls in families.option_classes(kind).items():
        group = sub.add_argument_group(f"options of {name} models")
        settings.add_arguments(group, cls, several=several)
