"""Training a multi-scale VQ tokenizer: recipe, state, update, evaluation.

The losses are VQGAN's (arXiv 2012.09841) around VAR's multi-scale quantizer (arXiv 2404.02905,
algorithm 1). Neither paper says how to keep the codebook in use. Here, the encoder first trains
without quantizing. Then the codebook is initialized with the residuals that the encoder yields at
all scales. From then on, entries that no scale has used for a while are reset to current
residuals.

Letters: B images, h w sides of an image, S side of the features, Z channels of the code, V codebook
entries, K scales, L tokens.
"""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hmar_jax.autoencoders.discriminator import PatchDiscriminator
from hmar_jax.autoencoders.losses import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    psnr,
    quantizer_loss,
    straight_through,
)
from hmar_jax.autoencoders.perceptual import perceptual_distance
from hmar_jax.autoencoders.vq import (
    PARTITION_RULES,
    Quantized,
    Tokenizer,
    TokenizerConfig,
    apply_tokenizer,
    to_float,
)
from hmar_jax.parallel.sharding import Rules, constrain_batch, constrain_like_params
from hmar_jax.settings import setting
from hmar_jax.training.metrics import Mean
from hmar_jax.training.optimizer import OptimizerConfig
from hmar_jax.training.state import TrainState
from hmar_jax.training.task import Batch, Params, TaskDefaults

_NEVER = -(2**30)  # in place of a number of images: the entry was never used

