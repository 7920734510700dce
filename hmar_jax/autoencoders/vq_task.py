"""Training a tokenizer: state, step, evaluation, as pure functions.

The losses are VQGAN's (arXiv 2012.09841) around VAR's multi-scale quantizer (arXiv 2404.02905, algorithm 1). What keeps the
codebook alive, which neither paper spells out: the encoder first trains without quantizing; then the codebook is drawn from
the residuals that the encoder gives at every scale; from then on entries that no scale has used for a while are replaced by
current residuals.

Letters: B images, h w sides, S side of the features, Z channels, V entries, K scales, L tokens.
"""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hmar_jax.autoencoders import adversarial
from hmar_jax.autoencoders.discriminator import PatchDiscriminator
from hmar_jax.autoencoders.perceptual import PerceptualNetwork, perceptual_distance
from hmar_jax.autoencoders.vq import PARTITION_RULES, Tokenizer, TokenizerConfig, to_float
from hmar_jax.autoencoders.vq_losses import quantizer_loss, straight_through
from hmar_jax.parallel.sharding import Rules, constrain_batch, constrain_like_params
from hmar_jax.training.metrics import Mean
from hmar_jax.training.optimizer import adamw, lr_schedule
from hmar_jax.training.state import TrainState

_NEVER = -(2**30)  # images ago: an entry that was never hit


