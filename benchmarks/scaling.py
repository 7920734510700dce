"""Training from tokens on 1, 2, 4 … GPUs of one host: speed, agreement, resuming on fewer GPUs.

    python benchmarks/scaling.py --gpus 1 2 4               # d16_256, in less than ten minutes
    python benchmarks/scaling.py --cpu --gpus 1 2 4 --images 4 --config.model.depth=2 \\
        --config.model.width=64 --config.model.heads=4 --config.model.dtype=float32

Every row is a run in its own processes: "data=4" and "fsdp=4" are one process with four GPUs,
"data=4,processes=4" four processes with one GPU each.

Speed: every row has the same number of images per GPU.
Agreement: --steps steps with the batch of the largest number of GPUs, from the same start, against
one GPU that accumulates the gradients of as many microbatches. The result is |difference of the
parameters| / |their change since the start|. For comparison, "rounding alone" is the same between
one GPU with that number of microbatches and one with twice as many. Stochastic depth is off,
because its random numbers depend on the microbatches.
Resume: a checkpoint of the largest number of GPUs continues on half of them; the result is the
largest difference of the next losses.

Tokens are random, so the losses mean nothing. Loading them is part of the time.
"""

import argparse
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
_WARM_UP, _RESUMED = 4, 5  # steps


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/hmar.py:d16_256")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--images", type=int, default=32, help="images per GPU and step")
    parser.add_argument(
        "--steps",
        type=int,
        default=20,
        help="steps that are timed, and after which parameters are compared",
    )
    parser.add_argument("--rows", type=int, default=20_000, help="number of random examples")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=None,
        help="such as data=4 fsdp=4 data=4,processes=4 (default: all, the main ones first)",
    )
    parser.add_argument(
        "--limit_s", type=float, default=570, help="seconds after which no case starts or continues"
    )
    parser.add_argument("--cpu", action="store_true", help="use simulated devices of one CPU")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.worker:
        work(args, overrides, json.loads(args.worker))
    else:
        drive(args)


# Rows and their processes


def default_cases(gpus: list[int]) -> list[str]:
    most, several = max(gpus), sorted(n for n in gpus if n > 1)
    first = ["data=1"] * (1 in gpus) + [f"data={n}" for n in several]
    second = [f"data={most},processes={most}", f"fsdp={most}"] * (most > 1)
    third = [case for n in several[:-1] for case in (f"fsdp={n}", f"data={n},processes={n}")]
    return [*first, *second, *([f"fsdp={most},processes={most}"] * (most > 1)), *third]


def drive(args) -> None:
    start, most = time.monotonic(), max(args.gpus)
    cases = args.cases or default_cases(args.gpus)
    if args.cases is None and most > 1:
        cases.insert(cases.index(f"data={most}") + 1, f"data={most // 2},resume=1")
    rows = {}
    with tempfile.TemporaryDirectory(prefix="hmar_scaling_") as folder:
        for case in cases:
            left = args.limit_s - (time.monotonic() - start)
            rows[case] = (
                run_case(args, case, most, folder, left)
                if left > 20
                else {"error": "not run: no time left"}
            )
            print(json.dumps({case: rows[case]}), flush=True)
        show(args, rows, folder, most)
    print(f"{time.monotonic() - start:.0f} s in total")


def run_case(args, case: str, most: int, folder: str, limit_s: float) -> dict:
    """The last line that the first process printed, or an error."""
    options = dict(pair.split("=") for pair in case.split(","))
    processes, resume = int(options.pop("processes", 1)), bool(options.pop("resume", ""))
    sizes = {axis: int(n) for axis, n in options.items()}
    devices = math.prod(sizes.values())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    children, logs = [], []
    for i in range(processes):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = dict(
            os.environ, PYTHONPATH=path, JAX_COMPILATION_CACHE_DIR=f"{folder}/compiled"
        )
        if args.cpu:
            environment |= {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
            }
        else:
            environment["CUDA_VISIBLE_DEVICES"] = (
                str(i) if processes > 1 else ",".join(map(str, range(devices)))
            )
        worker = dict(
            case=case,
            sizes=sizes,
            most=most,
            folder=folder,
            resume=resume,
            process=i,
            processes=processes,
            coordinator=coordinator,
        )
        log = open(f"{folder}/{case}_{i}.log", "w+")
        logs.append(log)
        children.append(
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], f"--worker={json.dumps(worker)}"],
                env=environment,
                stdout=log,
                stderr=log,
            )
        )
    try:
        for child in children:
            child.wait(max(1, limit_s))
            limit_s = max(10, limit_s)
    except subprocess.TimeoutExpired:
        return {"error": "stopped: no time left"}
    finally:
        for child in children:
            child.kill()
            child.wait()
    texts = []
    for log in logs:
        log.seek(0)
        texts.append(log.read())
    found = [line for line in texts[0].splitlines() if line.startswith('{"case"')]
    if any(child.returncode for child in children) or not found:
        bad = next((i for i, child in enumerate(children) if child.returncode), 0)
        print(texts[bad][-3000:], file=sys.stderr)
        return {"error": f"process {bad} ended with {children[bad].returncode}"}
    return json.loads(found[-1])


