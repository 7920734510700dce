"""The command `hmar`: parse, check, call, print. Exit status: 0 done, 2 the user's input is wrong, 1 anything else."""

import argparse
import ctypes
import dataclasses
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

    sub = command(
        "tokenize", _tokenize, "turn a data set into tokens, for training from tokens:DIR",
        "hmar tokenize --tokenizer=runs/tokenizer --data=folder:PICTURES --crops=4 --out=tokens\n\n"
        "Killed at any moment, the same command goes on; on a finished set, more --crops are added.")
    sub.add_argument("--tokenizer", required=True, help="a bundled model, a run directory or a model directory")
    sub.add_argument("--data", required=True, help="folder:DIR, tfds:NAME or digits")
    sub.add_argument("--out", type=_output, required=True, help="the directory to make, also gs://")
    sub.add_argument("--crops", type=_positive, default=1, help="random crops of each training picture (default 1); epochs take turns with them")
    sub.add_argument("--splits", default="train,validate", help="default train,validate; a validation picture has its centre crop alone")
    sub.add_argument("--transform", default="resize_crop", help="resize_crop (default), random_crop, or affine for digits")
    sub.add_argument("--resize_ratio", type=float, default=1.125, help="of resize_crop: shorter side before the crop, over the crop's (default 1.125)")
    sub.add_argument("--flip", action="store_true", help="mirror half of the crops; the published recipe does not")
    sub.add_argument("--seed", type=_seed, default=0, help="of the crops")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="of the convolutions (default: the tokenizer's own)")
    sub.add_argument("--batch_size", type=_positive, default=64, help="pictures encoded at once, on all devices together (default 64)")
    sub.add_argument("--shard_size", type=_positive, default=8192, help="pictures in a file, which is what a kill can cost (default 8192)")
    sub.add_argument("--threads", type=_positive, default=2, help="that read pictures (default 2) …")
    sub.add_argument("--workers", type=_whole, default=0, help="… in each of so many processes (default 0: this process alone)")
    sub.add_argument("--part", type=_part, default=None,
                     help="I/N, from 0/N to N-1/N: make every N-th file, where N commands share the work (default: by jax.distributed, else all)")
    sub.add_argument("--verify", action="store_true", help="check the checksums of what is there; make damaged files anew")

    for name, what, example in (
            ("train-tokenizer", "train a tokenizer", "hmar train-tokenizer --config=configs/tokenizer.py:digits --workdir=runs/tokenizer"),
            ("train", "train a transformer on a tokenizer", "hmar train --config=configs/hmar.py:digits --workdir=runs/digits")):
        sub = command(name, _train, what, example)
        sub.add_argument("--config", required=True, help="FILE:NAME[,key=value…]; single values also by --config.KEY=VALUE")
        sub.add_argument("--workdir", type=_output, required=True, help="the run's directory; an existing run goes on where it ended")
        hosts = sub.add_argument_group(
            "several processes", "on SLURM, Cloud TPU, GKE, Open MPI and Kubernetes they find each other; elsewhere give each of them "
            "the first three. See docs/training_at_scale.md")
        hosts.add_argument("--coordinator", default=None, help="HOST:PORT of the first process")
        hosts.add_argument("--num_processes", type=_positive, default=None, help="how many; 1: alone, whatever the cluster says")
        hosts.add_argument("--process_id", type=_whole, default=None, help="which one this is, from 0")
        hosts.add_argument("--local_devices", type=_numbers, default=None,
                           help="numbers of this host's GPUs that the process takes, such as 0,1 (default: on SLURM and Open MPI the one "
                           "of its number on the host, elsewhere all)")

    sub = command(
        "plan", _plan, "tell whether a run fits on a TPU pod or on GPUs, and what a step costs, without them",
        "hmar plan --config=configs/hmar.py:d30_256 --topology=v5p:4x4x4 --config.mesh.data=-1 --config.mesh.fsdp=4\n\n"
        "exit status: 0 it fits, 1 it does not, 2 the input is wrong")
    sub.add_argument("--config", required=True, help="FILE:NAME[,key=value…]; single values also by --config.KEY=VALUE")
    sub.add_argument("--topology", required=True, help="CHIP:AxB[xC] of TPUs, GPU:N or GPU:MACHINESxN: v5p:4x4x4, v5e:8x8, h100:8, h100:4x8, …")
    sub.add_argument("--json", nargs="?", type=_output, const="-", default=None, help="print the figures as JSON; --json=FILE writes them to a file, beside the words")

    sub = command("sample", _sample, "draw pictures of classes", "hmar sample --model=digits --classes=0,3,7 --n=8 --out=grid.png")
    _model(sub)
    sub.add_argument("--classes", default=None, help="ids or names, separated by commas (default: the first ten)")
    sub.add_argument("--n", type=_positive, default=8, help="pictures of each class (default 8)")
    _strength(sub, several_schedules=True)
    _manner(sub)
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--out", type=_output, required=True, help="a .png file: a grid with a labelled row for each class")
    sub.add_argument("--npz", type=_output, default=None,
                     help="also write images (uint8), labels and tokens to this .npz file (of one schedule)")

    sub = command(
        "edit", _edit, "draw new content into a part of a picture, without training",
        "hmar edit --model=digits --image=seven.png --box=0,11,32,21 --class=7 --out=edited.png --show=before_and_after.png")
    _model(sub)
    sub.add_argument("--image", required=True, help="a picture file; one of another size than the model's is resized")
    where = sub.add_mutually_exclusive_group(required=True)
    where.add_argument("--box", type=_box, default=None, help="x0,y0,x1,y1 in pixels of the picture, x1 and y1 the first outside")
    where.add_argument("--mask", default=None, help="a picture file of the same size, white where new content goes")
    sub.add_argument("--mode", choices=["inpaint", "outpaint"], default="inpaint",
                     help="inpaint: box or mask is made new (default); outpaint: it stays, and all around it is made new")
    sub.add_argument("--class", dest="class_id", default=None, help="what the new content is of: an id or name (default: no class)")
    sub.add_argument("--coarse", choices=["keep", "free"], default=None,
                     help="the tokens of scales up to 2x2, which hold the layout: kept, or drawn anew (default: kept without --class)")
    sub.add_argument("--ring", type=_whole, default=0, help="cells around the hole that are drawn anew too (default 0)")
    sub.add_argument("--feather", type=float, default=0.0, help="pixels inside the hole over which old and new are mixed (default 0)")
    sub.add_argument("--no_paste", action="store_true", help="leave all pixels to the decoder, those outside the hole too")
    _strength(sub)
    _manner(sub)
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--out", type=_output, required=True, help="a .png file: the edited picture")
    sub.add_argument("--show", type=_output, default=None, help="a .png file: before, mask and after, side by side")

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
    sub.add_argument("--torch", default=None,
                     help="the .pth file of stage 1, VAR, stage 2 or the combined model; without it the tokenizer alone is converted")
    sub.add_argument("--masked", default=None, help="the .pth file of a stage 2, where --torch is its stage 1")
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


