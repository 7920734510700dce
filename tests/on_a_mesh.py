"""Training steps on meshes of 8 CPU devices, compared with one device; prints JSON.

test_sharding.py runs it in a process of its own, which has 8 devices:

    python -m tests.on_a_mesh stage1:data=8 stage2:data=2,fsdp=2,tensor=2,grad_accum_steps=2 ...

For each case: the difference of the losses; the largest difference of a gradient, relative to the
largest gradient, and the largest gradient itself; names of metrics and evaluation metrics that
differ; and the share of the state's bytes that one device holds.
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
from hmar_jax.autoencoders.vq_task import VQRecipe, VQTask
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.next_scale_task import NextScaleTask
from hmar_jax.families.hmar.recipe import MaskedRecipe, NextScaleRecipe
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig
from hmar_jax.parallel import sharding
from hmar_jax.training.compiled_steps import compile_steps

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


def random_arrays(shapes, seed: int):
    """Arrays of these shapes: normal for parameters, zero elsewhere. Compiles nothing."""
    rng = np.random.default_rng(seed)

    def array(path, leaf):
        is_param = "params" in str(path[0]) or "opt" not in str(path[0])
        values = 0.1 * rng.normal(size=leaf.shape) * (is_param and leaf.dtype == np.float32)
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(array, shapes)


@functools.cache
def tokenizer_params():
    image = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)
    shapes = jax.eval_shape(Tokenizer(TOKENIZER).init, jax.random.key(0), image)["params"]
    return random_arrays(shapes, 1)


@functools.cache
def stage1_params():
    shapes = jax.eval_shape(NextScaleTransformer(TRANSFORMER).init, jax.random.key(0))
    return random_arrays(shapes, 2)


def make_task(name: str, remat: str = "none", **changes):
    """The task and its frozen parameters."""
    if name == "tokenizer":
        recipe = VQRecipe(
            vq_start_step=1,
            adversarial_weight=0.5,
            discriminator_channels=16,
            discriminator_layers=1,
        )
        return VQTask(TOKENIZER, steps=10, batch_size=BATCH, recipe=recipe), {}
    model = dataclasses.replace(TRANSFORMER, remat=remat, init_adaln_gamma=0.5)
    common = dict(steps=10, batch_size=BATCH, **changes)
    if name == "stage1":
        task = NextScaleTask(spec=HmarSpec(TOKENIZER, model), recipe=NextScaleRecipe(), **common)
        return task, {"tokenizer": tokenizer_params()}
    spec = HmarSpec(TOKENIZER, model, masked_depth=1)
    task = MaskedTask(spec=spec, recipe=MaskedRecipe(), **common)
    return task, {"tokenizer": tokenizer_params(), "transformer": stage1_params()}


def make_batch(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, BATCH).astype(np.int32)
    if name == "tokenizer":
        return {"label": labels, "image": rng.integers(0, 256, (BATCH, 6, 6, 3)).astype(np.uint8)}
    return {"label": labels, "tokens": rng.integers(0, 32, (BATCH, 14)).astype(np.int32)}


def first_moments(state):
    """Adam's first moments after the first step: the gradients, times a constant."""
    return [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if any(getattr(p, "name", None) == "mu" for p in path)
    ]


@functools.cache
def one_step(name: str, mesh_sizes: tuple, changes: tuple = (), evaluate: bool = False):
    """Runs one step.

    Returns:
      Metrics, gradients on the host, the largest share of the state that a device holds, and
      evaluation metrics.
    """
    devices = jax.devices() if mesh_sizes else jax.devices()[:1]
    mesh = sharding.make_mesh(**dict(mesh_sizes or (("data", 1),)), devices=devices)
    task, frozen = make_task(name, **dict(changes))
    steps = compile_steps(task, mesh, frozen, ema_decay=0.99)
    places = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    frozen = sharding.place(frozen, places(steps.frozen))
    key = sharding.place_key(jax.random.key(3), mesh)
    if evaluate:
        assert places(steps.init(key, frozen)) == places(steps.state)
    state = sharding.place(random_arrays(steps.state, 3), places(steps.state))
    leaves = jax.tree.leaves(state)
    held = sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)
    batch = sharding.global_batch(mesh, make_batch(name), BATCH)
    state, metrics = steps.train_step(state, frozen, batch, key)
    moments = [np.asarray(g) for g in first_moments(state)]
    if not evaluate:
        return jax.device_get(metrics), moments, held, {}
    rows = make_batch(name) | {"valid": np.ones(BATCH, bool)}
    evaluated = steps.eval_step(state, frozen, sharding.global_batch(mesh, rows, BATCH))
    return jax.device_get(metrics), moments, held, jax.device_get(evaluated)


def compare(case: str) -> dict:
    name, _, options = case.partition(":")
    options = dict(pair.split("=") for pair in options.split(","))
    evaluate = bool(options.pop("evaluate", ""))
    mesh = tuple((axis, int(options.pop(axis))) for axis in sharding.AXES if axis in options)
    changes = {key: int(value) if value.isdecimal() else value for key, value in options.items()}
    # Dropout differs between one microbatch and several: both sides accumulate alike.
    alone = {key: value for key, value in changes.items() if key == "grad_accum_steps"}
    metrics, expected, _, evaluated = one_step(name, (), tuple(alone.items()), evaluate)
    found_metrics, found, held, found_evaluated = one_step(
        name, mesh, tuple(changes.items()), evaluate
    )
    scale = max(np.abs(g).max() for g in expected)
    close = lambda a, b: bool(np.allclose(a, b, rtol=1e-5, atol=1e-5))
    differ = lambda a, b: [n for n in a if not jax.tree.all(jax.tree.map(close, a[n], b[n]))]
    pairs = zip(found, expected, strict=True)
    return {
        "loss": abs(float(found_metrics["loss"]) - float(metrics["loss"])),
        "largest": float(scale),
        "gradient": max(float(np.abs(a - b).max() / scale) for a, b in pairs),
        "metrics": differ(metrics, found_metrics),
        "evaluated": differ(evaluated, found_evaluated),
        "held": held,
    }


if __name__ == "__main__":
    print(json.dumps({case: compare(case) for case in sys.argv[1:]}))
