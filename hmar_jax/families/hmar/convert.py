"""Converts published PyTorch weights of HMAR and VAR to this package's parameters.

Names in strings are those of the published state dicts. The blocks' tensors are stacked on a
leading axis.

Letters: K scales, L tokens of all scales, N blocks, M blocks of stage 2.
"""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from hmar_jax.autoencoders.base import AUTOENCODER, AutoencoderSpec
from hmar_jax.autoencoders.convert import (
    MARKER,
    resolve_scales,
    tokenizer_from_state,
    tokenizer_scales,
)
from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.data import imagenet
from hmar_jax.errors import InputError, keyword
from hmar_jax.families.hmar import published
from hmar_jax.families.hmar.options import ConvertConfig, SamplingConfig
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.families.hmar.transformer import TransformerConfig
from hmar_jax.io.files import expand
from hmar_jax.io.state_dicts import StateDictReader
from hmar_jax.io.weight_files import StateDict, choose_model, find_models
from hmar_jax.training.task import Params

# Names of parameters that only one kind of state dict has.
_MARKERS = {"tokenizer": MARKER, "transformer": "pos_1LC"}
_MASK_EMBED = "mask_embed.weight"
_LICENCE = (
    "HMAR's published weights are for non-commercial use, VAR's are MIT: the converted weights "
    "keep their licence"
)


@dataclasses.dataclass(frozen=True)
class _File:
    """A state dict that was read, and what is said of its file."""

    path: str
    place: str  # where the file nests it
    state: StateDict

    @functools.cached_property
    def digest(self) -> str:
        return published.sha256(self.path)

    @property
    def licence(self) -> str | None:
        """That of the published file; None for others."""
        known = published.find_file(self.digest)
        return known and known.licence

    @property
    def name(self) -> str:
        return pathlib.Path(self.path).name

    @property
    def notes(self) -> str:
        known = published.find_file(self.digest)
        notes = [self.place, known and known.title, f"sha256 {self.digest[:12]}"]
        return f"{self.name}: {', '.join(note for note in notes if note)}"


def convert_files(
    model: str | None, options: ConvertConfig
) -> tuple[HmarSpec | AutoencoderSpec, Params]:
    """Reads published weights.

    Args:
      model: a file with a state dict of stage 1, VAR, stage 2 or the combined HMAR model, or a
        trainer's checkpoint that nests one. None: the tokenizer alone. Stage 2 without stage 1
        predicts whole scales from masks.
      options: the tokenizer's file, and settings that the weights do not record.

    Returns:
      The spec, and the parameters on the host. A model with the architecture of a published one has
      its published sampling options, one of 1000 classes has the names of ImageNet's.

    Raises:
      InputError: a file cannot be read or holds no such model, the two stages do not fit, or the
        scale list is not known.
    """
    if options.tokenizer is None:
        raise InputError(
            f"the tokenizer's file is required: {keyword('tokenizer', 'vae.pth')}",
            tokenizer="vae.pth",
        )
    if model is None and options.masked is not None:
        masked = keyword("masked", options.masked)
        raise InputError(f"{masked} requires the stage 1 it was trained on", masked=options.masked)
    # In the file of the model the option must name one; in the others it may.
    file = _read(options.tokenizer, "tokenizer", "such as vae.pth", options.weights, not model)
    if model is None:
        scales = tokenizer_scales(file.state, options.scales)
        config, params = tokenizer_from_state(file.state, scales)
        return AutoencoderSpec(config, **_source(file)), {AUTOENCODER: params}

    files, transformer, depth, next_scale, params = _read_transformer(model, options)
    config, params[AUTOENCODER] = tokenizer_from_state(file.state, transformer.scale_list)
    is_imagenet = transformer.num_classes == imagenet.NUM_CLASSES
    spec = HmarSpec(
        config,
        transformer,
        masked_depth=depth,
        next_scale=next_scale,
        class_names=imagenet.class_names() if is_imagenet else (),
        sampling=published.published_sampling(config, transformer) or SamplingConfig(),
        **_source(file, *files),
    )
    return spec, params


