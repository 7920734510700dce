"""Training stage 1, the next-scale transformer: state, step, evaluation, as pure functions.

HMAR (arXiv 2506.04421, section 3.2). Letters: B images, L tokens, K scales, h w sides of a image.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.families.hmar import flops
from hmar_jax.families.hmar.losses import cross_entropy, position_weights
from hmar_jax.families.hmar.transformer import NextScaleTransformer
from hmar_jax.training.metrics import Mean
from hmar_jax.training.state import TrainState
from hmar_jax.training.step import TransformerRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextScaleTask(TransformerRecipe):
    """The recipe."""

    loss_weights: str = "lognorm"

    @property
    def model(self) -> NextScaleTransformer:
        return NextScaleTransformer(self.transformer)

    @property
    def flops_per_image(self) -> float:
        """Of one step, counted by hand."""
        return flops.next_scale_step(self.transformer)

    def init(self, rng: jax.Array, tokenizer_params=None) -> TrainState:
        del tokenizer_params  # frozen: not part of the state
        return self.start(self.model.init(rng))

    def train_step(
        self, state: TrainState, batch: dict[str, jax.Array], rng: jax.Array, tokenizer_params
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step.

        Args:
          batch: {"label": (B,) int32} and "tokens" (B, L) int32, or "image" (B, h, w, 3) uint8 to be encoded here.
          rng: key of the run; the step's own key is folded from it.
          tokenizer_params: of the frozen tokenizer.

        Returns:
          The next state and scalar metrics.
        """
        class_key, dropout_key = jax.random.split(jax.random.fold_in(rng, state.step))
        rows = batch | {"label": self.drop_classes(class_key, batch["label"])}
        return self.descend(
            state,
            lambda params, rows, key: self.loss(params, rows, tokenizer_params, key),
            rows,
            dropout_key,
        )

    def loss(
        self, params, batch, tokenizer_params, dropout_key=None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over the images of a batch, whose labels may be the null class, and the metrics."""
        figures = self.figures(params, batch, tokenizer_params, dropout_key)
        metrics = {name: value.mean() for name, value in figures.items()}
        return metrics["loss"], metrics

    def figures(self, params, batch, tokenizer_params, dropout_key=None) -> dict[str, jax.Array]:
        """Of each image, (B,) each: "loss", "accuracy", and both for each scale (there unweighted)."""
        scales = self.transformer.scale_list
        tokens = self.tokens_of(batch, tokenizer_params)  # (B, L)
        codes = self.quantize(tokenizer_params, tokens, "transformer_inputs")  # (B, L - l_0, Z)
        logits = self.model.logits(params, batch["label"], codes, dropout_key)
        ce = cross_entropy(logits, tokens, self.label_smoothing)  # (B, L)
        correct = (logits.argmax(-1) == tokens).astype(jnp.float32)
        figures = {
            "loss": (position_weights(scales, self.loss_weights).astype(np.float32) * ce).sum(-1),
            "accuracy": correct.mean(-1),
        }
        for k, side in enumerate(scales.sides):
            figures |= {
                f"loss/{side}x{side}": ce[:, scales.slice(k)].mean(-1),
                f"accuracy/{side}x{side}": correct[:, scales.slice(k)].mean(-1),
            }
        return figures

    def eval_step(self, state: TrainState, batch, tokenizer_params) -> dict[str, Mean]:
        """Means over the images marked valid of every training figure."""
        figures = self.figures(state.eval_params, batch, tokenizer_params)
        return {name: Mean.of(value, batch["valid"]) for name, value in figures.items()}
