"""Tiny images and three runs on them, shared by many tests: made once, by the real command line.

Nearly all their time is compilation, so every run uses one compilation cache, which processes that
the tests start share too: `cached` for this process, ENVIRONMENT for others.
"""

import contextlib
import fcntl
import functools
import logging
import os
import pathlib
import tempfile

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from PIL import Image

from hmar_jax import config_files
from hmar_jax.cli import main as cli

CLASSES = ("circle", "cross", "stripes")
SIDE, LENGTH, VOCAB = 8, 5, 16  # scales 1, 2 at 4 pixels a token

# conftest.py makes one for all processes of a test run, and removes it.
FOLDER = pathlib.Path(os.environ.get("HMAR_TINY_FOLDER") or tempfile.mkdtemp(prefix="hmar_tiny_"))
CACHE = FOLDER / "compiled"
ENVIRONMENT = dict(
    os.environ,
    JAX_PLATFORMS="cpu",
    JAX_COMPILATION_CACHE_DIR=str(CACHE),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    PYTHONPATH=str(pathlib.Path(__file__).resolve().parent.parent),
)

_STEPS = dict(
    steps=80, batch_size=6, log_every=10, eval_every=40, sample_every=80, checkpoint_every=20
)
TOKENIZER = _STEPS | {
    "data.transform.kind": "random_crop",
    "model.scales": "1,2",
    "model.vocab_size": VOCAB,
    "model.z_channels": 4,
    "model.channels": 8,
    "model.channel_multipliers": "1",
    "model.groups": 2,
    "model.num_res_blocks": 0,
    "recipe.vq_start_step": 15,
    "recipe.warmup_steps": 5,
    "recipe.learning_rate": 5e-3,
    "recipe.reset_after": 60,
    "recipe.usage_window": 60,
}
TRANSFORMER = _STEPS | {
    "data.transform.kind": "random_crop",
    "image_side": 0,
    "data.cached_copies": 0,
    "model.depth": 2,
    "model.width": 32,
    "model.heads": 2,
    "sampling.guidance": 1.0,
}

MASKED = _STEPS | {
    "data.transform.kind": "random_crop",
    "image_side": 0,
    "data.cached_copies": 0,
    "model.masked_depth": 1,
    "sampling.guidance": 1.0,
}


def made_once(make):
    """Calls `make` with FOLDER / its name, once: in the first process; the others wait."""
    name = make.__name__

    @functools.cache
    def found():
        with open(FOLDER / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = FOLDER / f"{name}.made"
            if not done.exists():
                make(FOLDER / name)
                done.touch()
        return FOLDER / name

    return functools.update_wrapper(found, make)


@contextlib.contextmanager
def cached():
    """Compiles quickly, with programs in CACHE; restores the log on exit."""
    wanted = dict(
        jax_compilation_cache_dir=str(CACHE),
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=0,
        jax_disable_most_optimizations=True,
    )
    before = {name: jax.config.values[name] for name in wanted}
    log = logging.getLogger("hmar_jax")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        log.handlers, log.level, log.propagate = handlers, level, propagate


def image(label: int, rng: np.random.Generator, side: int = 10) -> np.ndarray:
    """A noisy circle, cross or set of stripes, uint8 (side, side, 3)."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    shape = (
        x**2 + y**2 < (side / 2.6) ** 2,
        (abs(x) < 1) | (abs(y) < 1),
        np.mgrid[:side, :side][0] % 4 < 2,
    )[label]
    return (200 * shape[..., None] + rng.uniform(0, 55, (side, side, 3))).astype(np.uint8)


@made_once
def images(root: pathlib.Path) -> None:
    """A folder of images: three classes, 12 images each to train and 3 to validate."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validate", 3)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(image(label, rng)).save(root / split / name / f"{i}.png")


def overrides(values: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in values.items()]


def train_tokenizer(workdir, **changes) -> list[str]:
    """Arguments of the command. Dots in the names of changes are written as two underscores."""
    values = TOKENIZER | {"data.source": f"folder:{images()}"} | _dotted(changes)
    return [
        "train-tokenizer",
        "--config=configs/tokenizer.py:digits",
        f"--workdir={workdir}",
        *overrides(values),
    ]


def train(workdir, **changes) -> list[str]:
    values = TRANSFORMER | {"data.source": f"folder:{images()}"} | _dotted(changes)
    if "tokenizer" not in values:
        values["tokenizer"] = tokenizer_run()
    return ["train", "--config=configs/hmar.py:digits", f"--workdir={workdir}", *overrides(values)]


def train_masked(workdir, **changes) -> list[str]:
    values = MASKED | {"data.source": f"folder:{images()}"} | _dotted(changes)
    if "init_from" not in values:
        values["init_from"] = model_run()
    return [
        "train",
        "--config=configs/hmar.py:digits,stage=masked",
        f"--workdir={workdir}",
        *overrides(values),
    ]


def config_of(arguments: list[str]) -> ConfigDict:
    """The config of these arguments."""
    config = config_files.load_config(arguments[1].removeprefix("--config="))
    for text in arguments:
        if text.startswith("--config."):
            config_files.override(config, *text.removeprefix("--config.").split("=", 1))
    return config


def _dotted(changes):
    return {key.replace("__", "."): value for key, value in changes.items()}


@made_once
def tokenizer_run(workdir: pathlib.Path) -> None:
    """A finished run of train-tokenizer. Do not change it: copy it first."""
    with cached():
        assert cli.main(train_tokenizer(workdir)) == 0


@made_once
def model_run(workdir: pathlib.Path) -> None:
    """A finished run of train on it. Do not change it: copy it first."""
    arguments = train(workdir)
    with cached():
        assert cli.main(arguments) == 0


@made_once
def masked_run(workdir: pathlib.Path) -> None:
    """A finished run of stage 2 on that. Do not change it: copy it first."""
    arguments = train_masked(workdir)
    with cached():
        assert cli.main(arguments) == 0
