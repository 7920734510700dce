"""Stage 2, masked prediction inside a scale: the same trunk, its last blocks and head trained anew.

HMAR (arXiv 2506.04421, section 3.3). Part of a scale's tokens is known, the rest is masked; the input of a position is the
image so far, as in stage 1, plus what the known token of that position adds, or a learned vector where it is masked.

Letters: B images, L tokens, l tokens of one scale, C width, N blocks of stage 1, M blocks of stage 2, V codebook, Z channels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig


@dataclasses.dataclass(frozen=True)
class MaskedTransformer:
    """The composition of stage 2, as pure functions of stage 1's parameters (frozen) and its own.

    Its own parameters: {"mask_embed": (C,), "blocks": … stacked (M, …), "head": …}.
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
        """The last M blocks and the head of stage 1, copied; the mask embedding, new."""
        return {
            "mask_embed": self.config.init_std * jax.random.normal(rng, (self.config.width,)),
            "blocks": jax.tree.map(lambda p: p[self.base_depth :], stage1_params["blocks"]),
            "head": stage1_params["head"],
        }

    def words(self, stage1_params, params, codes, own_codes, masked):
        """Input embeddings before level and position.

        Args:
          codes: next-scale inputs (B, l, Z).
          own_codes: own-scale inputs (B, l, Z).
          masked: (B, l) bool.

        Returns:
          (B, l, C): W codes + [W own_codes, or the mask embedding] + bias, W and bias those of stage 1's words.
        """
        own = own_codes @ stage1_params["embed"]["word_embed"]["kernel"]
        return self.stage1.embed(stage1_params, codes, method="words") + jnp.where(
            masked[..., None], params["mask_embed"], own
        )

    def logits(self, stage1_params, params, class_ids, codes, own_codes, masked, dropout_rng=None):
        """All scales at once, for training; the first scale has the start token and is never masked.

        Args:
          class_ids: (B,) int32.
          codes, own_codes: (B, L - l_0, Z).
          masked: (B, L - l_0) bool.

        Returns:
          (B, L, V) float32.
        """
        words = self.words(stage1_params, params, codes, own_codes, masked)
        x = jnp.concatenate([self.stage1.embed(stage1_params, class_ids, method="start"), words], 1)
        return self._predict(
            stage1_params,
            params,
            class_ids,
            x,
            slice(None),
            dropout_rng,
            self.config.scale_list.lengths,
        )

    def scale_logits(self, stage1_params, params, k: int, class_ids, codes, own_codes, masked):
        """One scale k >= 1, for sampling: codes and own_codes (B, l_k, Z), masked (B, l_k) -> (B, l_k, V) float32."""
        x = self.words(stage1_params, params, codes, own_codes, masked)
        return self._predict(stage1_params, params, class_ids, x, self.config.scale_list.slice(k))

    def _predict(
        self, stage1_params, params, class_ids, x, positions, dropout_rng=None, block_sizes=None
    ):
        """Level and position, the shared base, then stage 2's tail and head."""
        model = self.stage1
        condition = model.embed(stage1_params, class_ids, method="condition")
        x = model.embed(stage1_params, x, positions, method="place")
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
