"""The masks that stage 2 learns from: counts, ratios, independence of the images of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.masking import ranks, sample_mask_ratios, sample_masks
from hmar_jax.families.hmar.recipe import MaskedRecipe
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.families.hmar.transformer import TransformerConfig

KEY = jax.random.key(1)


def test_ranks_along_the_last_axis():
    assert ranks(jnp.array([0.5, -1.0, 7.0])).tolist() == [1, 0, 2]
    assert ranks(jnp.array([[3, 1, 2], [1, 2, 3]])).tolist() == [[2, 0, 1], [0, 1, 2]]
    assert ranks(jnp.array([1.0, jnp.inf, 0.0, jnp.inf])).tolist() == [1, 2, 0, 3]
    assert ranks(jnp.zeros(4)).tolist() == [0, 1, 2, 3]  # equal values: the first is less
    values = jax.random.normal(KEY, (3, 50))
    found = np.asarray(ranks(values))
    assert found.dtype == np.int32
    for row, rank in zip(np.asarray(values), found):
        assert np.array_equal(np.sort(row)[rank], row)


@pytest.mark.parametrize("sides", [(1, 2, 3, 4), (2, 5), (1, 7)])
def test_every_scale_gets_its_share(sides):
    scales, ratios = ScaleList(sides), jnp.array([1e-6, 0.3, 0.5, 1.0])
    masks = np.asarray(sample_masks(KEY, scales, ratios))
    assert masks.shape == (4, scales.length - scales.lengths[0])
    for k in range(1, scales.num_scales):
        start = scales.offsets[k] - scales.lengths[0]
        counts = masks[:, start : start + scales.lengths[k]].sum(-1)
        assert counts.tolist() == np.ceil(np.asarray(ratios) * scales.lengths[k]).tolist()


def test_positions_are_uniform():
    masks = np.asarray(sample_masks(KEY, ScaleList((1, 3)), jnp.full(4000, 0.34)))  # 4 of 9
    assert (masks.sum(-1) == 4).all() and abs(masks.mean(0) - 4 / 9).max() < 0.03


def test_ratios():
    uniform, cosine = (
        np.asarray(sample_mask_ratios(KEY, 20000, kind)) for kind in ("uniform", "cosine")
    )
    for ratios, mean in ((uniform, 0.5), (cosine, 2 / np.pi)):
        assert 0 < ratios.min() and ratios.max() <= 1 and abs(ratios.mean() - mean) < 0.01
    with pytest.raises(InputError) as error:
        sample_mask_ratios(KEY, 1, "flat")
    assert str(error.value) == "mask_ratios must be one of uniform, cosine; got 'flat'"


@pytest.mark.parametrize("shared", [False, True])
def test_one_mask_for_each_image_or_for_all(shared):
    scales = (1, 2, 4)
    spec = HmarSpec(
        TokenizerConfig(scales=scales),
        TransformerConfig(scales, depth=1, width=8, heads=1),
        masked_depth=1,
    )
    task = MaskedTask(spec=spec, recipe=MaskedRecipe(shared_mask=shared), steps=1, batch_size=8)
    ratios, masks = task.sample_batch_masks(KEY, jax.random.key(2), 8)
    assert ratios.shape == (8,) and masks.shape == (8, 20)
    assert len(np.unique(ratios)) == len(np.unique(masks, axis=0)) == (1 if shared else 8)

    batch = {"label": jnp.zeros(8, jnp.int32), "tokens": jnp.zeros((8, 21), jnp.int32)}
    prepared, rng = task.prepare_batch(batch, KEY)
    assert prepared["ratio"].shape == (8,) and prepared["is_masked"].shape == (8, 20)
    assert not jnp.array_equal(jax.random.key_data(rng), jax.random.key_data(KEY))
