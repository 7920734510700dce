"""Multi-scale residual VQ-VAE: images to K grids of tokens and back.

VAR's tokenizer (arXiv 2404.02905, section 3.2 and algorithms 1 and 2), which HMAR uses unchanged. A convolutional encoder
gives features f; the residual quantizer explains f scale by scale, coarse to fine; a decoder paints the sum of what all
scales explain.

Letters: B images, h w sides of a image, S side of the features, Z channels of the code, V codebook entries, K scales,
l tokens of one scale, L tokens of all. Arrays are channels-last; the published code is channels-first.
"""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.errors import InputError
from hmar_jax.parallel.sharding import constrain_batch

# The quantizer picks tokens by small differences of distances: never in TF32 or bfloat16.
_EXACT = jax.lax.Precision.HIGHEST

# How parameters are divided over a mesh (hmar_jax/sharding.py). Layers are too narrow to be divided by hidden units: "tensor"
# stores like "fsdp" does. Codebook, biases and norms are copied to every device.
PARTITION_RULES = (
    (r"(shortcut|qkv|proj)/kernel$", (None, ("fsdp", "tensor"))),  # (in, out)
    (r"/kernel$", (None, None, None, ("fsdp", "tensor"))),  # (3, 3, in, out)
)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Architecture of a tokenizer. The defaults are the published one (VAR, 16 pixels a token)."""

    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocab_size: int = 4096  # V
    z_channels: int = 32  # Z
    channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # one for each level, finest first
    num_res_blocks: int = 2  # of a level of the encoder; the decoder has one more
    patch_size: int = 1  # pixels folded into channels before the first convolution: small tokenizers cost its square less
    attention: bool = True  # in the coarsest level and the middle
    groups: int = 32  # of GroupNorm; keep 4 channels a group or more, one channel a group loses the channels' means
    dropout: float = 0.0
    num_phi: int = 4  # residual convolutions shared by the scales; 0: one for each scale
    phi_ratio: float = 0.5  # share of the convolution in phi(x) = (1 - ratio) x + ratio conv(x)
    distance: str = "l2"  # or "cosine"
    dtype: str = "float32"  # of the convolutions; the quantizer always computes in float32

    def __post_init__(self):
        for name in ("scales", "channel_multipliers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        ScaleList(self.scales)
        for multiplier in self.channel_multipliers:
            if self.channels * multiplier % self.groups:
                raise InputError(
                    f"groups={self.groups} does not divide {self.channels * multiplier} channels "
                    f"(channels={self.channels} x multiplier {multiplier})"
                )
        if self.distance not in ("l2", "cosine"):
            raise InputError(f"distance={self.distance!r}: known are l2, cosine")

    @property
    def scale_list(self) -> ScaleList:
        return ScaleList(self.scales)

    @property
    def pixels_per_token(self) -> int:
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_side(self) -> int:
        """h = w, pixels."""
        return self.scale_list.side * self.pixels_per_token


class Quantized(NamedTuple):
    """What the residual quantizer makes of features."""

    tokens: jax.Array  # (B, L) int32, scales in order
    f_hats: jax.Array  # (K, B, S, S, Z) running sum after each scale
    z: jax.Array  # (B, L, Z) the vectors that were quantized


def to_float(images: jax.Array) -> jax.Array:
    """uint8 (...) in 0..255 to float32 (...) in [-1, 1], the range of all images in the networks."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def resize(x: jax.Array, matrix) -> jax.Array:
    """(B, s, s, Z) -> (B, t, t, Z) by one (t, s) matrix for both axes."""
    x = jnp.einsum("ts,bsuz->btuz", matrix, x, precision=_EXACT)
    return jnp.einsum("ts,busz->butz", matrix, x, precision=_EXACT)


