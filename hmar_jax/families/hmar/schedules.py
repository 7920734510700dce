"""Sampling schedules: how many tokens of each scale are fixed in each pass.

HMAR (arXiv 2506.04421, section 3.3). The first number of a scale counts the tokens that the
next-scale pass fixes, the others those of the masked passes. The first scale, whose input is the
start token, has no masked passes. A schedule is chosen at sampling time, without training.

Letters: K scales, of which scale k has l_k tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hmar_jax.autoencoders.scales import PUBLISHED_SIDES, ScaleList
from hmar_jax.errors import InputError

Schedule = tuple[tuple[int, ...], ...]  # K rows; row k sums to l_k

# The published defaults; the remaining scales have one pass.
_PUBLISHED_STARTS = {
    PUBLISHED_SIDES[256]: ((1,), (1, 3), (1, 1, 2, 5)),
    PUBLISHED_SIDES[512]: ((1,), (1, 3), (1, 1, 2, 5), (5, 11)),
    PUBLISHED_SIDES[1024]: ((1,), (1, 3), (1, 1, 2, 5), (3, 5, 8)),
}
# Defaults of other scale lists: this many passes for scales of at most this many tokens, one for
# the others. Masked passes help most at the scales that decide the layout (paper). On the digits,
# four passes were better than those of the published list (benchmarks/RESULTS.md).
_DEFAULT_PASSES, _MAX_REFINED_TOKENS = 4, 16


def resolve_schedule(scales: ScaleList, given: Any) -> Schedule:
    """The schedule that a user's option stands for.

    Args:
      given: "none" or None (one pass a scale), "default", "cosine:N" (N passes a scale, at most as
        many as it has tokens, few tokens first), "cosine:1,2,4,4" (passes of each scale), or a list
        of K lists of counts.

    Returns:
      K rows; row k sums to l_k.

    Raises:
      InputError: an unknown name, another number of scales, a count below 1, or a row that does not
        sum to its scale's tokens.
    """
    if given is None or given == "none":
        return tuple((length,) for length in scales.lengths)
    if given == "default":
        return _default(scales)
    if isinstance(given, str):
        return _cosine_schedule(scales, given)
    return _check_rows(scales, given)


@dataclasses.dataclass(frozen=True)
class MaskingPlan:
    """A schedule as arrays for the compiled sampler.

    Another schedule compiles nothing, unless other scales have masked passes.
    """

    has_masked_passes: tuple[bool, ...]  # (K,) static
    num_passes: tuple[np.ndarray, ...]  # K scalars, the next-scale pass included
    # K arrays (l_k,) int32: tokens that are masked in pass j; 0 beyond the last pass
    num_masked: tuple[np.ndarray, ...]


jax.tree_util.register_dataclass(MaskingPlan, ("num_passes", "num_masked"), ("has_masked_passes",))


def masking_plan(schedule: Schedule) -> MaskingPlan:
    """The arrays of a schedule that `resolve_schedule` returned."""
    num_masked = []
    for row in schedule:
        after = np.zeros(sum(row), np.int32)
        after[: len(row)] = np.cumsum(row[::-1])[::-1]
        num_masked.append(after)
    return MaskingPlan(
        tuple(len(row) > 1 for row in schedule),
        tuple(np.int32(len(row)) for row in schedule),
        tuple(num_masked),
    )


def cosine_counts(length: int, num_passes: int) -> tuple[int, ...]:
    """How many of `length` tokens each pass fixes, at least one in each.

    After pass j of n, a share of cos(pi/2 j/n) of the tokens is still masked (MaskGIT, arXiv
    2202.04200, section 3.3).

    Returns:
      At most num_passes counts, which sum to length.
    """
    num_passes = min(num_passes, length)
    counts, num_masked = [], length
    for j in range(1, num_passes + 1):
        share = math.cos(math.pi / 2 * j / num_passes)
        after = math.floor(length * share) if j < num_passes else 0
        # Fix at least one token now, and leave one for each later pass.
        after = max(min(after, num_masked - 1), num_passes - j)
        counts.append(num_masked - after)
        num_masked = after
    return tuple(counts)


def _default(scales: ScaleList) -> Schedule:
    start = _PUBLISHED_STARTS.get(scales.sides)
    if start is None:
        refined = (n for n in scales.lengths[1:] if n <= _MAX_REFINED_TOKENS)
        start = ((1,), *(cosine_counts(n, _DEFAULT_PASSES) for n in refined))
    return _complete(scales, start[1:])


def _cosine_schedule(scales: ScaleList, text: str) -> Schedule:
    name, _, numbers = text.partition(":")
    passes = numbers.split(",")
    if name != "cosine" or not all(n.isdecimal() and int(n) >= 1 for n in passes):
        raise InputError(
            "schedule must be none, default, cosine:N with N passes a scale (or cosine:N,N,... "
            f"with a number for each), or a list of lists; got {text!r}"
        )
    if len(passes) not in (1, scales.num_scales):
        raise InputError(
            f"schedule {text!r} must have 1 or {scales.num_scales} numbers, as the model has "
            f"{scales.num_scales} scales; got {len(passes)}"
        )
    counts = [int(n) for n in passes] * (scales.num_scales if len(passes) == 1 else 1)
    pairs = zip(scales.lengths[1:], counts[1:])
    return _complete(scales, tuple(cosine_counts(length, n) for length, n in pairs))


def _complete(scales: ScaleList, rows: Schedule) -> Schedule:
    """Adds the first scale, and one pass for each scale without a row.

    Args:
      rows: of the scales from the second on.
    """
    rest = scales.lengths[1 + len(rows) :]
    return (scales.lengths[:1], *rows, *((length,) for length in rest))


def _check_rows(scales: ScaleList, rows: Sequence[Sequence[int]]) -> Schedule:
    try:
        rows = tuple(tuple(row) for row in rows)
    except TypeError:
        raise InputError(f"schedule must be a list of lists, one a scale; got {rows!r}") from None
    if len(rows) != scales.num_scales:
        raise InputError(
            f"schedule must have {scales.num_scales} rows, one for each scale; got {len(rows)}"
        )
    for k, (row, length, side) in enumerate(zip(rows, scales.lengths, scales.sides)):
        name = f"schedule of scale {k} ({side}x{side})"
        if not row or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in row):
            raise InputError(f"{name} must be integers of at least 1; got {list(row)}")
        if k == 0 and len(row) > 1:
            raise InputError(
                f"{name} must be [{length}], as the first scale has no masked passes; "
                f"got {list(row)}"
            )
        if sum(row) != length:
            raise InputError(f"{name} must sum to its {length} tokens; got sum {sum(row)}")
    return rows
