"""What the commands of `hmar` do with their arguments (main.py): check, call, print.

Each is a function of the parsed arguments, and of the --config.KEY=VALUE texts for those with a
--config. Nothing heavy is imported before the arguments have been checked, so that mistakes and
--help cost no time.
"""

import contextlib
import ctypes
import dataclasses
import json
import logging
import pathlib
import sys

from hmar_jax import families, settings
from hmar_jax.cli import arguments, outputs
from hmar_jax.errors import InputError
from hmar_jax.logging import TERMINAL

_log = logging.getLogger(__name__)

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def plan(args, overrides) -> int:
    """Prints whether a run fits a topology; returns 0 if it does, otherwise 1."""
    from hmar_jax.planning import topology

    target = topology.parse(args.topology)
    from hmar_jax import experiment, initialization
    from hmar_jax.io import files
    from hmar_jax.planning import advice, plan, report

    if args.json != "-":
        outputs.check({"json": args.json}, {"config": args.config.partition(":")[0]})

    plan.prepare_environment()
    config = _config(args, overrides)
    config, _ = initialization.complete(config, *experiment.task_kind(config))
    name = " ".join([args.config, *overrides])
    parent_config = _parent_config(args, config)
    found = plan.make_plan(config, target, name=name, parent_config=parent_config)
    changes = advice.find_advice(config, target, found, parent_config)
    data = found.to_json() | {"advice": [dataclasses.asdict(one) for one in changes]}
    if args.json == "-":
        print(json.dumps(data, indent=1))
    else:
        print(report.format_plan(found, changes))
        if args.json:
            files.write_atomically(args.json, json.dumps(data, indent=1) + "\n")
    return 0 if found.fits else 1


def _config(args, overrides):
    """The config that --config names, with the values that --config.KEY=VALUE give."""
    from hmar_jax import config_files
    from hmar_jax.experiment import task_kind

    config = config_files.load_config(args.config)
    texts = (text.removeprefix("--config.").partition("=") for text in overrides)
    pairs = [(key, value) for key, _, value in texts]
    config_files.override_all(config, pairs, task_kind(config)[1].schema)
    return config


def _parent_config(args, config):
    """The config of the parent that a plan assumes: another NAME of the same file."""
    from hmar_jax import config_files

    name = config.get("stage1_config", "")
    return config_files.load_config(f"{args.config.partition(':')[0]}:{name}") if name else None


def train(args, overrides) -> int:
    """Starts or resumes a run: `train` and `train-tokenizer`.

    Returns:
      0, or the conventional status of the signal that stopped the run.
    """
    _retain_freed_memory()
    config = _config(args, overrides)
    from hmar_jax.experiment import task_kind

    command = task_kind(config)[1].command
    if command != args.command:
        raise InputError(f"config {args.config!r} is for hmar {command}")
    import jax

    from hmar_jax.parallel import processes

    processes.initialize(args.coordinator, args.num_processes, args.process_id, args.local_devices)
    if not processes.is_primary():
        TERMINAL.setLevel(logging.WARNING)
    # Signals to one of several processes stop all of them, after a step.
    several = jax.process_count() > 1
    with args.interruptions.deferred() if several else contextlib.nullcontext():
        return _train(args, config)


def _train(args, config) -> int:
    from hmar_jax import interruption
    from hmar_jax.data.sources import check_outside
    from hmar_jax.experiment import build_experiment, task_kind
    from hmar_jax.io import locks, runs
    from hmar_jax.parallel import processes
    from hmar_jax.training import loop

    check_outside(config.data.source, args.workdir, "workdir")
    with locks.lock_together(args.workdir, "workdir") as lock:
        experiment, error = None, None
        try:
            config = runs.settle(args.workdir, config, task_kind(config)[1].schema)
            experiment = build_experiment(config, args.workdir, args.extend)
        except InputError as e:
            error = e
        processes.raise_on_all_processes(error)  # if one cannot start, others must not wait for it
        assert experiment is not None
        final = loop.run(
            experiment.config,  # what did not fit into the run has been changed
            experiment,
            args.workdir,
            args.interruptions,
            lock,
            allow_data_change=args.allow_data_change,
            extend=args.extend,
        )
    step, steps = int(final.step), experiment.task.steps
    stopped = args.interruptions.received
    if processes.is_primary():
        result = f"stopped at step {step} of {steps}" if stopped else "complete"
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"{args.workdir}: {config.task} run {result}", flush=True)
    # No process ends before all have finished: srun then kills the others.
    processes.wait_for_all("hmar_jax train has ended")
    return 0 if stopped is None else interruption.exit_status(stopped)


