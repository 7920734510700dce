"""Sampling schedules, on written-out tables."""

import pytest

from hmar_jax.autoencoders.scales import PUBLISHED_SIDES, ScaleList
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.schedules import cosine_counts, masking_plan, resolve_schedule


def test_published_defaults():
    rows = resolve_schedule(ScaleList(PUBLISHED_SIDES[256]), "default")
    assert rows[:4] == ((1,), (1, 3), (1, 1, 2, 5), (16,)) and sum(map(len, rows)) == 14
    assert resolve_schedule(ScaleList(PUBLISHED_SIDES[512]), "default")[3:5] == ((5, 11), (36,))
    assert resolve_schedule(ScaleList(PUBLISHED_SIDES[1024]), "default")[3] == (3, 5, 8)


def test_defaults_of_other_lists():
    assert resolve_schedule(ScaleList((1, 2, 3, 4, 6)), "default") == (
        (1,),
        (1, 1, 1, 1),
        (1, 2, 3, 3),
        (2, 3, 5, 6),
        (36,),
    )
    # The first scale is never masked.
    assert resolve_schedule(ScaleList((2, 3)), "default") == ((4,), (1, 2, 3, 3))


def test_cosine():
    assert cosine_counts(1, 4) == (1,)
    assert cosine_counts(4, 8) == (1, 1, 1, 1)
    assert cosine_counts(16, 4) == (2, 3, 5, 6)  # masked after each pass: 14, 11, 6, 0
    assert cosine_counts(16, 1) == (16,)
    rows = resolve_schedule(ScaleList((1, 2, 4)), "cosine:1,2,4")
    assert rows == ((1,), (2, 2), (2, 3, 5, 6))


@pytest.mark.parametrize(
    "sides", [*PUBLISHED_SIDES.values(), (1, 2, 3, 4), (3, 5), (7,), (2, 9, 10)]
)
@pytest.mark.parametrize("given", ["none", "default", "cosine:1", "cosine:3", "cosine:50"])
def test_every_row_sums_to_its_scale(sides, given):
    scales = ScaleList(sides)
    rows = resolve_schedule(scales, given)
    assert [sum(row) for row in rows] == list(scales.lengths) and min(min(row) for row in rows) >= 1
    assert resolve_schedule(scales, [list(row) for row in rows]) == rows


_NAMES = (
    "schedule must be none, default, cosine:N with N passes a scale (or cosine:N,N,... with a "
    "number for each), or a list of lists; got "
)


@pytest.mark.parametrize(
    "given, message",
    [
        ("fast", f"{_NAMES}'fast'"),
        ("cosine:1,,2", f"{_NAMES}'cosine:1,,2'"),
        ("cosine:0", f"{_NAMES}'cosine:0'"),
        ("cosine:x", f"{_NAMES}'cosine:x'"),
        (
            "cosine:1,2",
            "schedule 'cosine:1,2' must have 1 or 3 numbers, as the model has 3 scales; got 2",
        ),
        (3, "schedule must be a list of lists, one a scale; got 3"),
        ([[1], [4]], "schedule must have 3 rows, one for each scale; got 2"),
        (
            [[1], [1, 2], [9]],
            "schedule of scale 1 (2x2) must sum to its 4 tokens; got sum 3",
        ),
        (
            [[1], [0, 4], [9]],
            "schedule of scale 1 (2x2) must be integers of at least 1; got [0, 4]",
        ),
        (
            [[1], [True, 3], [9]],
            "schedule of scale 1 (2x2) must be integers of at least 1; got [True, 3]",
        ),
        ([[1], [4], []], "schedule of scale 2 (3x3) must be integers of at least 1; got []"),
    ],
)
def test_invalid_schedules(given, message):
    with pytest.raises(InputError) as error:
        resolve_schedule(ScaleList((1, 2, 3)), given)
    assert str(error.value) == message


def test_the_first_scale_has_no_masked_passes():
    with pytest.raises(InputError) as error:
        resolve_schedule(ScaleList((2, 3)), [[1, 3], [9]])
    assert str(error.value) == (
        "schedule of scale 0 (2x2) must be [4], as the first scale has no masked passes; got [1, 3]"
    )


def test_masking_plan():
    plan = masking_plan(((1,), (1, 3), (2, 3, 4)))
    assert plan.has_masked_passes == (False, True, True)
    assert [int(n) for n in plan.num_passes] == [1, 2, 3]
    assert [counts.tolist() for counts in plan.num_masked] == [
        [1],
        [4, 3, 0, 0],
        [9, 7, 4, 0, 0, 0, 0, 0, 0],
    ]
