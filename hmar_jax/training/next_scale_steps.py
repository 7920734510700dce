"""Training stage 1, the next-scale transformer: state, step, evaluation, as pure functions.

HMAR (arXiv 2506.04421, section 3.2). Letters: B pictures, L tokens, K scales, h w sides of a picture.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hmar_jax.models.tokenizer import Tokenizer, TokenizerConfig, to_float
from hmar_jax.models.transformer import NextScaleTransformer, TransformerConfig
from hmar_jax.training.losses import cross_entropy, per_scale, position_weights
from hmar_jax.training.optimizer import adamw, lr_schedule, wd_schedule


@flax.struct.dataclass
class NextScaleState:
    """Everything a stage-1 run must save to go on exactly. The frozen tokenizer lies beside it in the run directory."""

    step: jax.Array  # () int32, steps done
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class NextScaleTask:
    """The recipe."""

    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    steps: int
    batch_size: int
    learning_rate: float  # peak
    schedule: str = "lin0"
    warmup_steps: int = 0
    start_ratio: float = 0.005
    end_ratio: float = 0.1
    weight_decay: float = 0.05
    weight_decay_end: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    clip: float = 2.0
    loss_weights: str = "lognorm"
    label_smoothing: float = 0.0
    class_dropout: float = 0.1  # share of pictures whose class is replaced by the null class

    @property
    def model(self) -> NextScaleTransformer:
        return NextScaleTransformer(self.transformer)

    def learning_rates(self):
        return lr_schedule(
            self.schedule, peak=self.learning_rate, warmup=self.warmup_steps, total=self.steps,
            start_ratio=self.start_ratio, end_ratio=self.end_ratio)

    def optimizer(self) -> optax.GradientTransformation:
        decay = wd_schedule(start=self.weight_decay, end=self.weight_decay_end, total=self.steps)
        return adamw(self.learning_rates(), decay, b1=self.b1, b2=self.b2, clip=self.clip)

    def init(self, rng: jax.Array) -> NextScaleState:
        params = self.model.init(rng)
        return NextScaleState(step=jnp.zeros((), jnp.int32), params=params, opt_state=self.optimizer().init(params))

    def train_step(
        self, state: NextScaleState, batch: dict[str, jax.Array], rng: jax.Array, tokenizer_params
    ) -> tuple[NextScaleState, dict[str, jax.Array]]:
        """One step.

        Args:
          batch: {"label": (B,) int32} and "tokens" (B, L) int32, or "image" (B, h, w, 3) uint8 to be encoded here.
          rng: key of the run; the step's own key is folded from it.
          tokenizer_params: of the frozen tokenizer.

        Returns:
          The next state and scalar metrics.
        """
        class_key, dropout_key = jax.random.split(jax.random.fold_in(rng, state.step))
        labels = batch["label"]
        dropped = jax.random.bernoulli(class_key, self.class_dropout, labels.shape)
        labels = jnp.where(dropped, self.transformer.null_class, labels)
        tokens, codes = self.inputs(batch, tokenizer_params)
        (_, metrics), grads = jax.value_and_grad(self._loss, has_aux=True)(
            state.params, labels, tokens, codes, dropout_key)
        updates, opt_state = self.optimizer().update(grads, state.opt_state, state.params)
        metrics |= {"grad_norm": optax.global_norm(grads), "lr": self.learning_rates()(state.step)}
        params = optax.apply_updates(state.params, updates)
        return NextScaleState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def inputs(self, batch, tokenizer_params):
        """Tokens (B, L) and next-scale inputs (B, L - l_0, Z) of a batch."""
        apply = lambda x, method: Tokenizer(self.tokenizer).apply({"params": tokenizer_params}, x, method=method)
        tokens = batch["tokens"] if "tokens" in batch else apply(to_float(batch["image"]), "encode")
        return tokens, apply(tokens, "transformer_inputs")

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

    def eval_step(self, state: NextScaleState, batch, tokenizer_params) -> dict[str, jax.Array]:
        """Sums over the pictures marked valid of every training figure, and their "count"."""
        tokens, codes = self.inputs(batch, tokenizer_params)
        one = lambda label, t, c: self._loss(state.params, label[None], t[None], c[None])[1]
        figures = jax.vmap(one)(batch["label"], tokens, codes)
        valid = batch["valid"].astype(jnp.float32)
        return {name: (value * valid).sum() for name, value in figures.items()} | {"count": valid.sum()}
