"""The command `hmar`: its arguments. What it does with them is in commands.py.

Exit status: 0 done, 2 the user's input is wrong, 1 anything else; 130, 129 and 143 after Ctrl-C,
SIGHUP and SIGTERM.
"""

import argparse
import contextlib
import difflib
import errno
import io
import os
import sys
import warnings

from hmar_jax import families
from hmar_jax.cli import arguments, commands, environment, sampling_arguments
from hmar_jax.errors import InputError
from hmar_jax.interruption import Interrupted, Interruptions, end_now
from hmar_jax.logging import show_log

_CONFIG_HELP = "FILE:NAME[,key=value...]; single values also by --config.KEY=VALUE"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        return _main(argv)
    except Interrupted as e:
        return e.status


def _main(argv: list[str] | None) -> int:
    """Runs one command; returns the exit status.

    Raises:
      Interrupted: a signal ended it, perhaps in the middle of a computation.
    """
    show_log()
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.error(f"a COMMAND is required: {', '.join(args.commands)}")
    has_config = hasattr(args, "config")
    overrides = [r for r in rest if r.startswith("--config.")] if has_config else []
    unknown = [r for r in rest if r not in overrides]
    with Interruptions() as interruptions:
        args.interruptions = interruptions
        try:
            return _run_command(args, overrides, unknown, has_config)
        except Exception as e:
            # In the middle of an import, a signal's exception may become another one.
            if interruptions.received is None:
                raise
            interrupted = Interrupted(interruptions.received)
            interrupted.__cause__ = e
        except Interrupted as e:
            interrupted = e
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"hmar {args.command}: {interrupted}", file=sys.stderr)
    raise interrupted


