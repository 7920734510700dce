"""The training task of stage 2, masked prediction on top of a frozen stage 1.

HMAR (arXiv 2506.04421, section 3.3).

Letters: B images, L tokens of all scales, Z channels of the code, h w image sides, M blocks of
stage 2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hmar_jax.families.hmar import flops
from hmar_jax.families.hmar.losses import cross_entropy, masked_weights
from hmar_jax.families.hmar.masked import MaskedTransformer
from hmar_jax.families.hmar.masking import sample_mask_ratios, sample_masks
from hmar_jax.families.hmar.recipe import MaskedRecipe
from hmar_jax.families.hmar.transformer_task import TransformerTask
from hmar_jax.training.metrics import Mean
from hmar_jax.training.task import Batch, Metrics, Params

_BINS = 10  # of mask ratios; the loss is reported for each


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedTask(TransformerTask):
    """Stage 2. Frozen parameters: {"tokenizer": ..., "transformer": ...}."""

    recipe: MaskedRecipe = MaskedRecipe()

    @property
    def model(self) -> MaskedTransformer:
        return MaskedTransformer(self.transformer, self.spec.masked_depth)

    @property
    def flops_per_image(self) -> float:
        return flops.masked_step(self.transformer, self.spec.masked_depth)

    def init_params(self, rng: jax.Array, frozen: Params) -> Params:
        """Copies of stage 1's last M blocks and head, and a new mask embedding."""
        params = self.model.init(rng, frozen["transformer"])
        # Copies, because a step donates the state's buffers, and not those of frozen parameters.
        return jax.tree.map(jnp.copy, params)

    def prepare_batch(self, batch: Batch, rng: jax.Array) -> tuple[Batch, jax.Array]:
        """Replaces some labels by the null class, and samples masks.

        Returns:
          The batch with "ratio" (B,) float32 and "is_masked" (B, L - l_0) bool, and a key for
          `loss`.
        """
        class_key, ratio_key, mask_key, dropout_key = jax.random.split(rng, 4)
        labels = self.drop_classes(class_key, batch["label"])
        ratios, is_masked = self.sample_batch_masks(ratio_key, mask_key, labels.shape[0])
        rows = {"label": labels, "ratio": ratios, "is_masked": is_masked}
        return batch | rows, dropout_key

    def sample_batch_masks(self, ratio_key, mask_key, batch: int) -> tuple[jax.Array, jax.Array]:
        """Mask ratios (B,) float32 and masks (B, L - l_0) bool, True where masked."""
        count = 1 if self.recipe.shared_mask else batch
        ratios = sample_mask_ratios(ratio_key, count, self.recipe.mask_ratios)
        masks = sample_masks(mask_key, self.transformer.scale_list, ratios)
        return jnp.broadcast_to(ratios, (batch,)), jnp.broadcast_to(masks, (batch, masks.shape[1]))

    def loss(self, params, frozen, batch, rng=None, step=None) -> tuple[jax.Array, Metrics]:
        """The mean loss over a prepared batch, and its metrics.

        Args:
          batch: {"label", "ratio", "is_masked"} and "tokens" (B, L) int32 or "image" (B, h, w, 3)
            uint8.
          rng: key for dropout and stochastic depth; None turns them off.
        """
        del step
        tokens, scale_inputs = self.tokens_and_inputs(frozen, batch)
        is_masked = batch["is_masked"]
        metrics = self.per_image_metrics(
            params, frozen, batch["label"], tokens, scale_inputs, is_masked, rng
        )
        means = self._means(metrics, batch["ratio"], is_masked, jnp.ones(tokens.shape[:1]))
        loss = metrics["loss"].mean()
        return loss, means | {"loss": loss, "accuracy": metrics["accuracy"].mean()}

    def per_image_metrics(
        self, params, frozen, labels, tokens, scale_inputs, is_masked, rng=None
    ) -> dict[str, jax.Array]:
        """Metrics of each image.

        Args:
          labels: (B,) int32.
          tokens: (B, L) int32.
          scale_inputs: (B, L - l_0, Z).
          is_masked: (B, L - l_0) bool.
          rng: key for dropout and stochastic depth; None turns them off.

        Returns:
          "loss" (B,), weighted; "accuracy" (B,) over the masked positions; "ce" (B, L - l_0), the
          unweighted cross-entropy of every position.
        """
        scales = self.transformer.scale_list
        first = scales.lengths[0]
        features = self.apply_tokenizer(frozen, tokens, method="token_features")
        logits = self.model.logits(
            frozen["transformer"], params, labels, scale_inputs, features, is_masked, rng
        )[:, first:]
        targets = tokens[:, first:]
        ce = cross_entropy(logits, targets, self.recipe.label_smoothing)
        correct = (logits.argmax(-1) == targets) & is_masked
        weights = masked_weights(scales, self.recipe.loss_weights, is_masked)
        return {
            "loss": (weights * ce).sum(-1),
            "accuracy": correct.sum(-1) / is_masked.sum(-1),
            "ce": ce,
        }

    def _means(self, metrics, ratios, is_masked, valid) -> dict[str, Mean]:
        """The mean cross-entropy of masked positions: of each scale, and of each bin of ratios."""
        scales, means = self.transformer.scale_list, {}
        for k in range(1, scales.num_scales):
            start, stop = scales.offsets[k : k + 2]
            part = slice(start - scales.lengths[0], stop - scales.lengths[0])
            means[f"loss/{scales.sides[k]}x{scales.sides[k]}"] = Mean.of(
                metrics["ce"][:, part], is_masked[:, part] * valid[:, None]
            )
        bins = jnp.clip(jnp.ceil(ratios * _BINS) - 1, 0, _BINS - 1)
        mean_ce = (metrics["ce"] * is_masked).sum(-1) / is_masked.sum(-1)
        for i in range(_BINS):
            means[ratio_metric(i)] = Mean.of(mean_ce, (bins == i) * valid)
        return means

    def eval_metrics(self, params, frozen, batch, step=None) -> dict[str, Mean]:
        """Means over the images marked valid, each at ten mask ratios: the centers of the bins.

        The masked positions depend on the ratio and the image's row in the batch alone, so every
        evaluation has the same.
        """
        del step
        tokens, scale_inputs = self.tokens_and_inputs(frozen, batch)
        valid = batch["valid"].astype(jnp.float32)

        def evaluate(i):
            ratios = jnp.full(tokens.shape[:1], (i + 0.5) / _BINS)
            key = jax.random.fold_in(jax.random.key(0), i)
            is_masked = sample_masks(key, self.transformer.scale_list, ratios)
            metrics = self.per_image_metrics(
                params, frozen, batch["label"], tokens, scale_inputs, is_masked
            )
            overall = {name: Mean.of(metrics[name], valid) for name in ("loss", "accuracy")}
            return self._means(metrics, ratios, is_masked, valid) | overall

        by_ratio = jax.lax.map(evaluate, jnp.arange(_BINS))
        return jax.tree.map(lambda x: x.sum(0), by_ratio)

    def preview(self, params, frozen, images, rng, step) -> jax.Array:
        del images, step
        return self.sample_preview({**frozen, "masked": params}, rng)


def ratio_metric(i: int) -> str:
    """The name of the loss at mask ratios from i/10 to (i + 1)/10."""
    return f"loss/ratio_{i / _BINS:.1f}-{(i + 1) / _BINS:.1f}"
