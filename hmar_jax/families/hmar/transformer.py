"""The transformer over scales: embeddings, blocks with adaptive layer norm, head, and their composition for stage 1.

HMAR (arXiv 2506.04421, section 3) and VAR (arXiv 2404.02905, section 3.3): every token of scale k is predicted at once from
the image so far. In HMAR a token attends to its own scale only ("diagonal": what came before is in its input, through the
running sum f_hat); in VAR also to all earlier scales ("causal"). Both work with the same parameters.

The three parts are Flax modules; a model is a plain composition of them over one dictionary of parameters, so that the
blocks, stacked on a leading axis, can be cut into base and tail by a slice.

Letters: B images, L tokens of all scales, l tokens at hand, C width, H heads, D = C / H, N blocks, V codebook, Z channels
of the code, K scales.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.errors import InputError
from hmar_jax.parallel.sharding import constrain_batch, map_over_images_and_heads
from pallas_kernels import block_attention

_NORM_EPS = 1e-6
_QK_EPS = 1e-12  # of torch's normalize, used by the published code
_MAX_LOG_SCALE = np.log(100.0)
_INIT_LOG_SCALE = np.log(4.0)
_SCALE_WITHOUT_QK_NORM = 0.25  # times 1 / sqrt(D); VAR's choice where q and k are not normalised

# What training keeps of a block for the backward pass, which computes the rest again: less memory, more work.
REMAT = {
    "none": None,  # everything is kept
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of matrix products; norms, GELU, attention again
    "blocks": jax.checkpoint_policies.nothing_saveable,  # only the block's input: about a third more work
}

# How parameters are divided over a mesh (hmar_jax/sharding.py). Blocks are stacked on a first axis of N. Everything else,
# biases and embeddings, is small and copied to every device.
PARTITION_RULES = (
    (r"block/qkv/kernel$", (None, "fsdp", None, "tensor", None)),  # (N, C, 3, H, D)
    (r"(q_bias|v_bias)$", (None, "tensor", None)),  # (N, H, D)
    (r"log_scale$", (None, "tensor")),  # (N, H)
    (r"block/proj/kernel$", (None, "tensor", None, "fsdp")),  # (N, H, D, C)
    (r"block/fc1/kernel$", (None, "fsdp", "tensor")),  # (N, C, 4 C)
    (r"block/fc1/bias$", (None, "tensor")),  # (N, 4 C)
    (r"block/fc2/kernel$", (None, "tensor", "fsdp")),  # (N, 4 C, C)
    (r"blocks/block/ada/kernel$", (None, "fsdp", "tensor")),  # (N, C, 6 C)
    (r"(head|shared)/ada/kernel$", ("fsdp", "tensor")),  # (C, 2 C) and (C, 6 C)
    (r"head/kernel$", ("fsdp", "tensor")),  # (C, V)
    (r"head/bias$", ("tensor",)),  # (V,)
)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a next-scale transformer. Published sizes: width 64 N, heads N, MLP ratio 4 for depth N."""

    scales: tuple[int, ...]
    vocab_size: int = 4096  # V
    z_channels: int = 32  # Z
    num_classes: int = 1000
    depth: int = 16  # N
    width: int = 1024  # C
    heads: int = 16  # H
    mlp_ratio: float = 4.0
    pattern: str = "diagonal"  # HMAR; "causal" is VAR
    qk_norm: bool = True
    shared_adaln: bool = False  # one modulation layer for all blocks, plus a learned table a block
    dropout: float = 0.0
    drop_path: float = 0.0  # of the last block; grows linearly from 0. Published: 0.1 N / 24
    init_adaln: float = 0.5  # factor on the initial weights of scales and shifts, and of the head's
    init_adaln_gamma: float = 1e-3  # factor on those of the residual branches' gates
    init_head: float = 0.02
    dtype: str = "float32"  # of matrix products; residuals, norms, softmax and logits are float32
    attention: str | None = (
        None  # implementation for training; None picks one (pallas_kernels.block_attention)
    )
    remat: str = "none"  # what of a block the backward pass computes again, see REMAT

    def __post_init__(self):
        object.__setattr__(self, "scales", tuple(self.scales))
        ScaleList(self.scales)
        if self.pattern not in ("diagonal", "causal"):
            raise InputError(f"pattern={self.pattern!r}: known are diagonal (HMAR), causal (VAR)")
        if self.remat not in REMAT:
            raise InputError(f"remat={self.remat!r}: known are {', '.join(REMAT)}")
        if self.width % self.heads:
            raise InputError(f"heads={self.heads} does not divide width={self.width}")

    @property
    def scale_list(self) -> ScaleList:
        return ScaleList(self.scales)

    @property
    def null_class(self) -> int:
        """The class that stands for none, of unconditional predictions."""
        return self.num_classes

    @property
    def init_std(self) -> float:
        return (1 / 3 / self.width) ** 0.5

    @property
    def drop_path_rates(self) -> np.ndarray:
        """(N,)"""
        return np.linspace(0, self.drop_path, self.depth, dtype=np.float32)


