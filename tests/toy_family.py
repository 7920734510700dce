"""A family of models for tests: class-conditional linear-Gaussian images, without an autoencoder.

An image of class c is mean[c] + matrix[c] z with z standard normal; training fits both by the
variance of the data. It is registered under "toy" by `register`, and its pixels are its latents.

    python -m tests.toy_family train --config=tests/toy_config.py:toy --workdir=...
"""

import dataclasses
import functools
import sys
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax import settings
from hmar_jax.autoencoders.vq import to_float
from hmar_jax.config_files import ConfigSchema
from hmar_jax.data.record_spec import RecordField, RecordSpec
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError
from hmar_jax.parallel.sharding import MeshConfig
from hmar_jax.settings import Settings, setting
from hmar_jax.training.config import DataConfig, GenerativeTrainConfig
from hmar_jax.training.metrics import Mean
from hmar_jax.training.optimizer import OptimizerConfig
from hmar_jax.training.task import LayerStack, TaskDefaults
from hmar_jax.training.trainable import TaskKind, TaskSetup

NAME, SIDE = "toy", 8
PIXELS = 3 * SIDE * SIDE


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    spread: float = setting(1.0, "Factor on the standard deviation of samples.", at_least=0)


@dataclasses.dataclass(frozen=True)
class ToyModel(Settings):
    rank: int = setting(4, "Columns of each class's matrix.", at_least=1)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """An autoencoder that does nothing: the latents of an image are its pixels in [-1, 1]."""

    config: "PixelsConfig"
    partition_rules: ClassVar = ()

    image_side = SIDE
    field = RecordField("pixels", (SIDE, SIDE, 3), "float16")
    record_spec = RecordSpec("pixels", (field,))

    def encode(self, params, images):
        return {"pixels": to_float(images) if images.dtype == jnp.uint8 else images * 2 - 1}

    def decode(self, params, latents):
        return (latents["pixels"] + 1) / 2

    def describe(self, num_params):
        return [("images", f"{SIDE} x {SIDE} pixels")]


@dataclasses.dataclass(frozen=True)
class PixelsConfig:
    kind: ClassVar[str] = "pixels"
    dtype: str = "float32"


Pixels.config_class = PixelsConfig
AUTOENCODER = Pixels  # see hmar_jax/autoencoders/__init__.py


@dataclasses.dataclass(frozen=True)
class Spec:
    num_classes: int
    rank: int
    class_names: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()
    autoencoder: PixelsConfig = PixelsConfig()
    origin: str = ""
    licence: str = ""
    family: ClassVar[str] = NAME
    kind: ClassVar[str] = "linear-Gaussian toy"

    @property
    def null_class(self):
        return 0

    def with_dtype(self, dtype):
        return self

    def to_json(self):
        return {"family": NAME, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data, where):
        data = {k: v for k, v in data.items() if k not in ("family", "autoencoder")}
        sampling = SamplingConfig(**data.pop("sampling"))
        return cls(**{**data, "class_names": tuple(data["class_names"])}, sampling=sampling)


@dataclasses.dataclass(frozen=True)
class ToyTask(TaskDefaults):
    spec: Spec
    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    grad_accum_steps: int = 1

    partition_rules: ClassVar = ((r"matrix$", (None, "fsdp", None)),)  # (classes, pixels, rank)
    input_kinds: ClassVar = frozenset({"image"})
    flops_per_image: ClassVar = 1.0

    def batch_shapes(self, kind):
        return {
            "label": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32),
            "image": jax.ShapeDtypeStruct((self.batch_size, SIDE, SIDE, 3), jnp.uint8),
        }

    def init_params(self, rng, frozen):
        return init_trained(self.spec, rng)

    def loss(self, params, frozen, batch, rng, step):
        loss = self.per_image(params, batch, jax.random.normal(rng, (self.spec.rank,))).mean()
        return loss, {"loss": loss}

    def per_image(self, params, batch, z):
        x = to_float(batch["image"]).reshape(len(batch["label"]), PIXELS)
        mean = params["mean"][batch["label"]] + params["matrix"][batch["label"]] @ z
        return ((x - mean) ** 2).mean(-1)

    def eval_metrics(self, params, frozen, batch, step):
        loss = self.per_image(params, batch, jnp.zeros(self.spec.rank))
        return {"loss": Mean.of(loss, batch["valid"])}

    def preview(self, params, frozen, images, rng, step):
        keys = jax.random.split(rng, self.spec.num_classes)
        images, _ = sample(params, keys, jnp.arange(self.spec.num_classes), 1.0)
        return images[:, None]

    def preview_labels(self):
        return list(self.spec.class_names)

    def layer_stack(self, params, kind):
        shape = jax.ShapeDtypeStruct((self.batch_size, 1, PIXELS), jnp.float32)
        return LayerStack(params["matrix"], 1, shape, shape)