def _retain_freed_memory() -> None:
    """Tells glibc to keep what a step frees for the next one.

    XLA's CPU backend allocates its temporaries again each step. By default glibc returns such sizes
    to the system at once, and page faults took a third of the digits' training time
    (benchmarks/RESULTS.md).
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


def tokenize(args) -> None:
    """Encodes a data set, or resumes that."""
    _retain_freed_memory()
    import jax

    from hmar_jax import autoencoders, loading
    from hmar_jax.autoencoders.base import AUTOENCODER, config_to_json, make_encoder
    from hmar_jax.data import encoding
    from hmar_jax.data.agreement import check_same_data
    from hmar_jax.data.sources import SPLITS, SourceConfig, check_outside, open_splits
    from hmar_jax.data.transforms import Transform
    from hmar_jax.io import locks
    from hmar_jax.parallel import processes
    from hmar_jax.progress import phase

    splits = args.splits.split(",")
    if not set(splits) <= set(SPLITS):
        raise InputError(f"--splits must be train, validate or both; got {args.splits}")
    if args.part is None:
        processes.initialize()
    args.interruptions.install()  # again: JAX has taken SIGTERM if there are several processes
    spec, params = loading.load_spec_and_params(args.tokenizer)
    changes = {"dtype": args.dtype} if args.dtype else {}
    config = dataclasses.replace(spec.autoencoder, **changes)
    autoencoder, params = autoencoders.make_autoencoder(config), params[AUTOENCODER]
    transform = Transform(
        autoencoder.image_side, args.transform, resize_ratio=args.resize_ratio, flip=args.flip
    )
    check_outside(args.data, args.out, "--out")
    source_config = encoding.settle(args.out, settings.from_arguments(SourceConfig(), args))
    with phase(f"listing the images of {args.data}"):
        sources = open_splits(
            args.data,
            [split for split in SPLITS if split in splits],
            need_classes=True,
            config=source_config,
        )
    part = args.part or (jax.process_index(), jax.process_count())
    info = encoding.describe(
        args.tokenizer,
        autoencoder.fingerprint(params),
        autoencoder.record_spec,
        config_to_json(config),
        args.data,
        sources,
        transform,
        crops=args.crops,
        seed=args.seed,
        shard_size=args.shard_size,
        config=source_config,
    )
    if args.part is None:
        check_same_data(
            {
                name: {"images": split.num_images, "fingerprint": split.source_fingerprint}
                for name, split in info.splits.items()
            }
        )
    encode, batch_size = make_encoder(autoencoder, params, args.batch_size, jax.local_devices())
    what, file = "--out", locks.LOCK_FILE
    if args.part:  # these write to one set together
        what = f"part {part[0]}/{part[1]} of --out"
        file = f".lock-{part[0]}-of-{part[1]}.tmp"
    with locks.lock_together(args.out, what, file) as lock, args.interruptions.deferred():

        def check():
            args.interruptions.check()
            lock.check()

        info = encoding.write_record_set(
            args.out,
            encode,
            sources,
            transform,
            info,
            batch_size=batch_size,
            part=part,
            threads=args.threads,
            workers=args.workers,
            verify=args.verify,
            progress=True,
            check=check,
        )
    if not info.complete:
        missing, total = encoding.count_unfinished(args.out, info)
        if part[1] == 1:
            raise InputError(
                f"{missing} of the {total} files of {args.out} were deleted while this command "
                "wrote the others; run it again"
            )
        print(
            f"{args.out}: part {part[0]}/{part[1]} is complete; {missing} of {total} files are "
            "left to other parts"
        )
        return
    print(f"{args.out}: {_describe_records(info)}")


def _describe_records(info) -> str:
    splits = []
    for name, split in info.splits.items():
        crops = f" in {split.crops} crops" if split.crops > 1 else ""
        broken = f" ({len(split.broken)} could not be decoded)" if split.broken else ""
        splits.append(f"{split.num_images - len(split.broken)} images to {name}{crops}{broken}")
    size = sum(shard["bytes"] for split in info.splits.values() for shard in split.shards)
    return (
        f"{', '.join(splits)}; {len(info.class_names)} classes, {size / 1e6:.1f} MB, "
        f"tokenizer {info.fingerprint}"
    )


def info(args) -> None:
    """Prints what a model is and, of a run, how far it is."""
    from hmar_jax import loading
    from hmar_jax.autoencoders import models

    spec, params = loading.load_spec_and_params(args.model, args.checkpoint)
    rows = [("model", f"{args.model}: {spec.kind}"), *_describe_run(args.model)]
    rows += models.describe(spec.autoencoder, params)
    if spec.sampling is not None:
        rows += families.get_family(spec.family).describe(spec, params)
    rows += [("origin", spec.origin), ("licence", spec.licence)]
    for name, text in rows:
        if text:
            print(f"{name:12} {text}")


def _describe_run(name: str) -> list[tuple[str, str]]:
    """Rows on a run's progress; none for a model."""
    from hmar_jax.io import files, history, runs
    from hmar_jax.training import status

    path = files.absolute(name) / "config.json"
    saved = files.read_json(path, "the config of a run") if path.exists() else None
    if not runs.is_run(saved):
        return []
    config = saved["config"]
    trainable = families.get_trainable(config.get("family", ""), config.get("task", ""))
    command = trainable.TASKS[config["task"]].command
    return status.describe_run(name, config, command, history.read(saved, str(path)))


