"""The transformer of stage 1: embeddings, blocks with adaptive layer norm, and a head.

HMAR (arXiv 2506.04421, section 3) and VAR (arXiv 2404.02905, section 3.3) predict all tokens of
scale k at once. In HMAR a token attends to its own scale only (pattern "diagonal"): its input
contains the earlier scales, through their running sum f_hat. In VAR it also attends to all earlier
scales (pattern "causal"). Both patterns have the same parameters.

The parts are Flax modules. A model is a composition of them, over one dictionary of parameters. The
blocks' parameters are stacked on a leading axis, so that slices give a base and a tail.

Letters: B images, L tokens of all scales, l tokens of one or several scales, C width, H heads,
D = C / H head dim, N blocks, V codebook entries, Z channels of the code, K scales.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.errors import InputError
from hmar_jax.parallel.sharding import constrain_batch, map_over_images_and_heads
from hmar_jax.settings import Settings, setting
from pallas_kernels import block_attention
from pallas_kernels.api import IMPLEMENTATIONS

_NORM_EPS = 1e-6
_QK_NORM_EPS = 1e-12  # the default of torch.nn.functional.normalize, as in the published code
_MAX_LOG_SCALE = np.log(100.0)
_INIT_LOG_SCALE = np.log(4.0)
_SCALE_WITHOUT_QK_NORM = 0.25  # times 1 / sqrt(D); VAR's choice without normalized q and k

# What training saves of a block for the backward pass, which computes the rest again.
REMAT = {
    "none": None,  # everything is saved
    # Saves results of matrix products; computes norms, GELU and attention again.
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Saves the block's input alone: a third more FLOPs.
    "blocks": jax.checkpoint_policies.nothing_saveable,
}

# How a mesh divides parameters (parallel/sharding.py). The blocks' have a leading axis of N. All
# others, biases and embeddings, are small: each device has a copy.
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
class TransformerConfig(Settings):
    """Architecture of a next-scale transformer.

    The published models of depth N have width 64 N, N heads and an MLP ratio of 4.
    """

    scales: tuple[int, ...]  # sides of the token grids
    vocab_size: int = setting(4096, "V, codebook entries.", at_least=1, derived=True)
    z_channels: int = setting(32, "Z, channels of the code.", at_least=1, derived=True)
    num_classes: int = setting(1000, "Number of classes.", at_least=1, derived=True)
    depth: int = setting(16, "N, number of blocks.", at_least=1, at_most=2**20)
    width: int = setting(1024, "C, width.", at_least=1, at_most=2**20)
    heads: int = setting(16, "H, number of attention heads.", at_least=1, at_most=2**20)
    mlp_ratio: float = setting(
        4.0, "Hidden units of the MLP, relative to C.", at_least=0.1, at_most=100
    )
    pattern: str = setting(
        "diagonal",
        "What a token attends to: diagonal, its own scale (HMAR); causal, also earlier ones (VAR).",
        choices=("diagonal", "causal"),
    )
    qk_norm: bool = setting(True, "Normalize queries and keys.")
    shared_adaln: bool = setting(
        False, "One AdaLN layer for all blocks, plus a learned table in each block."
    )
    dropout: float = setting(0.0, "Dropout rate.", at_least=0, at_most=1, extendable=True)
    drop_path: float = setting(
        0.0,
        "Stochastic depth: rate of the last block, rising from 0 at the first. Published: "
        "0.1 N / 24.",
        at_least=0,
        at_most=1,
        extendable=True,
    )
    init_adaln: float = setting(
        0.5, "Factor on initial AdaLN weights of scales and shifts, and on those of the head."
    )
    init_adaln_gamma: float = setting(
        1e-3, "Factor on initial AdaLN weights of the gates of residual branches."
    )
    init_head: float = setting(0.02, "Factor on the head's initial weights.")
    dtype: str = setting(
        "float32",
        "Of matrix products; residuals, norms, softmax and logits are always float32.",
        choices=("float32", "bfloat16", "float16"),
        extendable=True,
    )
    attention: str = setting(
        "",
        "Implementation of block_attention in training, see pallas_kernels; empty: the fastest "
        "that runs here.",
        harmless=True,
    )
    remat: str = setting(
        "none",
        "What the backward pass computes again, to save memory: matmuls, all but the results of "
        "matrix products; blocks, all.",
        choices=tuple(REMAT),
        harmless=True,
    )

    def __post_init__(self):
        object.__setattr__(self, "attention", self.attention or "")  # None in older files
        super().__post_init__()
        ScaleList(self.scales)
        if self.width % self.heads:
            raise InputError(f"heads={self.heads} must divide width={self.width}")

    @property
    def scale_list(self) -> ScaleList:
        return ScaleList(self.scales)

    @property
    def null_class(self) -> int:
        """The class id of unconditional predictions."""
        return self.num_classes

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights."""
        return (1 / 3 / self.width) ** 0.5

    @property
    def drop_path_rates(self) -> np.ndarray:
        """(N,) float32: the stochastic depth of each block."""
        return np.linspace(0, self.drop_path, self.depth, dtype=np.float32)


