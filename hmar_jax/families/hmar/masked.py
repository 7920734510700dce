"""Stage 2, masked prediction inside a scale: the same trunk, last blocks and head retrained.

HMAR (arXiv 2506.04421, section 3.3). Some tokens of a scale are known, the others are masked. The
input of a position is the image so far, as in stage 1, plus the features of the position's own
token, or a learned vector where it is masked.

Letters: B images, L tokens, l tokens of one scale, C width, N blocks of stage 1, M blocks of stage
2, V codebook, Z channels of the code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig


@dataclasses.dataclass(frozen=True)
class MaskedTransformer:
    """The composition of stage 2, as pure functions of stage 1's parameters (frozen) and its own.

    Its own parameters: {"mask_embed": (C,), "blocks": ... stacked (M, ...), "head": ...}.
    """

    config: TransformerConfig  # of stage 1
    depth: int  # M

    @property
    def base_depth(self) -> int:
        """N - M, blocks shared with stage 1."""
        return self.config.depth - self.depth

    @property
    def stage1(self) -> NextScaleTransformer:
        return NextScaleTransformer(self.config)

    def init(self, rng: jax.Array, stage1_params) -> dict[str, Any]:
        """Copies of stage 1's last M blocks and head, and a new mask embedding."""
        return {
            "mask_embed": self.config.init_std * jax.random.normal(rng, (self.config.width,)),
            "blocks": jax.tree.map(lambda p: p[self.base_depth :], stage1_params["blocks"]),
            "head": stage1_params["head"],
        }

    def embed_inputs(self, stage1_params, params, scale_inputs, token_features, is_masked):
        """Input embeddings before level and position.

        Args:
          scale_inputs: next-scale inputs (B, l, Z).
          token_features: features of the scale's own tokens (B, l, Z).
          is_masked: (B, l) bool.

        Returns:
          (B, l, C): W scale_inputs + [W token_features, or the mask embedding] + bias; W and bias
          are stage 1's word embedding.
        """
        own = token_features @ stage1_params["embed"]["word_embed"]["kernel"]
        inputs = self.stage1.embed(stage1_params, scale_inputs, method="embed_inputs")
        return inputs + jnp.where(is_masked[..., None], params["mask_embed"], own)

    def logits(
        self,
        stage1_params,
        params,
        class_ids,
        scale_inputs,
        token_features,
        is_masked,
        dropout_rng=None,
    ):
        """All scales at once, for training. The first scale has the start token and no masks.

        Args:
          class_ids: (B,) int32.
          scale_inputs, token_features: (B, L - l_0, Z).
          is_masked: (B, L - l_0) bool.

        Returns:
          (B, L, V) float32.
        """
        inputs = self.embed_inputs(stage1_params, params, scale_inputs, token_features, is_masked)
        start = self.stage1.embed(stage1_params, class_ids, method="start_tokens")
        x = jnp.concatenate([start, inputs], 1)
        return self._predict(
            stage1_params,
            params,
            class_ids,
            x,
            slice(None),
            dropout_rng,
            self.config.scale_list.lengths,
        )

    def scale_logits(
        self, stage1_params, params, class_ids, scale_inputs, token_features, is_masked, k: int
    ):
        """One scale k >= 1, for sampling.

        Args:
          scale_inputs, token_features: (B, l_k, Z).
          is_masked: (B, l_k) bool.

        Returns:
          (B, l_k, V) float32.
        """
        x = self.embed_inputs(stage1_params, params, scale_inputs, token_features, is_masked)
        positions = self.config.scale_list.slice(k)
        return self._predict(stage1_params, params, class_ids, x, positions)

    def _predict(
        self,
        stage1_params,
        params,
        class_ids,
        x,
        positions,
        dropout_rng=None,
        block_sizes=None,
    ):
        """Level and position, the shared base, then stage 2's tail and head."""
        model = self.stage1
        condition = model.embed(stage1_params, class_ids, method="class_embedding")
        x = model.embed(stage1_params, x, positions, method="add_position_and_level")
        if self.base_depth:
            x, _ = model.run_blocks(
                stage1_params, x, condition, 0, self.base_depth, block_sizes=block_sizes
            )
        tail = {**stage1_params, "blocks": params["blocks"], "head": params["head"]}
        x, _ = model.run_blocks(
            tail,
            x,
            condition,
            self.base_depth,
            self.config.depth,
            stacked_from=self.base_depth,
            dropout_rng=dropout_rng,
            block_sizes=block_sizes,
        )
        return model.head(tail, x, condition)