def show(args, rows: dict, folder: str, most: int) -> None:
    alone = rows.get("data=1", {}).get("images_per_second")
    moved = load(folder, "data=1")
    print(
        f"\n{args.config}, {args.images} images per GPU, "
        + next((row["device"] for row in rows.values() if "device" in row), "?")
    )
    print(
        f"{'case':24} {'images/s':>10} {'efficiency':>10} {'MFU':>6} {'wait':>6} {'compile':>8} "
        f"{'GiB':>6}  parameters after {args.steps} steps, against 1 GPU"
    )
    for case, row in rows.items():
        if "error" in row or "resumed" in row:
            continue
        n = row["devices"]
        efficiency = f"{row['images_per_second'] / (n * alone):.1%}" if alone else ""
        agreement = ""
        mfu, gib = (
            f"{row['mfu']:.1%}" if row["mfu"] else "?",
            f"{row['peak_gib']:.1f}" if row["peak_gib"] else "?",
        )
        if moved is not None and n > 1 and (there := load(folder, case)) is not None:
            agreement = f"{distance(there['params'], moved['params'], moved['start']):.2e}"
        print(
            f"{case:24} {row['images_per_second']:10.1f} {efficiency:>10} {mfu:>6} "
            f"{row['wait']:6.1%} {row['compile_s']:7.0f}s {gib:>6}  {agreement}"
        )
    if moved is not None and moved["again"] is not None:
        print(
            f"rounding alone (1 GPU, {most} and {2 * most} microbatches): "
            f"{distance(moved['again'], moved['params'], moved['start']):.2e}"
        )
    for case, row in rows.items():
        if "resumed" in row:
            known = rows.get(f"data={most}", {}).get("losses", [])[args.steps :]
            worst = max((abs(a - b) for a, b in zip(row["resumed"], known)), default=math.nan)
            print(
                f"{case}: started on {most}, resumed at step {row['step']}: losses differ by at "
                f"most {worst:.1e} over {len(known)} steps"
            )
        if "error" in row:
            print(f"{case}: {row['error']}")


def load(folder: str, case: str):
    import numpy as np

    path = pathlib.Path(folder, f"{case}.npz")
    if not path.exists():
        return None
    arrays = np.load(path)
    return {name: arrays[name] if name in arrays else None for name in ("params", "start", "again")}


def distance(a, b, start) -> float:
    import numpy as np

    return float(np.linalg.norm(a - b) / np.linalg.norm(b - start))


# One process of a row


