"""The base of the training tasks of both stages: batches, class dropout, previews.

Letters: B images, L tokens of all scales, Z channels of the code, h w image sides.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from hmar_jax.autoencoders.vq import apply_tokenizer, to_float
from hmar_jax.class_names import label_of
from hmar_jax.errors import InputError
from hmar_jax.families.base import image_keys
from hmar_jax.families.hmar.combined import CombinedModel
from hmar_jax.families.hmar.recipe import TransformerRecipe
from hmar_jax.families.hmar.sampler import HmarSampler, SamplerOptions, sample
from hmar_jax.families.hmar.schedules import masking_plan
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.families.hmar.transformer import (
    PARTITION_RULES,
    TransformerConfig,
    check_attention,
)
from hmar_jax.parallel.sharding import Rules, constrain_batch
from hmar_jax.training.optimizer import leaves_named
from hmar_jax.training.task import Batch, LayerStack, Params, TaskDefaults

_PREVIEW_CLASSES, _PREVIEWS_PER_CLASS = 10, 8
_decays = leaves_named("kernel", "class_emb", "mask_embed")  # as in the published code


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerTask(TaskDefaults):
    """A stage of the transformer, on top of a frozen tokenizer, frozen["tokenizer"]."""

    spec: HmarSpec  # of the model that comes out
    recipe: TransformerRecipe
    steps: int
    batch_size: int
    grad_accum_steps: int = 1

    partition_rules: ClassVar[Rules] = PARTITION_RULES
    input_kinds: ClassVar[frozenset[str]] = frozenset({"image", "tokens"})

    @property
    def optimizer(self) -> TransformerRecipe:
        return self.recipe

    @property
    def transformer(self) -> TransformerConfig:
        return self.spec.transformer

    def batch_shapes(self, kind: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of "tokens", or of "image", which the step encodes."""
        label = jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)
        if kind == "image":
            side = self.spec.autoencoder.image_side
            image = jax.ShapeDtypeStruct((self.batch_size, side, side, 3), jnp.uint8)
            return {"label": label, "image": image}
        shape = (self.batch_size, self.transformer.scale_list.length)
        return {"label": label, "tokens": jax.ShapeDtypeStruct(shape, jnp.int32)}

    def decay_mask(self, params: Params) -> Any:
        return _decays(params)

    def check_mesh(self, mesh: Mesh | AbstractMesh) -> None:
        heads, tensor = self.transformer.heads, mesh.shape["tensor"]
        if heads % tensor:
            raise InputError(f"mesh.tensor must divide the {heads} heads; got {tensor}")
        if isinstance(mesh, Mesh):  # of a plan, the devices are not this process's
            check_attention(self.transformer)

    def drop_classes(self, rng: jax.Array, labels) -> jax.Array:
        """Replaces a random share of the labels (B,) int32 by the null class."""
        dropped = jax.random.bernoulli(rng, self.recipe.class_dropout, labels.shape)
        return jnp.where(dropped, self.transformer.null_class, labels)

    def apply_tokenizer(self, frozen: Params, *args, method: str):
        """Calls a method of the frozen tokenizer."""
        return apply_tokenizer(self.spec.autoencoder, frozen["tokenizer"], *args, method=method)

    def tokens_and_inputs(self, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Tokens (B, L) int32 and next-scale inputs (B, L - l_0, Z) of a batch."""
        if "tokens" in batch:
            tokens = batch["tokens"]
            f_hats = self.apply_tokenizer(frozen, tokens, method="tokens_to_f_hats")
        else:  # (B, h, w, 3) uint8, encoded here
            images = to_float(batch["image"])
            tokens, f_hats = self.apply_tokenizer(frozen, images, method="encode_with_features")
        return tokens, self.apply_tokenizer(frozen, f_hats, method="next_scale_inputs")

    def preview_labels(self) -> list[str]:
        count = min(_PREVIEW_CLASSES, self.transformer.num_classes)
        return [label_of(i, self.spec.class_names) for i in range(count)]

    def sample_preview(self, params: Params, rng: jax.Array) -> jax.Array:
        """Samples images of the first classes.

        Args:
          params: of the whole model.

        Returns:
          (classes, 8, h, w, 3) float32 in [0, 1].
        """
        count = min(_PREVIEW_CLASSES, self.transformer.num_classes)
        ids = np.repeat(np.arange(count), _PREVIEWS_PER_CLASS)
        keys = constrain_batch(image_keys(rng, len(ids)))
        sampling = self.spec.sampling
        plan = masking_plan(HmarSampler(self.spec).schedule(sampling.schedule))
        options = SamplerOptions.of(sampling)
        model = CombinedModel(self.spec)
        images, _ = sample(model, params, keys, jnp.array(ids), options, plan)
        return images.reshape(count, _PREVIEWS_PER_CLASS, *images.shape[1:])

    def layer_stack(self, params: Params, kind: str) -> LayerStack:
        model, tokenizer = self.transformer, self.spec.autoencoder
        length = model.scale_list.length
        encoding = 0.0
        if kind == "image":  # the largest arrays of the encoder, in a residual block
            pixels = self.batch_size * tokenizer.image_side**2 / tokenizer.patch_size**2
            encoding = 3.0 * pixels * tokenizer.channels * jnp.dtype(tokenizer.dtype).itemsize
        return LayerStack(
            params["blocks"],
            model.depth,
            jax.ShapeDtypeStruct((self.batch_size, length, model.width), jnp.dtype(model.dtype)),
            jax.ShapeDtypeStruct((self.batch_size, length, model.vocab_size), jnp.float32),
            encoding,
        )
