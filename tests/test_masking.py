"""Which tokens stage 2 learns from: counts, ratios, and independence of the images of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.masking import sample_mask_ratios, sample_masks
from hmar_jax.families.hmar.transformer import TransformerConfig

KEY = jax.random.key(1)


@pytest.mark.parametrize("sides", [(1, 2, 3, 4), (2, 5), (1, 7)])
def test_every_scale_gets_its_share(sides):
    scales, ratios = ScaleList(sides), jnp.array([1e-6, 0.3, 0.5, 1.0])
    masks = np.asarray(sample_masks(KEY, scales, ratios))
    assert masks.shape == (4, scales.length - scales.lengths[0])
    for k in range(1, scales.num_scales):
        start = scales.offsets[k] - scales.lengths[0]
        counts = masks[:, start : start + scales.lengths[k]].sum(-1)
        assert counts.tolist() == np.ceil(np.asarray(ratios) * scales.lengths[k]).tolist()


def test_positions_are_drawn_evenly():
    masks = np.asarray(sample_masks(KEY, ScaleList((1, 3)), jnp.full(4000, 0.34)))  # 4 of 9
    assert (masks.sum(-1) == 4).all() and abs(masks.mean(0) - 4 / 9).max() < 0.03


def test_ratios():
    uniform, cosine = (
        np.asarray(sample_mask_ratios(KEY, 20000, kind)) for kind in ("uniform", "cosine")
    )
    for ratios, mean in ((uniform, 0.5), (cosine, 2 / np.pi)):
        assert 0 < ratios.min() and ratios.max() <= 1 and abs(ratios.mean() - mean) < 0.01
    with pytest.raises(InputError, match="mask_ratios='flat': known are uniform, cosine"):
        sample_mask_ratios(KEY, 1, "flat")


@pytest.mark.parametrize("shared", [False, True])
def test_shared_or_drawn_for_each_image(shared):
    scales = (1, 2, 4)
    task = MaskedTask(
        transformer=TransformerConfig(scales, depth=1, width=8, heads=1),
        tokenizer=TokenizerConfig(scales),
        masked_depth=1,
        steps=1,
        batch_size=8,
        learning_rate=1.0,
        shared_mask=shared,
    )
    ratios, masks = task.draw(KEY, jax.random.key(2), 8)
    assert ratios.shape == (8,) and masks.shape == (8, 20)
    assert len(np.unique(ratios)) == len(np.unique(masks, axis=0)) == (1 if shared else 8)
