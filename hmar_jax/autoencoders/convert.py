"""Published PyTorch weights of VAR's tokenizer to this package's parameters.

The names are those of the published state dict. Sizes are read off the shapes of the tensors; the
scale list and the groups of the norms leave no trace in them.

Letters: K scales, L tokens of all scales.
"""

from collections.abc import Sequence

import numpy as np

from hmar_jax.autoencoders.scales import ScaleList, find_published_list
from hmar_jax.autoencoders.vq import Params, TokenizerConfig
from hmar_jax.errors import InputError, keyword
from hmar_jax.io.state_dicts import StateDictReader
from hmar_jax.io.weight_files import StateDict

MARKER = "quantize.embedding.weight"  # of find_models: only a tokenizer has this name
_EXAMPLE = (1, 2, 3, 4, 6)  # a scale list


def resolve_scales(
    num_scales: int, length: int | None, given: ScaleList | Sequence[int] | None
) -> ScaleList:
    """The scale list of weights that record only K and L: the given one, or else a published one.

    Args:
      num_scales: K.
      length: L; None where the weights do not record it.
      given: the caller's list of sides.

    Raises:
      InputError: the given list does not fit, or none is given and no published list has this K
        and L.
    """
    known = f"these weights have K={num_scales} scales"
    if length:
        known += f" and L={length} tokens"
    if given is not None:
        scales = given if isinstance(given, ScaleList) else ScaleList(tuple(given))
        if scales.num_scales != num_scales or (length and scales.length != length):
            sides = ",".join(map(str, scales.sides))
            raise InputError(
                f"scales {sides} have K={scales.num_scales} and L={scales.length}, but {known}"
            )
        return scales
    published = find_published_list(num_scales, length) if length else None
    if published is None:
        raise InputError(
            f"{known}, which is no published list: give scales, such as "
            f"{keyword('scales', _EXAMPLE)}",
            scales=_EXAMPLE,
        )
    return published


def tokenizer_scales(state: StateDict, given: ScaleList | Sequence[int] | None = None) -> ScaleList:
    """The scale list of a tokenizer without a transformer, whose weights record K at most.

    Raises:
      InputError: no list is given, or it does not fit K.
    """
    usage = state.get("quantize.ema_vocab_hit_SV")  # (K, V)
    if given is None:
        known = f" of its K={usage.shape[0]} scales" if usage is not None else ""
        raise InputError(
            f"a tokenizer's weights do not record its scale list: give the sides{known}, such as "
            f"{keyword('scales', _EXAMPLE)}",
            scales=_EXAMPLE,
        )
    scales = given if isinstance(given, ScaleList) else ScaleList(tuple(given))
    return resolve_scales(scales.num_scales if usage is None else usage.shape[0], None, scales)


def tokenizer_from_state(
    state: StateDict, scales: ScaleList, groups: int = 32
) -> tuple[TokenizerConfig, Params]:
    """VAR's tokenizer.

    Args:
      state: published names to arrays.
      groups: of the group norms.

    Returns:
      Its config and parameters.

    Raises:
      InputError: a tensor is missing.
    """
    r = StateDictReader(state)
    levels = r.count(r"encoder\.down\.(\d+)\.")
    channels = r("encoder.conv_in.weight").shape[0]
    outputs = [r(f"encoder.down.{i}.block.0.conv2.weight").shape[0] for i in range(levels)]
    codebook = r(MARKER)  # (V, Z)
    shared = r.count(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    if shared:
        phi_names, num_phi = [f"quantize.quant_resi.qresi_ls.{i}" for i in range(shared)], shared
    elif "quantize.quant_resi.qresi.weight" in r:
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
        attention="encoder.mid.attn_1.norm.weight" in r,
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
            "phi_kernel": np.stack([phi["kernel"] for phi in phis]),
            "phi_bias": np.stack([phi["bias"] for phi in phis]),
        },
    }
    return config, params


def _ends(r: StateDictReader, part: str) -> Params:
    """The first and last layers of encoder or decoder."""
    return {
        "conv_in": r.conv(f"{part}.conv_in"),
        "norm_out": r.norm(f"{part}.norm_out"),
        "conv_out": r.conv(f"{part}.conv_out"),
    }


def _middle(r: StateDictReader, part: str) -> Params:
    middle = {f"mid_block_{i}": _res_block(r, f"{part}.mid.block_{i}") for i in (1, 2)}
    if f"{part}.mid.attn_1.norm.weight" in r:
        middle["mid_attn"] = _attn_block(r, f"{part}.mid.attn_1")
    return middle


def _levels(
    r: StateDictReader, config: TokenizerConfig, part: str, direction: str, resample: str
) -> Params:
    """The residual and attention blocks of every level, and the layers between levels."""
    params = {}
    for i in range(len(config.channel_multipliers)):
        for j in range(config.num_res_blocks + (direction == "up")):
            params[f"{direction}_{i}_block_{j}"] = _res_block(
                r, f"{part}.{direction}.{i}.block.{j}"
            )
            if f"{part}.{direction}.{i}.attn.{j}.norm.weight" in r:
                attn = _attn_block(r, f"{part}.{direction}.{i}.attn.{j}")
                params[f"{direction}_{i}_attn_{j}"] = attn
        if f"{part}.{direction}.{i}.{resample}.conv.weight" in r:
            conv = r.conv(f"{part}.{direction}.{i}.{resample}.conv")
            params[f"{direction}_{i}_{resample}"] = conv
    return params


def _res_block(r: StateDictReader, name: str) -> Params:
    block = {f"norm{i}": r.norm(f"{name}.norm{i}") for i in (1, 2)}
    block |= {f"conv{i}": r.conv(f"{name}.conv{i}") for i in (1, 2)}
    if f"{name}.nin_shortcut.weight" in r:
        block["shortcut"] = r.conv1x1(f"{name}.nin_shortcut")
    return block


def _attn_block(r: StateDictReader, name: str) -> Params:
    return {
        "norm": r.norm(f"{name}.norm"),
        "qkv": r.conv1x1(f"{name}.qkv"),
        "proj": r.conv1x1(f"{name}.proj_out"),
    }