def _plan(args, overrides) -> int:
    from hmar_jax import chips

    topology = chips.parse(args.topology)
    from hmar_jax import configs, files, plan

    if args.json not in (None, "-"):
        files.check_writable(args.json)

    plan.prepare_environment()
    config, stage1 = configs.load_config(args.config), plan.stage1_of(args.config)
    for text in overrides:
        key, value = text.removeprefix("--config.").split("=", 1)
        configs.override(config, key, value)
    found = plan.make_plan(config, topology, name=" ".join([args.config, *overrides]), stage1=stage1)
    if args.json == "-":
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(plan.report(found))
        if args.json:
            files.write_by_rename(args.json, json.dumps(found.to_json(), indent=1) + "\n")
    return 0 if found.fits else 1


def _model(sub) -> None:
    sub.add_argument("--model", required=True, help="a bundled model (digits), a run directory or a model directory")
    sub.add_argument("--checkpoint", type=_checkpoint, default="latest",
                     help="of a run: latest (default), best (of least validation loss) or a step")


def _checkpoint(text: str) -> int | str:
    if text in ("latest", "best"):
        return text
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: latest, best or the number of a step is wanted")
    return int(text)


def _strength(sub, several_schedules: bool = False) -> None:
    sub.add_argument("--guidance", type=float, default=None, help="0 is none (default: the model's own)")
    sub.add_argument("--top_k", type=int, default=None, help="0 is off (default: the model's own)")
    sub.add_argument("--top_p", type=float, default=None, help="0 is off (default: the model's own)")
    sub.add_argument("--masked_guidance", type=float, default=None, help="guidance of masked passes, 0 is none (default: the model's own)")
    sub.add_argument("--confidence_noise", type=float, default=None,
                     help="chance in the order in which masked passes fix tokens, 0 is none (default: the model's own)")
    sub.add_argument("--schedule", type=_schedule, default=None, action="append" if several_schedules else "store",
                     help="passes of each scale: none (one each), default, cosine:N, or counts such as [[1],[1,3],[9],[16]] (default: "
                     "the model's own)" + ("; given several times: side by side" if several_schedules else ""))


