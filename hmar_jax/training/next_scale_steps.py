"""Training stage 1, the next-scale transformer: state, step, evaluation, as pure functions.

HMAR (arXiv 2506.04421, section 3.2). Letters: B pictures, L tokens, K scales, h w sides of a picture.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hmar_jax.models.transformer import NextScaleTransformer
from hmar_jax.training.losses import cross_entropy, per_scale, position_weights
from hmar_jax.training.metrics import Mean
from hmar_jax.training.recipe import TrainState, TransformerRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextScaleTask(TransformerRecipe):
    """The recipe."""

    loss_weights: str = "lognorm"

    @property
    def model(self) -> NextScaleTransformer:
        return NextScaleTransformer(self.transformer)

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
        labels = self.drop_classes(class_key, batch["label"])
        tokens, codes = self.inputs(batch, tokenizer_params)
        return self.descend(state, lambda params: self._loss(params, labels, tokens, codes, dropout_key))

    def inputs(self, batch, tokenizer_params):
        """Tokens (B, L) and next-scale inputs (B, L - l_0, Z) of a batch."""
        tokens = self.tokens_of(batch, tokenizer_params)
        return tokens, self.quantize(tokenizer_params, tokens, "transformer_inputs")

    def _loss(self, params, labels, tokens, codes, dropout_key=None):
        scales = self.transformer.scale_list
        logits = self.model.logits(params, labels, codes, dropout_key)
        ce = cross_entropy(logits, tokens, self.label_smoothing)  # (B, L)
        loss = (position_weights(scales, self.loss_weights) * ce).sum(-1).mean()
        correct = (logits.argmax(-1) == tokens).astype(jnp.float32)
        scale_losses, scale_accuracies = per_scale(scales, ce), per_scale(scales, correct)
        metrics = {"loss": loss, "accuracy": correct.mean()}
        for k, side in enumerate(scales.sides):
            metrics |= {f"loss/{side}x{side}": scale_losses[k], f"accuracy/{side}x{side}": scale_accuracies[k]}
        return loss, metrics

    def eval_step(self, state: TrainState, batch, tokenizer_params) -> dict[str, Mean]:
        """Means over the pictures marked valid of every training figure."""
        tokens, codes = self.inputs(batch, tokenizer_params)
        one = lambda label, t, c: self._loss(state.params, label[None], t[None], c[None])[1]
        figures = jax.vmap(one)(batch["label"], tokens, codes)
        return {name: Mean.of(value, batch["valid"]) for name, value in figures.items()}
