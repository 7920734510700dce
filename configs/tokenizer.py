"""Tokenizers: hmar train-tokenizer --config=configs/tokenizer.py:NAME --workdir=DIR

digits   the demo: 32x32 handwritten digits, about two minutes on two CPU cores.
photos   a small tokenizer for a folder of photographs, random 64-pixel crops:
         --config.data.source=folder:DIR. Metrics over time: docs/tokenizer.md.
cifar10  32x32 images of CIFAR-10: --config.data.source=folder:DIR or tfds:cifar10.
finetune continues from the tokenizer of a model: --config.init_from=MODEL, a run, a bundled or a
         converted model. The architecture is that model's, unless it is given.
vae_256  the published architecture (VAR, arXiv 2404.02905; 16 pixels a token, V 4096, Z 32) for
         256-pixel images. Its training recipe is not published; this one is VQGAN's, not measured
         here.

What a key means, its range and its default: hmar_jax/training/config.py, training/optimizer.py and
autoencoders (vq.py, vq_task.py). Here stand the differences alone.
"""

from ml_collections import ConfigDict

from hmar_jax.autoencoders.vq_training import TASKS
from hmar_jax.config_files import override_all, parse_spec

NAMES = ("digits", "photos", "cifar10", "finetune", "vae_256")


def base() -> ConfigDict:
    c = TASKS["tokenizer"].schema.default_config()
    c.family, c.task = "vq", "tokenizer"
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 50, 500, 500, 500
    return c


def digits() -> ConfigDict:
    c = base()
    c.steps, c.batch_size = 2000, 24
    c.data.source, c.data.in_memory, c.data.transform.kind = "digits", True, "affine"
    c.model.update(
        scales=(1, 2, 3, 4),
        vocab_size=256,
        z_channels=16,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        patch_size=4,
        attention=False,
        groups=4,
    )
    c.recipe.update(learning_rate=4e-3, vq_start_step=500)
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 100, 1000, 1000, 500
    return c


def photos() -> ConfigDict:
    c = base()
    c.steps, c.batch_size = 6000, 32
    c.data.in_memory = True
    c.data.transform.update(kind="random_crop", flip=True)
    c.model.update(
        scales=(1, 2, 3, 4, 6, 8),
        vocab_size=512,
        z_channels=16,
        channels=32,
        channel_multipliers=(1, 2, 4),
        num_res_blocks=1,
        patch_size=2,
        attention=False,
        groups=8,
        # By squared distance each scale keeps to its own entries: 36 % of them at 2x2. By angle all
        # scales share them.
        distance="cosine",
    )
    c.recipe.update(learning_rate=2e-3, vq_start_step=600, reset_after=500)
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 100, 1000, 1000, 1000
    return c


def cifar10() -> ConfigDict:
    c = photos()
    c.steps, c.batch_size = 20000, 64
    c.data.transform.update(kind="resize_crop", resize_ratio=1.0)
    c.model.update(patch_size=1, channel_multipliers=(1, 2, 2), vocab_size=1024)
    return c


def finetune() -> ConfigDict:
    """The codebook stays in use as it is: entries that these images do not use are not replaced."""
    c = base()
    schema = TASKS["tokenizer"].schema
    schema.leave_empty(c, [f"model.{name}" for name in c.model if name not in ("dropout", "dtype")])
    c.steps, c.batch_size = 2000, 16
    c.data.transform.update(kind="random_crop", flip=True)
    c.recipe.update(learning_rate=1e-4, vq_start_step=0, reset_every=0)
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 50, 250, 250, 250
    return c


def vae_256() -> ConfigDict:
    c = base()
    c.steps, c.batch_size = 250_000, 128
    c.model.dtype = "bfloat16"
    c.recipe.update(
        learning_rate=1e-4,
        warmup_steps=2000,
        vq_start_step=5000,
        reset_every=100,
        reset_after=100_000,
        adversarial_weight=0.8,
        adversarial_start=50_000,
        usage_window=50_000,
    )
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 100, 5000, 5000, 2500
    return c


def get_config(spec: str) -> ConfigDict:
    """From "NAME[,key=value...]"."""
    name, pairs = parse_spec(spec, NAMES)
    configs = (digits, photos, cifar10, finetune, vae_256)
    config = {make.__name__: make for make in configs}[name]().lock()
    override_all(config, pairs.items(), TASKS["tokenizer"].schema)
    return config
