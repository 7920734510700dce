"""The whole model that images are drawn with: tokenizer, shared base, and the two tails of stages 1 and 2.

HMAR (arXiv 2506.04421, section 3.3). Stage 1 predicts a scale from the image so far; stage 2 predicts some of its tokens
from the others. Both run the same first blocks. The sampler knows nothing else of a model than the methods here.

Letters: B images, K scales with l tokens each, S side of the features, Z channels of the code, V codebook entries.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.autoencoders.vq import Tokenizer
from hmar_jax.families.hmar.masked import MaskedTransformer
from hmar_jax.families.hmar.spec import ModelSpec
from hmar_jax.families.hmar.transformer import NextScaleTransformer


@dataclasses.dataclass(frozen=True)
class CombinedModel:
    """Pure functions of params, {"tokenizer": …, "transformer": …} and, with stage 2, {"masked": …}."""

    spec: ModelSpec

    @property
    def scales(self) -> ScaleList:
        return self.spec.tokenizer.scale_list

    @property
    def z_channels(self) -> int:
        return self.spec.tokenizer.z_channels

    @property
    def null_class(self) -> int:
        return self.spec.transformer.null_class

    @property
    def _masked(self) -> MaskedTransformer:
        return MaskedTransformer(self.spec.transformer, self.spec.masked_depth)

    # The tokenizer's part.

    def quantize(self, params, *args, method: str):
        """A method of the tokenizer."""
        return Tokenizer(self.spec.tokenizer).apply(
            {"params": params["tokenizer"]}, *args, method=method
        )

    def codebook(self, params) -> jax.Array:
        """(V, Z)"""
        return params["tokenizer"]["quantizer"]["codebook"]

    def area(self, params, k: int, f) -> jax.Array:
        """Averages over the cells of scale k: (B, S, S, Z) -> (B, l, Z)."""
        return self.quantize(params, f, k, method="area")

    def residual(self, params, k: int, vectors) -> jax.Array:
        """What scale k adds to the image: (B, l, Z) -> (B, S, S, Z)."""
        return self.quantize(params, vectors, k, method="residual")

    def paint(self, params, f_hat) -> jax.Array:
        """(B, S, S, Z) -> images (B, h, w, 3) in [0, 1]."""
        return (self.quantize(params, f_hat, method="paint").clip(-1, 1) + 1) / 2

    # The transformer's part.

    def next_scale_logits(self, params, k: int, class_ids, codes, past=None):
        """The first prediction of scale k.

        Args:
          class_ids: (B,) int32.
          codes: the image so far on the cells of the scale, (B, l, Z).
          past: what this method returned for scale k - 1 (block-causal models keep keys and values there).

        Returns:
          (B, l, V) float32, and what to pass on.
        """
        if self.spec.next_scale or k == 0:
            return NextScaleTransformer(self.spec.transformer).scale_logits(
                params["transformer"], k, class_ids, codes, past
            )
        everything = jnp.ones(
            codes.shape[:2], bool
        )  # stage 2 without a stage 1: no token is known yet
        return self.masked_logits(
            params, k, class_ids, codes, jnp.zeros_like(codes), everything
        ), None

    def masked_logits(self, params, k: int, class_ids, codes, own_codes, masked) -> jax.Array:
        """Stage 2's prediction of scale k >= 1: own_codes (B, l, Z), what the scale itself adds; masked (B, l) bool, positions
        whose own code is not to be seen -> (B, l, V) float32."""
        return self._masked.scale_logits(
            params["transformer"], params["masked"], k, class_ids, codes, own_codes, masked
        )
