"""Transformers: hmar train --config=configs/hmar.py:NAME --workdir=DIR --config.tokenizer=TOKENIZER

TOKENIZER is a bundled name, a run of `hmar train-tokenizer`, or a converted model.

digits    the demo: handwritten digits, three minutes on two CPU cores. Class accuracy and
          diversity: README.
photos    hundreds to thousands of your own images at 64 pixels, in class folders, on the tokenizer
          configs/tokenizer.py:photos. Small and regularized. Losses and times of a short run:
          docs/own_images.md.
cifar10   32x32 images; needs a tokenizer trained with configs/tokenizer.py:cifar10.
finetune  continues from the parameters of a model: --config.init_from=MODEL, a run, a bundled or a
          converted model. Architecture, tokenizer and defaults of sampling are that model's, unless
          they are given. Classes may be others. See docs/fine_tuning.md.
d16_256 d20_256 d24_256 d30_256 d24_512 d36_512 d16_1024
          the published sizes and recipe (HMAR, arXiv 2506.04421; VAR, arXiv 2404.02905), on
          ImageNet: --config.data.source=folder:DIR or tfds:imagenet2012. Published FID at 256
          pixels, stages 1 and 2 together, theirs and not measured here: 3.01, 2.50, 2.10, 1.95.
          Recipes of d24_512, d36_512 and d16_1024 are not published; these follow the rule of the
          others.

NAME,stage=masked trains stage 2, masked prediction, on a frozen stage 1: --config.init_from=RUN
instead of --config.tokenizer. NAME,pattern=causal trains VAR instead: the same network with VAR's
block-causal attention.

What a key means, its range and its default: hmar_jax/training/config.py, training/optimizer.py and
families/hmar (transformer.py, recipe.py, options.py). Here stand the differences alone.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from hmar_jax.config_files import override, override_all, parse_spec
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.family import TASKS
from hmar_jax.training.trainable import IMAGENET


class Published(NamedTuple):
    """What the published recipe says of a depth (tables in the papers' appendices)."""

    batch: int
    epochs: int
    base_lr: float  # at batch 256
    gamma: float  # init_adaln_gamma
    end_ratio: float
    weight_decay: float
    weight_decay_end: float
    guidance: float
    top_k: int


_PUBLISHED = {
    16: Published(768, 200, 1e-4, 1e-3, 0.1, 0.05, 0.05, 1.7, 1000),
    20: Published(768, 250, 1e-4, 1e-3, 0.1, 0.05, 0.05, 1.9, 950),
    24: Published(768, 350, 8e-5, 1e-4, 0.01, 0.05, 0.05, 2.1, 900),
    30: Published(1024, 350, 8e-5, 1e-5, 0.01, 0.05, 0.08, 1.6, 650),
    # VAR's d36 in its paper; learning rate and gamma as d30.
    36: Published(768, 350, 8e-5, 1e-5, 0.01, 0.05, 0.08, 2.0, 900),
}
_SIZES = {  # name: depth, side of the images
    "d16_256": (16, 256),
    "d20_256": (20, 256),
    "d24_256": (24, 256),
    "d30_256": (30, 256),
    "d24_512": (24, 512),
    "d36_512": (36, 512),
    "d16_1024": (16, 1024),
}
NAMES = ("digits", "photos", "cifar10", "finetune", *_SIZES)
# Of the group model: what `finetune` takes from the model that it starts from.
_NETWORK = ("depth", "width", "heads", "mlp_ratio", "pattern", "qk_norm", "shared_adaln")


def base() -> ConfigDict:
    """Stage 1."""
    c = TASKS["next_scale"].schema.default_config()
    c.family, c.task = "hmar", "next_scale"
    c.recipe.weight_decay_end = 0.05
    c.sampling.guidance = 1.5
    return c


def digits() -> ConfigDict:
    c = base()
    c.steps, c.batch_size = 1200, 32
    c.tokenizer, c.image_side = "digits", 32
    c.data.source, c.data.in_memory, c.data.cached_copies = "digits", True, 10
    c.data.transform.kind = "affine"
    c.model.update(depth=4, width=128, heads=4, dropout=0.1, init_adaln_gamma=0.1)
    c.recipe.update(learning_rate=3e-3, end_ratio=0.01)
    c.sampling.update(guidance=1.0)
    c.eval_every, c.sample_every, c.checkpoint_every = 600, 600, 400
    return c


def photos() -> ConfigDict:
    """Small and regularized: a larger model learns some hundred images by heart."""
    c = base()
    c.steps, c.batch_size, c.image_side = 2000, 32, 64
    c.data.in_memory, c.data.cached_copies = True, 20
    c.data.transform.update(kind="resize_crop", resize_ratio=1.25, flip=True)
    c.model.update(depth=4, width=192, heads=3, dropout=0.2, drop_path=0.1, init_adaln_gamma=1e-2)
    c.recipe.update(
        learning_rate=1e-3,
        warmup_steps=100,
        end_ratio=0.01,
        weight_decay=0.1,
        weight_decay_end=0.1,
        label_smoothing=0.1,
    )
    c.ema_decay = 0.999
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 50, 250, 500, 250
    return c


def cifar10() -> ConfigDict:
    c = base()
    c.epochs, c.batch_size, c.image_side = 100, 128, 32
    c.data.cached_copies = 1
    c.data.transform.update(resize_ratio=1.0, flip=True)
    c.model.update(depth=8, width=384, heads=6, dropout=0.1, init_adaln_gamma=1e-2)
    c.recipe.update(learning_rate=1e-3, warmup_steps=500)
    return c


def finetune() -> ConfigDict:
    """A short run at a small learning rate, from a model with any architecture."""
    c = base()
    schema = TASKS["next_scale"].schema
    schema.leave_empty(c, [f"model.{name}" for name in _NETWORK])
    schema.leave_empty(c, [f"sampling.{name}" for name in c.sampling])
    c.steps, c.batch_size = 1000, 32
    c.data.transform.update(kind="resize_crop", flip=True)
    c.model.update(dropout=0.1, remat="matmuls")
    c.recipe.update(learning_rate=2e-4, warmup_steps=50, end_ratio=0.01)
    c.ema_decay = 0.999
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 20, 250, 250, 250
    return c


def published(depth: int, side: int) -> ConfigDict:
    p = _PUBLISHED[depth]
    c = base()
    c.epochs, c.batch_size, c.image_side = p.epochs, p.batch, side
    c.model.update(
        depth=depth,
        width=64 * depth,
        heads=depth,
        drop_path=0.1 * depth / 24,
        init_adaln_gamma=p.gamma,
        dtype="bfloat16",
        # Kept for the backward pass at 256 pixels: 245 MB an image at depth 16 ("blocks": 45), 860
        # at depth 30 (157).
        remat="matmuls",
    )
    c.recipe.update(
        learning_rate=p.base_lr * p.batch / 256,
        warmup_steps=round(p.epochs / 50 * IMAGENET.num_images / p.batch),
        end_ratio=p.end_ratio,
        weight_decay=p.weight_decay,
        weight_decay_end=p.weight_decay_end,
    )
    c.sampling.update(guidance=p.guidance, top_k=p.top_k, top_p=0.99)
    # Where images are divided over all devices, parameters and optimizer can be too; below 1 G
    # parameters copies are faster.
    c.mesh.update({"data": 1, "fsdp": -1} if depth >= 24 else {"data": -1, "fsdp": 1})
    return c


def masked(name: str, stage1: ConfigDict) -> ConfigDict:
    """Stage 2 of a stage 1: what it trains on stays, the architecture comes from `init_from`."""
    c = TASKS["masked"].schema.default_config()
    for key in set(c) & set(stage1) - {"model", "recipe", "sampling"}:
        c[key] = stage1[key]
    for group in ("model", "recipe", "sampling"):
        for key in set(c[group]) & set(stage1[group]) - {"loss_weights"}:
            if stage1[group][key] is not None:
                c[group][key] = stage1[group][key]
    c.task, c.stage1_config = "masked", name
    if stage1.model.depth is not None:
        c.model.masked_depth = max(1, stage1.model.depth // 2)
    if name == "digits":
        c.steps = 1000
        c.sampling.update(guidance=0.75, choice_temperature=4.0)
    elif name == "photos":
        c.steps = 1000
    elif name == "finetune":
        c.model.masked_depth = TASKS["masked"].schema.default_config().model.masked_depth
        c.sampling.guidance = base().sampling.guidance
    elif name == "cifar10":
        c.epochs = 50
    else:
        c.epochs, c.model.masked_depth = 100, 8  # published: 8, the last half of d16
        c.recipe.warmup_steps = round(100 / 50 * IMAGENET.num_images / c.batch_size)
    return c


def get_config(spec: str) -> ConfigDict:
    """From "NAME[,stage=masked | ,pattern=causal][,key=value...]"."""
    name, pairs = parse_spec(spec, NAMES)
    stage = pairs.pop("stage", "next_scale")
    if stage not in TASKS:
        raise InputError(f"stage must be next_scale (stage 1) or masked (stage 2); got {stage!r}")
    small = {"digits": digits, "photos": photos, "cifar10": cifar10, "finetune": finetune}
    config = published(*_SIZES[name]) if name in _SIZES else small[name]()
    if stage == "masked":
        if "pattern" in pairs:
            raise InputError(
                "stage=masked and pattern exclude each other: stage 2 takes the pattern of its "
                "stage 1, which must be diagonal"
            )
        config = masked(name, config)
    config.lock()
    if "pattern" in pairs:
        override(config, "model.pattern", pairs.pop("pattern"))
    override_all(config, pairs.items(), TASKS[stage].schema)
    return config