def layer_norm(x):
    """Without affine part, in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, -1, keepdims=True) + _NORM_EPS)


def _normal(std):
    # The published initialisation truncates at +-2 absolute, which at these deviations never happens.
    return nn.initializers.normal(std)


class Embeddings(nn.Module):
    """Class, start, word, level and position embeddings."""

    config: TransformerConfig

    def setup(self):
        c, normal = self.config, _normal(self.config.init_std)
        scales = c.scale_list
        self.class_emb = self.param("class_emb", normal, (c.num_classes + 1, c.width))
        self.pos_start = self.param("pos_start", normal, (scales.lengths[0], c.width))
        self.pos_emb = self.param("pos_emb", normal, (scales.length, c.width))
        self.level_emb = self.param("level_emb", normal, (scales.num_scales, c.width))
        self.word_embed = nn.Dense(c.width, kernel_init=normal, dtype=jnp.float32)

    def __call__(self, class_ids, codes):
        """All scales: class_ids (B,), next-scale inputs (B, L - l_0, Z) -> (B, L, C)."""
        return self.place(
            jnp.concatenate([self.start(class_ids), self.words(codes)], 1), slice(None)
        )

    def condition(self, class_ids):
        """(B,) int32 -> (B, C)"""
        return self.class_emb[class_ids]

    def start(self, class_ids):
        """The input of the first scale: (B,) -> (B, l_0, C)."""
        return self.condition(class_ids)[:, None] + self.pos_start

    def words(self, codes):
        """(B, l, Z) -> (B, l, C)"""
        return self.word_embed(codes)

    def place(self, x, positions: slice):
        """Adds level and position embeddings of these positions to (B, l, C)."""
        levels = self.config.scale_list.level_ids[positions]
        return x + self.level_emb[levels] + self.pos_emb[positions]


class Block(nn.Module):
    """x += drop_path(gamma1 Attn(LN(x)(1 + sigma1) + beta1)); x += drop_path(gamma2 MLP(LN(x)(1 + sigma2) + beta2))."""

    config: TransformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x, modulation, drop_path, past, block_sizes, keep_kv):
        """One block.

        Args:
          x: (B, l, C) float32.
          modulation: SiLU of the class embedding (B, C), or with shared_adaln the shared modulation (B, 6, C).
          drop_path: scalar rate of this block.
          past: keys and values of earlier scales, each (B, l_past, H, D), or None.
          block_sizes: scales' lengths when x holds several scales (training), else None: x is one scale and sees all
            of `past` and itself.
          keep_kv: whether to return keys and values for the scales to come.

        Returns:
          x (B, l, C), and None or the keys and values of past and own tokens.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = constrain_batch(x)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self._modulate(
            modulation
        )  # (B, 1, C) each

        h = (layer_norm(x) * (1 + scale1) + shift1).astype(dtype)
        h, kv = self._attention(h, past, block_sizes, keep_kv)
        x = x + self._drop_path(gamma1 * h, drop_path)

        h = _rows((layer_norm(x) * (1 + scale2) + shift2).astype(dtype))
        h = nn.Dense(
            round(c.width * c.mlp_ratio), name="fc1", dtype=dtype, kernel_init=_normal(c.init_std)
        )(h)
        h = nn.Dense(c.width, name="fc2", dtype=dtype, kernel_init=self._residual_init())(
            nn.gelu(h, approximate=True)
        )
        h = nn.Dropout(c.dropout)(h.reshape(x.shape), deterministic=self.deterministic)
        return constrain_batch(x + self._drop_path(gamma2 * h, drop_path)), kv

    def _residual_init(self):
        """Of the layers that end a residual branch: smaller by sqrt(2 N)."""
        return _normal(self.config.init_std / (2 * self.config.depth) ** 0.5)

    def _modulate(self, modulation):
        c = self.config
        rows = jnp.array([c.init_adaln_gamma] * 2 + [c.init_adaln] * 4)
        if c.shared_adaln:
            init = lambda key, shape: jax.random.normal(key, shape) / c.width**0.5 * rows[:, None]
            table = self.param("ada_table", init, (6, c.width))
            return jnp.split(modulation + table, 6, axis=1)
        init = lambda key, shape, dtype: (
            _normal(c.init_std)(key, shape, dtype) * jnp.repeat(rows, c.width)
        )
        packed = nn.Dense(6 * c.width, name="ada", kernel_init=init)(modulation)
        return jnp.split(packed.reshape(-1, 6, c.width), 6, axis=1)

    def _attention(self, h, past, block_sizes, keep_kv):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        head_size = c.width // c.heads
        qkv = nn.DenseGeneral(
            (3, c.heads, head_size),
            use_bias=False,
            name="qkv",
            dtype=dtype,
            kernel_init=_normal(c.init_std),
        )(_rows(h))
        qkv = qkv.reshape(*h.shape[:2], 3, c.heads, head_size)
        zeros = nn.initializers.zeros
        q = qkv[:, :, 0] + self.param("q_bias", zeros, (c.heads, head_size)).astype(
            dtype
        )  # (B, l, H, D)
        k = qkv[:, :, 1]  # no bias: it would shift all scores of a query alike
        v = qkv[:, :, 2] + self.param("v_bias", zeros, (c.heads, head_size)).astype(dtype)
        if c.qk_norm:
            log_scale = self.param(
                "log_scale", nn.initializers.constant(_INIT_LOG_SCALE), (c.heads,)
            )
            q = (_unit(q) * jnp.exp(jnp.minimum(log_scale, _MAX_LOG_SCALE))[:, None]).astype(dtype)
            k, scale = _unit(k).astype(dtype), 1.0
        else:
            scale = _SCALE_WITHOUT_QK_NORM / head_size**0.5
        if past is not None:
            k, v = jnp.concatenate([past[0], k], 1), jnp.concatenate([past[1], v], 1)
        if block_sizes is None:
            out = jax.nn.dot_product_attention(q, k, v, scale=scale)
        else:
            attend = lambda q, k, v: block_attention(
                q, k, v, block_sizes, c.pattern, scale, implementation=c.attention
            )
            out = map_over_images_and_heads(attend, q, k, v)
        project = nn.DenseGeneral(
            c.width, axis=(-2, -1), name="proj", dtype=dtype, kernel_init=self._residual_init()
        )
        out = project(out.reshape(-1, c.heads, head_size)).reshape(h.shape)
        return nn.Dropout(c.dropout)(out, deterministic=self.deterministic), (
            k,
            v,
        ) if keep_kv else None

    def _drop_path(self, branch, rate):
        """Stochastic depth: the whole branch of a image is dropped with probability `rate`."""
        if self.deterministic or self.config.drop_path == 0:
            return branch
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (branch.shape[0], 1, 1))
        return branch * keep / (1 - rate)