class ResBlock(nn.Module):
    """GN, SiLU, conv, GN, SiLU, dropout, conv, plus the input (through a 1x1 convolution where channels change)."""

    channels: int
    groups: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, deterministic=True):
        h = conv3x3(self.channels, "conv1", self.dtype)(
            nn.silu(group_norm(self.groups, "norm1", self.dtype)(x))
        )
        h = nn.silu(group_norm(self.groups, "norm2", self.dtype)(h))
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = conv3x3(self.channels, "conv2", self.dtype)(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, name="shortcut", dtype=self.dtype)(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions: GN, packed [q | k | v], softmax(q k^T / sqrt C), projection, residual."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        h = group_norm(self.groups, "norm", self.dtype)(x).reshape(batch, height * width, channels)
        q, k, v = jnp.split(
            nn.Dense(3 * channels, name="qkv", dtype=self.dtype)(h), 3, axis=-1
        )  # (B, hw, C) each
        scores = (
            jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * channels**-0.5
        )
        h = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores).astype(self.dtype), v)
        return x + nn.Dense(channels, name="proj", dtype=self.dtype)(h).reshape(x.shape)


def conv3x3(channels, name, dtype, strides=1, padding=((1, 1), (1, 1))):
    return nn.Conv(channels, (3, 3), strides, padding=padding, name=name, dtype=dtype)


def group_norm(groups, name, dtype):
    # Not the fast variance E[x^2] - E[x]^2: it cancels in float32.
    norm = nn.GroupNorm(groups, epsilon=1e-6, name=name, dtype=dtype, use_fast_variance=False)
    # A kernel that is divided by channels would leave pieces of groups on each device, and gradients would be copied about.
    return lambda x: norm(constrain_batch(x))


def fold(x, patch: int):
    """(B, h, w, c) -> (B, h/patch, w/patch, c patch^2)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, height // patch, width // patch, -1)


def unfold(x, patch: int):
    """The inverse of fold."""
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height, width, patch, patch, -1)
    return x.swapaxes(2, 3).reshape(batch, height * patch, width * patch, -1)


class Encoder(nn.Module):
    config: TokenizerConfig

    @nn.compact
    def __call__(self, x, deterministic=True):
        """(B, h, w, 3) in [-1, 1] -> (B, S, S, Z)."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        last = len(c.channel_multipliers) - 1
        block = lambda channels, name: ResBlock(channels, c.groups, c.dropout, dtype, name=name)
        x = conv3x3(c.channels, "conv_in", dtype)(fold(x, c.patch_size).astype(dtype))
        for i, multiplier in enumerate(c.channel_multipliers):
            for j in range(c.num_res_blocks):
                x = block(c.channels * multiplier, f"down_{i}_block_{j}")(x, deterministic)
                if c.attention and i == last:
                    x = AttnBlock(c.groups, dtype, name=f"down_{i}_attn_{j}")(x)
            if i != last:  # padded at the right and the bottom only
                x = conv3x3(
                    x.shape[-1], f"down_{i}_downsample", dtype, strides=2, padding=((0, 1), (0, 1))
                )(x)
        x = block(x.shape[-1], "mid_block_1")(x, deterministic)
        if c.attention:
            x = AttnBlock(c.groups, dtype, name="mid_attn")(x)
        x = block(x.shape[-1], "mid_block_2")(x, deterministic)
        x = nn.silu(group_norm(c.groups, "norm_out", dtype)(x))
        return conv3x3(c.z_channels, "conv_out", dtype)(x)


