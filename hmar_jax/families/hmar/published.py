"""Facts of the published models: how they are sampled, and how their files are recognized.

docs/weights.md says where the files are and what their licences allow.
"""

import dataclasses
import hashlib
import os

from hmar_jax.autoencoders.scales import PUBLISHED_SIDES
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.families.hmar.options import SamplingConfig
from hmar_jax.families.hmar.transformer import TransformerConfig

_NUM_CLASSES = 1000  # ImageNet's; all published models have them
_HEAD_SIZE = 64

# guidance, top_k and top_p of HMAR at 256 pixels, by depth (arXiv 2506.04421 and its sampling
# configs). Guidance of masked passes is off there, and the schedule is "default".
_HMAR_SAMPLING = {
    16: (1.7, 1000, 0.99),
    20: (1.9, 950, 0.99),
    24: (2.1, 900, 0.99),
    30: (1.6, 650, 0.99),
}
# Of VAR at all depths: the README of FoundationVision/VAR, for its published FID.
_VAR_SAMPLING = (1.5, 900, 0.96)
_VAR_DEPTHS = {256: (16, 20, 24, 30), 512: (36,)}


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    title: str
    licence: str


_VAR_LICENCE = "MIT (VAR, FoundationVision/var)"
# By SHA-256. Only checksums that a source states: the first is the oid of the Git LFS pointer on
# Hugging Face, the second was recorded by users of the file. Others are not known to this project.
_FILES = {
    "7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c": PublishedFile(
        "VAR's published tokenizer", _VAR_LICENCE
    ),
    "4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb": PublishedFile(
        "VAR-d16 as published", _VAR_LICENCE
    ),
}


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_file(digest: str) -> PublishedFile | None:
    """The published file with this SHA-256; None where none is known."""
    return _FILES.get(digest)


def published_sampling(
    tokenizer: TokenizerConfig, transformer: TransformerConfig
) -> SamplingConfig | None:
    """The published sampling options of a model with the architecture of a published one.

    Returns:
      None for other architectures.
    """
    t, depth = transformer, transformer.depth
    default = TokenizerConfig(scales=t.scales)
    if (
        t.num_classes != _NUM_CLASSES
        or (t.width, t.heads) != (_HEAD_SIZE * depth, depth)
        or (t.vocab_size, t.z_channels) != (default.vocab_size, default.z_channels)
        or tokenizer.scales != t.scales
    ):
        return None
    side = next((side for side, sides in PUBLISHED_SIDES.items() if sides == t.scales), 0)
    if t.pattern == "causal":
        found = _VAR_SAMPLING if depth in _VAR_DEPTHS.get(side, ()) else None
    else:
        found = _HMAR_SAMPLING.get(depth) if side == 256 else None
    if found is None:
        return None
    guidance, top_k, top_p = found
    return SamplingConfig(guidance=guidance, top_k=top_k, top_p=top_p)
