"""How many tokens of each scale are fixed in each pass: schedules, as data.

HMAR (arXiv 2506.04421, section 3.3): the first entry of a scale is what the next-scale pass fixes, the others are masked
passes. A schedule is changed at sampling time; nothing is trained for one. Letters: K scales with l_k tokens.
"""

import dataclasses
import math
from typing import Sequence

import jax
import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.scales import PUBLISHED_SIDES, ScaleList

Schedule = tuple[tuple[int, ...], ...]  # K rows; row k sums to l_k, and only its first count may be 0

# The published defaults; what they leave out is one pass.
_PUBLISHED_STARTS = {
    PUBLISHED_SIDES[256]: ((1,), (1, 3), (1, 1, 2, 5)),
    PUBLISHED_SIDES[512]: ((1,), (1, 3), (1, 1, 2, 5), (5, 11)),
    PUBLISHED_SIDES[1024]: ((1,), (1, 3), (1, 1, 2, 5), (3, 5, 8)),
}
# Of other lists: so many passes for scales of up to so many tokens, one for the others. Passes pay where the layout is
# decided (paper); on the digits, four at every scale were better than those of the published list (benchmarks/RESULTS.md).
_PASSES, _REFINED_TOKENS = 4, 16


def resolve(scales: ScaleList, wanted) -> Schedule:
    """A schedule from what a user may say.

    Args:
      wanted: "none" (one pass a scale), "default", "cosine:N" (N passes a scale, or as many as it has tokens, few tokens
        first), or a list of K lists of counts. A scale's first count may be 0: then all that its next-scale pass drew
        is predicted again.

    Raises:
      InputError: an unknown name, another number of scales, a count below 1, or a row that does not sum to its scale's tokens.
    """
    if wanted is None or wanted == "none":
        return tuple((length,) for length in scales.lengths)
    if wanted == "default":
        return _default(scales)
    if isinstance(wanted, str):
        name, _, number = wanted.partition(":")
        if name != "cosine" or not number.isdecimal() or int(number) < 1:
            raise InputError(f"schedule {wanted!r}: known are none, default, cosine:N with N passes a scale, or a list of lists")
        return tuple(cosine(length, int(number)) for length in scales.lengths)
    return _checked(scales, wanted)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A schedule as the compiled sampler takes it: numbers, so that another schedule compiles nothing.

    Only which scales have masked passes at all is part of the program.
    """

    refined: tuple[bool, ...]  # (K,) static
    passes: tuple[np.ndarray, ...]  # K scalars: passes of the scale, the next-scale pass included
    left: tuple[np.ndarray, ...]  # K times (l_k + 1,): tokens still to be predicted in pass j; 0 beyond the last pass


jax.tree_util.register_dataclass(Plan, ("passes", "left"), ("refined",))


def plan(schedule: Schedule) -> Plan:
    """From counts that `resolve` has checked."""
    left = []
    for row in schedule:
        after = np.zeros(sum(row) + 1, np.int32)
        after[:len(row)] = np.cumsum(row[::-1])[::-1]
        left.append(after)
    return Plan(
        tuple(len(row) > 1 for row in schedule), tuple(np.int32(len(row)) for row in schedule), tuple(left))


def see_known_tokens(schedule: Schedule) -> Schedule:
    """For editing: the same passes, but what the next-scale pass drew is predicted once more in a masked pass.

    The next-scale pass sees nothing of its own scale; a masked pass sees the tokens that are kept, and draws what fits
    them. So a first count n_0 of a scale with several tokens becomes 0, n_0.
    """
    return tuple(row if sum(row) == 1 or row[0] == 0 else (0, *row) for row in schedule)


def cosine(length: int, passes: int) -> tuple[int, ...]:
    """Counts that sum to `length`: after pass j of n, cos(pi/2 j/n) of the tokens are still masked (MaskGIT,
    arXiv 2202.04200, section 3.3), and at least one token is fixed in each pass."""
    passes = min(passes, length)
    counts, masked = [], length
    for j in range(1, passes + 1):
        after = math.floor(length * math.cos(math.pi / 2 * j / passes)) if j < passes else 0
        after = max(min(after, masked - 1), passes - j)  # one at least now, and one for each pass to come
        counts.append(masked - after)
        masked = after
    return tuple(counts)


def _default(scales: ScaleList) -> Schedule:
    start = _PUBLISHED_STARTS.get(scales.sides)
    if start is None:
        start = tuple(cosine(length, _PASSES) for length in scales.lengths if length <= _REFINED_TOKENS)
    return start + tuple((length,) for length in scales.lengths[len(start):])


def _checked(scales: ScaleList, rows: Sequence[Sequence[int]]) -> Schedule:
    try:
        rows = tuple(tuple(row) for row in rows)
    except TypeError:
        raise InputError(f"schedule {rows!r}: a list of lists is wanted, one a scale") from None
    if len(rows) != scales.num_scales:
        raise InputError(f"schedule has {len(rows)} rows, the model {scales.num_scales} scales")
    for k, (row, length, side) in enumerate(zip(rows, scales.lengths, scales.sides)):
        whole = row and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in row)
        if not whole or min(row[1:], default=1) < 1 or row == (0,):
            raise InputError(
                f"schedule of scale {k} ({side}x{side}) is {list(row)}: whole numbers of 1 or more are wanted (the first may be 0)")
        if sum(row) != length:
            raise InputError(f"schedule of scale {k} ({side}x{side}) sums to {sum(row)}, but the scale has {length} tokens")
    return rows
