"""Transformers: hmar train --config=configs/hmar.py:NAME --workdir=DIR --config.tokenizer=TOKENIZER

TOKENIZER is a bundled name, a run of `hmar train-tokenizer`, or a converted model.

digits    the demo: handwritten digits, three minutes on two CPU cores. Reads as asked, diversity: README.
cifar10   32x32 images; needs a tokenizer trained with configs/tokenizer.py:cifar10.
d16_256 d20_256 d24_256 d30_256 d24_512 d36_512 d16_1024
          the published sizes and recipe (HMAR, arXiv 2506.04421; VAR, arXiv 2404.02905), on ImageNet:
          --config.data.source=folder:DIR or tfds:imagenet2012. Published FID at 256 pixels, stages 1 and 2 together, theirs and not
          measured here: 3.01, 2.50, 2.10, 1.95. Recipes of d24_512, d36_512 and d16_1024 are not published; these follow the
          rule of the others.

NAME,stage=masked trains stage 2, masked prediction, on a frozen stage 1: --config.init_from=RUN instead of --config.tokenizer.
NAME,pattern=causal trains VAR instead: the same network with VAR's block-causal attention.
"""

from ml_collections import ConfigDict

from hmar_jax.config_files import override, parse_spec
from hmar_jax.errors import InputError