def _rows(x):
    """(B, l, C) -> (B l, C): XLA's CPU backend multiplies matrices twice as fast as stacks of them (with gradients)."""
    return x.reshape(-1, x.shape[-1])


def _unit(x):
    """L2-normalised over D, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)), _QK_EPS)


class Blocks(nn.Module):
    """`depth` blocks as one scanned body; their parameters are stacked on a leading axis."""

    config: TransformerConfig
    depth: int
    deterministic: bool = True

    @nn.compact
    def __call__(self, x, modulation, drop_path, past=None, block_sizes=None, keep_kv=False):
        """As Block, with drop_path (depth,) and past, keys and values (depth, B, l, H, D)."""
        block, policy = Block, REMAT[self.config.remat]
        if policy is not None:  # inside a scan nothing could be merged with what is computed again
            block = nn.remat(Block, policy=policy, prevent_cse=False, static_argnums=(5, 6))
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            in_axes=(nn.broadcast, 0, 0, nn.broadcast, nn.broadcast),
        )
        return scanned(self.config, self.deterministic, name="block")(
            x, modulation, drop_path, past, block_sizes, keep_kv
        )


class Head(nn.Module):
    """AdaLN(LN(x)) and a linear layer to the codebook, in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, condition):
        """x (B, l, C), condition (B, C) -> logits (B, l, V) float32."""
        c = self.config
        ada = nn.Dense(2 * c.width, name="ada", kernel_init=_normal(c.init_std * c.init_adaln))(
            nn.silu(condition)
        )
        scale, shift = jnp.split(ada.reshape(-1, 2, c.width), 2, axis=1)  # (B, 1, C) each
        h = _rows((layer_norm(x) * (1 + scale) + shift).astype(c.dtype))
        kernel = self.param("kernel", _normal(c.init_std * c.init_head), (c.width, c.vocab_size))
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,))
        logits = jnp.dot(h, kernel.astype(c.dtype), preferred_element_type=jnp.float32) + bias
        return logits.reshape(*x.shape[:2], c.vocab_size)