@functools.partial(jax.jit, static_argnums=3)
def sample(params, keys, ids, spread):
    rank = params["matrix"].shape[-1]
    z = jax.vmap(lambda key: jax.random.normal(key, (rank,)))(keys)
    x = params["mean"][ids] + spread * jnp.einsum("bpr,br->bp", params["matrix"][ids], z)
    x = x.reshape(-1, SIDE, SIDE, 3).clip(-1, 1)
    return (x + 1) / 2, x


class Sampler:
    def check(self, config):
        if config.spread > 10:
            raise InputError(f"spread must be at most 10; got {config.spread}")

    def __call__(self, params, keys, class_ids, config, known=None):
        return sample(params["model"], keys, class_ids, config.spread)


# What a family's modules offer, see hmar_jax/families/base.py.

EditingConfig = ConvertConfig = None
TASKS = {
    "fit": TaskKind(
        ConfigSchema(
            {
                "": (GenerativeTrainConfig,),
                "data": (DataConfig,),
                "data.transform": (Transform,),
                "mesh": (MeshConfig,),
                "model": (ToyModel,),
                "recipe": (OptimizerConfig,),
                "sampling": (SamplingConfig,),
            }
        ),
        command="train",
    )
}


def image_side(config, parent):
    return SIDE


def make_task(config, parent, data):
    sampling = settings.from_group(SamplingConfig, config.sampling)
    spec = Spec(data.num_classes, config.model.rank, data.class_names, sampling)
    recipe = settings.from_group(OptimizerConfig, config.recipe)
    task = ToyTask(spec, config.steps, config.batch_size, recipe, config.grad_accum_steps)
    return TaskSetup(task, spec)


def frozen_params(config, parent, parent_params, kind):
    return {}


def init_trained(spec, rng):
    shape = (spec.num_classes, PIXELS, spec.rank)
    return {
        "mean": jnp.zeros((spec.num_classes, PIXELS)),
        "matrix": 0.1 * jax.random.normal(rng, shape),
    }


def init_params(spec, rng):
    return assemble_params(spec, init_trained(spec, rng), {})


def make_sampler(spec):
    return Sampler()


def describe(spec, params):
    return [
        ("toy", f"rank {spec.rank}, {sum(np.size(x) for x in jax.tree.leaves(params))} numbers")
    ]


def assemble_params(spec, trained, parent_params):
    return {"model": trained, "tokenizer": {}}


def register(monkeypatch=None) -> None:
    """Adds the family to the registries; for the duration of a test with its monkeypatch."""
    from hmar_jax import autoencoders, families

    sys.modules[f"{__name__}.family"] = sys.modules[f"{__name__}.options"] = sys.modules[__name__]
    for registry, key in ((families.FAMILIES, NAME), (autoencoders.AUTOENCODERS, "pixels")):
        if monkeypatch is None:
            registry[key] = __name__
        else:
            monkeypatch.setitem(registry, key, __name__)


CONFIG = SimpleNamespace(path="tests/toy_config.py:toy")

if __name__ == "__main__":
    import tests.toy_family as this  # not __main__: registered under its name

    this.register()
    from hmar_jax.cli.main import main

    sys.exit(main())