def _source(*files: _File) -> dict[str, str]:
    """Origin and licence of what was converted from some files."""
    licences = {file.licence or _LICENCE for file in files}
    names, notes = (" and ".join(f.name for f in files), "; ".join(f.notes for f in files))
    return {
        "origin": f"converted from {names} ({notes})",
        "licence": licences.pop() if len(licences) == 1 else _LICENCE,
    }


def _read_transformer(
    model: str, options: ConvertConfig
) -> tuple[list[_File], TransformerConfig, int, bool, Params]:
    """Files, config of stage 1, M, whether there is a stage 1, and params["transformer", ...]."""
    scales, heads = options.scales, options.heads
    file = _read(model, "transformer", "such as hmar.pth", options.weights, True)
    state, files = file.state, [file]
    combined, alone = is_combined(state), is_stage2(state)
    if options.masked is not None:
        if combined or alone:
            masked = keyword("masked", options.masked)
            raise InputError(f"{model} must be a stage 1 with {masked}", masked=options.masked)
        file2 = _read(options.masked, "transformer", "such as masked.pth", options.weights, False)
        files.append(file2)
        if not is_stage2(file2.state):
            raise InputError(f"{options.masked} must be a stage 2 by itself")
        config, params, depth, masked = join_stages(state, file2.state, scales, heads)
    elif combined:
        config, params, depth, masked = combined_from_state(state, scales, heads)
    elif alone:
        config, params, depth, masked = stage2_from_state(state, scales, heads)
    else:
        config, params = transformer_from_state(state, scales, heads)
        return files, config, 0, True, {"transformer": params}
    return files, config, depth, not alone, {"transformer": params, "masked": masked}


def _read(path: str, kind: str, example: str, weights: str | None, required: bool) -> _File:
    """Reads the state dict of the tokenizer or of the transformer.

    Args:
      kind: "tokenizer" or "transformer".
      example: an example of such a file, for the error.
      weights, required: as choose_model's.

    Raises:
      InputError: the file cannot be read, or contains only the other kind.
    """
    path = expand(path)
    found = find_models(path, _MARKERS)
    if kind not in found:
        raise InputError(f"{path} must hold a {kind}, {example}; it holds a {next(iter(found))}")
    model = choose_model(path, found[kind], weights, required)
    return _File(path, model.place, model.arrays())


def read_state(path: str, kind: str) -> StateDict:
    """The state dict of the "tokenizer" or of the "transformer" in a file."""
    return _read(path, kind, "", None, False).state


def transformer_from_state(
    state: StateDict, scales=None, heads: int | None = None
) -> tuple[TransformerConfig, dict]:
    """Converts stage 1 or VAR, which differ in the attention mask stored with the weights.

    Args:
      state: published names to arrays.
      scales: sides of the token grids, where K and L are not those of a published list.
      heads: number of heads, where the weights do not record it (without qk_norm); None: N, as in
        the published models.

    Returns:
      Config and parameters.

    Raises:
      InputError: a tensor is missing, or the scale list is not known.
    """
    r = StateDictReader(state)
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
    bias = r("word_embed.bias" if "word_embed.bias" in state else "word_embed_bias")
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


def head_from_state(r: StateDictReader, norm: str, head: str) -> dict:
    """The head's parameters from the names of its modulation and of its linear layer."""
    return {"ada": r.linear(f"{norm}.ada_lin.1"), **r.linear(head)}


def _pattern(r: StateDictReader, scales: ScaleList) -> str:
    """The attention pattern: causal where the stored mask lets scale 1 attend to scale 0."""
    if "attn_bias_for_masking" not in r.state or scales.num_scales == 1:
        return "diagonal"
    bias = r.buffer("attn_bias_for_masking")  # 0 and -inf
    return "causal" if bias[0, 0, scales.offsets[1], 0] == 0 else "diagonal"


