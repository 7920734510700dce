"""What fraction of training time saving takes: the digits model, a checkpoint every --every steps.

    python benchmarks/checkpoint.py [--config=configs/hmar.py:digits] [--rounds=12]

Windows of steps that start with a save alternate with windows without one, because the speed of a
machine varies over time. The cost of a save is the difference of the medians: the call, which
copies the arrays, and what writing in the background takes from the following steps. A window must
be long enough for its save to finish; the output says where it was not.
"""

import argparse
import statistics
import tempfile
import time

import jax

from hmar_jax import config_files
from hmar_jax.data.loader import loader_state_to_bytes
from hmar_jax.experiment import build_experiment
from hmar_jax.io.checkpoints import RunCheckpoints
from hmar_jax.parallel import sharding
from hmar_jax.training.compiled_steps import compile_steps


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/hmar.py:digits")
    parser.add_argument(
        "--every", type=int, default=500, help="steps between saves, for the fraction"
    )
    parser.add_argument("--window", type=int, default=30, help="steps timed together")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of windows")
    args, overrides = parser.parse_known_args()
    config = config_files.load_config(args.config)
    for text in ["--config.data.cached_copies=1", *overrides]:
        config_files.override(config, *text.removeprefix("--config.").split("=", 1))

    experiment = build_experiment(config)
    mesh = experiment.mesh
    steps = compile_steps(experiment.task, mesh, experiment.frozen, config.ema_decay)
    places = jax.tree.map(lambda x: x.sharding, steps.frozen)
    frozen = sharding.place(experiment.frozen, places)
    key = sharding.place_key(jax.random.key(config.seed), mesh)
    state, batches = steps.init(key, frozen), iter(experiment.loader())

    def window(state):
        for _ in range(args.window):
            batch = sharding.global_batch(mesh, next(batches), config.batch_size)
            state, metrics = steps.train_step(state, frozen, batch, key)
            jax.block_until_ready(
                metrics["loss"]
            )  # like the training loop, which is never far ahead of the device
        return state

    plain, saving, calls, late = [], [], [], 0
    with (
        tempfile.TemporaryDirectory() as workdir,
        RunCheckpoints(workdir, max_to_keep=2, keep_best=1) as checkpoints,
    ):
        state = window(state)
        checkpoints.save(
            0, state, loader_state_to_bytes(batches)
        )  # the first save also starts threads
        checkpoints.wait()
        for round in range(1, args.rounds + 1):
            for save in (True, False) if round % 2 else (False, True):
                start = time.perf_counter()
                if save:
                    checkpoints.save(
                        round, state, loader_state_to_bytes(batches), validation_loss=1.0
                    )
                    calls.append(time.perf_counter() - start)
                state = window(state)
                (saving if save else plain).append(time.perf_counter() - start)
                waiting = time.perf_counter()
                checkpoints.wait()
                late += save and time.perf_counter() - waiting > 0.01

    step = statistics.median(plain) / args.window
    cost = statistics.median(saving) - statistics.median(plain)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20
    print(
        f"{jax.devices()[0].device_kind}, {args.config}, state of {size:.1f} MiB, "
        f"batch {config.batch_size}"
    )
    print(
        f"step {step * 1e3:.1f} ms; window of {args.window} steps: "
        f"{statistics.median(plain):.3f} s, with a save {statistics.median(saving):.3f} s"
    )
    print(
        f"a save: call {statistics.median(calls) * 1e3:.0f} ms, total {cost * 1e3:.0f} ms"
        + (
            f" (in {late} of {args.rounds} windows it did not finish: use a longer --window)"
            if late
            else ""
        )
    )
    print(f"of training with a save every {args.every} steps: {cost / (args.every * step):.2%}")


if __name__ == "__main__":
    main()
