"""Training stage 2, masked prediction on top of a frozen stage 1: state, step, evaluation, as pure functions.

HMAR (arXiv 2506.04421, section 3.3). Letters: B images, L tokens, K scales, Z channels of the code, M blocks of stage 2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hmar_jax.families.hmar import flops
from hmar_jax.families.hmar.losses import cross_entropy, masked_weights
from hmar_jax.families.hmar.masked import MaskedTransformer
from hmar_jax.families.hmar.masking import sample_mask_ratios, sample_masks
from hmar_jax.training.metrics import Mean
from hmar_jax.training.state import TrainState
from hmar_jax.training.step import TransformerRecipe

_TENTHS = 10  # of the mask ratio, by which losses are told apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedTask(TransformerRecipe):
    """The recipe. What is frozen comes as an argument: {"tokenizer": …, "transformer": …}."""

    masked_depth: int  # M
    loss_weights: str = "unweighted"
    mask_ratios: str = "uniform"
    # Published: one ratio and one set of positions for all images of a batch; every step's gradient is then that of one
    # difficulty alone.
    shared_mask: bool = False

    @property
    def model(self) -> MaskedTransformer:
        return MaskedTransformer(self.transformer, self.masked_depth)

    @property
    def flops_per_image(self) -> float:
        """Of one step, counted by hand."""
        return flops.masked_step(self.transformer, self.masked_depth)

    def init(self, rng: jax.Array, frozen) -> TrainState:
        """Stage 1's last M blocks and head, copied, and a new mask embedding."""
        params = self.model.init(rng, frozen["transformer"])
        return self.start(
            jax.tree.map(jnp.copy, params)
        )  # the state may be donated, what is frozen not

    def train_step(
        self, state: TrainState, batch: dict[str, jax.Array], rng: jax.Array, frozen
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step.

        Args:
          batch: {"label": (B,) int32} and "tokens" (B, L) int32, or "image" (B, h, w, 3) uint8 to be encoded here.
          rng: key of the run; the step's own key is folded from it.
          frozen: parameters of the tokenizer and of stage 1.

        Returns:
          The next state and metrics, those of single scales and of tenths of the mask ratio as Means.
        """
        class_key, ratio_key, mask_key, dropout_key = jax.random.split(
            jax.random.fold_in(rng, state.step), 4
        )
        labels = self.drop_classes(class_key, batch["label"])
        ratios, masked = self.draw(ratio_key, mask_key, labels.shape[0])
        rows = batch | {"label": labels, "ratio": ratios, "masked": masked}
        return self.descend(
            state, lambda params, rows, key: self.loss(params, rows, frozen, key), rows, dropout_key
        )

    def draw(self, ratio_key, mask_key, batch: int) -> tuple[jax.Array, jax.Array]:
        """Mask ratios (B,) and masks (B, L - l_0), True where masked."""
        drawn = 1 if self.shared_mask else batch
        ratios = sample_mask_ratios(ratio_key, drawn, self.mask_ratios)
        masked = sample_masks(mask_key, self.transformer.scale_list, ratios)
        return jnp.broadcast_to(ratios, (batch,)), jnp.broadcast_to(
            masked, (batch, masked.shape[1])
        )

    def loss(self, params, batch, frozen, dropout_key=None):
        """Mean over the images of a batch that also has "ratio" (B,) and "masked" (B, L - l_0), and the metrics."""
        tokens = self.tokens_of(batch, frozen["tokenizer"])
        figures = self.figures(params, frozen, batch["label"], tokens, batch["masked"], dropout_key)
        metrics = self._means(figures, batch["ratio"], batch["masked"], jnp.ones(tokens.shape[:1]))
        loss = figures["loss"].mean()
        return loss, metrics | {"loss": loss, "accuracy": figures["accuracy"].mean()}

    def figures(
        self, params, frozen, labels, tokens, masked, dropout_key=None
    ) -> dict[str, jax.Array]:
        """Of each image: "loss" (B,) weighted, "accuracy" (B,) over its masked positions; "ce" (B, L - l_0) everywhere."""
        first = self.transformer.scale_list.lengths[0]
        codes = self.quantize(frozen["tokenizer"], tokens, "transformer_inputs")
        own = self.quantize(frozen["tokenizer"], tokens, "own_scale_inputs")
        logits = self.model.logits(
            frozen["transformer"], params, labels, codes, own, masked, dropout_key
        )[:, first:]
        targets = tokens[:, first:]
        ce = cross_entropy(logits, targets, self.label_smoothing)
        correct = (logits.argmax(-1) == targets) & masked
        return {
            "loss": (
                masked_weights(self.transformer.scale_list, self.loss_weights, masked) * ce
            ).sum(-1),
            "accuracy": correct.sum(-1) / masked.sum(-1),
            "ce": ce,
        }

    def _means(self, figures, ratios, masked, valid) -> dict[str, Mean]:
        """Loss over the masked positions of each scale, and of the images in each tenth of the mask ratio."""
        scales, means = self.transformer.scale_list, {}
        for k in range(1, scales.num_scales):
            part = slice(
                scales.offsets[k] - scales.lengths[0], scales.offsets[k + 1] - scales.lengths[0]
            )
            means[f"loss/{scales.sides[k]}x{scales.sides[k]}"] = Mean.of(
                figures["ce"][:, part], masked[:, part] * valid[:, None]
            )
        tenth = jnp.clip(jnp.ceil(ratios * _TENTHS) - 1, 0, _TENTHS - 1)
        mean_ce = (figures["ce"] * masked).sum(-1) / masked.sum(-1)
        for t in range(_TENTHS):
            means[tenth_name(t)] = Mean.of(mean_ce, (tenth == t) * valid)
        return means

    def eval_step(self, state: TrainState, batch, frozen) -> dict[str, Mean]:
        """Means over the images marked valid. Every image is judged at ten mask ratios, the middle of each tenth, with
        positions that depend on nothing but the tenth and the image's place in the batch: the same at every evaluation."""
        tokens = self.tokens_of(batch, frozen["tokenizer"])
        valid = batch["valid"].astype(jnp.float32)

        def judge(t):
            ratios = jnp.full(tokens.shape[:1], (t + 0.5) / _TENTHS)
            masked = sample_masks(
                jax.random.fold_in(jax.random.key(0), t), self.transformer.scale_list, ratios
            )
            figures = self.figures(state.eval_params, frozen, batch["label"], tokens, masked)
            overall = {name: Mean.of(figures[name], valid) for name in ("loss", "accuracy")}
            return self._means(figures, ratios, masked, valid) | overall

        by_tenth = jax.lax.map(judge, jnp.arange(_TENTHS))
        return jax.tree.map(lambda x: x.sum(0), by_tenth)


def tenth_name(t: int) -> str:
    """Of the metric of mask ratios from t/10 to (t + 1)/10."""
    return f"loss/ratio_{t / _TENTHS:.1f}-{(t + 1) / _TENTHS:.1f}"
