"""Stage 2, masked prediction within a scale: stage 1 with new last blocks and a new head.

HMAR (arXiv 2506.04421, section 3.3). Some tokens of a scale are known, the others are masked. The
input of a position is that of stage 1 (the earlier scales), plus the features of the position's own
token, or a learned vector where it is masked.

Letters: B images, L tokens of all scales, l tokens of one or several scales, C width, N blocks of
stage 1, M blocks of stage 2, V codebook entries, Z channels of the code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig


@dataclasses.dataclass(frozen=True)
class MaskedTransformer:
    """Stage 2, as pure functions of stage 1's parameters (frozen) and its own.

    Its own are a dictionary with the keys "mask_embed" (C,), "blocks" (arrays (M, ...)), "head".
    """

    config: TransformerConfig  # of stage 1
    depth: int  # M

    @property
    def base_depth(self) -> int:
        """N - M, the number of blocks that are shared with stage 1."""
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
        """Input embeddings, before level and position are added.

        They are W scale_inputs + bias + W token_features, with the mask embedding instead of the
        last term where a position is masked. W and bias are stage 1's word embedding.

        Args:
          scale_inputs: next-scale inputs (B, l, Z).
          token_features: contributions of the scale's own tokens (B, l, Z).
          is_masked: (B, l) bool.

        Returns:
          (B, l, C) float32.
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
        """Predicts all scales at once, for training.

        The first scale has no masks: its input is the start token.

        Args:
          class_ids: (B,) int32.
          scale_inputs, token_features: (B, L - l_0, Z).
          is_masked: (B, L - l_0) bool.
          dropout_rng: key for dropout and stochastic depth; None turns them off.

        Returns:
          Logits (B, L, V) float32.
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
        """Predicts one scale k >= 1, for sampling.

        Args:
          class_ids: (B,) int32.
          scale_inputs, token_features: (B, l_k, Z).
          is_masked: (B, l_k) bool.

        Returns:
          Logits (B, l_k, V) float32.
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
        """Adds level and position to x (B, l, C); applies the base, stage 2's tail and head."""
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