def convert(args) -> None:
    """Published PyTorch weights become a model directory."""
    import warnings

    from hmar_jax import loading
    from hmar_jax.io import models
    from hmar_jax.progress import phase

    models.check_new_model(args.out, args.overwrite)
    options = arguments.given_options(args, "ConvertConfig")
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always", UserWarning)
        try:
            spec, params = loading.convert_torch_files(args.torch, args.family, **options)
        except ImportError as e:
            raise InputError(str(e)) from None
    for notice in notices:
        print(f"hmar convert: {notice.message}", file=sys.stderr)
    readme = _readme(args.out, spec)
    with phase(f"writing {args.out}"):
        models.save_model(args.out, spec.to_json(), params, readme, overwrite=args.overwrite)
    print(f"{args.out}: {spec.kind}, {spec.origin}. {spec.licence}.")
    if spec.sampling is not None:  # what `hmar sample` does without options
        rows = families.get_family(spec.family).describe(spec, params)
        print("\n".join(f"{name:12} {text}" for name, text in rows))


def export(args) -> None:
    """A run or a model becomes a model directory."""
    import jax
    import numpy as np

    from hmar_jax import loading
    from hmar_jax.io import models
    from hmar_jax.progress import phase

    models.check_new_model(args.out, args.overwrite)
    spec, params = loading.load_spec_and_params(args.model, args.checkpoint)
    if args.licence is not None:
        spec = dataclasses.replace(spec, licence=args.licence)
    if args.half:
        halve = lambda x: x.astype(np.float16) if x.dtype == np.float32 else x
        params = jax.tree.map(lambda x: halve(np.asarray(x)), params)
    readme = _readme(args.out, spec)
    with phase(f"writing {args.out}"):
        models.save_model(args.out, spec.to_json(), params, readme, overwrite=args.overwrite)
    print(f"{args.out}: {spec.kind}")


def _readme(directory: str, spec) -> str:
    licence = f"\nLicence: {spec.licence}.\n" if spec.licence else ""
    return f"# {pathlib.Path(directory).name}\n\n{spec.kind}, {spec.origin}.\n{licence}"