def _manner(sub) -> None:
    sub.add_argument("--greedy", action="store_true", help="the likeliest token everywhere")
    sub.add_argument("--smooth", action="store_true", help="mixtures of tokens: smoother pictures, to look at and not to measure")


def _sampling_options(args) -> dict:
    names = ("guidance", "top_k", "top_p", "masked_guidance", "confidence_noise", "greedy", "smooth")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


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

    from hmar_jax import distributed

    distributed.initialize(args.coordinator, args.num_processes, args.process_id, args.local_devices)
    if not distributed.is_first():
        _TERMINAL.setLevel(logging.WARNING)
    from hmar_jax.training import experiments, loop

    experiment, error = None, None
    try:
        experiment = experiments.build(config, args.workdir)
    except InputError as e:
        error = e
    distributed.raise_together(error)  # where one cannot begin, the others should not wait for it
    step, steps = int(loop.run(config, experiment, args.workdir).step), experiment.task.steps
    if distributed.is_first():
        print(f"{args.workdir}: {task} run " + ("complete" if step == steps else f"stopped at step {step} of {steps}"))


def _tokenize(args) -> None:
    _keep_freed_memory()
    import jax

    from hmar_jax import distributed
    from hmar_jax.data import tokenize
    from hmar_jax.data.pipeline import Transform
    from hmar_jax.data.sources import SPLITS, open_source
    from hmar_jax.sampling import pipeline

    splits = args.splits.split(",")
    if not set(splits) <= set(SPLITS):
        raise InputError(f"--splits={args.splits}: train, validate or both are wanted")
    if args.part is None:
        distributed.initialize()
    spec, params = pipeline.load_parts(args.tokenizer)
    config = dataclasses.replace(spec.tokenizer, **({"dtype": args.dtype} if args.dtype else {}))
    transform = Transform(config.image_side, args.transform, resize_ratio=args.resize_ratio, flip=args.flip)
    sources = {split: open_source(args.data, split, need_classes=True) for split in SPLITS if split in splits}
    part = args.part or (jax.process_index(), jax.process_count())
    info = tokenize.describe(
        args.tokenizer, config, params["tokenizer"], args.data, sources, transform, crops=args.crops, seed=args.seed,
        shard_size=args.shard_size)
    encode, batch_size = tokenize.make_encoder(config, params["tokenizer"], args.batch_size, jax.local_devices())
    info = tokenize.write_token_set(
        args.out, encode, sources, transform, info, batch_size=batch_size, part=part, threads=args.threads, workers=args.workers,
        verify=args.verify, progress=True)
    if not info.complete:
        missing, total = tokenize.count_unfinished(args.out, info)
        print(f"{args.out}: part {part[0]}/{part[1]} is done; {missing} of {total} files are still to be made by other parts")
        return
    told = [
        f"{split.pictures - len(split.broken)} pictures to {name}" + (f" in {split.crops} crops" if split.crops > 1 else "")
        + (f" ({len(split.broken)} could not be read)" if split.broken else "") for name, split in info.splits.items()]
    size = sum(shard["bytes"] for split in info.splits.values() for shard in split.shards)
    print(f"{args.out}: {', '.join(told)}; {len(info.class_names)} classes, {size / 1e6:.1f} MB, tokenizer {info.fingerprint}")