Metrics = dict[str, jax.Array]  # scalars


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQRecipe(OptimizerConfig):
    """How a tokenizer is trained. A loss whose weight is 0 is left out of the compiled step."""

    learning_rate: float = setting(1e-3, "Peak learning rate.", at_least=0)
    schedule: str = setting("cos", "Learning-rate schedule, see training/optimizer.py.")
    warmup_steps: int = setting(50, "Steps of linear warm-up.", at_least=0, share_of_run=0.05)
    end_ratio: float = setting(0.01, "Last learning rate, relative to the peak.", at_least=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay at the first step.", at_least=0)
    b2: float = setting(0.99, "Decay of Adam's second moment.", at_least=0, below=1)
    clip: float = setting(1.0, "Largest global norm of a gradient; 0: no clipping.", at_least=0)

    l2_weight: float = setting(1.0, "Weight of the mean squared error.", at_least=0)
    l1_weight: float = setting(0.2, "Weight of the mean absolute error.", at_least=0)
    quantizer_weight: float = setting(
        1.0, "Weight of the codebook and commitment loss.", at_least=0
    )
    beta: float = setting(0.25, "Weight of the commitment term within that loss.", at_least=0)
    perceptual_weight: float = setting(
        0.0, "Weight of the perceptual distance; needs config.perceptual_network.", at_least=0
    )
    adversarial_weight: float = setting(
        0.0, "Factor of the adaptive weight of the adversarial loss.", at_least=0
    )
    adversarial_start: int = setting(
        0, "First step at which the adversarial loss counts.", at_least=0, share_of_run=0.5
    )
    discriminator_channels: int = setting(
        64, "Channels of the discriminator's first layer.", at_least=1
    )
    discriminator_layers: int = setting(3, "Discriminator layers of stride 2.", at_least=1)
    discriminator_learning_rate: float = setting(
        1e-4, "Learning rate of the discriminator.", at_least=0
    )

    vq_start_step: int = setting(
        100,
        "First step that quantizes; the codebook is initialized with data just before it. 0: the "
        "codebook of config.init_from stays.",
        at_least=0,
        share_of_run=0.1,
        happens_once=True,
        former_name="unquantized_steps",
    )
    reset_every: int = setting(
        20,
        "Steps between resets of unused codebook entries; 0: never.",
        at_least=0,
        share_of_run=0.01,
        former_name="revive_every",
    )
    reset_after: int = setting(
        2000,
        "Images after which an entry that no scale used is reset.",
        at_least=0,
        share_of_run=0.1,
        counts="images",
        former_name="revive_after",
    )
    usage_window: int = setting(
        10000,
        "Images over which codebook usage is reported.",
        at_least=1,
        share_of_run=0.25,
        counts="images",
    )


@flax.struct.dataclass
class VQTrainState(TrainState):
    """Everything a run must save to resume exactly; params are the tokenizer's."""

    discriminator: Any  # parameters, or {} where there is none
    discriminator_opt_state: Any
    last_used: jax.Array  # (K, V) int32: value of images_seen when scale k last used the entry
    images_seen: jax.Array  # () int32


@dataclasses.dataclass(frozen=True)
class VQTask(TaskDefaults):
    """Trains a tokenizer; a CustomUpdateTask, see training/task.py.

    `frozen` is {}, or {"perceptual": PerceptualNetwork} where the recipe's perceptual_weight is
    not 0.
    """

    tokenizer: TokenizerConfig
    steps: int
    batch_size: int
    recipe: VQRecipe = VQRecipe()

    partition_rules: ClassVar[Rules] = PARTITION_RULES
    input_kinds: ClassVar[frozenset[str]] = frozenset({"image"})
    num_preview_images: ClassVar[int] = 8

    @property
    def optimizer(self) -> OptimizerConfig:
        return self.recipe

    @property
    def discriminator(self) -> PatchDiscriminator | None:
        if not self.recipe.adversarial_weight:
            return None
        return PatchDiscriminator(
            self.recipe.discriminator_channels, self.recipe.discriminator_layers
        )

    @property
    def discriminator_optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.recipe.discriminator_learning_rate, b1=0.5, b2=0.9)

    def batch_shapes(self, kind: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of all hosts; the label is not used."""
        del kind  # images
        batch, side = self.batch_size, self.tokenizer.image_side
        return {
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
            "image": jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8),
        }

    # Before the first step.

    def init_params(self, rng: jax.Array, frozen: Params) -> Params:
        """The tokenizer's parameters before the first step."""
        del frozen
        return Tokenizer(self.tokenizer).init(jax.random.split(rng)[0], self._example())["params"]

    def init_state(self, rng: jax.Array, frozen: Params) -> VQTrainState:
        """The state before the first step, without the moving average."""
        params = self.init_params(rng, frozen)
        discriminator = {}
        if self.discriminator:
            key = jax.random.split(rng)[1]
            discriminator = self.discriminator.init(key, self._example())["params"]
        return VQTrainState.start(
            params,
            self._make_optimizer().init(params),
            discriminator=discriminator,
            discriminator_opt_state=self.discriminator_optimizer.init(discriminator),
            last_used=jnp.full(
                (len(self.tokenizer.scales), self.tokenizer.vocab_size), _NEVER, jnp.int32
            ),
            images_seen=jnp.zeros((), jnp.int32),
        )

    def _example(self) -> jax.Array:
        side = self.tokenizer.image_side
        return jnp.zeros((1, side, side, 3))

    def _make_optimizer(self) -> optax.GradientTransformation:
        return self.optimizer.make(self.steps, self.decay_mask)

    # The update.

    def train_step(
        self, state: VQTrainState, frozen: Params, batch: Batch, rng: jax.Array
    ) -> tuple[VQTrainState, Metrics]:
        """One step of the tokenizer and, where there is one, of the discriminator.

        Args:
          frozen: see the class.
          batch: {"image": (B, h, w, 3) uint8}.
          rng: the key of the run; the step's own key is folded from it.

        Returns:
          The next state and scalar metrics.
        """
        recipe = self.recipe
        images = constrain_batch(to_float(batch["image"]))  # (B, h, w, 3) in [-1, 1]
        step_key = jax.random.fold_in(rng, state.step)
        dropout_key, codebook_key, reset_key = jax.random.split(step_key, 3)
        quantizing = (state.step >= recipe.vq_start_step).astype(jnp.float32)

        (reconstructions, codebook_loss), pull_back, (f, quantized) = jax.vjp(
            lambda params: self._reconstruct_for_training(params, images, quantizing, dropout_key),
            state.params,
            has_aux=True,
        )
        (reconstruction_loss, metrics), image_grad = jax.value_and_grad(
            self._reconstruction_loss, has_aux=True
        )(reconstructions, images, frozen)
        metrics |= {
            "loss": reconstruction_loss + quantizing * recipe.quantizer_weight * codebook_loss,
            "quantizer_loss": codebook_loss,
        }
        if self.discriminator:
            image_grad, more = self._add_adversarial_grad(
                state, reconstructions, image_grad, pull_back
            )
            metrics |= more
        (grads,) = pull_back((image_grad, quantizing * recipe.quantizer_weight))
        grads = constrain_like_params(grads, self.partition_rules)
        updates, opt_state = self._make_optimizer().update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        images_seen = state.images_seen + images.shape[0]
        new = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            last_used=self._mark_used(state.last_used, quantized.tokens, images_seen),
            images_seen=images_seen,
        )
        if self.discriminator:
            new, more = self._update_discriminator(new, images, reconstructions)
            metrics |= more
        new = self._init_codebook(new, f, codebook_key)
        if recipe.reset_every:
            new, metrics["codes_reset"] = self._reset_dead_codes(new, quantized.z, reset_key)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "lr": recipe.learning_rates(self.steps)(state.step),
        }
        return new, metrics | self.usage(new)

    def _reconstruct_for_training(
        self, params: Params, images: jax.Array, quantizing: jax.Array, dropout_key: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, Quantized]]:
        """Reconstructions, and what else a training step needs of them.

        Args:
          quantizing: 1.0, or 0.0 to decode the features as they are.

        Returns:
          What has gradients: images (B, h, w, 3) and the quantizer's loss; then, without gradients,
          the features and their codes.
        """
        apply = lambda *args, **kw: Tokenizer(self.tokenizer).apply(
            {"params": params}, *args, rngs={"dropout": dropout_key}, **kw
        )
        deterministic = self.tokenizer.dropout == 0
        f = apply(images, deterministic, method="compute_features")
        quantized = apply(f, method="quantize")
        f_hat = quantizing * straight_through(quantized.f_hats[-1], f) + (1 - quantizing) * f
        reconstructions = apply(f_hat, deterministic, method="decode_features")
        codebook_loss = quantizer_loss(quantized.f_hats, f, self.recipe.beta)
        return (reconstructions, codebook_loss), (f, quantized)

    def _reconstruction_loss(
        self, reconstructions: jax.Array, images: jax.Array, frozen: Params
    ) -> tuple[jax.Array, Metrics]:
        recipe = self.recipe
        l2 = jnp.mean((reconstructions - images) ** 2)
        l1 = jnp.mean(jnp.abs(reconstructions - images))
        loss = recipe.l2_weight * l2 + recipe.l1_weight * l1
        metrics = {"l2": l2, "l1": l1, "psnr": psnr(reconstructions, images)}
        if recipe.perceptual_weight:
            distance = perceptual_distance(frozen["perceptual"], reconstructions, images).mean()
            loss, metrics["perceptual"] = loss + recipe.perceptual_weight * distance, distance
        return loss, metrics

    def _add_adversarial_grad(self, state, reconstructions, image_grad, pull_back):
        """Adds the generator's gradient to that of the reconstruction loss.

        Its weight makes both equally long at the decoder's last kernel (VQGAN, equation 7).

        Args:
          reconstructions: (B, h, w, 3).
          image_grad: (B, h, w, 3), gradient of the reconstruction loss.
          pull_back: from gradients of images and of the quantizer's loss to those of parameters.

        Returns:
          The sum, (B, h, w, 3), and metrics.
        """

        def generator_loss(images):
            logits = self.discriminator.apply({"params": state.discriminator}, images)
            return hinge_generator_loss(logits)

        def at_last_kernel(image_grad):
            return pull_back((image_grad, 0.0))[0]["decoder"]["conv_out"]["kernel"]

        loss, gradient = jax.value_and_grad(generator_loss)(reconstructions)
        weight = adaptive_weight(at_last_kernel(image_grad), at_last_kernel(gradient))
        active = (state.step >= self.recipe.adversarial_start) * self.recipe.adversarial_weight
        metrics = {"adversarial": loss, "adaptive_weight": weight}
        return image_grad + active * weight * gradient, metrics

    def _update_discriminator(self, state, images, reconstructions):
        """The state with the discriminator one step further, and metrics."""

        def loss(params):
            score = lambda x: self.discriminator.apply({"params": params}, x)
            return hinge_discriminator_loss(score(images), score(reconstructions))

        value, grads = jax.value_and_grad(loss)(state.discriminator)
        updates, opt_state = self.discriminator_optimizer.update(
            grads, state.discriminator_opt_state
        )
        params = optax.apply_updates(state.discriminator, updates)
        return state.replace(discriminator=params, discriminator_opt_state=opt_state), {
            "discriminator_loss": value,
            "discriminator_grad_norm": optax.tree.norm(grads),
        }

    # The codebook.

    def _mark_used(
        self, last_used: jax.Array, tokens: jax.Array, images_seen: jax.Array
    ) -> jax.Array:
        """(K, V): `last_used` after a batch of tokens (B, L)."""
        scales = self.tokenizer.scale_list
        for k in range(scales.num_scales):
            last_used = last_used.at[k, tokens[:, scales.slice(k)].ravel()].set(images_seen)
        return last_used

    def usage(self, state: VQTrainState) -> Metrics:
        """Share of entries used over the last `usage_window` images, by each scale and by any."""
        recent = state.last_used > state.images_seen - self.recipe.usage_window  # (K, V)
        per_scale = {
            f"usage/{side}x{side}": recent[k].mean() for k, side in enumerate(self.tokenizer.scales)
        }
        return per_scale | {"usage/any": recent.any(0).mean()}

    def _init_codebook(self, state: VQTrainState, f: jax.Array, key: jax.Array) -> VQTrainState:
        """Sets every entry to a residual of f (B, S, S, Z), if the next step is vq_start_step."""

        def init():
            residuals = apply_tokenizer(
                self.tokenizer, state.params, f, method="unquantized_residuals"
            )  # (B, L, Z)
            every = jnp.ones(self.tokenizer.vocab_size, bool)
            return self._set_codes(state, self._sample_vectors(residuals, key), every)

        return jax.lax.cond(state.step == self.recipe.vq_start_step, init, lambda: state)

    def _reset_dead_codes(
        self, state: VQTrainState, z: jax.Array, key: jax.Array
    ) -> tuple[VQTrainState, jax.Array]:
        """Replaces entries unused for `reset_after` images by residuals of this batch, z (B, L, Z).

        Returns:
          The state, and how many entries were reset.
        """
        recipe = self.recipe
        idle = state.images_seen - state.last_used.max(0)  # (V,) images
        since_init = (state.step - recipe.vq_start_step) * self.batch_size  # images
        due = (state.step % recipe.reset_every == 0) & (since_init > recipe.reset_after)
        dead = due & (idle > recipe.reset_after)
        reset = state.replace(last_used=jnp.where(dead, state.images_seen, state.last_used))
        new = jax.lax.cond(
            due,
            lambda: self._set_codes(reset, self._sample_vectors(z, key), dead),
            lambda: state,
        )
        return new, dead.sum()

    def _sample_vectors(self, z: jax.Array, key: jax.Array) -> jax.Array:
        """(B, L, Z) -> (V, Z): uniform over scales, then over images and positions."""
        scales, entries = self.tokenizer.scale_list, self.tokenizer.vocab_size
        keys = jax.random.split(key, 3)
        k = jax.random.randint(keys[0], (entries,), 0, scales.num_scales)
        within = jax.random.uniform(keys[1], (entries,)) * jnp.array(scales.lengths)[k]
        position = jnp.array(scales.offsets)[k] + within.astype(jnp.int32)
        sampled = z[jax.random.randint(keys[2], (entries,), 0, z.shape[0]), position]
        # Two entries may get the same vector: a little noise lets training separate them.
        return sampled + 0.01 * z.std() * jax.random.normal(keys[1], sampled.shape)

    def _set_codes(self, state: VQTrainState, vectors: jax.Array, where: jax.Array) -> VQTrainState:
        """Sets the entries `where` (V,) to vectors (V, Z); their optimizer state becomes 0."""
        where = where[:, None]
        quantizer = state.params["quantizer"]
        codebook = jnp.where(where, vectors, quantizer["codebook"])
        params = state.params | {"quantizer": quantizer | {"codebook": codebook}}

        def clear(path, leaf):
            is_codebook = any(getattr(p, "key", None) == "codebook" for p in path)
            return jnp.where(where, 0, leaf) if is_codebook else leaf

        opt_state = jax.tree_util.tree_map_with_path(clear, state.opt_state)
        return state.replace(params=params, opt_state=opt_state)

    # Evaluation.

    def eval_metrics(
        self, params: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> dict[str, Mean]:
        """Means over the images that batch["valid"] marks, of the terms of the training loss.

        "loss" has the same terms as in training: l2, l1, the perceptual distance where the recipe
        has it, and the quantizer's. There is none before vq_start_step, when nothing is quantized:
        the loss is less then, and its checkpoints must not count as the best.
        """
        images = to_float(batch["image"])
        reconstructions, quantizer_losses = self._reconstruct(params, images, step)
        l1 = jnp.abs(reconstructions - images).mean((1, 2, 3))  # (B,), as the others
        l2 = ((reconstructions - images) ** 2).mean((1, 2, 3))
        recipe = self.recipe
        loss = recipe.l2_weight * l2 + recipe.l1_weight * l1
        values = {
            "l1": l1,
            "l2": l2,
            "psnr": jax.vmap(psnr)(reconstructions, images),
            "quantizer_loss": quantizer_losses,
        }
        if recipe.perceptual_weight:
            distance = perceptual_distance(frozen["perceptual"], reconstructions, images)
            loss, values["perceptual"] = loss + recipe.perceptual_weight * distance, distance
        loss = loss + recipe.quantizer_weight * quantizer_losses
        quantizes = batch["valid"] * (step >= recipe.vq_start_step)
        means = {name: Mean.of(value, batch["valid"]) for name, value in values.items()}
        return means | {"loss": Mean.of(loss, quantizes)}

    def reconstruct(self, params: Params, images: jax.Array, step: jax.Array) -> jax.Array:
        """Images through the tokens and back; before vq_start_step, through the features alone.

        Args:
          images: (B, h, w, 3) in [-1, 1].

        Returns:
          (B, h, w, 3) float32 in [-1, 1].
        """
        return self._reconstruct(params, images, step)[0].clip(-1, 1)

    def _reconstruct(self, params: Params, images: jax.Array, step: jax.Array):
        """Reconstructions (B, h, w, 3) as they are, and the quantizer's loss of each image (B,)."""
        apply = lambda x, method: apply_tokenizer(self.tokenizer, params, x, method=method)
        f = apply(images, "compute_features")
        f_hats = apply(f, "quantize").f_hats
        per_image = jax.vmap(lambda f_hats, f: quantizer_loss(f_hats, f, self.recipe.beta), (1, 0))
        f_hat = jnp.where(step >= self.recipe.vq_start_step, f_hats[-1], f)
        return apply(f_hat, "decode_features"), per_image(f_hats, f)

    def preview(
        self, params: Params, frozen: Params, images: Any, rng: jax.Array, step: jax.Array
    ) -> jax.Array:
        """Images and their reconstructions: (2, n, h, w, 3) float32 in [0, 1].

        Args:
          images: (n, h, w, 3) uint8.
        """
        del frozen, rng
        originals = to_float(images)
        return (jnp.stack([originals, self.reconstruct(params, originals, step)]) + 1) / 2

    def preview_labels(self) -> list[str]:
        return ["image", "reconstruction"]
