"""Published PyTorch weights to this project's parameters: the only place that imports torch.

The names below are those of the published state dicts (VAR's tokenizer, VAR, HMAR's stages). Linear weights are transposed,
convolution kernels go from OIHW to HWIO, and the blocks' tensors are stacked on a leading axis.
"""

import collections.abc
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hmar_jax.autoencoders.scales import ScaleList, published_list
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.transformer import TransformerConfig

_WRAPPERS = (
    "module.",
    "_orig_mod.",
)  # prefixes that DistributedDataParallel and torch.compile leave behind
_TRANSFORMER_KEY = "pos_1LC"
_TOKENIZER_KEY = "quantize.embedding.weight"
_MASK_EMBED = "mask_embed.weight"


def load_state_dicts(path: str) -> dict[str, dict[str, np.ndarray]]:
    """Reads a .pth file and finds the state dicts in it.

    Args:
      path: of a file written by torch.save: a state dict, or a trainer's checkpoint that nests one or several.

    Returns:
      {"tokenizer": …, "transformer": …}, whichever is there, float tensors as float32 numpy arrays.

    Raises:
      InputError: the file cannot be read, or holds neither; ImportError without torch says how to get it.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(
            'reading published weights needs PyTorch: pip install "hmar_jax[torch]"'
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory; a .pth file is wanted") from None
    except Exception as e:  # torch raises many kinds for damaged or foreign files
        raise InputError(
            f"{path}: not a file of PyTorch weights ({str(e).splitlines()[0][:120]})"
        ) from None
    found: dict[str, dict] = {}
    _find(loaded, found)
    if not found:
        raise InputError(
            f"{path}: holds no model of this family (looked for {_TRANSFORMER_KEY!r} or {_TOKENIZER_KEY!r} among its names)"
        )
    to_numpy = lambda t: (t.float() if t.is_floating_point() else t).numpy()
    return {
        kind: {name: to_numpy(t) for name, t in state.items() if hasattr(t, "numpy")}
        for kind, state in found.items()
    }


def _find(node: Any, found: dict[str, dict]):
    """Collects the first tokenizer and the first transformer in nested mappings."""
    if not isinstance(node, collections.abc.Mapping):
        return
    names = {_unwrapped(k): v for k, v in node.items() if isinstance(k, str)}
    if _TOKENIZER_KEY in names:
        found.setdefault("tokenizer", names)
    elif _TRANSFORMER_KEY in names:
        found.setdefault("transformer", names)
    else:
        for value in node.values():
            _find(value, found)


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def resolve_scales(num_scales: int, length: int | None, given) -> ScaleList:
    """The scale list of weights that record only K and L: a published one, or the one given.

    Raises:
      InputError: K and L are not those of a published list and none was given, or the given one does not fit.
    """
    known = f"these weights have K={num_scales} scales" + (
        f" and L={length} tokens" if length else ""
    )
    if given is not None:
        scales = given if isinstance(given, ScaleList) else ScaleList(tuple(given))
        if scales.num_scales != num_scales or (length and scales.length != length):
            raise InputError(
                f"scales {','.join(map(str, scales.sides))} have K={scales.num_scales} and L={scales.length}, but {known}"
            )
        return scales
    scales = published_list(num_scales, length) if length else None
    if scales is None:
        raise InputError(
            f"{known}, which is no published list: give scales, such as scales=(1, 2, 3, 4, 6)"
        )
    return scales


def tokenizer_scales(state: Mapping[str, np.ndarray], given=None) -> ScaleList:
    """The scale list of a tokenizer without a transformer: its weights record K only."""
    hits = state.get("quantize.ema_vocab_hit_SV")
    if given is None:
        known = f" for its K={hits.shape[0]} scales" if hits is not None else ""
        raise InputError(
            f"a tokenizer alone does not tell its scale list: give the sides{known}, such as scales=(1, 2, 3, 4, 6)"
        )
    scales = given if isinstance(given, ScaleList) else ScaleList(tuple(given))
    return resolve_scales(scales.num_scales if hits is None else hits.shape[0], None, scales)


class _Reader:
    """Takes tensors out of a state dict by name, and complains about what is missing."""

    def __init__(self, state: Mapping[str, np.ndarray]):
        self.state = state

    def __call__(self, name: str) -> np.ndarray:
        if name not in self.state:
            raise InputError(f"the weights lack {name!r}: a file of another model, or cut short")
        return self.state[name]

    def linear(self, name: str) -> dict:
        return {"kernel": self(f"{name}.weight").T, "bias": self(f"{name}.bias")}

    def conv(self, name: str) -> dict:
        kernel = self(f"{name}.weight").transpose(2, 3, 1, 0)
        return {"kernel": kernel, "bias": self(f"{name}.bias")}

    def conv1x1(self, name: str) -> dict:
        return {"kernel": self(f"{name}.weight")[:, :, 0, 0].T, "bias": self(f"{name}.bias")}

    def norm(self, name: str) -> dict:
        return {"scale": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def count(self, pattern: str) -> int:
        """1 + the largest number that `pattern`'s group matches in any name; 0 without a match."""
        return 1 + max(
            (int(m[1]) for m in (re.match(pattern, name) for name in self.state) if m), default=-1
        )