def _sample(args) -> None:
    from hmar_jax import files

    for path in filter(None, (args.out, args.npz)):
        files.check_writable(path)
    import io

    import jax
    import numpy as np

    from hmar_jax.sampling import grid, pipeline

    pipe = pipeline.load(args.model, devices=jax.devices(), checkpoint=args.checkpoint)
    spec = pipe.spec
    if spec.transformer is None:
        raise InputError(f"model {args.model!r} is a tokenizer alone: it cannot sample")
    asked = args.classes.split(",") if args.classes is not None else range(min(10, spec.transformer.num_classes))
    classes = [spec.resolve_class(c) for c in asked]
    schedules = args.schedule or [None]
    if args.npz and len(schedules) > 1:
        raise InputError(f"--npz takes the samples of one schedule, --schedule is given {len(schedules)} times")
    for schedule in schedules:
        pipe.schedule(schedule)  # is it one? before the first is drawn
    ids = np.repeat(classes, args.n)
    drawn = [
        pipe.sample(jax.random.key(args.seed), ids, schedule=schedule, return_tokens=True, **_sampling_options(args))
        for schedule in schedules]
    images = np.stack([np.asarray(images) for images, _ in drawn])  # (schedules, classes n, h, w, 3)
    rows = images.reshape(len(schedules), len(classes), args.n, *images.shape[2:]).swapaxes(0, 1)
    names = [spec.class_names[c] if spec.class_names else str(c) for c in classes]
    titles = [f"schedule {args.schedule[i]}" for i in range(len(schedules))] if len(schedules) > 1 else ()
    _write_png(args.out, grid.draw(rows.reshape(-1, *images.shape[2:]), columns=len(schedules) * args.n, labels=names, titles=titles))
    if args.npz:
        arrays = io.BytesIO()
        np.savez(arrays, images=(images[0] * 255).round().astype(np.uint8), labels=ids, tokens=np.asarray(drawn[0][1]))
        files.write_by_rename(args.npz, arrays.getvalue())
    print(f"{args.out}: {images.shape[0] * len(ids)} pictures of {len(classes)} classes" + (f"; {args.npz}" if args.npz else ""))


def _write_png(path: str, picture) -> None:
    import io

    from hmar_jax import files

    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    files.write_by_rename(path, buffer.getvalue())


def _edit(args) -> None:
    from hmar_jax import files

    for path in filter(None, (args.out, args.show)):
        files.check_writable(path)
    import warnings

    import jax
    import numpy as np
    from PIL import Image

    from hmar_jax.sampling import editing, grid, pipeline

    image = _read_picture("--image", args.image)  # uint8 (h, w, 3)
    if args.box:
        hole = editing.box_hole(args.box, *image.shape[:2])
    else:
        mask = _read_picture("--mask", args.mask)
        if mask.shape != image.shape:
            raise InputError(
                f"mask {args.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, the picture {image.shape[1]} x {image.shape[0]}: "
                "one of the picture's size is wanted")
        hole = mask.mean(-1) >= 128
    if args.mode == "outpaint":
        hole = ~hole
    if not hole.any():
        raise InputError(
            "the box is the whole picture: nothing around it is left to be made new" if args.box
            else f"mask {args.mask} selects nothing: white (128 and above) is wanted where "
            + ("the picture stays, and black elsewhere" if args.mode == "outpaint" else "new content goes"))
    pipe = pipeline.load(args.model, checkpoint=args.checkpoint)
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always", UserWarning)
        edited = np.asarray(pipe.edit(
            jax.random.key(args.seed), image, hole, args.class_id, keep_coarse=args.coarse and args.coarse == "keep",
            ring=args.ring, paste=not args.no_paste, feather=args.feather, schedule=args.schedule, **_sampling_options(args)))
    for notice in notices:
        print(f"hmar edit: {notice.message}", file=sys.stderr)
    _write_png(args.out, Image.fromarray((edited * 255).round().astype(np.uint8)))
    if args.show:
        side = edited.shape[0]
        before = pipeline.resize_picture(image / np.float32(255), side)
        shown = editing.resize_hole(hole[None], side)[0]
        sheet = np.stack([before, np.repeat(shown[..., None], 3, -1), edited])
        _write_png(args.show, grid.draw(sheet, columns=3, titles=["before", "mask", "after"]))
    print(args.out + (f"; {args.show}" if args.show else ""))


