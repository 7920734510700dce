"""The command `hmar`: parse, check, call, print. Exit status: 0 done, 2 the user's input is wrong, 1 anything else."""

import argparse
import ctypes
import json
import logging
import os
import pathlib
import sys

from hmar_jax.errors import InputError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_FORMATTER = argparse.RawDescriptionHelpFormatter


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    _quiet_libraries()
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
        args.run(args, overrides) if hasattr(args, "config") else args.run(args)
        return 0
    except InputError as e:
        print(f"hmar {args.command}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hmar {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _quiet_libraries() -> None:
    """The package's own log goes to stderr; the libraries' only where something is wrong."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    log = logging.getLogger("hmar_jax")
    log.addHandler(_TERMINAL)  # does nothing the second time
    log.setLevel(logging.DEBUG)  # a run's log.txt has more
    log.propagate = False


class _Terminal(logging.StreamHandler):
    """Writes to what sys.stderr is at the time."""

    stream = property(lambda self: sys.stderr)

    def __init__(self):
        logging.Handler.__init__(self, logging.INFO)


_TERMINAL = _Terminal()


def _keep_freed_memory() -> None:
    """Tells glibc to keep what a step frees for the next one.

    XLA's CPU backend allocates its temporaries anew each step. By default glibc gives such sizes back to the system at once, and
    faulting them in again took a third of the digits' training time (benchmarks/RESULTS.md).
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc accepts
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 256 << 20)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hmar", description="Hierarchical masked autoregressive image generation in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name, run, help, example):
        sub = commands.add_parser(
            name, help=help, description=help + ".", epilog=f"example:\n  {example}", formatter_class=_FORMATTER,
            allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    for name, what, example in (
            ("train-tokenizer", "train a tokenizer", "hmar train-tokenizer --config=configs/tokenizer.py:digits --workdir=runs/tokenizer"),
            ("train", "train a transformer on a tokenizer", "hmar train --config=configs/hmar.py:digits --workdir=runs/digits")):
        sub = command(name, _train, what, example)
        sub.add_argument("--config", required=True, help="FILE:NAME[,key=value…]; single values also by --config.KEY=VALUE")
        sub.add_argument("--workdir", type=_output, required=True, help="the run's directory; an existing run goes on where it ended")

    sub = command("sample", _sample, "draw pictures of classes", "hmar sample --model=digits --classes=0,3,7 --n=8 --out=grid.png")
    _model(sub)
    sub.add_argument("--classes", default=None, help="ids or names, separated by commas (default: the first ten)")
    sub.add_argument("--n", type=_positive, default=8, help="pictures of each class (default 8)")
    _strength(sub)
    sub.add_argument("--greedy", action="store_true", help="the likeliest token everywhere")
    sub.add_argument("--schedule", type=_schedule, default=None,
                     help="none, default, cosine:N, or counts such as [[1],[1,3],[9],[16]] (default: the model's own)")
    sub.add_argument("--masked_guidance", type=float, default=0.0, help="guidance of masked passes (default 0: none)")
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--out", type=_output, required=True, help="a .png file: a grid with a labelled row for each class")
    sub.add_argument("--npz", type=_output, default=None, help="also write images (uint8), labels and tokens to this .npz file")

    sub = command(
        "evaluate", _evaluate, "judge samples against real pictures", "hmar evaluate --model=digits --reference=digits --features=classifier")
    _model(sub)
    sub.add_argument("--reference", default="digits", help="the data set of real pictures: digits, folder:DIR, tfds:NAME (default digits)")
    sub.add_argument("--features", default="classifier", choices=["classifier"],
                     help="classifier: how an independent classifier reads samples, and nearest neighbours")
    sub.add_argument("--n", type=_positive, default=500, help="samples in all (default 500)")
    _strength(sub)
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--json", type=_output, default=None, help="also write the figures to this file")

    sub = command("info", _info, "tell what a model is", "hmar info --model=digits")
    _model(sub)

    sub = command(
        "convert", _convert, "turn published PyTorch weights into a model directory",
        "hmar convert --torch=var_d16.pth --tokenizer=vae.pth --out=models/var_d16")
    sub.add_argument("--torch", default=None, help="the transformer's .pth file; without it the tokenizer alone is converted")
    sub.add_argument("--tokenizer", required=True, help="the tokenizer's .pth file")
    sub.add_argument("--scales", default=None, help="sides, such as 1,2,3,4,6; needed where the list is not a published one")
    sub.add_argument("--heads", type=_positive, default=None, help="where the weights do not tell (default: as many as blocks)")
    sub.add_argument("--out", type=_output, required=True, help="the directory to make")

    sub = command(
        "export", _export, "turn a finished run into a model directory, without optimizer and checkpoints",
        "hmar export --model=runs/digits --out=models/digits")
    _model(sub)
    sub.add_argument("--half", action="store_true", help="store parameters as float16: half the size")
    sub.add_argument("--licence", default=None, help="what to write into its README")
    sub.add_argument("--out", type=_output, required=True, help="the directory to make")
    return parser


def _model(sub) -> None:
    sub.add_argument("--model", required=True, help="a bundled model (digits), a run directory or a model directory")


def _strength(sub) -> None:
    sub.add_argument("--guidance", type=float, default=None, help="0 is none (default: the model's own)")
    sub.add_argument("--top_k", type=int, default=None, help="0 is off (default: the model's own)")
    sub.add_argument("--top_p", type=float, default=None, help="0 is off (default: the model's own)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of 1 or more is wanted")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:  # what numpy and JAX both take
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 0 to {2**32 - 1} is wanted")
    return int(text)


def _schedule(text: str):
    """A name, or JSON; what it means is checked against the model's scales."""
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a list of lists is wanted, such as [[1],[1,3],[9],[16]]") from None


def _output(text: str) -> str:
    if not text:  # would be the current directory
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def _train(args, overrides) -> None:
    _keep_freed_memory()
    from hmar_jax import configs

    config = configs.load_config(args.config)
    for text in overrides:
        key, _, value = text.removeprefix("--config.").partition("=")
        configs.override(config, key, value)
    commands = {"tokenizer": "train-tokenizer", "next_scale": "train", "masked": "train"}
    task = config.get("task")
    if task not in commands:
        raise InputError(f"config.task={task!r}: known are {', '.join(commands)}")
    if commands[task] != args.command:
        raise InputError(f"config {args.config!r} is for hmar {commands[task]}")

    from hmar_jax.training import experiments, loop

    experiment = experiments.build(config, args.workdir)
    step, steps = int(loop.run(config, experiment, args.workdir).step), experiment.task.steps
    print(f"{args.workdir}: {task} run " + ("complete" if step == steps else f"stopped at step {step} of {steps}"))


def _sample(args) -> None:
    from hmar_jax import files

    for path in filter(None, (args.out, args.npz)):
        files.check_writable(path)
    import io

    import jax
    import numpy as np

    from hmar_jax.sampling import grid, pipeline

    pipe = pipeline.load(args.model)
    spec = pipe.spec
    if spec.transformer is None:
        raise InputError(f"model {args.model!r} is a tokenizer alone: it cannot sample")
    asked = args.classes.split(",") if args.classes is not None else range(min(10, spec.transformer.num_classes))
    classes = [spec.resolve_class(c) for c in asked]
    ids = np.repeat(classes, args.n)
    images, tokens = pipe.sample(
        jax.random.key(args.seed), ids, guidance=args.guidance, top_k=args.top_k, top_p=args.top_p, greedy=args.greedy,
        schedule=args.schedule, masked_guidance=args.masked_guidance,
        return_tokens=True)
    images = np.asarray(images)
    names = [spec.class_names[c] if spec.class_names else str(c) for c in classes]
    picture = io.BytesIO()
    grid.draw(images, columns=args.n, labels=names).save(picture, format="PNG")
    files.write_by_rename(args.out, picture.getvalue())
    if args.npz:
        arrays = io.BytesIO()
        np.savez(arrays, images=(images * 255).round().astype(np.uint8), labels=ids, tokens=np.asarray(tokens))
        files.write_by_rename(args.npz, arrays.getvalue())
    print(f"{args.out}: {len(ids)} pictures of {len(classes)} classes" + (f"; {args.npz}" if args.npz else ""))


def _evaluate(args) -> None:
    from hmar_jax import files

    if args.json:
        files.check_writable(args.json)
    import jax
    import numpy as np

    from hmar_jax.data.sources import open_source
    from hmar_jax.evaluation.classifier import read_all
    from hmar_jax.evaluation.report import digit_report, format_report
    from hmar_jax.sampling import pipeline

    pipe = pipeline.load(args.model)
    if pipe.spec.transformer is None:
        raise InputError(f"model {args.model!r} is a tokenizer alone: it cannot sample")
    real = [open_source(args.reference, split) for split in ("train", "validate")]
    if real[0].num_classes != pipe.spec.transformer.num_classes:
        raise InputError(
            f"reference {args.reference!r} has {real[0].num_classes} classes, model {args.model!r} has "
            f"{pipe.spec.transformer.num_classes}")
    ids = np.arange(args.n) % pipe.spec.transformer.num_classes
    images = np.asarray(pipe.sample(
        jax.random.key(args.seed), ids, guidance=args.guidance, top_k=args.top_k, top_p=args.top_p))
    report = digit_report(images, ids, *[read_all(r) for r in real], seed=args.seed)
    if args.json:
        files.write_by_rename(args.json, json.dumps(report, indent=1) + "\n")
    print(format_report(report))


def _info(args) -> None:
    from hmar_jax.sampling import pipeline

    spec, params = pipeline.load_parts(args.model)
    import jax

    count = lambda part: sum(x.size for x in jax.tree.leaves(params.get(part, {})))
    t = spec.tokenizer
    scales = t.scale_list
    lines = [
        ("model", f"{args.model}: {spec.kind}"),
        ("pictures", f"{t.image_side} x {t.image_side} pixels, {scales.length} tokens"),
        ("scales", ", ".join(f"{s}x{s}" for s in scales.sides)),
        ("tokenizer", f"{count('tokenizer'):,} parameters, codebook {t.vocab_size} x {t.z_channels}"),
    ]
    if spec.transformer is not None:
        m = spec.transformer
        lines += [
            ("transformer", f"{count('transformer'):,} parameters, depth {m.depth}, width {m.width}, {m.heads} heads, {m.pattern} attention"),
            *([("stage 2", f"{count('masked'):,} parameters, depth {spec.masked_depth}")] if spec.masked_depth else []),
            ("classes", f"{m.num_classes}" + (f": {', '.join(spec.class_names[:10])}{', …' if len(spec.class_names) > 10 else ''}" if spec.class_names else "")),
            ("sampling", f"guidance {spec.guidance:g}, top-k {spec.top_k or 'off'}, top-p {spec.top_p or 'off'}"),
        ]
    lines += [(name, text) for name, text in (("origin", spec.origin), ("licence", spec.licence)) if text]
    for name, text in lines:
        print(f"{name:12} {text}")


def _convert(args) -> None:
    from hmar_jax import checkpoints
    from hmar_jax.sampling import pipeline
    from hmar_jax.scales import ScaleList

    checkpoints.check_new_model(args.out)
    scales = ScaleList.parse(args.scales).sides if args.scales else None
    try:
        spec, params = pipeline.torch_parts(args.torch, tokenizer=args.tokenizer, scales=scales, heads=args.heads)
    except ImportError as e:
        raise InputError(str(e)) from None
    readme = f"# {pathlib.Path(args.out).name}\n\n{spec.kind}, {spec.origin}.\n\nLicence: {spec.licence}.\n"
    checkpoints.save_model(args.out, spec.to_json(), params, readme)
    print(f"{args.out}: {spec.kind}, {spec.origin}. {spec.licence}.")


def _export(args) -> None:
    import dataclasses

    import jax
    import numpy as np

    from hmar_jax import checkpoints
    from hmar_jax.sampling import pipeline

    checkpoints.check_new_model(args.out)
    spec, params = pipeline.load_parts(args.model)
    if args.licence is not None:
        spec = dataclasses.replace(spec, licence=args.licence)
    if args.half:
        params = jax.tree.map(lambda x: np.asarray(x).astype(np.float16) if np.asarray(x).dtype == np.float32 else x, params)
    readme = f"# {pathlib.Path(args.out).name}\n\n{spec.kind}, {spec.origin}.\n" + (f"\nLicence: {spec.licence}.\n" if spec.licence else "")
    checkpoints.save_model(args.out, spec.to_json(), params, readme)
    print(f"{args.out}: {spec.kind}")


def run() -> None:
    """The console command."""
    sys.exit(main())
