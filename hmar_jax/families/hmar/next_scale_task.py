"""The training task of stage 1, the next-scale transformer.

HMAR (arXiv 2506.04421, section 3.2).

Letters: B images, L tokens of all scales, h w image sides.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.families.hmar import flops
from hmar_jax.families.hmar.losses import cross_entropy, position_weights
from hmar_jax.families.hmar.recipe import NextScaleRecipe
from hmar_jax.families.hmar.transformer import NextScaleTransformer
from hmar_jax.families.hmar.transformer_task import TransformerTask
from hmar_jax.training.metrics import Mean
from hmar_jax.training.task import Batch, Metrics, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextScaleTask(TransformerTask):
    """Stage 1. Frozen parameters: {"tokenizer": ...}."""

    recipe: NextScaleRecipe = NextScaleRecipe()

    @property
    def model(self) -> NextScaleTransformer:
        return NextScaleTransformer(self.transformer)

    @property
    def flops_per_image(self) -> float:
        return flops.next_scale_step(self.transformer)

    def init_params(self, rng: jax.Array, frozen: Params) -> Params:
        del frozen
        return self.model.init(rng)

    def prepare_batch(self, batch: Batch, rng: jax.Array) -> tuple[Batch, jax.Array]:
        """Replaces some labels by the null class; returns the batch and a key for `loss`."""
        class_key, dropout_key = jax.random.split(rng)
        return batch | {"label": self.drop_classes(class_key, batch["label"])}, dropout_key

    def loss(self, params, frozen, batch, rng=None, step=None) -> tuple[jax.Array, Metrics]:
        """The mean loss over a prepared batch, and its metrics.

        Args:
          batch: {"label": (B,) int32} and "tokens" (B, L) int32 or "image" (B, h, w, 3) uint8.
          rng: key for dropout and stochastic depth; None turns them off.
        """
        del step
        metrics = {
            name: value.mean()
            for name, value in self.per_image_metrics(params, frozen, batch, rng).items()
        }
        return metrics["loss"], metrics

    def per_image_metrics(self, params, frozen, batch, rng=None) -> dict[str, jax.Array]:
        """Metrics of each image.

        Returns:
          Arrays (B,): "loss", weighted, "accuracy", and of each scale the unweighted "loss/2x2" and
          "accuracy/2x2".
        """
        scales = self.transformer.scale_list
        tokens, scale_inputs = self.tokens_and_inputs(frozen, batch)
        logits = self.model.logits(params, batch["label"], scale_inputs, rng)
        ce = cross_entropy(logits, tokens, self.recipe.label_smoothing)  # (B, L)
        correct = (logits.argmax(-1) == tokens).astype(jnp.float32)
        weights = position_weights(scales, self.recipe.loss_weights).astype(np.float32)
        metrics = {"loss": (weights * ce).sum(-1), "accuracy": correct.mean(-1)}
        for k, side in enumerate(scales.sides):
            metrics |= {
                f"loss/{side}x{side}": ce[:, scales.slice(k)].mean(-1),
                f"accuracy/{side}x{side}": correct[:, scales.slice(k)].mean(-1),
            }
        return metrics

    def eval_metrics(self, params, frozen, batch, step=None) -> dict[str, Mean]:
        """Means of the training metrics over the images marked valid."""
        del step
        metrics = self.per_image_metrics(params, frozen, batch)
        return {name: Mean.of(value, batch["valid"]) for name, value in metrics.items()}

    def preview(self, params, frozen, images, rng, step) -> jax.Array:
        del images, step
        return self.sample_preview({"tokenizer": frozen["tokenizer"], "transformer": params}, rng)
