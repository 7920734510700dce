"""Training recipes of both stages.

HMAR (arXiv 2506.04421) uses the recipe of VAR (arXiv 2404.02905).
"""

import dataclasses

from hmar_jax.families.hmar.losses import MASKED_WEIGHTINGS, WEIGHTINGS
from hmar_jax.families.hmar.masking import RATIOS
from hmar_jax.settings import setting
from hmar_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerRecipe(OptimizerConfig):
    """Settings of both stages."""

    label_smoothing: float = setting(0.0, "Label smoothing.", at_least=0, at_most=1)
    class_dropout: float = setting(
        0.1,
        "Probability that the class of an image is replaced by the null class.",
        at_least=0,
        at_most=1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextScaleRecipe(TransformerRecipe):
    """Stage 1."""

    loss_weights: str = setting(
        "lognorm",
        "Weights of positions in the loss, see losses.position_weights.",
        choices=WEIGHTINGS,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedRecipe(TransformerRecipe):
    """Stage 2."""

    loss_weights: str = setting(
        "unweighted",
        "Weights of masked positions in the loss, see losses.masked_weights.",
        choices=MASKED_WEIGHTINGS,
    )
    mask_ratios: str = setting("uniform", "Distribution of mask ratios.", choices=RATIOS)
    # The published code shares it; the gradient of a step then comes from a single mask ratio.
    shared_mask: bool = setting(
        False, "One ratio and one set of masked positions for all images of a batch, as published."
    )