def _run_command(args, overrides: list[str], unknown: list[str], has_config: bool) -> int:
    try:
        for text in overrides:  # first: of "--config.KEY VALUE", the value would be called unknown
            if "=" not in text:
                raise InputError(f"overrides must be --config.KEY=VALUE; got {text!r}")
        if unknown:
            raise InputError(_describe_unknown(unknown[0], args))
        environment.check_current_directory()
        return (args.run(args, overrides) if has_config else args.run(args)) or 0
    except InputError as e:
        print(f"hmar {args.command}: {e.for_command_line()}", file=sys.stderr)
        return 2
    except (RuntimeError, AssertionError):
        missing = environment.describe_missing_devices()
        if missing is None:
            raise
        print(f"hmar {args.command}: {missing}", file=sys.stderr)
        return 2
    except FloatingPointError as e:  # a run that diverged
        print(f"hmar {args.command}: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe, such as head, has ended
        _discard_stdout()
        return 1
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = e.filename or "a file"
        print(f"hmar {args.command}: cannot write {what}: {e.strerror}", file=sys.stderr)
        return 2


def _describe_unknown(given: str, args: argparse.Namespace) -> str:
    name = given.partition("=")[0]
    similar = difflib.get_close_matches(name, args.options, n=1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    return f"unknown argument {given!r}{hint} (see hmar {args.command} --help)"


def run() -> None:
    """The console command."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):  # names of files and classes may be no text at all
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning
    try:
        status = _main(None)
    except Interrupted as e:
        end_now(e.status)
    except SystemExit as e:  # --help, --version, or wrong arguments
        status = e.code
    sys.exit(_flush_stdout() or status)


def _flush_stdout() -> int:
    """Writes what was printed, which Python otherwise does too late to say anything sensible.

    Returns:
      0, or the exit status if it cannot be written.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return 1
    except OSError as e:
        _discard_stdout()
        print(f"hmar: cannot write to the standard output: {e.strerror}", file=sys.stderr)
        return 2
    return 0


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_streams() -> None:
    """Opens those that the caller has closed (`2>&-`).

    Otherwise the next file that is opened, such as log.txt, takes the number of the missing one,
    and libraries write their messages into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            setattr(sys, name, open(number, mode, closefd=False))


def _format_warning(message, category, filename, lineno, line=None) -> str:
    """A deprecated name in one line; other warnings as usual."""
    if category is FutureWarning:
        return f"hmar: {message}\n"
    return _format_other_warning(message, category, filename, lineno, line)


_format_other_warning = warnings.formatwarning


class _Version(argparse.Action):
    """Prints versions and devices, and ends. JAX is imported only then."""

    def __call__(self, parser, *_):
        print(environment.describe_versions())
        parser.exit()


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
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the versions and the devices, and exit"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name, run, help, example):
        sub = subparsers.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run, options=sub._option_string_actions)
        return sub

    _add_tokenize(command)
    _add_train(command)
    _add_plan(command)
    sampling_arguments.add_sample(command)
    sampling_arguments.add_edit(command)
    sampling_arguments.add_evaluate(command)
    arguments.add_model(
        command("info", commands.info, "describe a model", "hmar info --model=digits")
    )
    _add_convert(command)
    _add_export(command)
    parser.set_defaults(commands=tuple(subparsers.choices))
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
    sub.add_argument("--tokenizer", type=arguments.path, required=True, help=arguments.MODEL_HELP)
    sub.add_argument(
        "--data", required=True, help="folder:DIR, zip:FILE, hf:NAME_OR_DIR, tfds:NAME or digits"
    )
    sub.add_argument(
        "--out", type=arguments.path, required=True, help="the directory to make, also gs://"
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
    arguments.add_source_options(sub)


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
            f"{example}\n\nSafe to interrupt: rerun the same command to resume.\n"
            "--extend continues a run with changed settings.",
        )
        sub.add_argument("--config", type=arguments.path, required=True, help=_CONFIG_HELP)
        sub.add_argument(
            "--workdir",
            type=arguments.path,
            required=True,
            help="the run's directory; an existing run resumes where it ended",
        )
        sub.add_argument(
            "--allow_data_change",
            action="store_true",
            help="resume a run also where images were added, removed or changed; the run's "
            "config.json records it. A data set that was only moved needs no option",
        )
        sub.add_argument(
            "--extend",
            action="store_true",
            help="continue a finished or unfinished run under a changed config (steps, learning "
            "rate, batch size, data source, ...); the run's config.json records the change. See "
            "docs/extending_runs.md",
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
    sub.add_argument("--config", type=arguments.path, required=True, help=_CONFIG_HELP)
    sub.add_argument(
        "--topology",
        required=True,
        help="CHIP:AxB[xC] or CHIP:CHIPS of TPUs or a name of Cloud TPU or GKE, GPU:N or "
        "GPU:MACHINESxN: v5p:4x4x4, v5e:64, v5litepod-64, h100:8, h100:4x8",
    )
    sub.add_argument(
        "--json",
        nargs="?",
        type=arguments.path,
        const="-",
        default=None,
        help="print the plan as JSON; --json=FILE writes it to a file, beside the text",
    )


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
        help="the .pth or .safetensors file of the model; without it the tokenizer alone is "
        "converted",
    )
    sub.add_argument(
        "--family",
        default=families.DEFAULT_FAMILY,
        help=f"whose weights they are: {', '.join(families.FAMILIES)}",
    )
    _add_new_model(sub)
    arguments.add_options(sub, "ConvertConfig")


def _add_export(command) -> None:
    sub = command(
        "export",
        commands.export,
        "export a run to a model directory, without optimizer and checkpoints",
        "hmar export --model=runs/digits --out=models/digits",
    )
    arguments.add_model(sub)
    sub.add_argument(
        "--half", action="store_true", help="store parameters as float16: half the size"
    )
    sub.add_argument("--licence", default=None, help="what its README says of the licence")
    _add_new_model(sub)


def _add_new_model(sub) -> None:
    sub.add_argument("--out", type=arguments.path, required=True, help="the directory to make")
    sub.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the model that --out contains, when the new one is complete",
    )
