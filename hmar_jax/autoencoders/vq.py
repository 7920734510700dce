"""Multi-scale residual VQ-VAE: images to K grids of tokens and back.

VAR's tokenizer (arXiv 2404.02905, section 3.2, algorithms 1 and 2), which HMAR uses unchanged. A
convolutional encoder makes features f. The residual quantizer approximates f scale by scale,
coarse to fine: f_hat is the running sum of what the scales contribute. A decoder makes an image
of f_hat.

Letters: B images, h w sides of an image, S side of the features, Z channels of the code, V
codebook entries, K scales, l tokens of one scale, L tokens of all. Arrays are channels-last; the
published code is channels-first.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.autoencoders.layers import ConvNetConfig, Decoder, Encoder, conv3x3
from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.parallel.sharding import Rules
from hmar_jax.settings import setting

if TYPE_CHECKING:
    from hmar_jax.data.record_spec import RecordSpec

Params = Any  # a pytree of arrays

# Small differences between distances decide which token is chosen: never in TF32 or bfloat16.
_EXACT = jax.lax.Precision.HIGHEST

# How a mesh divides parameters (hmar_jax/parallel/sharding.py). Layers are too narrow to divide
# hidden units, so the axis "tensor" only stores, as "fsdp" does. Codebook, biases and norms are
# copied to every device.
PARTITION_RULES: Rules = (
    (r"(shortcut|qkv|proj)/kernel$", (None, ("fsdp", "tensor"))),  # (in, out)
    (r"/kernel$", (None, None, None, ("fsdp", "tensor"))),  # (3, 3, in, out)
)

_ENCODER_PARTS = ("encoder", "quant_conv")  # of the parameters
_ENCODING_PARTS = (*_ENCODER_PARTS, "quantizer")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(ConvNetConfig):
    """Architecture of a tokenizer. The defaults are VAR's, with 16 pixels a token."""

    kind: ClassVar[str] = "vq"  # of autoencoder, see hmar_jax/autoencoders/__init__.py

    scales: tuple[int, ...] = setting(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), "Sides of the token grids, increasing."
    )
    vocab_size: int = setting(4096, "Codebook entries, V.", at_least=1, at_most=2**20)
    z_channels: int = setting(32, "Channels of the code, Z.", at_least=1, at_most=2**20)
    num_phi: int = setting(
        4,
        "Residual convolutions that the scales share; 0: one for each scale.",
        at_least=0,
        at_most=2**20,
    )
    phi_ratio: float = setting(
        0.5,
        "Share of the convolution in phi(x) = (1 - ratio) x + ratio conv(x).",
        at_least=0,
        at_most=1,
    )
    distance: str = setting(
        "l2", "How the nearest codebook entry is found.", choices=("l2", "cosine")
    )

    def __post_init__(self):
        super().__post_init__()
        ScaleList(self.scales)

    @property
    def scale_list(self) -> ScaleList:
        return ScaleList(self.scales)

    @property
    def image_side(self) -> int:
        """h = w, pixels."""
        return self.scale_list.side * self.pixels_per_token


class Quantized(NamedTuple):
    """What the residual quantizer computes from features."""

    tokens: jax.Array  # (B, L) int32, scales in order
    f_hats: jax.Array  # (K, B, S, S, Z) running sum after each scale
    z: jax.Array  # (B, L, Z) the vectors that were quantized


class Encoded(NamedTuple):
    """Images as tokens, with the features that the tokens stand for."""

    tokens: jax.Array  # (B, L) int32, scales in order
    f_hats: jax.Array  # (K, B, S, S, Z) running sum after each scale


