"""What both stages of a transformer's training share: the optimizer, the state of a run, and what a batch becomes.

HMAR (arXiv 2506.04421) trains its stages with VAR's recipe (arXiv 2404.02905). Letters: B images, L tokens, K scales, Z
channels of the code, h w sides of a image.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from hmar_jax.autoencoders.vq import Tokenizer, TokenizerConfig, to_float
from hmar_jax.families.hmar.transformer import PARTITION_RULES, TransformerConfig
from hmar_jax.parallel.sharding import Rules, constrain_batch, constrain_like_params
from hmar_jax.training.metrics import Mean
from hmar_jax.training.optimizer import adamw, lr_schedule, wd_schedule
from hmar_jax.training.state import TrainState

Loss = Callable[
    [Any, Any, jax.Array], tuple[jax.Array, dict[str, Any]]
]  # (params, rows, key) -> value, metrics


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
    class_dropout: float = 0.1  # share of images whose class is replaced by the null class
    accumulate: int = (
        1  # parts that a batch is cut into, whose gradients are added up one after another
    )

    partition_rules: ClassVar[Rules] = PARTITION_RULES

    def learning_rates(self) -> Callable:
        return lr_schedule(
            self.schedule,
            peak=self.learning_rate,
            warmup=self.warmup_steps,
            total=self.steps,
            start_ratio=self.start_ratio,
            end_ratio=self.end_ratio,
        )

    def optimizer(self) -> optax.GradientTransformation:
        decay = wd_schedule(start=self.weight_decay, end=self.weight_decay_end, total=self.steps)
        return adamw(self.learning_rates(), decay, b1=self.b1, b2=self.b2, clip=self.clip)

    def start(self, params) -> TrainState:
        """The state before the first step."""
        return TrainState.start(params, self.optimizer().init(params))

    def descend(
        self, state: TrainState, loss: Loss, rows, key: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        """One step down the mean of `loss` over rows, arrays (B, …): the next state and the metrics."""
        grads, metrics = gradients(
            loss, state.params, rows, key, self.accumulate, self.partition_rules
        )
        updates, opt_state = self.optimizer().update(grads, state.opt_state, state.params)
        metrics = metrics | {
            "grad_norm": optax.global_norm(grads),
            "lr": self.learning_rates()(state.step),
        }
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def drop_classes(self, rng: jax.Array, labels) -> jax.Array:
        """(B,) int32, some of them replaced by the null class."""
        dropped = jax.random.bernoulli(rng, self.class_dropout, labels.shape)
        return jnp.where(dropped, self.transformer.null_class, labels)

    def tokens_of(self, batch, tokenizer_params) -> jax.Array:
        """(B, L) int32 of a batch that has them as "tokens", or "image" (B, h, w, 3) uint8 to be encoded here."""
        return (
            batch["tokens"]
            if "tokens" in batch
            else self.quantize(tokenizer_params, to_float(batch["image"]), "encode")
        )

    def quantize(self, tokenizer_params, x, method: str):
        """A method of the frozen tokenizer."""
        return Tokenizer(self.tokenizer).apply({"params": tokenizer_params}, x, method=method)


def gradients(
    loss: Loss, params, rows, key: jax.Array, parts: int, rules: Rules = ()
) -> tuple[Any, dict[str, Any]]:
    """The mean gradient of `loss` over rows (B, …), computed in so many parts of B / parts rows, and the means of its metrics.

    Part a takes the rows a, a + parts, …: each device keeps its own, wherever the batch is divided over devices.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (_, metrics), grads = gradient(params, rows, key)
        return constrain_like_params(grads, rules), metrics

    def cut(x):  # (B, …) -> (parts, B / parts, …)
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        part_rows, part_key = part
        (_, metrics), grads = gradient(params, jax.tree.map(constrain_batch, part_rows), part_key)
        return constrain_like_params(jax.tree.map(jnp.add, total, grads), rules), metrics

    zeros = constrain_like_params(jax.tree.map(jnp.zeros_like, params), rules)
    total, metrics = jax.lax.scan(
        add, zeros, (jax.tree.map(cut, rows), jax.random.split(key, parts))
    )
    mean = lambda x: jax.tree.map(lambda y: y.sum(0), x) if isinstance(x, Mean) else x.mean(0)
    return jax.tree.map(lambda g: g / parts, total), {
        name: mean(value) for name, value in metrics.items()
    }
