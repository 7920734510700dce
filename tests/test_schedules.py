"""Sampling schedules, on written-out tables."""

import pytest

from hmar_jax.autoencoders.scales import PUBLISHED_SIDES, ScaleList
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import schedules


def test_published_defaults():
    row = schedules.resolve(ScaleList(PUBLISHED_SIDES[256]), "default")
    assert row[:4] == ((1,), (1, 3), (1, 1, 2, 5), (16,)) and sum(map(len, row)) == 14
    assert schedules.resolve(ScaleList(PUBLISHED_SIDES[512]), "default")[3:5] == ((5, 11), (36,))
    assert schedules.resolve(ScaleList(PUBLISHED_SIDES[1024]), "default")[3] == (3, 5, 8)


def test_defaults_of_other_lists():
    assert schedules.resolve(ScaleList((1, 2, 3, 4, 6)), "default") == (
        (1,),
        (1, 1, 1, 1),
        (1, 2, 3, 3),
        (2, 3, 5, 6),
        (36,),
    )
    assert schedules.resolve(ScaleList((2, 3)), "default") == (
        (4,),
        (1, 2, 3, 3),
    )  # the first scale is never masked


def test_cosine():
    assert schedules.cosine(1, 4) == (1,)
    assert schedules.cosine(4, 8) == (1, 1, 1, 1)
    assert schedules.cosine(16, 4) == (2, 3, 5, 6)  # still masked: 14, 11, 6, 0
    assert schedules.cosine(16, 1) == (16,)
    rows = schedules.resolve(ScaleList((1, 2, 4)), "cosine:1,2,4")
    assert rows == ((1,), (2, 2), (2, 3, 5, 6))


@pytest.mark.parametrize(
    "sides", [*PUBLISHED_SIDES.values(), (1, 2, 3, 4), (3, 5), (7,), (2, 9, 10)]
)
@pytest.mark.parametrize("wanted", ["none", "default", "cosine:1", "cosine:3", "cosine:50"])
def test_every_row_sums_to_its_scale(sides, wanted):
    scales = ScaleList(sides)
    rows = schedules.resolve(scales, wanted)
    assert [sum(row) for row in rows] == list(scales.lengths) and min(min(row) for row in rows) >= 1
    assert schedules.resolve(scales, [list(row) for row in rows]) == rows


@pytest.mark.parametrize(
    "wanted,message",
    [
        ("fast", "known are none, default"),
        ("cosine:1,2", "2 numbers, the model 3 scales"),
        ("cosine:1,,2", "cosine:N"),
        ("cosine:0", "cosine:N"),
        ("cosine:x", "cosine:N"),
        (3, "list of lists"),
        ([[1], [4]], "2 rows, the model 3 scales"),
        ([[1], [1, 2], [9]], r"scale 1 \(2x2\) sums to 3, but the scale has 4"),
        ([[1], [0, 4], [9]], r"scale 1 \(2x2\) is \[0, 4\]"),
        ([[1], [4], []], "scale 2"),
    ],
)
def test_bad_schedules(wanted, message):
    with pytest.raises(InputError, match=message):
        schedules.resolve(ScaleList((1, 2, 3)), wanted)


def test_the_first_scale_has_no_masked_passes():
    with pytest.raises(
        InputError, match=r"scale 0 \(2x2\) is \[1, 3\]: the first scale has no masked passes"
    ):
        schedules.resolve(ScaleList((2, 3)), [[1, 3], [9]])


def test_plan():
    plan = schedules.plan(((1,), (1, 3), (2, 3, 4)))
    assert plan.refined == (False, True, True) and [int(n) for n in plan.passes] == [1, 2, 3]
    assert [left.tolist() for left in plan.left] == [[1], [4, 3, 0, 0], [9, 7, 4, 0, 0, 0, 0, 0, 0]]
