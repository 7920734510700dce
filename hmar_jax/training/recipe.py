"""What both stages of a transformer's training share: the optimizer, the state of a run, and what a batch becomes.

HMAR (arXiv 2506.04421) trains its stages with VAR's recipe (arXiv 2404.02905). Letters: B pictures, L tokens, K scales, Z
channels of the code, h w sides of a picture.
"""

import dataclasses
from typing import Any, Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hmar_jax.models.tokenizer import Tokenizer, TokenizerConfig, to_float
from hmar_jax.models.transformer import TransformerConfig
from hmar_jax.training.optimizer import adamw, lr_schedule, wd_schedule


@flax.struct.dataclass
class TrainState:
    """Everything a transformer's run must save to go on exactly. What is frozen lies beside it in the run directory."""

    step: jax.Array  # () int32, steps done
    params: Any  # the trained ones
    opt_state: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerRecipe:
    """Model and recipe; the two stages add their loss."""

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
    label_smoothing: float = 0.0
    class_dropout: float = 0.1  # share of pictures whose class is replaced by the null class

    def learning_rates(self) -> Callable:
        return lr_schedule(
            self.schedule, peak=self.learning_rate, warmup=self.warmup_steps, total=self.steps,
            start_ratio=self.start_ratio, end_ratio=self.end_ratio)

    def optimizer(self) -> optax.GradientTransformation:
        decay = wd_schedule(start=self.weight_decay, end=self.weight_decay_end, total=self.steps)
        return adamw(self.learning_rates(), decay, b1=self.b1, b2=self.b2, clip=self.clip)

    def start(self, params) -> TrainState:
        """The state before the first step."""
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=self.optimizer().init(params))

    def descend(self, state: TrainState, loss: Callable) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step down `loss(params) -> (value, metrics)`: the next state and the metrics."""
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer().update(grads, state.opt_state, state.params)
        metrics = metrics | {"grad_norm": optax.global_norm(grads), "lr": self.learning_rates()(state.step)}
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def drop_classes(self, rng: jax.Array, labels) -> jax.Array:
        """(B,) int32, some of them replaced by the null class."""
        dropped = jax.random.bernoulli(rng, self.class_dropout, labels.shape)
        return jnp.where(dropped, self.transformer.null_class, labels)

    def tokens_of(self, batch, tokenizer_params) -> jax.Array:
        """(B, L) int32 of a batch that has them as "tokens", or "image" (B, h, w, 3) uint8 to be encoded here."""
        return batch["tokens"] if "tokens" in batch else self.quantize(tokenizer_params, to_float(batch["image"]), "encode")

    def quantize(self, tokenizer_params, x, method: str):
        """A method of the frozen tokenizer."""
        return Tokenizer(self.tokenizer).apply({"params": tokenizer_params}, x, method=method)