class Decoder(nn.Module):
    config: TokenizerConfig

    @nn.compact
    def __call__(self, x, deterministic=True):
        """(B, S, S, Z) -> (B, h, w, 3), not clamped."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        last = len(c.channel_multipliers) - 1
        block = lambda channels, name: ResBlock(channels, c.groups, c.dropout, dtype, name=name)
        x = conv3x3(c.channels * c.channel_multipliers[last], "conv_in", dtype)(x.astype(dtype))
        x = block(x.shape[-1], "mid_block_1")(x, deterministic)
        if c.attention:
            x = AttnBlock(c.groups, dtype, name="mid_attn")(x)
        x = block(x.shape[-1], "mid_block_2")(x, deterministic)
        for i in range(last, -1, -1):
            for j in range(c.num_res_blocks + 1):
                x = block(c.channels * c.channel_multipliers[i], f"up_{i}_block_{j}")(
                    x, deterministic
                )
                if c.attention and i == last:
                    x = AttnBlock(c.groups, dtype, name=f"up_{i}_attn_{j}")(x)
            if i:
                x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbour
                x = conv3x3(x.shape[-1], f"up_{i}_upsample", dtype)(x)
        x = nn.silu(group_norm(c.groups, "norm_out", dtype)(x))
        return unfold(conv3x3(3 * c.patch_size**2, "conv_out", dtype)(x), c.patch_size)


class Quantizer(nn.Module):
    """The residual quantizer and the maps from tokens to features (VAR, algorithms 1 and 2)."""

    config: TokenizerConfig

    def setup(self):
        c = self.config
        num_phi = c.num_phi or len(c.scales)
        # Uniform in +-1/V, as VQ-VAEs start; training replaces the codebook by data (training/tokenizer.py).
        uniform = lambda key, shape: jax.random.uniform(
            key, shape, minval=-1 / c.vocab_size, maxval=1 / c.vocab_size
        )
        self.codebook = self.param("codebook", uniform, (c.vocab_size, c.z_channels))  # (V, Z)
        self.phi_kernel = self.param(
            "phi_kernel",
            nn.initializers.lecun_normal(in_axis=(-4, -3, -2), batch_axis=0),
            (num_phi, 3, 3, c.z_channels, c.z_channels),
        )
        self.phi_bias = self.param("phi_bias", nn.initializers.zeros, (num_phi, c.z_channels))

    def __call__(self, f):
        return self.quantize(f)

    def phi(self, k: int, x):
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

    def nearest(self, z):
        """(..., Z) -> (...) int32: the nearest codebook entry, by squared distance or by angle."""
        codebook = self.codebook
        if self.config.distance == "cosine":
            codebook = codebook / jnp.linalg.norm(codebook, axis=-1, keepdims=True).clip(1e-12)
            return jnp.argmax(
                jnp.einsum("...z,vz->...v", z, codebook, precision=_EXACT), axis=-1
            ).astype(jnp.int32)
        # |z - e|^2 without |z|^2, which is the same for every entry
        cross = jnp.einsum("...z,vz->...v", z, codebook, precision=_EXACT)
        return jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * cross, axis=-1).astype(jnp.int32)

    def residual(self, k: int, codes):
        """What scale k adds: phi_k(bicubic(codes -> S)). codes (B, l_k, Z) -> (B, S, S, Z)."""
        scales = self.config.scale_list
        h = codes.reshape(codes.shape[0], scales.sides[k], scales.sides[k], codes.shape[-1])
        if scales.sides[k] != scales.side:
            h = resize(h, scales.bicubic(k))
        return self.phi(k, h)

    def look_up(self, tokens):
        """(...) int32 -> (..., Z)."""
        return self.codebook[tokens]

    def area(self, k: int, f):
        """(B, S, S, Z) -> (B, l_k, Z): averages over the cells of scale k."""
        scales = self.config.scale_list
        if scales.sides[k] != scales.side:
            f = resize(f, scales.area(k))
        return f.reshape(f.shape[0], scales.lengths[k], f.shape[-1])

    def quantize(self, f) -> Quantized:
        """f (B, S, S, Z). Gradients reach the codebook and phi through f_hats; tokens and rests are constants."""
        f = f.astype(jnp.float32)
        rest, f_hat = jax.lax.stop_gradient(f), jnp.zeros_like(f)
        tokens, f_hats, zs = [], [], []
        for k in range(self.config.scale_list.num_scales):
            zs.append(self.area(k, rest))
            tokens.append(self.nearest(jax.lax.stop_gradient(zs[-1])))
            h = self.residual(k, self.look_up(tokens[-1]))
            f_hat = f_hat + h
            rest = rest - jax.lax.stop_gradient(h)
            f_hats.append(f_hat)
        return Quantized(jnp.concatenate(tokens, 1), jnp.stack(f_hats), jnp.concatenate(zs, 1))

    def unquantized_residuals(self, f):
        """f (B, S, S, Z) -> (B, L, Z): the vectors each scale would be given if nothing were lost by quantizing.

        What a codebook is best initialised from, before there is one.
        """
        rest, zs = f.astype(jnp.float32), []
        for k in range(self.config.scale_list.num_scales):
            zs.append(self.area(k, rest))
            rest = rest - self.residual(k, zs[-1])
        return jnp.concatenate(zs, 1)

    def f_hats(self, tokens):
        """tokens (B, L) -> (K, B, S, S, Z): the running sum after each scale."""
        scales = self.config.scale_list
        h = [
            self.residual(k, self.look_up(tokens[:, scales.slice(k)]))
            for k in range(scales.num_scales)
        ]
        return jnp.cumsum(jnp.stack(h), axis=0)

    def next_scale_inputs(self, f_hats):
        """(K, B, S, S, Z) -> (B, L - l_0, Z): for each scale after the first, the running sum before it, averaged."""
        num_scales = self.config.scale_list.num_scales
        parts = [self.area(k, f_hats[k - 1]) for k in range(1, num_scales)]
        return jnp.concatenate(parts, 1) if parts else f_hats[0, :, :0, 0]

    def own_scale_input(self, k: int, tokens):
        """tokens (B, l_k) -> (B, l_k, Z): that scale's own residual, averaged back to its cells."""
        return self.area(k, self.residual(k, self.look_up(tokens)))

    def own_scale_inputs(self, tokens):
        """(B, L) -> (B, L - l_0, Z): own_scale_input of each scale after the first."""
        scales = self.config.scale_list
        parts = [
            self.own_scale_input(k, tokens[:, scales.slice(k)]) for k in range(1, scales.num_scales)
        ]
        return jnp.concatenate(parts, 1) if parts else self.look_up(tokens)[:, :0]


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder. Call a method by name: `tokenizer.apply(params, images, method="encode")`."""

    config: TokenizerConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.encoder, self.decoder, self.quantizer = Encoder(c), Decoder(c), Quantizer(c)
        self.quant_conv = conv3x3(c.z_channels, None, dtype)
        self.post_quant_conv = conv3x3(c.z_channels, None, dtype)

    def __call__(self, images):
        """Runs every part once, to make the parameters."""
        return self.paint(self.quantizer(self.features(images)).f_hats[-1])

    def features(self, images, deterministic=True):
        """(B, h, w, 3) in [-1, 1] -> f (B, S, S, Z) float32."""
        return self.quant_conv(self.encoder(images, deterministic)).astype(jnp.float32)

    def quantize(self, f) -> Quantized:
        return self.quantizer.quantize(f)

    def encode(self, images):
        """(B, h, w, 3) in [-1, 1] -> tokens (B, L) int32."""
        return self.quantizer.quantize(self.features(images)).tokens

    def paint(self, f_hat, deterministic=True):
        """(B, S, S, Z) -> (B, h, w, 3) float32, not clamped."""
        return self.decoder(
            self.post_quant_conv(f_hat.astype(self.config.dtype)), deterministic
        ).astype(jnp.float32)

    def decode(self, tokens):
        """tokens (B, L) -> images (B, h, w, 3) in [-1, 1]."""
        return self.paint(self.quantizer.f_hats(tokens)[-1]).clip(-1, 1)

    def transformer_inputs(self, tokens):
        """(B, L) -> next-scale inputs (B, L - l_0, Z)."""
        return self.quantizer.next_scale_inputs(self.quantizer.f_hats(tokens))

    def own_scale_inputs(self, tokens):
        """(B, L) -> (B, L - l_0, Z)."""
        return self.quantizer.own_scale_inputs(tokens)

    # One scale at a time, for the sampler.

    def look_up(self, tokens):
        return self.quantizer.look_up(tokens)

    def residual(self, codes, k: int):
        return self.quantizer.residual(k, codes)

    def area(self, f, k: int):
        return self.quantizer.area(k, f)


def without_encoder(params: dict) -> dict:
    """The parameters that are left to do once images are tokens: the quantizer's and the decoder's."""
    return {
        part: values for part, values in params.items() if part not in ("encoder", "quant_conv")
    }


def fingerprint(config: TokenizerConfig, params: dict) -> str:
    """16 hexadecimal digits that differ between tokenizers that make, or read, tokens differently.

    Of the architecture and of every number in encoder and quantizer. The decoder may be trained further without making
    old tokens worthless, so it is left out; so are dropout and the type that convolutions compute in.
    """
    fields = dataclasses.asdict(config)
    told = {name: value for name, value in fields.items() if name not in ("dropout", "dtype")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    parts = {part: params[part] for part in ("encoder", "quant_conv", "quantizer")}
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts)
    ):
        digest.update(f"{path}{np.shape(leaf)}".encode())
        digest.update(np.ascontiguousarray(leaf, "<f4").tobytes())
    return digest.hexdigest()[:16]