class SharedModulation(nn.Module):
    """The one modulation layer of all blocks (shared_adaln)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, condition):
        """SiLU of the class embedding (B, C) -> (B, 6, C)."""
        normal = _normal(self.config.init_std)
        return nn.Dense(6 * self.config.width, name="ada", kernel_init=normal)(condition).reshape(
            -1, 6, self.config.width
        )


@dataclasses.dataclass(frozen=True)
class NextScaleTransformer:
    """Stage 1: the composition, as pure functions of one dictionary of parameters.

    params: {"embed": …, "blocks": … stacked (N, …), "head": …} and with shared_adaln {"shared": …}.
    """

    config: TransformerConfig

    def init(self, rng: jax.Array) -> dict[str, Any]:
        c = self.config
        class_ids, codes = (
            jnp.zeros(1, jnp.int32),
            jnp.zeros((1, c.scale_list.length - c.scale_list.lengths[0], c.z_channels)),
        )
        keys = jax.random.split(rng, 4)
        params = {"embed": Embeddings(c).init(keys[0], class_ids, codes)["params"]}
        condition = jnp.zeros((1, c.width))
        modulation = condition
        if c.shared_adaln:
            params["shared"] = SharedModulation(c).init(keys[1], condition)["params"]
            modulation = jnp.zeros((1, 6, c.width))
        x = jnp.zeros((1, 1, c.width))
        params["blocks"] = Blocks(c, c.depth).init(keys[2], x, modulation, c.drop_path_rates)[
            "params"
        ]
        params["head"] = Head(c).init(keys[3], x, condition)["params"]
        return params

    def modulation(self, params, condition):
        """What blocks take for the class: condition (B, C) -> (B, C), or with shared_adaln (B, 6, C)."""
        condition = nn.silu(condition)
        return (
            SharedModulation(self.config).apply({"params": params["shared"]}, condition)
            if self.config.shared_adaln
            else condition
        )

    def embed(self, params, *args, method=None):
        return Embeddings(self.config).apply({"params": params["embed"]}, *args, method=method)

    def run_blocks(
        self,
        params,
        x,
        condition,
        first=0,
        last=None,
        *,
        stacked_from=0,
        dropout_rng=None,
        **kwargs,
    ):
        """Blocks first … last - 1 over x (B, l, C); params has the blocks from stacked_from on. Others as Blocks."""
        last = self.config.depth if last is None else last
        stacked = jax.tree.map(
            lambda p: p[first - stacked_from : last - stacked_from], params["blocks"]
        )
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        return Blocks(self.config, last - first, deterministic=dropout_rng is None).apply(
            {"params": stacked},
            x,
            self.modulation(params, condition),
            self.config.drop_path_rates[first:last],
            rngs=rngs,
            **kwargs,
        )

    def head(self, params, x, condition):
        return Head(self.config).apply({"params": params["head"]}, x, condition)

    def logits(self, params, class_ids, codes, dropout_rng=None):
        """All scales at once, for training.

        Args:
          class_ids: (B,) int32.
          codes: next-scale inputs (B, L - l_0, Z).
          dropout_rng: key for dropout and stochastic depth; None turns them off.

        Returns:
          (B, L, V) float32.
        """
        condition = self.embed(params, class_ids, method="condition")
        x = self.embed(params, class_ids, codes)
        x, _ = self.run_blocks(
            params,
            x,
            condition,
            dropout_rng=dropout_rng,
            block_sizes=self.config.scale_list.lengths,
        )
        return self.head(params, x, condition)

    def scale_input(self, params, k: int, class_ids, codes):
        """The input embeddings of scale k alone: codes (B, l_k, Z) -> (B, l_k, C); codes are not used where k is 0."""
        words = (
            self.embed(params, class_ids, method="start")
            if k == 0
            else self.embed(params, codes, method="words")
        )
        return self.embed(params, words, self.config.scale_list.slice(k), method="place")

    def scale_logits(self, params, k: int, class_ids, codes, past=None):
        """One scale, for sampling.

        Args:
          codes: next-scale input of scale k (B, l_k, Z).
          past: keys and values of earlier scales (causal pattern), as returned for scale k - 1.

        Returns:
          (B, l_k, V) float32, and keys and values to pass on (None in the diagonal pattern, which needs none).
        """
        condition = self.embed(params, class_ids, method="condition")
        x = self.scale_input(params, k, class_ids, codes)
        x, past = self.run_blocks(
            params, x, condition, past=past, keep_kv=self.config.pattern == "causal"
        )
        return self.head(params, x, condition), past
