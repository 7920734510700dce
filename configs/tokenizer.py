"""Tokenizers: hmar train-tokenizer --config=configs/tokenizer.py:NAME --workdir=DIR

digits   the demo: 32x32 handwritten digits, about two minutes on two CPU cores.
photos   a small tokenizer for a folder of photographs, random 64-pixel crops:
         --config.data.source=folder:DIR. Figures over time: docs/tokenizer.md.
cifar10  32x32 images of CIFAR-10: --config.data.source=folder:DIR or tfds:cifar10.
vae_256  the published architecture (VAR, arXiv 2404.02905; 16 pixels a token, V 4096, Z 32) for 256-pixel images. Nobody
         published its training recipe; this one is VQGAN's, not measured here.
"""

from ml_collections import ConfigDict

from hmar_jax.config_files import override, parse_spec

NAMES = ("digits", "photos", "cifar10", "vae_256")


def base() -> ConfigDict:
    return ConfigDict(
        dict(
            task="tokenizer",
            seed=0,
            steps=0,
            batch_size=0,
            data=dict(
                source="",
                threads=2,  # that read images ahead; in each of so many processes:
                workers=0,
                in_memory=False,  # keep decoded images: for small data sets
                transform=dict(
                    kind="resize_crop",
                    resize_ratio=1.125,
                    flip=False,
                    rotate=6.0,
                    shift=1.0,
                    scale=0.03,
                    shear=0.05,
                ),
            ),
            model=dict(
                scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                vocab_size=4096,
                z_channels=32,
                channels=160,
                channel_multipliers=(1, 1, 2, 2, 4),
                num_res_blocks=2,
                patch_size=1,
                attention=True,
                groups=32,
                dropout=0.0,
                num_phi=4,
                phi_ratio=0.5,
                distance="l2",
                dtype="float32",
            ),
            recipe=dict(
                learning_rate=1e-3,
                schedule="cos",
                warmup_steps=50,
                end_ratio=0.01,
                b2=0.99,
                clip=1.0,
                weight_decay=0.0,
                l2_weight=1.0,
                l1_weight=0.2,
                quantizer_weight=1.0,
                beta=0.25,
                perceptual_weight=0.0,
                adversarial_weight=0.0,
                adversarial_start=0,
                discriminator_channels=64,
                discriminator_layers=3,
                discriminator_learning_rate=1e-4,
                unquantized_steps=100,
                revive_every=20,
                revive_after=2000,
                usage_window=10000,
            ),
            perceptual_network="",  # an .npz file, see hmar_jax/models/perceptual.py; needed where perceptual_weight is not 0
            log_every=50,
            eval_every=500,
            sample_every=500,
            checkpoint_every=500,
            keep_checkpoints=2,  # the newest ones
            keep_best=1,  # and those with the least validation loss
            ema_decay=0.0,  # of a moving average of the parameters, which is then evaluated and sampled with; 0: none
            mesh=dict(
                data=-1, fsdp=1, tensor=1
            ),  # devices on each axis, -1: what is left; see docs/training_at_scale.md
        )
    )


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
    c.recipe.update(learning_rate=4e-3, unquantized_steps=500)
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 100, 1000, 1000, 500
    return c


def photos() -> ConfigDict:
    c = base()
    c.steps, c.batch_size = 6000, 32
    c.data.in_memory, c.data.transform.kind, c.data.transform.flip = True, "random_crop", True
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
        # By squared distance each scale keeps to its own entries: 36 % of them at 2x2; by angle all scales share them.
        distance="cosine",
    )
    c.recipe.update(learning_rate=2e-3, unquantized_steps=600, revive_after=500)
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 100, 1000, 1000, 1000
    return c


def cifar10() -> ConfigDict:
    c = photos()
    c.steps, c.batch_size = 20000, 64
    c.data.transform.kind, c.data.transform.resize_ratio = "resize_crop", 1.0
    c.model.update(
        scales=(1, 2, 3, 4, 6, 8), patch_size=1, channel_multipliers=(1, 2, 2), vocab_size=1024
    )
    return c


def vae_256() -> ConfigDict:
    c = base()
    c.steps, c.batch_size = 250_000, 128
    c.model.dtype = "bfloat16"
    c.recipe.update(
        learning_rate=1e-4,
        warmup_steps=2000,
        unquantized_steps=5000,
        revive_every=100,
        revive_after=100_000,
        adversarial_weight=0.8,
        adversarial_start=50_000,
        usage_window=50_000,
    )
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 100, 5000, 5000, 2500
    return c


def get_config(spec: str) -> ConfigDict:
    name, pairs = parse_spec(spec, NAMES)
    config = {"digits": digits, "photos": photos, "cifar10": cifar10, "vae_256": vae_256}[
        name
    ]().lock()
    for key, text in pairs.items():
        override(config, key, text)
    return config