@flax.struct.dataclass
class TokenizerState(TrainState):
    """Everything a tokenizer run must save to go on exactly; params are the tokenizer's."""

    discriminator: Any  # parameters, or {} where there is none
    discriminator_opt_state: Any
    last_hit: (
        jax.Array
    )  # (K, V) int32: how many images had been seen when scale k last used the entry
    images_seen: jax.Array  # () int32, images seen


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """The recipe. Weights are factors in the sum of losses; a weight of 0 leaves that loss out of the program."""

    tokenizer: TokenizerConfig
    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    schedule: str = "cos"
    warmup_steps: int = 50  # of the learning rate
    end_ratio: float = 0.01
    b2: float = 0.99
    clip: float = 1.0
    weight_decay: float = 0.0
    l2_weight: float = 1.0
    l1_weight: float = 0.2
    quantizer_weight: float = 1.0
    beta: float = 0.25
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 0  # step from which the discriminator's opinion counts
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_learning_rate: float = 1e-4
    unquantized_steps: int = 100  # before the codebook is drawn from data, 1 or more
    revive_every: int = 20  # steps; 0 never
    revive_after: int = 2000  # images without a hit at any scale
    usage_window: int = 10000  # images over which usage is reported

    partition_rules: ClassVar[Rules] = PARTITION_RULES

    @property
    def flops_per_image(self) -> None:
        """Not counted: convolutions of many shapes."""

    @property
    def model(self) -> Tokenizer:
        return Tokenizer(self.tokenizer)

    @property
    def discriminator(self) -> PatchDiscriminator | None:
        if not self.adversarial_weight:
            return None
        return PatchDiscriminator(self.discriminator_channels, self.discriminator_layers)

    def optimizer(self) -> optax.GradientTransformation:
        return adamw(
            self.learning_rates(), lambda it: self.weight_decay, b1=0.9, b2=self.b2, clip=self.clip
        )

    def learning_rates(self):
        return lr_schedule(
            self.schedule,
            peak=self.learning_rate,
            warmup=self.warmup_steps,
            total=self.steps,
            end_ratio=self.end_ratio,
        )

    def discriminator_optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.discriminator_learning_rate, b1=0.5, b2=0.9)

    def init(self, rng: jax.Array, perceptual: PerceptualNetwork | None = None) -> TokenizerState:
        del perceptual  # frozen: not part of the state
        side = self.tokenizer.image_side
        images = jnp.zeros((1, side, side, 3))
        rng, key = jax.random.split(rng)
        params = self.model.init(rng, images)["params"]
        discriminator = self.discriminator.init(key, images)["params"] if self.discriminator else {}
        return TokenizerState.start(
            params,
            self.optimizer().init(params),
            discriminator=discriminator,
            discriminator_opt_state=self.discriminator_optimizer().init(discriminator),
            last_hit=jnp.full(
                (len(self.tokenizer.scales), self.tokenizer.vocab_size), _NEVER, jnp.int32
            ),
            images_seen=jnp.zeros((), jnp.int32),
        )

    def train_step(
        self,
        state: TokenizerState,
        batch: dict[str, jax.Array],
        rng: jax.Array,
        perceptual: PerceptualNetwork | None = None,
    ) -> tuple[TokenizerState, dict[str, jax.Array]]:
        """One step of the tokenizer and, where there is one, of the discriminator.

        Args:
          batch: {"image": (B, h, w, 3) uint8}.
          rng: key of the run; the step's own key is folded from it.
          perceptual: network of the perceptual term, where perceptual_weight is not 0.

        Returns:
          The next state and scalar metrics.
        """
        images = constrain_batch(to_float(batch["image"]))  # (B, h, w, 3) in [-1, 1]
        dropout_key, draw_key, revive_key = jax.random.split(jax.random.fold_in(rng, state.step), 3)
        quantizing = (state.step >= self.unquantized_steps).astype(jnp.float32)

        (painted, codebook), pull_back, (f, quantized) = jax.vjp(
            lambda params: self._forward(params, images, quantizing, dropout_key),
            state.params,
            has_aux=True,
        )
        (reconstruction, metrics), to_image = jax.value_and_grad(
            self._reconstruction_loss, has_aux=True
        )(painted, images, perceptual)
        metrics |= {
            "loss": reconstruction + quantizing * self.quantizer_weight * codebook,
            "quantizer_loss": codebook,
        }
        if self.discriminator:
            more, to_image = self._adversarial(state, painted, to_image, pull_back)
            metrics |= more
        (grads,) = pull_back((to_image, quantizing * self.quantizer_weight))
        grads = constrain_like_params(grads, self.partition_rules)
        updates, opt_state = self.optimizer().update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        images_seen = state.images_seen + images.shape[0]
        last_hit = self._hits(state.last_hit, quantized.tokens, images_seen)
        new = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            last_hit=last_hit,
            images_seen=images_seen,
        )
        if self.discriminator:
            new, more = self._discriminator_step(new, images, painted)
            metrics |= more
        new = self._draw_codebook(new, f, draw_key)
        if self.revive_every:
            new, revived = self._revive(new, quantized.z, revive_key)
            metrics["revived"] = revived
        metrics |= {"grad_norm": optax.global_norm(grads), "lr": self.learning_rates()(state.step)}
        return new, metrics | self.usage(new)

    def _forward(self, params, images, quantizing, dropout_key):
        """Images (B, h, w, 3) and the quantizer's loss, both of which have gradients; features and tokens beside."""
        apply = lambda *args, **kw: self.model.apply(
            {"params": params}, *args, rngs={"dropout": dropout_key}, **kw
        )
        deterministic = self.tokenizer.dropout == 0
        f = apply(images, deterministic, method="features")
        quantized = apply(f, method="quantize")
        f_hat = quantizing * straight_through(quantized.f_hats[-1], f) + (1 - quantizing) * f
        painted = apply(f_hat, deterministic, method="paint")
        return (painted, quantizer_loss(quantized.f_hats, f, self.beta)), (f, quantized)

    def _reconstruction_loss(self, painted, images, perceptual):
        l2, l1 = jnp.mean((painted - images) ** 2), jnp.mean(jnp.abs(painted - images))
        loss, metrics = (
            self.l2_weight * l2 + self.l1_weight * l1,
            {"l2": l2, "l1": l1, "psnr": psnr(painted, images)},
        )
        if self.perceptual_weight:
            distance = perceptual_distance(perceptual, painted, images).mean()
            loss, metrics["perceptual"] = loss + self.perceptual_weight * distance, distance
        return loss, metrics

    def _adversarial(self, state, painted, to_image, pull_back):
        """Adds the generator's gradient to that of the reconstruction, both at the image (B, h, w, 3).

        Its weight makes both equally long at the decoder's last kernel (VQGAN, equation 7).
        """
        judge = lambda x: adversarial.hinge_generator_loss(
            self.discriminator.apply({"params": state.discriminator}, x)
        )
        loss, gradient = jax.value_and_grad(judge)(painted)
        at_last_kernel = lambda cotangent: pull_back((cotangent, 0.0))[0]["decoder"]["conv_out"][
            "kernel"
        ]
        weight = adversarial.adaptive_weight(at_last_kernel(to_image), at_last_kernel(gradient))
        active = (state.step >= self.adversarial_start) * self.adversarial_weight
        return {
            "adversarial": loss,
            "adaptive_weight": weight,
        }, to_image + active * weight * gradient

    def _discriminator_step(self, state, images, painted):
        def loss(params):
            score = lambda x: self.discriminator.apply({"params": params}, x)
            return adversarial.hinge_discriminator_loss(score(images), score(painted))

        value, grads = jax.value_and_grad(loss)(state.discriminator)
        updates, opt_state = self.discriminator_optimizer().update(
            grads, state.discriminator_opt_state
        )
        params = optax.apply_updates(state.discriminator, updates)
        return state.replace(discriminator=params, discriminator_opt_state=opt_state), {
            "discriminator_loss": value,
            "discriminator_grad_norm": optax.global_norm(grads),
        }

    def _hits(self, last_hit, tokens, images_seen):
        """Marks the entries that each scale used in this batch; tokens (B, L)."""
        scales = self.tokenizer.scale_list
        for k in range(scales.num_scales):
            last_hit = last_hit.at[k, tokens[:, scales.slice(k)].ravel()].set(images_seen)
        return last_hit

    def usage(self, state: TokenizerState) -> dict[str, jax.Array]:
        """Share of the entries that each scale used over the last `usage_window` images, and that any scale used."""
        recent = state.last_hit > state.images_seen - self.usage_window  # (K, V)
        per_scale = {
            f"usage/{side}x{side}": recent[k].mean() for k, side in enumerate(self.tokenizer.scales)
        }
        return per_scale | {"usage/any": recent.any(0).mean()}

    def _draw_codebook(self, state, f, key):
        """Before the first quantizing step: every entry becomes a residual of these features, f (B, S, S, Z)."""

        def draw():
            rests = self.model.apply(
                {"params": state.params},
                f,
                method=lambda t, f: t.quantizer.unquantized_residuals(f),
            )  # (B, L, Z)
            return self._with_codebook(
                state, self._pick(rests, key), jnp.ones(self.tokenizer.vocab_size, bool)
            )

        return jax.lax.cond(state.step == self.unquantized_steps, draw, lambda: state)

    def _revive(self, state, z, key):
        """Replaces entries without a hit for `revive_after` images by residuals of this batch, z (B, L, Z)."""
        idle = state.images_seen - state.last_hit.max(0)  # (V,)
        since_draw = (state.step - self.unquantized_steps) * self.batch_size
        due = (state.step % self.revive_every == 0) & (since_draw > self.revive_after)
        dead = due & (idle > self.revive_after)
        fresh = state.replace(last_hit=jnp.where(dead, state.images_seen, state.last_hit))
        fresh = jax.lax.cond(
            due, lambda: self._with_codebook(fresh, self._pick(z, key), dead), lambda: state
        )
        return fresh, dead.sum()

    def _pick(self, z, key):
        """V vectors out of (B, L, Z): every scale has the same chance, then every image and position of it."""
        scales, entries = self.tokenizer.scale_list, self.tokenizer.vocab_size
        keys = jax.random.split(key, 3)
        k = jax.random.randint(keys[0], (entries,), 0, scales.num_scales)
        within = jax.random.uniform(keys[1], (entries,)) * jnp.array(scales.lengths)[k]
        position = jnp.array(scales.offsets)[k] + within.astype(jnp.int32)
        picked = z[jax.random.randint(keys[2], (entries,), 0, z.shape[0]), position]
        # Two entries may be given one vector: a little noise lets them part.
        return picked + 0.01 * z.std() * jax.random.normal(keys[1], picked.shape)

    def _with_codebook(self, state, vectors, where):
        """Sets entries (V,) to vectors (V, Z), and forgets what the optimizer remembers of them."""
        where = where[:, None]
        quantizer = state.params["quantizer"]
        params = state.params | {
            "quantizer": quantizer | {"codebook": jnp.where(where, vectors, quantizer["codebook"])}
        }

        def forget(path, leaf):
            is_codebook = any(getattr(p, "key", None) == "codebook" for p in path)
            return jnp.where(where, 0, leaf) if is_codebook else leaf

        return state.replace(
            params=params, opt_state=jax.tree_util.tree_map_with_path(forget, state.opt_state)
        )

    def eval_step(
        self,
        state: TokenizerState,
        batch: dict[str, jax.Array],
        perceptual: PerceptualNetwork | None = None,
    ) -> dict[str, Mean]:
        """Means over the images marked valid: {"l1", "l2", "psnr"}, and "loss", the weighted l1 and l2 alone."""
        del perceptual
        images = to_float(batch["image"])
        painted = self.reconstruct(state, batch["image"])
        l1, l2 = (
            jnp.abs(painted - images).mean((1, 2, 3)),
            ((painted - images) ** 2).mean((1, 2, 3)),
        )
        figures = {
            "loss": self.l2_weight * l2 + self.l1_weight * l1,
            "l1": l1,
            "l2": l2,
            "psnr": jax.vmap(psnr)(painted, images),
        }
        return {name: Mean.of(value, batch["valid"]) for name, value in figures.items()}

    def reconstruct(self, state: TokenizerState, images) -> jax.Array:
        """(B, h, w, 3) uint8 -> (B, h, w, 3) in [-1, 1], through the tokens (without, while the codebook is not drawn)."""
        apply = lambda *args, method: self.model.apply(
            {"params": state.eval_params}, *args, method=method
        )
        f = apply(to_float(images), method="features")
        f_hat = apply(f, method="quantize").f_hats[-1]
        return apply(
            jnp.where(state.step >= self.unquantized_steps, f_hat, f), method="paint"
        ).clip(-1, 1)

    def samples(self, state: TokenizerState, images) -> tuple[jax.Array, jax.Array]:
        """What is shown while training: images and their reconstructions, both (B, h, w, 3) in [-1, 1]."""
        return to_float(images), self.reconstruct(state, images)


def psnr(painted, images):
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * jnp.log10(4 / jnp.mean((painted.clip(-1, 1) - images) ** 2).clip(1e-10))