def check_attention(config: TransformerConfig) -> None:
    """Raises InputError where the named attention is unknown or cannot run in this process."""
    if config.attention:
        lengths = config.scale_list.lengths
        shape = (1, sum(lengths), config.heads, config.width // config.heads)
        q = jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))
        jax.eval_shape(functools.partial(_attend, config, lengths, 1.0), q, q, q)


def _attend(config: TransformerConfig, block_sizes, scale: float, q, k, v):  # (B, L, H, D)
    name = config.attention
    if name and name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise InputError(f"model.attention must be empty or one of {known}; got {name!r}")
    try:
        return block_attention(
            q, k, v, block_sizes, config.pattern, scale, implementation=name or None
        )
    except NotImplementedError as error:
        raise InputError(f"model.attention: {error}") from None


def layer_norm(x):
    """Layer norm without affine part, in float32: (..., C) -> (..., C)."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, -1, keepdims=True) + _NORM_EPS)


def _normal(std):
    # The published code truncates at +-2, which has no effect at such small standard deviations.
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

    def __call__(self, class_ids, scale_inputs):
        """Embeds all scales.

        Args:
          class_ids: (B,) int32.
          scale_inputs: next-scale inputs (B, L - l_0, Z).

        Returns:
          (B, L, C)
        """
        return self.add_position_and_level(
            jnp.concatenate([self.start_tokens(class_ids), self.embed_inputs(scale_inputs)], 1),
            slice(None),
        )

    def class_embedding(self, class_ids):
        """(B,) int32 -> (B, C)"""
        return self.class_emb[class_ids]

    def start_tokens(self, class_ids):
        """(B,) int32 -> (B, l_0, C): the input of the first scale."""
        return self.class_embedding(class_ids)[:, None] + self.pos_start

    def embed_inputs(self, scale_inputs):
        """(B, l, Z) -> (B, l, C)"""
        return self.word_embed(scale_inputs)

    def add_position_and_level(self, x, positions: slice):
        """Adds the level and position embeddings of some positions.

        Args:
          x: (B, l, C).
          positions: of the L tokens, those of x.

        Returns:
          (B, l, C)
        """
        levels = self.config.scale_list.level_ids[positions]
        return x + self.level_emb[levels] + self.pos_emb[positions]


class Block(nn.Module):
    """Attention and MLP, each modulated by the class (adaptive layer norm, AdaLN).

    x += drop_path(gamma1 Attn(LN(x)(1 + sigma1) + beta1))
    x += drop_path(gamma2 MLP(LN(x)(1 + sigma2) + beta2))
    """

    config: TransformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x, modulation, drop_path, kv_cache, block_sizes, return_kv):
        """One block.

        Args:
          x: (B, l, C) float32.
          modulation: SiLU of the class embedding (B, C), or with shared_adaln the shared
            modulation (B, 6, C).
          drop_path: scalar rate of this block.
          kv_cache: keys and values of earlier scales, each (B, l_cache, H, D), or None.
          block_sizes: the scales' lengths where x holds several scales (training). None: x is one
            scale, whose tokens attend to kv_cache and to each other.
          return_kv: whether to return keys and values, for later scales.

        Returns:
          x (B, l, C), and the keys and values of kv_cache and x, or None.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = constrain_batch(x)
        # (B, 1, C) each
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self._modulate(modulation)

        h = (layer_norm(x) * (1 + scale1) + shift1).astype(dtype)
        h, kv = self._attention(h, kv_cache, block_sizes, return_kv)
        x = x + self._drop_path(gamma1 * h, drop_path)

        h = _flatten_tokens((layer_norm(x) * (1 + scale2) + shift2).astype(dtype))
        h = nn.Dense(
            round(c.width * c.mlp_ratio), name="fc1", dtype=dtype, kernel_init=_normal(c.init_std)
        )(h)
        h = nn.Dense(c.width, name="fc2", dtype=dtype, kernel_init=self._residual_init())(
            nn.gelu(h, approximate=True)
        )
        h = nn.Dropout(c.dropout)(h.reshape(x.shape), deterministic=self.deterministic)
        return constrain_batch(x + self._drop_path(gamma2 * h, drop_path)), kv

    def _residual_init(self):
        """The initializer of the last layer of a residual branch: smaller by sqrt(2 N)."""
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

    def _attention(self, h, kv_cache, block_sizes, return_kv):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        head_size = c.width // c.heads
        qkv = nn.DenseGeneral(
            (3, c.heads, head_size),
            use_bias=False,
            name="qkv",
            dtype=dtype,
            kernel_init=_normal(c.init_std),
        )(_flatten_tokens(h))
        qkv = qkv.reshape(*h.shape[:2], 3, c.heads, head_size)
        zeros = nn.initializers.zeros
        q_bias = self.param("q_bias", zeros, (c.heads, head_size))
        v_bias = self.param("v_bias", zeros, (c.heads, head_size))
        q = qkv[:, :, 0] + q_bias.astype(dtype)  # (B, l, H, D)
        k = qkv[:, :, 1]  # no bias: it would add the same number to all scores of a query
        v = qkv[:, :, 2] + v_bias.astype(dtype)
        if c.qk_norm:
            log_scale = self.param(
                "log_scale", nn.initializers.constant(_INIT_LOG_SCALE), (c.heads,)
            )
            q = (
                _l2_normalize(q) * jnp.exp(jnp.minimum(log_scale, _MAX_LOG_SCALE))[:, None]
            ).astype(dtype)
            k, scale = _l2_normalize(k).astype(dtype), 1.0
        else:
            scale = _SCALE_WITHOUT_QK_NORM / head_size**0.5
        if kv_cache is not None:
            k, v = jnp.concatenate([kv_cache[0], k], 1), jnp.concatenate([kv_cache[1], v], 1)
        if block_sizes is None:
            out = jax.nn.dot_product_attention(q, k, v, scale=scale)
        else:
            attend = functools.partial(_attend, c, block_sizes, scale)
            out = map_over_images_and_heads(attend, q, k, v)
        project = nn.DenseGeneral(
            c.width, axis=(-2, -1), name="proj", dtype=dtype, kernel_init=self._residual_init()
        )
        out = project(out.reshape(-1, c.heads, head_size)).reshape(h.shape)
        out = nn.Dropout(c.dropout)(out, deterministic=self.deterministic)
        return out, (k, v) if return_kv else None

    def _drop_path(self, branch, rate):
        """Stochastic depth: drops the whole branch of an image with probability `rate`."""
        if self.deterministic or self.config.drop_path == 0:
            return branch
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (branch.shape[0], 1, 1))
        return branch * keep / (1 - rate)