class Quantizer(nn.Module):
    """The residual quantizer and the maps from tokens to features (VAR, algorithms 1 and 2)."""

    config: TokenizerConfig

    def setup(self):
        c = self.config
        num_phi = c.num_phi or len(c.scales)
        # As VQ-VAEs usually start; training replaces the codebook by residuals (vq_task.py).
        bound = 1 / c.vocab_size
        uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        self.codebook = self.param("codebook", uniform, (c.vocab_size, c.z_channels))  # (V, Z)
        self.phi_kernel = self.param(
            "phi_kernel",
            nn.initializers.lecun_normal(in_axis=(-4, -3, -2), batch_axis=0),
            (num_phi, 3, 3, c.z_channels, c.z_channels),
        )
        self.phi_bias = self.param("phi_bias", nn.initializers.zeros, (num_phi, c.z_channels))

    def __call__(self, f: jax.Array) -> Quantized:
        return self.quantize(f)

    def quantize(self, f: jax.Array) -> Quantized:
        """Approximates features by K scales of codebook entries (VAR, algorithm 1).

        Args:
          f: (B, S, S, Z).

        Returns:
          Tokens, running sums and quantized vectors. Gradients reach the codebook and phi through
          the running sums; tokens and residuals are constants.
        """
        f = f.astype(jnp.float32)
        residual, f_hat = jax.lax.stop_gradient(f), jnp.zeros_like(f)
        tokens, f_hats, zs = [], [], []
        for k in range(self.config.scale_list.num_scales):
            zs.append(self.downsample_to_scale(residual, k))
            tokens.append(self.nearest_entries(jax.lax.stop_gradient(zs[-1])))
            h = self.scale_contribution(self.codebook_lookup(tokens[-1]), k)
            f_hat = f_hat + h
            residual = residual - jax.lax.stop_gradient(h)
            f_hats.append(f_hat)
        return Quantized(jnp.concatenate(tokens, 1), jnp.stack(f_hats), jnp.concatenate(zs, 1))

    def unquantized_residuals(self, f: jax.Array) -> jax.Array:
        """The vectors that each scale would contribute if quantization lost nothing.

        The best initial codebook consists of such vectors.

        Args:
          f: (B, S, S, Z).

        Returns:
          (B, L, Z).
        """
        residual, zs = f.astype(jnp.float32), []
        for k in range(self.config.scale_list.num_scales):
            zs.append(self.downsample_to_scale(residual, k))
            residual = residual - self.scale_contribution(zs[-1], k)
        return jnp.concatenate(zs, 1)

    def nearest_entries(self, z: jax.Array) -> jax.Array:
        """(..., Z) -> (...) int32: the nearest codebook entries by the config's distance."""
        codebook = self.codebook
        if self.config.distance == "cosine":
            codebook = codebook / jnp.linalg.norm(codebook, axis=-1, keepdims=True).clip(1e-12)
            cosine = jnp.einsum("...z,vz->...v", z, codebook, precision=_EXACT)
            return jnp.argmax(cosine, axis=-1).astype(jnp.int32)
        # |z - e|^2 without |z|^2, which is the same for every entry.
        cross = jnp.einsum("...z,vz->...v", z, codebook, precision=_EXACT)
        return jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * cross, axis=-1).astype(jnp.int32)

    def codebook_lookup(self, tokens: jax.Array) -> jax.Array:
        """(...) int32 -> (..., Z): the codebook entries of tokens."""
        return self.codebook[tokens]

    def downsample_to_scale(self, f: jax.Array, k: int) -> jax.Array:
        """(B, S, S, Z) -> (B, l, Z): the mean over each cell of scale k."""
        scales = self.config.scale_list
        if scales.sides[k] != scales.side:
            f = resize(f, scales.downsample_matrix(k))
        return f.reshape(f.shape[0], scales.lengths[k], f.shape[-1])

    def scale_contribution(self, vectors: jax.Array, k: int) -> jax.Array:
        """(B, l, Z) -> (B, S, S, Z): what scale k adds to f_hat, phi_k(bicubic(vectors -> S))."""
        scales = self.config.scale_list
        side = scales.sides[k]
        h = vectors.reshape(vectors.shape[0], side, side, vectors.shape[-1])
        if side != scales.side:
            h = resize(h, scales.upsample_matrix(k))
        return self.phi(h, k)

    def phi(self, x: jax.Array, k: int) -> jax.Array:
        """phi_k(x) = (1 - ratio) x + ratio conv3x3(x); x (B, S, S, Z)."""
        c = self.config
        i = c.scale_list.phi_index(k, c.num_phi)
        y = jax.lax.conv_general_dilated(
            x,
            self.phi_kernel[i],
            (1, 1),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_EXACT,
        )
        return (1 - c.phi_ratio) * x + c.phi_ratio * (y + self.phi_bias[i])

    def tokens_to_f_hats(self, tokens: jax.Array) -> jax.Array:
        """(B, L) -> (K, B, S, S, Z): the running sum after each scale (VAR, algorithm 2)."""
        scales = self.config.scale_list
        contributions = [
            self.scale_contribution(self.codebook_lookup(tokens[:, scales.slice(k)]), k)
            for k in range(scales.num_scales)
        ]
        return jnp.cumsum(jnp.stack(contributions), axis=0)

    def next_scale_inputs(self, f_hats: jax.Array) -> jax.Array:
        """What a next-scale transformer sees of the earlier scales.

        Args:
          f_hats: (K, B, S, S, Z).

        Returns:
          (B, L - l_0, Z): for each scale after the first, the running sum before it, downsampled
          to it.
        """
        num_scales = self.config.scale_list.num_scales
        parts = [self.downsample_to_scale(f_hats[k - 1], k) for k in range(1, num_scales)]
        return jnp.concatenate(parts, 1) if parts else f_hats[0, :, :0, 0]

    def token_features(self, tokens: jax.Array) -> jax.Array:
        """What a masked transformer sees of the scale's own tokens.

        Args:
          tokens: (B, L).

        Returns:
          (B, L - l_0, Z): for each scale after the first, its own contribution, downsampled to it.
        """
        scales = self.config.scale_list
        parts = []
        for k in range(1, scales.num_scales):
            vectors = self.codebook_lookup(tokens[:, scales.slice(k)])
            parts.append(self.downsample_to_scale(self.scale_contribution(vectors, k), k))
        return jnp.concatenate(parts, 1) if parts else self.codebook_lookup(tokens)[:, :0]


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder; `apply_tokenizer` calls a method by its name."""

    config: TokenizerConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.encoder, self.decoder = Encoder(c, c.z_channels), Decoder(c)
        self.quantizer = Quantizer(c)
        self.quant_conv = conv3x3(c.z_channels, None, dtype)
        self.post_quant_conv = conv3x3(c.z_channels, None, dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Runs every part once, to initialize the parameters."""
        return self.decode_features(self.quantize(self.compute_features(images)).f_hats[-1])

    def compute_features(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """(B, h, w, 3) in [-1, 1] -> f (B, S, S, Z) float32."""
        return self.quant_conv(self.encoder(images, deterministic)).astype(jnp.float32)

    def encode(self, images: jax.Array) -> jax.Array:
        """(B, h, w, 3) in [-1, 1] -> tokens (B, L) int32."""
        return self.encode_with_features(images).tokens

    def encode_with_features(self, images: jax.Array) -> Encoded:
        """Tokens, and the running sums that tokens_to_f_hats would compute from them.

        Args:
          images: (B, h, w, 3) in [-1, 1].
        """
        quantized = self.quantize(self.compute_features(images))
        return Encoded(quantized.tokens, quantized.f_hats)

    def decode_features(self, f_hat: jax.Array, deterministic: bool = True) -> jax.Array:
        """(B, S, S, Z) -> (B, h, w, 3) float32, not clipped."""
        x = self.post_quant_conv(f_hat.astype(self.config.dtype))
        return self.decoder(x, deterministic).astype(jnp.float32)

    def decode(self, tokens: jax.Array) -> jax.Array:
        """(B, L) -> images (B, h, w, 3) float32 in [-1, 1]."""
        return self.decode_features(self.tokens_to_f_hats(tokens)[-1]).clip(-1, 1)

    # Methods of the quantizer, see there.

    def quantize(self, f: jax.Array) -> Quantized:
        """(B, S, S, Z) -> tokens, running sums and quantized vectors."""
        return self.quantizer.quantize(f)

    def unquantized_residuals(self, f: jax.Array) -> jax.Array:
        """(B, S, S, Z) -> (B, L, Z)."""
        return self.quantizer.unquantized_residuals(f)

    def tokens_to_f_hats(self, tokens: jax.Array) -> jax.Array:
        """(B, L) -> (K, B, S, S, Z)."""
        return self.quantizer.tokens_to_f_hats(tokens)

    def next_scale_inputs(self, f_hats: jax.Array) -> jax.Array:
        """(K, B, S, S, Z) -> (B, L - l_0, Z)."""
        return self.quantizer.next_scale_inputs(f_hats)

    def token_features(self, tokens: jax.Array) -> jax.Array:
        """(B, L) -> (B, L - l_0, Z)."""
        return self.quantizer.token_features(tokens)

    def codebook_lookup(self, tokens: jax.Array) -> jax.Array:
        """(...) int32 -> (..., Z)."""
        return self.quantizer.codebook_lookup(tokens)

    def downsample_to_scale(self, f: jax.Array, k: int) -> jax.Array:
        """(B, S, S, Z) -> (B, l, Z)."""
        return self.quantizer.downsample_to_scale(f, k)

    def scale_contribution(self, vectors: jax.Array, k: int) -> jax.Array:
        """(B, l, Z) -> (B, S, S, Z)."""
        return self.quantizer.scale_contribution(vectors, k)


def apply_tokenizer(
    config: TokenizerConfig,
    params: Params,
    *arrays: jax.Array,
    method: str | Callable = "__call__",
    **static: Any,
) -> Any:
    """Calls a method of the Tokenizer: apply_tokenizer(config, params, f, method="quantize").

    Args:
      params: of the parts that the method uses; others may be missing.
      arrays: arguments of the method.
      method: name of the method, or a function of the module and the arrays.
      static: further arguments that are no arrays, such as k=3.
    """
    return Tokenizer(config).apply({"params": params}, *arrays, method=method, **static)


def to_float(images: jax.Array) -> jax.Array:
    """uint8 in 0..255 -> float32 in [-1, 1], the range of all images in the networks."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def resize(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    """(B, s, s, Z) -> (B, t, t, Z) by one (t, s) matrix for both axes."""
    x = jnp.einsum("ts,bsuz->btuz", matrix, x, precision=_EXACT)
    return jnp.einsum("ts,busz->butz", matrix, x, precision=_EXACT)


@dataclasses.dataclass(frozen=True)
class VQAutoencoder:
    """The tokenizer as an Autoencoder, see base.py: pure functions of its parameters."""

    config: TokenizerConfig

    kind: ClassVar[str] = TokenizerConfig.kind
    config_class: ClassVar[type] = TokenizerConfig
    partition_rules: ClassVar[Rules] = PARTITION_RULES

    @property
    def image_side(self) -> int:
        """h = w, pixels."""
        return self.config.image_side

    @property
    def record_spec(self) -> "RecordSpec":
        """What an encoded data set stores for one image: L tokens."""
        # Here, because loading a model does not need the readers of data sets.
        from hmar_jax.data.record_spec import RecordField, RecordSpec

        c = self.config
        field = RecordField("tokens", (c.scale_list.length,), "int32", vocab_size=c.vocab_size)
        return RecordSpec(kind="tokens", fields=(field,))

    def init(self, rng: jax.Array) -> Params:
        """Random parameters."""
        images = jnp.zeros((1, self.image_side, self.image_side, 3))
        return Tokenizer(self.config).init(rng, images)["params"]

    def encode(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """(B, h, w, 3), uint8 or floats in [0, 1] -> {"tokens": (B, L) int32}."""
        images = to_float(images) if images.dtype == jnp.uint8 else images * 2 - 1
        return {"tokens": apply_tokenizer(self.config, params, images, method="encode")}

    def decode(self, params: Params, latents: dict[str, jax.Array]) -> jax.Array:
        """What `encode` returns -> (B, h, w, 3) float32 in [0, 1]."""
        images = apply_tokenizer(self.config, params, latents["tokens"], method="decode")
        return (images + 1) / 2

    def encoder_params(self, params: Params) -> Params:
        """The parameters that encoding needs."""
        return {part: params[part] for part in _ENCODING_PARTS}

    def decoder_params(self, params: Params) -> Params:
        """The parameters that are needed once images are tokens: all but the encoder's."""
        return {part: values for part, values in params.items() if part not in _ENCODER_PARTS}

    def describe(self, num_params: int) -> list[tuple[str, str]]:
        """Rows of `hmar info`: names and values."""
        c, scales = self.config, self.config.scale_list
        return [
            ("images", f"{c.image_side} x {c.image_side} pixels, {scales.length} tokens"),
            ("scales", ", ".join(f"{side}x{side}" for side in scales.sides)),
            ("tokenizer", f"{num_params:,} parameters, codebook {c.vocab_size} x {c.z_channels}"),
        ]

    def fingerprint(self, params: Params) -> str:
        """16 hexadecimal digits that differ where tokens are made, or mean, something different.

        A hash of the architecture and of every number in encoder and quantizer. Training the
        decoder further does not invalidate old tokens, so the decoder does not count; neither do
        dropout and the type that convolutions compute in.
        """
        fields = dataclasses.asdict(self.config)
        counted = {name: fields[name] for name in fields if name not in ("dropout", "dtype")}
        digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode())
        leaves = jax.tree_util.tree_leaves_with_path(self.encoder_params(params))
        for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
            digest.update(f"{path}{np.shape(leaf)}".encode())
            digest.update(np.ascontiguousarray(leaf, "<f4").tobytes())
        return digest.hexdigest()[:16]


AUTOENCODER = VQAutoencoder  # see hmar_jax/autoencoders/__init__.py