def _read_picture(option: str, path: str):
    """uint8 (h, w, 3)"""
    from hmar_jax.data.sources import BrokenPicture, decode_picture

    if not os.path.isfile(path):
        raise InputError(f"{option} {path}: no such file")
    try:
        return decode_picture(path)
    except BrokenPicture as e:
        raise InputError(f"{option} {path}: cannot be read as a picture ({e.reason})") from None


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

    pipe = pipeline.load(args.model, devices=jax.devices(), checkpoint=args.checkpoint)
    if pipe.spec.transformer is None:
        raise InputError(f"model {args.model!r} is a tokenizer alone: it cannot sample")
    pipe.schedule(args.schedule)
    real = [open_source(args.reference, split) for split in ("train", "validate")]
    if real[0].num_classes != pipe.spec.transformer.num_classes:
        raise InputError(
            f"reference {args.reference!r} has {real[0].num_classes} classes, model {args.model!r} has "
            f"{pipe.spec.transformer.num_classes}")
    ids = np.arange(args.n) % pipe.spec.transformer.num_classes
    images = np.asarray(pipe.sample(jax.random.key(args.seed), ids, schedule=args.schedule, **_sampling_options(args)))
    report = digit_report(images, ids, *[read_all(r) for r in real], seed=args.seed)
    if args.json:
        files.write_by_rename(args.json, json.dumps(report, indent=1) + "\n")
    print(format_report(report))


def _info(args) -> None:
    from hmar_jax.sampling import pipeline

    spec, params = pipeline.load_parts(args.model, args.checkpoint)
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
            *([("stage 2", _stage2(spec, count("masked")))] if spec.masked_depth else []),
            ("classes", f"{m.num_classes}" + (f": {', '.join(spec.class_names[:10])}{', …' if len(spec.class_names) > 10 else ''}" if spec.class_names else "")),
            ("sampling", f"guidance {spec.guidance:g}, top-k {spec.top_k or 'off'}, top-p {spec.top_p or 'off'}" + (
                f", masked guidance {spec.masked_guidance:g}, confidence noise {spec.confidence_noise:g}" if spec.masked_depth else "")),
        ]
    lines += [(name, text) for name, text in (("origin", spec.origin), ("licence", spec.licence)) if text]
    for name, text in lines:
        print(f"{name:12} {text}")


def _stage2(spec, parameters: int) -> str:
    if not spec.next_scale:
        return "alone: it predicts whole scales from masks, then parts of them"
    return f"{parameters:,} parameters, depth {spec.masked_depth}; the first {spec.transformer.depth - spec.masked_depth} blocks are shared"


def _convert(args) -> None:
    from hmar_jax import checkpoints
    from hmar_jax.sampling import pipeline
    from hmar_jax.scales import ScaleList

    checkpoints.check_new_model(args.out)
    scales = ScaleList.parse(args.scales).sides if args.scales else None
    try:
        spec, params = pipeline.torch_parts(
            args.torch, tokenizer=args.tokenizer, masked=args.masked, scales=scales, heads=args.heads)
    except ImportError as e:
        raise InputError(str(e)) from None
    readme = f"# {pathlib.Path(args.out).name}\n\n{spec.kind}, {spec.origin}.\n\nLicence: {spec.licence}.\n"
    checkpoints.save_model(args.out, spec.to_json(), params, readme)
    print(f"{args.out}: {spec.kind}, {spec.origin}. {spec.licence}.")


def _export(args) -> None:
    import jax
    import numpy as np

    from hmar_jax import checkpoints
    from hmar_jax.sampling import pipeline

    checkpoints.check_new_model(args.out)
    spec, params = pipeline.load_parts(args.model, args.checkpoint)
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