def stack_blocks(r: StateDictReader, config: TransformerConfig, names: list[str]) -> dict:
    """Parameters of the named blocks, stacked on a leading axis: arrays (len(names), ...)."""
    blocks = [_block(r, config, name) for name in names]
    return {"block": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}


def _block(r: StateDictReader, config: TransformerConfig, name: str) -> dict:
    width, heads = config.width, config.heads
    head_size = width // heads
    block = {
        # rows of the published matrix: q, k, v
        "qkv": {"kernel": r(f"{name}.attn.mat_qkv.weight").T.reshape(width, 3, heads, head_size)},
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


def is_combined(state: StateDict) -> bool:
    """Whether a state dict contains both stages, as those of the published HMAR models."""
    return "mask_blocks.0.attn.q_bias" in state


def combined_from_state(state: StateDict, scales=None, heads: int | None = None):
    """Converts both stages from one state dict.

    Args:
      state, scales, heads: as transformer_from_state's.

    Returns:
      Config and parameters of stage 1, M, and the parameters of stage 2.
    """
    r = StateDictReader(state)
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


def is_stage2(state: StateDict) -> bool:
    """Whether a state dict is that of stage 2 alone: all blocks, but no second tail."""
    return _MASK_EMBED in state and not is_combined(state)


def stage2_from_state(state: StateDict, scales=None, heads: int | None = None):
    """Converts stage 2 without its stage 1; such a model predicts whole scales from masks.

    Args:
      state, scales, heads: as transformer_from_state's.

    Returns:
      Config and parameters of the transformer with its blocks, M, and the parameters of stage 2.
      Both have the same blocks, so M, the number of blocks that are not shared, is 1, the minimum.
    """
    config, params = transformer_from_state(state, scales, heads)
    masked = masked_from_state(state, config, [f"blocks.{config.depth - 1}"], "head")
    return config, params, 1, masked


def join_stages(
    stage1: StateDict,
    stage2: StateDict,
    scales=None,
    heads: int | None = None,
):
    """Converts both stages from one state dict each.

    Args:
      scales, heads: as transformer_from_state's.

    Returns:
      As combined_from_state. M is the number of blocks from the first one that differs.

    Raises:
      InputError: stage 2 was trained on another stage 1.
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
            f"stage 2 does not fit stage 1: {field} is {getattr(other_config, field)} there and "
            f"{getattr(config, field)} here"
        )
    blocks, others = (jax.tree.leaves(p["blocks"]) for p in (params, other))
    equal = [
        all(np.array_equal(a[i], b[i]) for a, b in zip(blocks, others)) for i in range(config.depth)
    ]
    shared = equal.index(False) if False in equal else config.depth - 1
    embeddings = zip(jax.tree.leaves(params["embed"]), jax.tree.leaves(other["embed"]))
    if not shared or not all(np.array_equal(a, b) for a, b in embeddings):
        raise InputError(
            "stage 2 was trained on another stage 1: its frozen parameters differ from this one's"
        )
    masked = masked_from_state(
        stage2, config, [f"blocks.{i}" for i in range(shared, config.depth)], "head"
    )
    return config, params, config.depth - shared, masked


def masked_from_state(
    state: StateDict, config: TransformerConfig, blocks: list[str], head: str
) -> dict:
    """Stage 2's own parameters: the named blocks, {head}_nm and {head}, and mask_embed.weight.

    Args:
      config: of stage 1.
      blocks: names of stage 2's blocks.
      head: name of its head.
    """
    r = StateDictReader(state)
    return {
        "mask_embed": r(_MASK_EMBED)[0],
        "blocks": stack_blocks(r, config, blocks),
        "head": head_from_state(r, f"{head}_nm", head),
    }