def work(args, overrides: list[str], worker: dict) -> None:
    import jax
    import numpy as np

    from hmar_jax import autoencoders, config_files
    from hmar_jax.data.loader import loader_state_to_bytes, restore_loader_state
    from hmar_jax.data.records import RecordsInMemory, make_record_loader
    from hmar_jax.experiment import task_kind, task_shapes
    from hmar_jax.io.checkpoints import RunCheckpoints
    from hmar_jax.loading import load_spec_and_params
    from hmar_jax.parallel import processes, sharding
    from hmar_jax.parallel.chips import peak_flops
    from hmar_jax.training.compiled_steps import compile_steps
    from hmar_jax.training.trainable import IMAGENET, Parent

    if worker["processes"] > 1:
        processes.initialize(worker["coordinator"], worker["processes"], worker["process"])
    mesh = sharding.make_mesh(**{"data": 1} | worker["sizes"])
    devices, most = mesh.size, worker["most"]
    config = config_files.load_config(args.config)
    for text in overrides:
        config_files.override(config, *text.removeprefix("--config.").split("=", 1))
    config.steps, config.model.drop_path = 1000, 0.0
    trainable, kind = task_kind(config)
    name = config[kind.parent_key]
    parent = Parent(
        name,
        load_spec_and_params(name)[0] if name else trainable.planning_parent(config, None),
    )

    def prepare(batch_size: int, parts: int = 1):
        """The compiled steps, loader and frozen arrays for a batch size, and FLOPs per image."""
        config.batch_size, config.grad_accum_steps = batch_size, parts
        sharding.check_batch(mesh, batch_size, parts)
        task, frozen, _, _ = task_shapes(config, parent, IMAGENET)
        steps = compile_steps(task, mesh, frozen, config.ema_decay)
        rng = np.random.default_rng(0)
        record = autoencoders.make_autoencoder(parent.spec.autoencoder).record_spec
        [tokens] = record.fields
        source = RecordsInMemory.from_arrays(
            {"tokens": rng.integers(0, tokens.vocab_size, (args.rows, *tokens.shape), np.int32)},
            rng.integers(0, IMAGENET.num_classes, args.rows, np.int32),
            record,
        )
        shard, shards = sharding.host_share(mesh, batch_size)
        loader = make_record_loader(
            source, batch_size=batch_size // shards, seed=0, shard_index=shard, shard_count=shards
        )
        # Of the frozen tokenizer, only the quantizer is used.
        values = jax.tree_util.tree_map_with_path(
            lambda path, x: (
                rng.normal(size=x.shape).astype(x.dtype)
                if "quantizer" in str(path)
                else np.zeros(x.shape, x.dtype)
            ),
            steps.frozen,
        )
        frozen = sharding.place(values, jax.tree.map(lambda x: x.sharding, steps.frozen))
        return steps, loader, frozen, task.flops_per_image

    key = sharding.place_key(jax.random.key(0), mesh)

    def train(steps, loader, frozen, num_steps: int, batch_size: int, state=None, at=None):
        """Trains from the start, or from a state and a position in the data.

        Returns:
          State, iterator of the data, losses, and seconds in total and waiting for data, of the
          steps after the first ones.
        """
        state = steps.init(key, frozen) if state is None else state
        batches, losses, waited = iter(loader), [], 0.0
        if at is not None:
            restore_loader_state(batches, at)
        for step in range(num_steps):
            if step == _WARM_UP:
                jax.block_until_ready(state)
                start, waited = time.perf_counter(), 0.0
            before = time.perf_counter()
            batch = sharding.global_batch(mesh, next(batches), batch_size)
            waited += time.perf_counter() - before
            state, metrics = steps.train_step(state, frozen, batch, key)
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start if num_steps > _WARM_UP else math.nan
        return state, batches, [float(x) for x in losses], seconds, waited

    def flat(state) -> np.ndarray:
        """All parameters of a state as one vector on this host."""
        whole = jax.jit(lambda p: p, out_shardings=sharding.replicated(mesh))(state.params)
        return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(whole)])

    def report(**results) -> None:
        if processes.is_primary():
            print(
                json.dumps(
                    dict(
                        case=worker["case"],
                        devices=devices,
                        device=jax.devices()[0].device_kind,
                        **results,
                    )
                ),
                flush=True,
            )

    whole = args.images * most
    if worker["resume"]:
        steps, loader, frozen, _ = prepare(whole, most // devices)
        with RunCheckpoints(worker["folder"]) as checkpoints:
            restored = checkpoints.restore_latest(steps.state)
        _, _, losses, _, _ = train(
            steps, loader, frozen, _RESUMED, whole, restored.state, restored.metadata["data_state"]
        )
        return report(step=restored.step, resumed=losses)

    batch = args.images * devices
    steps, loader, frozen, flops_per_image = prepare(batch)
    start = time.perf_counter()
    train(steps, loader, frozen, 1, batch)
    compile_s = time.perf_counter() - start
    _, _, _, seconds, waited = train(steps, loader, frozen, _WARM_UP + args.steps, batch)
    rate = args.steps * batch / seconds
    peak = peak_flops(jax.devices()[0])
    memory = jax.local_devices()[0].memory_stats() or {}
    results = dict(
        images_per_second=rate,
        compile_s=compile_s,
        wait=waited / seconds,
        mfu=rate * flops_per_image / (peak * devices) if peak else None,
        peak_gib=memory["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in memory else None,
    )
    report(**results)

    arrays = {}
    if devices in (1, most):  # the rows that are compared
        losses = []
        if devices < most:
            steps, loader, frozen, _ = prepare(whole, most)
            arrays["start"] = flat(steps.init(key, frozen))
        state, batches, losses, _, _ = train(steps, loader, frozen, args.steps, whole)
        arrays["params"] = flat(state)
        if worker["case"] == f"data={most}" and most > 1:
            with RunCheckpoints(worker["folder"]) as checkpoints:
                checkpoints.save(args.steps, state, loader_state_to_bytes(batches))
                state, _, more, _, _ = train(
                    steps, loader, frozen, _RESUMED, whole, state, loader_state_to_bytes(batches)
                )
            losses += more
        del state
        if devices < most:
            steps, loader, frozen, _ = prepare(whole, 2 * most)
            arrays["again"] = flat(train(steps, loader, frozen, args.steps, whole)[0])
        if processes.is_primary():
            np.savez(f"{worker['folder']}/{worker['case']}.npz", **arrays)
        report(**results, losses=losses)


if __name__ == "__main__":
    main()
