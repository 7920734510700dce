"""Scale lists: offsets, resize matrices, and the residual convolution of each scale."""

import numpy as np
import pytest

from hmar_jax.autoencoders.scales import (
    PUBLISHED_SIDES,
    ScaleList,
    area_matrix,
    bicubic_matrix,
    find_published_list,
)
from hmar_jax.errors import InputError


def test_published_lists():
    assert [ScaleList(s).length for s in PUBLISHED_SIDES.values()] == [680, 2240, 9451]
    assert find_published_list(10, 2240).sides == PUBLISHED_SIDES[512]
    assert find_published_list(5, 66) is None


def test_offsets_and_levels():
    scales = ScaleList((2, 3))
    assert scales.offsets == (0, 4, 13)
    assert scales.level_ids.tolist() == [0] * 4 + [1] * 9
    assert scales.slice(1) == slice(4, 13)
    assert ScaleList.parse("1,2,4").lengths == (1, 4, 16)


@pytest.mark.parametrize("sides", [(), (0, 1), (1, 1), (2, 1), ("a",), (1, None)])
def test_invalid_sides(sides):
    with pytest.raises(InputError, match="scales must be"):
        ScaleList(sides)


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_resizing_agrees_with_recorded(load_golden, size):
    z = load_golden("resize")
    scales = ScaleList(PUBLISHED_SIDES[size])
    checked = 0
    for k, side in enumerate(scales.sides):
        if f"{size}/area_{side}" not in z:
            continue
        checked += 1
        for kind, matrix, source in (
            ("area", scales.downsample_matrix(k), "area_in"),
            ("bicubic", scales.upsample_matrix(k), f"bicubic_in_{side}"),
        ):
            x, expected = z[f"{size}/{source}"], z[f"{size}/{kind}_{side}"]
            np.testing.assert_allclose(matrix @ x @ matrix.T, expected, atol=1e-5)
            if f"{size}/{kind}_grad_{side}" in z:  # of a linear map: its transpose
                cotangent = z[f"{size}/{kind}_cot_{side}"]
                np.testing.assert_allclose(
                    matrix.T @ cotangent @ matrix, z[f"{size}/{kind}_grad_{side}"], atol=1e-5
                )
    assert checked >= 5


@pytest.mark.parametrize("source,target", [(1, 4), (3, 3), (5, 16), (7, 64)])
def test_resizing_preserves_constants(source, target):
    np.testing.assert_allclose(bicubic_matrix(source, target).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(area_matrix(target, source).sum(1), 1, atol=1e-6)
    assert np.array_equal(area_matrix(target, target), np.eye(target))
    np.testing.assert_allclose(bicubic_matrix(target, target), np.eye(target), atol=1e-6)


@pytest.mark.parametrize("num_scales", [5, 10, 14])
@pytest.mark.parametrize("num_phi", [4, 1, 0])
def test_phi_index_agrees_with_recorded(load_golden, num_scales, num_phi):
    expected = load_golden("tokenizer")[f"phi_index_K{num_scales}_share{num_phi}"]
    scales = ScaleList(tuple(range(1, num_scales + 1)))
    assert [scales.phi_index(k, num_phi) for k in range(num_scales)] == expected.tolist()