def tokenizer_from_state(
    state: Mapping[str, np.ndarray], scales: ScaleList, groups: int = 32
) -> tuple[TokenizerConfig, dict]:
    """VAR's tokenizer. Sizes are read off the shapes; `groups` leaves no trace there.

    Returns:
      Its config and parameters.
    """
    r = _Reader(state)
    levels = r.count(r"encoder\.down\.(\d+)\.")
    channels = r("encoder.conv_in.weight").shape[0]
    outputs = [r(f"encoder.down.{i}.block.0.conv2.weight").shape[0] for i in range(levels)]
    codebook = r(_TOKENIZER_KEY)
    shared = r.count(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    if shared:
        phi_names, num_phi = [f"quantize.quant_resi.qresi_ls.{i}" for i in range(shared)], shared
    elif "quantize.quant_resi.qresi.weight" in state:
        phi_names, num_phi = ["quantize.quant_resi.qresi"], 1
    else:
        phi_names, num_phi = [f"quantize.quant_resi.{i}" for i in range(scales.num_scales)], 0
    config = TokenizerConfig(
        scales=scales.sides,
        vocab_size=codebook.shape[0],
        z_channels=codebook.shape[1],
        channels=channels,
        channel_multipliers=tuple(o // channels for o in outputs),
        num_res_blocks=r.count(r"encoder\.down\.0\.block\.(\d+)\."),
        attention="encoder.mid.attn_1.norm.weight" in state,
        groups=groups,
        num_phi=num_phi,
    )

    phis = [r.conv(name) for name in phi_names]
    params = {
        "encoder": {
            **_ends(r, "encoder"),
            **_middle(r, "encoder"),
            **_levels(r, config, "encoder", "down", "downsample"),
        },
        "decoder": {
            **_ends(r, "decoder"),
            **_middle(r, "decoder"),
            **_levels(r, config, "decoder", "up", "upsample"),
        },
        "quant_conv": r.conv("quant_conv"),
        "post_quant_conv": r.conv("post_quant_conv"),
        "quantizer": {
            "codebook": codebook,
            "phi_kernel": np.stack([p["kernel"] for p in phis]),
            "phi_bias": np.stack([p["bias"] for p in phis]),
        },
    }
    return config, params


def _ends(r: _Reader, side: str) -> dict:
    return {
        "conv_in": r.conv(f"{side}.conv_in"),
        "norm_out": r.norm(f"{side}.norm_out"),
        "conv_out": r.conv(f"{side}.conv_out"),
    }


def _middle(r: _Reader, side: str) -> dict:
    middle = {f"mid_block_{i}": _res_block(r, f"{side}.mid.block_{i}") for i in (1, 2)}
    if f"{side}.mid.attn_1.norm.weight" in r.state:
        middle["mid_attn"] = _attn_block(r, f"{side}.mid.attn_1")
    return middle


def _levels(r: _Reader, config: TokenizerConfig, side: str, way: str, resample: str) -> dict:
    """The residual and attention blocks of every level, and what changes the resolution between levels."""
    params = {}
    for i in range(len(config.channel_multipliers)):
        for j in range(config.num_res_blocks + (way == "up")):
            params[f"{way}_{i}_block_{j}"] = _res_block(r, f"{side}.{way}.{i}.block.{j}")
            if f"{side}.{way}.{i}.attn.{j}.norm.weight" in r.state:
                params[f"{way}_{i}_attn_{j}"] = _attn_block(r, f"{side}.{way}.{i}.attn.{j}")
        if f"{side}.{way}.{i}.{resample}.conv.weight" in r.state:
            params[f"{way}_{i}_{resample}"] = r.conv(f"{side}.{way}.{i}.{resample}.conv")
    return params


def _res_block(r: _Reader, name: str) -> dict:
    block = {f"norm{i}": r.norm(f"{name}.norm{i}") for i in (1, 2)} | {
        f"conv{i}": r.conv(f"{name}.conv{i}") for i in (1, 2)
    }
    if f"{name}.nin_shortcut.weight" in r.state:
        block["shortcut"] = r.conv1x1(f"{name}.nin_shortcut")
    return block


def _attn_block(r: _Reader, name: str) -> dict:
    return {
        "norm": r.norm(f"{name}.norm"),
        "qkv": r.conv1x1(f"{name}.qkv"),
        "proj": r.conv1x1(f"{name}.proj_out"),
    }


def transformer_from_state(
    state: Mapping[str, np.ndarray], scales=None, heads: int | None = None
) -> tuple[TransformerConfig, dict]:
    """Stage 1 or VAR. The mask stored with the weights tells which.

    Args:
      state: published names to arrays.
      scales: a list of sides, where K and L are not those of a published list.
      heads: where the weights do not tell (without qk_norm); None takes the published rule H = N.

    Returns:
      Its config and parameters.
    """
    r = _Reader(state)
    length, width = r("pos_1LC").shape[1:]
    scales = resolve_scales(r("lvl_embed.weight").shape[0], length, scales)
    depth = r.count(r"blocks\.(\d+)\.")
    qk_norm = "blocks.0.attn.scale_mul_1H11" in state
    heads = state["blocks.0.attn.scale_mul_1H11"].shape[1] if qk_norm else heads or depth
    config = TransformerConfig(
        scales=scales.sides,
        vocab_size=r("head.weight").shape[0],
        z_channels=r("word_embed.weight").shape[1],
        num_classes=r("class_emb.weight").shape[0] - 1,
        depth=depth,
        width=width,
        heads=heads,
        mlp_ratio=r("blocks.0.ffn.fc1.weight").shape[0] / width,
        pattern=_pattern(r, scales),
        qk_norm=qk_norm,
        shared_adaln="shared_ada_lin.1.weight" in state,
    )
    bias = state["word_embed.bias"] if "word_embed.bias" in state else r("word_embed_bias")
    params = {
        "embed": {
            "class_emb": r("class_emb.weight"),
            "pos_start": r("pos_start")[0],
            "pos_emb": r("pos_1LC")[0],
            "level_emb": r("lvl_embed.weight"),
            "word_embed": {"kernel": r("word_embed.weight").T, "bias": bias},
        },
        "blocks": stack_blocks(r, config, [f"blocks.{i}" for i in range(depth)]),
        "head": head_from_state(r, "head_nm", "head"),
    }
    if config.shared_adaln:
        params["shared"] = {"ada": r.linear("shared_ada_lin.1")}
    return config, params


def head_from_state(r: _Reader, norm: str, head: str) -> dict:
    return {"ada": r.linear(f"{norm}.ada_lin.1"), **r.linear(head)}


def _pattern(r: _Reader, scales: ScaleList) -> str:
    """ "causal" where the stored mask lets the second scale see the first."""
    if "attn_bias_for_masking" not in r.state or scales.num_scales == 1:
        return "diagonal"
    bias = r("attn_bias_for_masking")
    return "causal" if bias[0, 0, scales.offsets[1], 0] == 0 else "diagonal"


def stack_blocks(r: _Reader, config: TransformerConfig, names: list[str]) -> dict:
    """Blocks' parameters by name, stacked on a leading axis."""
    return {
        "block": jax.tree.map(
            lambda *leaves: np.stack(leaves), *[_block(r, config, name) for name in names]
        )
    }


def _block(r: _Reader, config: TransformerConfig, name: str) -> dict:
    width, heads = config.width, config.heads
    head_size = width // heads
    block = {
        "qkv": {
            "kernel": r(f"{name}.attn.mat_qkv.weight").T.reshape(width, 3, heads, head_size)
        },  # rows packed [q | k | v]
        "q_bias": r(f"{name}.attn.q_bias").reshape(heads, head_size),
        "v_bias": r(f"{name}.attn.v_bias").reshape(heads, head_size),
        "proj": {
            "kernel": r(f"{name}.attn.proj.weight").T.reshape(heads, head_size, width),
            "bias": r(f"{name}.attn.proj.bias"),
        },
        "fc1": r.linear(f"{name}.ffn.fc1"),
        "fc2": r.linear(f"{name}.ffn.fc2"),
    }
    if config.qk_norm:
        block["log_scale"] = r(f"{name}.attn.scale_mul_1H11").reshape(heads)
    if config.shared_adaln:
        block["ada_table"] = r(f"{name}.ada_gss").reshape(6, width)
    else:
        block["ada"] = r.linear(f"{name}.ada_lin.1")
    return block


def is_combined(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state dict holds both stages, as the published HMAR models do."""
    return "mask_blocks.0.attn.q_bias" in state


def combined_from_state(state: Mapping[str, np.ndarray], scales=None, heads: int | None = None):
    """Both stages from one state dict.

    Returns:
      Config and parameters of stage 1, and M and the parameters of stage 2.
    """
    r = _Reader(state)
    base, tail = r.count(r"base_blocks\.(\d+)\."), r.count(r"mask_blocks\.(\d+)\.")
    stage1 = {}
    for name, value in state.items():
        kind, _, rest = name.partition(".")
        if kind == "base_blocks":
            stage1[f"blocks.{rest}"] = value
        elif kind == "ns_blocks":
            number, _, rest = rest.partition(".")
            stage1[f"blocks.{base + int(number)}.{rest}"] = value
        elif not name.startswith("mask_"):
            stage1[name.removeprefix("ns_")] = value
    config, params = transformer_from_state(stage1, scales, heads)
    masked = masked_from_state(
        state, config, [f"mask_blocks.{i}" for i in range(tail)], "mask_head"
    )
    return config, params, tail, masked


def is_stage2(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state dict is a stage 2 by itself: all blocks, the last ones trained anew, but no second tail."""
    return _MASK_EMBED in state and not is_combined(state)


def stage2_from_state(state: Mapping[str, np.ndarray], scales=None, heads: int | None = None):
    """Stage 2 without its stage 1, which predicts whole scales from masks.

    Returns:
      Config and parameters of the transformer that its blocks make, and M and the parameters of stage 2. The blocks of
      both are the same ones, so M, what is not shared, is as small as it can be.
    """
    config, params = transformer_from_state(state, scales, heads)
    return (
        config,
        params,
        1,
        masked_from_state(state, config, [f"blocks.{config.depth - 1}"], "head"),
    )


def join_stages(
    stage1: Mapping[str, np.ndarray],
    stage2: Mapping[str, np.ndarray],
    scales=None,
    heads: int | None = None,
):
    """Both stages from a state dict each.

    Returns:
      As combined_from_state. M is the number of last blocks in which the two differ.

    Raises:
      InputError: what stage 2 keeps of its stage 1 is not in this one.
    """
    config, params = transformer_from_state(stage1, scales, heads)
    other_config, other = transformer_from_state(stage2, scales, heads)
    if other_config != config:
        field = next(
            f.name
            for f in dataclasses.fields(config)
            if getattr(config, f.name) != getattr(other_config, f.name)
        )
        raise InputError(
            f"stage 2 does not fit stage 1: {field} is {getattr(other_config, field)} there and {getattr(config, field)} here"
        )
    blocks, others = (jax.tree.leaves(p["blocks"]) for p in (params, other))
    equal = [
        all(np.array_equal(a[i], b[i]) for a, b in zip(blocks, others)) for i in range(config.depth)
    ]
    shared = equal.index(False) if False in equal else config.depth - 1
    embeddings = zip(jax.tree.leaves(params["embed"]), jax.tree.leaves(other["embed"]))
    if not shared or not all(np.array_equal(a, b) for a, b in embeddings):
        raise InputError(
            "stage 2 was trained on another stage 1: its frozen parameters are not those of this one"
        )
    masked = masked_from_state(
        stage2, config, [f"blocks.{i}" for i in range(shared, config.depth)], "head"
    )
    return config, params, config.depth - shared, masked


def masked_from_state(
    state: Mapping[str, np.ndarray], config: TransformerConfig, blocks: list[str], head: str
) -> dict:
    """Stage 2's own parameters: the named blocks, {head}_nm and {head}, and the mask embedding."""
    r = _Reader(state)
    return {
        "mask_embed": r(_MASK_EMBED)[0],
        "blocks": stack_blocks(r, config, blocks),
        "head": head_from_state(r, f"{head}_nm", head),
    }
