"""One training step on meshes of 8 CPU devices, run by test_sharding.py in a process of its own: prints JSON.

    python -m tests.on_a_mesh stage1:data=8 stage2:data=2,fsdp=2,tensor=2,accumulate=2 …

For each: loss, and the largest difference of a gradient from the one-device step's, relative to the largest gradient; and what
part of the state's bytes one device holds.
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.autoencoders.vq import Tokenizer, TokenizerConfig
from hmar_jax.autoencoders.vq_task import TokenizerTask
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.next_scale_task import NextScaleTask
from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig
from hmar_jax.parallel import sharding
from hmar_jax.training import compiled_steps

BATCH = 16
TOKENIZER = TokenizerConfig(
    scales=(1, 2, 3),
    vocab_size=32,
    z_channels=8,
    channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention=True,
    groups=4,
)
TRANSFORMER = TransformerConfig(
    scales=TOKENIZER.scales,
    vocab_size=32,
    z_channels=8,
    num_classes=5,
    depth=2,
    width=64,
    heads=8,
    dropout=0.1,
    drop_path=0.2,
)
RECIPE = dict(
    transformer=TRANSFORMER, tokenizer=TOKENIZER, steps=10, batch_size=BATCH, learning_rate=1e-3
)


def drawn(shapes, seed: int):
    """Numbers of these shapes: floats, if they are parameters, and otherwise zeros. Nothing needs to be compiled for it."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        parameters = "params" in str(path[0]) or "opt" not in str(path[0])
        return (
            0.1 * rng.normal(size=leaf.shape) * (parameters and leaf.dtype == np.float32)
        ).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def tokenizer_params():
    image = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)
    return drawn(jax.eval_shape(Tokenizer(TOKENIZER).init, jax.random.key(0), image)["params"], 1)


@functools.cache
def stage1_params():
    return drawn(jax.eval_shape(NextScaleTransformer(TRANSFORMER).init, jax.random.key(0)), 2)


def task_of(name: str, **changes):
    """The task and what is frozen."""
    model = dataclasses.replace(
        TRANSFORMER, remat=changes.pop("remat", "none"), init_adaln_gamma=0.5
    )
    recipe = RECIPE | {"transformer": model} | changes
    if name == "stage1":
        return NextScaleTask(**recipe), (tokenizer_params(),)
    if name == "stage2":
        return MaskedTask(masked_depth=1, **recipe), (
            {"tokenizer": tokenizer_params(), "transformer": stage1_params()},
        )
    return TokenizerTask(
        tokenizer=TOKENIZER,
        steps=10,
        batch_size=BATCH,
        unquantized_steps=1,
        adversarial_weight=0.5,
        discriminator_channels=16,
        discriminator_layers=1,
    ), ()


def batch_of(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, BATCH).astype(np.int32)
    if name == "tokenizer":
        return {"label": labels, "image": rng.integers(0, 256, (BATCH, 6, 6, 3)).astype(np.uint8)}
    return {"label": labels, "tokens": rng.integers(0, 32, (BATCH, 14)).astype(np.int32)}


def first_moments(state):
    """Of the optimizer after a first step: the gradients, times a constant."""
    return [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if any(getattr(p, "name", None) == "mu" for p in path)
    ]


@functools.cache
def one_step(name: str, mesh_sizes: tuple, changes: tuple = (), evaluate: bool = False):
    """Metrics, gradients on the host, and the largest share of the state that a device holds."""
    devices = jax.devices() if mesh_sizes else jax.devices()[:1]
    mesh = sharding.make_mesh(**dict(mesh_sizes or (("data", 1),)), devices=devices)
    task, extra = task_of(name, **dict(changes))
    made = compiled_steps.build(task, mesh, extra, ema_decay=0.99)
    places = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    extra = tuple(sharding.place(x, places(y)) for x, y in zip(extra, made.extra))
    key = sharding.place_key(jax.random.key(3), mesh)
    if evaluate:
        assert places(made.init(key, *extra)) == places(made.state)
    state = sharding.place(drawn(made.state, 3), places(made.state))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)) / sum(
        x.nbytes for x in jax.tree.leaves(state)
    )
    state, metrics = made.train_step(
        state, sharding.global_batch(mesh, batch_of(name), BATCH), key, *extra
    )
    moments = [np.asarray(g) for g in first_moments(state)]
    if not evaluate:
        return jax.device_get(metrics), moments, held, {}
    evaluated = made.eval_step(
        state,
        sharding.global_batch(mesh, batch_of(name) | {"valid": np.ones(BATCH, bool)}, BATCH),
        *extra,
    )
    return jax.device_get(metrics), moments, held, jax.device_get(evaluated)


def compare(case: str) -> dict:
    name, _, options = case.partition(":")
    options = dict(pair.split("=") for pair in options.split(","))
    evaluate = bool(options.pop("evaluate", ""))
    mesh = tuple((axis, int(options.pop(axis))) for axis in sharding.AXES if axis in options)
    changes = {key: int(value) if value.isdecimal() else value for key, value in options.items()}
    alone = {
        key: value for key, value in changes.items() if key == "accumulate"
    }  # its random numbers differ from those of one part
    metrics, wanted, _, evaluated = one_step(name, (), tuple(alone.items()), evaluate)
    there, found, held, evaluated_there = one_step(name, mesh, tuple(changes.items()), evaluate)
    scale = max(np.abs(g).max() for g in wanted)
    close = lambda a, b: bool(np.allclose(a, b, rtol=1e-5, atol=1e-5))
    return {
        "loss": abs(float(there["loss"]) - float(metrics["loss"])),
        "largest": float(scale),
        "gradient": max(
            float(np.abs(a - b).max() / scale) for a, b in zip(found, wanted, strict=True)
        ),
        "metrics": [
            n for n in metrics if not jax.tree.all(jax.tree.map(close, metrics[n], there[n]))
        ],
        "evaluated": [
            n
            for n in evaluated
            if not jax.tree.all(jax.tree.map(close, evaluated[n], evaluated_there[n]))
        ],
        "held": held,
    }


if __name__ == "__main__":
    print(json.dumps({case: compare(case) for case in sys.argv[1:]}))
