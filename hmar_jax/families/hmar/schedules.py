"""Sampling schedules: how many tokens of each scale are fixed in each pass, as data.

HMAR (arXiv 2506.04421, section 3.3): the first number of a scale is what the next-scale pass fixes,
the others are masked passes. The first scale has the start token for input and no masked passes.
Schedules change at sampling time, without training.

Letters: K scales with l_k tokens.
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

# The published defaults; scales that they leave out have one pass.
_PUBLISHED_STARTS = {
    PUBLISHED_SIDES[256]: ((1,), (1, 3), (1, 1, 2, 5)),
    PUBLISHED_SIDES[512]: ((1,), (1, 3), (1, 1, 2, 5), (5, 11)),
    PUBLISHED_SIDES[1024]: ((1,), (1, 3), (1, 1, 2, 5), (3, 5, 8)),
}
# Defaults of other lists: this many passes for scales of up to so many tokens, one for the others.
# Masked passes pay where the layout is decided (paper); on the digits, four at every scale were
# better than the passes of the published list (benchmarks/RESULTS.md).
_DEFAULT_PASSES, _MAX_REFINED_TOKENS = 4, 16


def resolve_schedule(scales: ScaleList, given: Any) -> Schedule:
    """A schedule from what a user may give.

    Args:
      given: "none" or None (one pass a scale), "default", "cosine:N" (N passes a scale, or as many
        as it has tokens, few tokens first), "cosine:1,2,4,4" (passes of each scale), or a list of K
        lists of counts.

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
    """A schedule as arrays for the compiled sampler: another schedule compiles nothing.

    Only which scales have masked passes at all is part of the program.
    """

    has_masked_passes: tuple[bool, ...]  # (K,) static
    num_passes: tuple[np.ndarray, ...]  # K scalars, the next-scale pass included
    # K times (l_k,) int32: tokens still masked in pass j; 0 beyond the last pass
    num_masked: tuple[np.ndarray, ...]


jax.tree_util.register_dataclass(MaskingPlan, ("num_passes", "num_masked"), ("has_masked_passes",))


def masking_plan(schedule: Schedule) -> MaskingPlan:
    """The arrays of a schedule that `resolve_schedule` has checked."""
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
    """Counts that sum to `length`, at least one token in each pass.

    After pass j of n, cos(pi/2 j/n) of the tokens are still masked (MaskGIT, arXiv 2202.04200,
    section 3.3).
    """
    num_passes = min(num_passes, length)
    counts, num_masked = [], length
    for j in range(1, num_passes + 1):
        share = math.cos(math.pi / 2 * j / num_passes)
        after = math.floor(length * share) if j < num_passes else 0
        # At least one token now, and one for each pass to come.
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
            "schedule must be none, default, cosine:N with N passes a scale (or cosine:N,N,... with "
            f"a number for each), or a list of lists; got {text!r}"
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
    """The rows of the scales after the first; scales that are left out have one pass."""
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
