"""Options of sampling, editing and conversion, each declared once.

The command line imports this module before JAX, so it imports nothing heavy.
"""

import dataclasses
from typing import Any

from hmar_jax.settings import Settings, parse_json, setting

_BOTH, _STAGE2 = ("next_scale", "masked"), ("masked",)  # whose models have a default of their own


def _parse_schedule(text: str) -> Any:
    """Parses a name or JSON; the sampler checks it against the model's scales."""
    if not text.startswith("["):
        return text
    return parse_json(text, "a list of lists such as [[1],[1,3],[9],[16]]")


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    """How tokens are sampled.

    Options of type float are traced: another value compiles nothing. Switching one on or off, that
    is, changing it from or to its default, compiles another program.
    """

    guidance: float = setting(
        0.0, "Classifier-free guidance of next-scale passes; 0: none.", at_least=0, tasks=_BOTH
    )
    masked_guidance: float = setting(
        0.0, "Classifier-free guidance of masked passes; 0: none.", at_least=0, tasks=_STAGE2
    )
    temperature: float = setting(
        1.0,
        "Temperature of next-scale passes: their logits are divided by it.",
        above=0,
        tasks=_BOTH,
    )
    top_k: int = setting(
        0, "Sample from the k most likely tokens; 0: off.", at_least=0, tasks=_BOTH
    )
    top_p: float = setting(
        0.0,
        "Sample from the most likely tokens whose probabilities sum to p (nucleus); 0: off.",
        at_least=0,
        at_most=1,
        tasks=_BOTH,
    )
    greedy: bool = setting(False, "Take the most likely token instead of a sample.")
    schedule: Any = setting(
        None,
        "Passes of each scale: none (one each), default, cosine:N, or tokens fixed in each pass, "
        "such as [[1],[1,3],[9],[16]]. Default: default with stage 2, otherwise none.",
        parse=_parse_schedule,
    )
    smooth: bool = setting(
        False, "Decode mixtures of tokens: smoother images, not to be used in evaluations."
    )
    choice_temperature: float = setting(
        0.0,
        "Randomness of the order in which masked passes fix tokens (MaskGIT); 0: none.",
        at_least=0,
        former_name="confidence_noise",
        tasks=_STAGE2,
    )


@dataclasses.dataclass(frozen=True)
class EditingConfig(SamplingConfig):
    """How a region of an image is regenerated: the sampling options and two more."""

    keep_coarse: bool | None = setting(
        None,
        "Keep the tokens of scales up to 2x2, which hold the layout of the whole image; "
        "by default only where no class is given.",
    )
    dilation: int = setting(
        0,
        "Cells around the mask, at every scale, whose tokens are also regenerated.",
        at_least=0,
        former_name="ring",
    )


@dataclasses.dataclass(frozen=True)
class ConvertConfig(Settings):
    """Files of published PyTorch weights, and settings that the weights do not record."""

    tokenizer: str | None = setting(
        None, "The tokenizer's file, such as vae.pth or vae.safetensors.", metavar="FILE"
    )
    masked: str | None = setting(
        None, "The file of stage 2, where the model's file holds stage 1.", metavar="FILE"
    )
    weights: str | None = setting(
        None,
        "Which weights of a checkpoint that holds several, such as ema or model; default: the "
        "averaged ones, otherwise the first.",
        metavar="NAME",
    )
    scales: tuple[int, ...] | None = setting(
        None, "Sides of the token grids, such as 1,2,3,4,6; default: a published list.", at_least=1
    )
    heads: int | None = setting(
        None,
        "Attention heads, where the weights do not record them; default: the number of blocks.",
        at_least=1,
    )