# depth: (batch, epochs, base learning rate, init gamma, last learning rate, weight decay, last weight decay, guidance, top-k)
_PUBLISHED = {
    16: (768, 200, 1e-4, 1e-3, 0.1, 0.05, 0.05, 1.7, 1000),
    20: (768, 250, 1e-4, 1e-3, 0.1, 0.05, 0.05, 1.9, 950),
    24: (768, 350, 8e-5, 1e-4, 0.01, 0.05, 0.05, 2.1, 900),
    30: (1024, 350, 8e-5, 1e-5, 0.01, 0.05, 0.08, 1.6, 650),
    36: (
        768,
        350,
        8e-5,
        1e-5,
        0.01,
        0.05,
        0.08,
        2.0,
        900,
    ),  # VAR's d36 in its paper; learning rate and gamma as d30
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
NAMES = ("digits", "cifar10", *_SIZES)
_IMAGES = 1_281_167  # of ImageNet's training set


def base() -> ConfigDict:
    return ConfigDict(
        dict(
            task="next_scale",
            seed=0,
            steps=0,  # or, where 0, from epochs
            epochs=0,
            batch_size=0,
            tokenizer="",
            data=dict(
                source="",  # folder:DIR, tfds:NAME, digits, or tokens:DIR as hmar tokenize made it: then the tokenizer only draws samples
                threads=2,  # that read images ahead; in each of so many processes:
                workers=0,
                in_memory=False,
                cached_copies=0,  # encode every image so many times before training; 0: encode while training
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
                depth=16,
                width=1024,
                heads=16,
                mlp_ratio=4.0,
                pattern="diagonal",
                qk_norm=True,
                shared_adaln=False,
                dropout=0.0,
                drop_path=0.0,
                init_adaln=0.5,
                init_adaln_gamma=1e-3,
                init_head=0.02,
                dtype="float32",
                remat="none",
            ),  # or "matmuls", "blocks": what of a block is computed again in the backward pass, to save memory
            recipe=dict(
                learning_rate=1e-3,
                schedule="lin0",
                warmup_steps=20,
                start_ratio=0.005,
                end_ratio=0.1,
                weight_decay=0.05,
                weight_decay_end=0.05,
                b1=0.9,
                b2=0.95,
                clip=2.0,
                loss_weights="lognorm",
                label_smoothing=0.0,
                class_dropout=0.1,
            ),
            sampling=dict(
                guidance=1.5, top_k=0, top_p=0.0
            ),  # what the model is sampled with unless the caller says otherwise
            image_side=0,  # checked against the tokenizer's where not 0
            log_every=100,
            eval_every=5000,
            sample_every=5000,
            checkpoint_every=2500,
            keep_checkpoints=2,  # the newest ones
            keep_best=1,  # and those with the least validation loss
            ema_decay=0.0,  # of a moving average of the parameters, which is then evaluated and sampled with; 0: none
            mesh=dict(
                data=-1, fsdp=1, tensor=1
            ),  # devices on each axis, -1: what is left; see docs/training_at_scale.md
            accumulate=1,  # parts that a batch is computed in, one after another: less memory
        )
    )


def digits() -> ConfigDict:
    c = base()
    c.steps, c.batch_size = 1200, 32
    c.tokenizer, c.image_side = "digits", 32
    c.data.source, c.data.in_memory, c.data.cached_copies, c.data.transform.kind = (
        "digits",
        True,
        10,
        "affine",
    )
    c.model.update(depth=4, width=128, heads=4, dropout=0.1, init_adaln_gamma=0.1)
    c.recipe.update(learning_rate=3e-3, end_ratio=0.01)
    c.sampling.update(guidance=1.0)
    c.log_every, c.eval_every, c.sample_every, c.checkpoint_every = 100, 600, 600, 400
    return c


def cifar10() -> ConfigDict:
    c = base()
    c.epochs, c.batch_size, c.image_side = 100, 128, 32
    c.data.cached_copies, c.data.transform.resize_ratio, c.data.transform.flip = 1, 1.0, True
    c.model.update(depth=8, width=384, heads=6, dropout=0.1, init_adaln_gamma=1e-2)
    c.recipe.update(learning_rate=1e-3, warmup_steps=500)
    return c


def published(depth: int, side: int) -> ConfigDict:
    batch, epochs, base_lr, gamma, end, decay, decay_end, guidance, top_k = _PUBLISHED[depth]
    c = base()
    c.epochs, c.batch_size, c.image_side = epochs, batch, side
    c.model.update(
        depth=depth,
        width=64 * depth,
        heads=depth,
        drop_path=0.1 * depth / 24,
        init_adaln_gamma=gamma,
        dtype="bfloat16",
    )
    c.recipe.update(
        learning_rate=base_lr * batch / 256,
        warmup_steps=round(epochs / 50 * _IMAGES / batch),
        end_ratio=end,
        weight_decay=decay,
        weight_decay_end=decay_end,
    )
    c.sampling.update(guidance=guidance, top_k=top_k, top_p=0.99)
    # Where images are divided over all devices, so can parameters and optimizer be; below 1 G parameters copies are faster.
    c.mesh.update(dict(data=1, fsdp=-1) if depth >= 24 else dict(data=-1, fsdp=1))
    # What is kept for the backward pass at 256 pixels: 245 MB a image at depth 16 ("blocks": 45), 860 at depth 30 (157).
    c.model.remat = "matmuls"
    return c


def masked(name: str, stage1: ConfigDict) -> ConfigDict:
    """Stage 2 of a stage 1: what it trains on stays, the architecture comes from `init_from`."""
    c = ConfigDict(stage1.to_dict())
    c.task, c.init_from = "masked", ""
    del c.tokenizer, c.recipe.loss_weights
    c.model = ConfigDict(
        dict(
            masked_depth=max(1, stage1.model.depth // 2),  # M; published: 8, the last half of d16
            dropout=stage1.model.dropout,
            drop_path=stage1.model.drop_path,
            dtype=stage1.model.dtype,
            remat=stage1.model.remat,
        )
    )
    c.recipe.update(loss_weights="unweighted", mask_ratios="uniform", shared_mask=False)
    c.sampling.update(masked_guidance=0.0, confidence_noise=0.0)
    if name == "digits":
        c.steps = 1000
        c.sampling.update(guidance=0.75, confidence_noise=4.0)
    elif name == "cifar10":
        c.epochs = 50
    else:
        c.epochs, c.model.masked_depth = 100, 8
        c.recipe.warmup_steps = round(100 / 50 * _IMAGES / c.batch_size)
    return c


def get_config(spec: str) -> ConfigDict:
    name, pairs = parse_spec(spec, NAMES)
    stage = pairs.pop("stage", "next_scale")
    if stage not in ("next_scale", "masked"):
        raise InputError(f"stage={stage!r}: known are next_scale (stage 1), masked (stage 2)")
    config = (
        published(*_SIZES[name])
        if name in _SIZES
        else {"digits": digits, "cifar10": cifar10}[name]()
    )
    if stage == "masked":
        if "pattern" in pairs:
            raise InputError(
                "stage=masked and pattern do not go together: stage 2 takes the pattern of its stage 1, which must be diagonal"
            )
        config = masked(name, config)
    config.lock()
    if "pattern" in pairs:
        override(config, "model.pattern", pairs.pop("pattern"))
    for key, text in pairs.items():
        override(config, key, text)
    return config