def _flatten_tokens(x):
    """(B, l, C) -> (B l, C).

    On XLA's CPU backend a product of matrices is twice as fast as one with a batch axis, in the
    backward pass too.
    """
    return x.reshape(-1, x.shape[-1])


def _l2_normalize(x):
    """(..., D) -> (..., D) float32 of unit L2 norm."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)), _QK_NORM_EPS)


class Blocks(nn.Module):
    """Blocks as one scanned layer: compiled once, with parameters stacked on a leading axis."""

    config: TransformerConfig
    depth: int
    deterministic: bool = True

    @nn.compact
    def __call__(self, x, modulation, drop_path, kv_cache=None, block_sizes=None, return_kv=False):
        """As Block, with drop_path (depth,), and keys and values (depth, B, l, H, D)."""
        block, policy = Block, REMAT[self.config.remat]
        if policy is not None:  # in a scan, the compiler cannot merge what is computed twice
            block = nn.remat(Block, policy=policy, prevent_cse=False, static_argnums=(5, 6))
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            in_axes=(nn.broadcast, 0, 0, nn.broadcast, nn.broadcast),
        )
        return scanned(self.config, self.deterministic, name="block")(
            x, modulation, drop_path, kv_cache, block_sizes, return_kv
        )


class Head(nn.Module):
    """AdaLN(LN(x)) and a linear layer to the codebook, in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, condition):
        """x (B, l, C) and class embedding (B, C) -> logits (B, l, V) float32."""
        c = self.config
        ada = nn.Dense(2 * c.width, name="ada", kernel_init=_normal(c.init_std * c.init_adaln))(
            nn.silu(condition)
        )
        scale, shift = jnp.split(ada.reshape(-1, 2, c.width), 2, axis=1)  # (B, 1, C) each
        h = _flatten_tokens((layer_norm(x) * (1 + scale) + shift).astype(c.dtype))
        kernel = self.param("kernel", _normal(c.init_std * c.init_head), (c.width, c.vocab_size))
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,))
        logits = jnp.dot(h, kernel.astype(c.dtype), preferred_element_type=jnp.float32) + bias
        return logits.reshape(*x.shape[:2], c.vocab_size)


