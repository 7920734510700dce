"""The combined model for sampling: tokenizer, shared base, tails of stages 1 and 2.

HMAR (arXiv 2506.04421, section 3.3). Stage 1 predicts a scale from the earlier ones. Stage 2
predicts some tokens of a scale from the others. Both apply the same first blocks. The sampler calls
no method of a model but those of CombinedModel.

Letters: B images, L tokens of all scales, l_k tokens of scale k, S side of the features, Z channels
of the code, V codebook entries, h w image sides.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.autoencoders.vq import apply_tokenizer
from hmar_jax.families.hmar.masked import MaskedTransformer
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.families.hmar.transformer import NextScaleTransformer


@dataclasses.dataclass(frozen=True)
class CombinedModel:
    """Pure functions of one dictionary of parameters.

    The dictionary has the keys "tokenizer", "transformer" and, with stage 2, "masked".
    """

    spec: HmarSpec

    @property
    def scales(self) -> ScaleList:
        return self.spec.autoencoder.scale_list

    @property
    def z_channels(self) -> int:
        return self.spec.autoencoder.z_channels

    @property
    def null_class(self) -> int:
        return self.spec.transformer.null_class

    @property
    def _masked(self) -> MaskedTransformer:
        return MaskedTransformer(self.spec.transformer, self.spec.masked_depth)

    # Methods of the tokenizer.

    def _tokenizer(self, params, *args, method: str):
        return apply_tokenizer(self.spec.autoencoder, params["tokenizer"], *args, method=method)

    def codebook(self, params) -> jax.Array:
        """(V, Z) float32."""
        return params["tokenizer"]["quantizer"]["codebook"]

    def downsample_to_scale(self, params, f, k: int) -> jax.Array:
        """(B, S, S, Z) -> (B, l_k, Z): the mean over each cell of scale k."""
        return self._tokenizer(params, f, k, method="downsample_to_scale")

    def scale_contribution(self, params, vectors, k: int) -> jax.Array:
        """(B, l_k, Z) -> (B, S, S, Z): what scale k adds to the features."""
        return self._tokenizer(params, vectors, k, method="scale_contribution")

    def decode_features(self, params, f_hat) -> jax.Array:
        """(B, S, S, Z) -> images (B, h, w, 3) float32 in [0, 1]."""
        return (self._tokenizer(params, f_hat, method="decode_features").clip(-1, 1) + 1) / 2

    def decode_tokens(self, params, tokens) -> jax.Array:
        """(B, L) int32 -> images (B, h, w, 3) float32 in [0, 1]."""
        return (self._tokenizer(params, tokens, method="decode") + 1) / 2

    # Methods of the transformer.

    def next_scale_logits(self, params, class_ids, scale_inputs, k: int, kv_cache=None):
        """The first prediction of scale k.

        Args:
          class_ids: (B,) int32.
          scale_inputs: features of the earlier scales on the cells of scale k, (B, l_k, Z).
          kv_cache: what this method returned for scale k - 1; None for k = 0. Only block-causal
            models have a cache of keys and values.

        Returns:
          Logits (B, l_k, V) float32, and the cache for scale k + 1.
        """
        if self.spec.next_scale or k == 0:
            return NextScaleTransformer(self.spec.transformer).scale_logits(
                params["transformer"], class_ids, scale_inputs, k, kv_cache
            )
        # There is no stage 1: stage 2 predicts the scale with all tokens masked.
        is_masked = jnp.ones(scale_inputs.shape[:2], bool)
        features = jnp.zeros_like(scale_inputs)
        return self.masked_logits(params, class_ids, scale_inputs, features, is_masked, k), None

    def masked_logits(
        self, params, class_ids, scale_inputs, token_features, is_masked, k: int
    ) -> jax.Array:
        """Stage 2's prediction of scale k >= 1.

        Args:
          class_ids: (B,) int32.
          scale_inputs: features of the earlier scales on the cells of scale k, (B, l_k, Z).
          token_features: contribution of scale k's own tokens on its cells, (B, l_k, Z).
          is_masked: (B, l_k) bool, positions whose own token is hidden.

        Returns:
          Logits (B, l_k, V) float32.
        """
        return self._masked.scale_logits(
            params["transformer"],
            params["masked"],
            class_ids,
            scale_inputs,
            token_features,
            is_masked,
            k,
        )