class SharedModulation(nn.Module):
    """The AdaLN layer that all blocks share (shared_adaln)."""

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
    """Stage 1, as pure functions of one dictionary of parameters.

    The dictionary has the keys "embed", "blocks" (arrays (N, ...)), "head" and, with shared_adaln,
    "shared".
    """

    config: TransformerConfig

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Random parameters."""
        c = self.config
        class_ids = jnp.zeros(1, jnp.int32)
        length = c.scale_list.length - c.scale_list.lengths[0]
        scale_inputs = jnp.zeros((1, length, c.z_channels))
        keys = jax.random.split(rng, 4)
        params = {"embed": Embeddings(c).init(keys[0], class_ids, scale_inputs)["params"]}
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
        """The blocks' argument: class embedding (B, C) -> (B, C), with shared_adaln (B, 6, C)."""
        condition = nn.silu(condition)
        if not self.config.shared_adaln:
            return condition
        return SharedModulation(self.config).apply({"params": params["shared"]}, condition)

    def embed(self, params, *args, method=None):
        """Calls a method of Embeddings, by default for all scales."""
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
        """Applies the blocks first, ..., last - 1.

        Args:
          x: (B, l, C).
          condition: class embedding (B, C).
          last: None: up to the last block.
          stacked_from: the index of the first block that params["blocks"] contains.
          dropout_rng: key for dropout and stochastic depth; None turns them off.
          **kwargs: kv_cache, block_sizes and return_kv of Blocks.

        Returns:
          x (B, l, C), and keys and values, or None.
        """
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
        """x (B, l, C) and class embedding (B, C) -> logits (B, l, V) float32."""
        return Head(self.config).apply({"params": params["head"]}, x, condition)

    def logits(self, params, class_ids, scale_inputs, dropout_rng=None):
        """Predicts all scales at once, for training.

        Args:
          class_ids: (B,) int32.
          scale_inputs: next-scale inputs (B, L - l_0, Z).
          dropout_rng: key for dropout and stochastic depth; None turns them off.

        Returns:
          Logits (B, L, V) float32.
        """
        condition = self.embed(params, class_ids, method="class_embedding")
        x = self.embed(params, class_ids, scale_inputs)
        x, _ = self.run_blocks(
            params,
            x,
            condition,
            dropout_rng=dropout_rng,
            block_sizes=self.config.scale_list.lengths,
        )
        return self.head(params, x, condition)

    def _embed_scale(self, params, class_ids, scale_inputs, k: int):
        """(B, l_k, Z) -> (B, l_k, C): input embeddings of scale k; for k = 0, the start tokens."""
        if k == 0:
            x = self.embed(params, class_ids, method="start_tokens")
        else:
            x = self.embed(params, scale_inputs, method="embed_inputs")
        positions = self.config.scale_list.slice(k)
        return self.embed(params, x, positions, method="add_position_and_level")

    def scale_logits(self, params, class_ids, scale_inputs, k: int, kv_cache=None):
        """Predicts one scale, for sampling.

        Args:
          class_ids: (B,) int32.
          scale_inputs: next-scale inputs of scale k (B, l_k, Z); not used for k = 0.
          kv_cache: what this method returned for scale k - 1; None for k = 0.

        Returns:
          Logits (B, l_k, V) float32, and keys and values of all scales up to k. The diagonal
          pattern needs no keys and values: None.
        """
        condition = self.embed(params, class_ids, method="class_embedding")
        x = self._embed_scale(params, class_ids, scale_inputs, k)
        x, kv_cache = self.run_blocks(
            params, x, condition, kv_cache=kv_cache, return_kv=self.config.pattern == "causal"
        )
        return self.head(params, x, condition), kv_cache
