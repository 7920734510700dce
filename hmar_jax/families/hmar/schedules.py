"""How many tokens of each scale are fixed in each pass: schedules, as data.

HMAR (arXiv 2506.04421, section 3.3): the first entry of a scale is what the next-scale pass fixes, the others are masked
passes. The first scale has the start token for input and no masked passes. A schedule is changed at sampling time; nothing is
trained for one. Letters: K scales with l_k tokens.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from hmar_jax.autoencoders.scales import PUBLISHED_SIDES, ScaleList
from hmar_jax.errors import InputError

Schedule = tuple[tuple[int, ...], ...]  # K rows; row k sums to l_k

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
        first), "cosine:1,2,4,4" (so many passes of each scale), or a list of K lists of counts.

    Raises:
      InputError: an unknown name, another number of scales, a count below 1, or a row that does not sum to its scale's tokens.
    """
    if wanted is None or wanted == "none":
        return tuple((length,) for length in scales.lengths)
    if wanted == "default":
        return _default(scales)
    if isinstance(wanted, str):
        name, _, numbers = wanted.partition(":")
        passes = numbers.split(",")
        if name != "cosine" or not all(n.isdecimal() and int(n) >= 1 for n in passes):
            raise InputError(
                f"schedule {wanted!r}: known are none, default, cosine:N with N passes a scale (or cosine:N,N,… with a number for "
                "each), or a list of lists"
            )
        if len(passes) not in (1, scales.num_scales):
            raise InputError(
                f"schedule {wanted!r} has {len(passes)} numbers, the model {scales.num_scales} scales"
            )
        passes = [int(n) for n in passes] * (scales.num_scales if len(passes) == 1 else 1)
        return _after_first(
            scales, tuple(cosine(length, n) for length, n in zip(scales.lengths[1:], passes[1:]))
        )
    return _checked(scales, wanted)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A schedule as the compiled sampler takes it: numbers, so that another schedule compiles nothing.

    Only which scales have masked passes at all is part of the program.
    """

    refined: tuple[bool, ...]  # (K,) static
    passes: tuple[np.ndarray, ...]  # K scalars: passes of the scale, the next-scale pass included
    left: tuple[
        np.ndarray, ...
    ]  # K times (l_k,): tokens still to be predicted in pass j; 0 beyond the last pass


jax.tree_util.register_dataclass(Plan, ("passes", "left"), ("refined",))


def plan(schedule: Schedule) -> Plan:
    """From counts that `resolve` has checked."""
    left = []
    for row in schedule:
        after = np.zeros(sum(row), np.int32)
        after[: len(row)] = np.cumsum(row[::-1])[::-1]
        left.append(after)
    return Plan(
        tuple(len(row) > 1 for row in schedule),
        tuple(np.int32(len(row)) for row in schedule),
        tuple(left),
    )


def cosine(length: int, passes: int) -> tuple[int, ...]:
    """Counts that sum to `length`: after pass j of n, cos(pi/2 j/n) of the tokens are still masked (MaskGIT,
    arXiv 2202.04200, section 3.3), and at least one token is fixed in each pass."""
    passes = min(passes, length)
    counts, masked = [], length
    for j in range(1, passes + 1):
        after = math.floor(length * math.cos(math.pi / 2 * j / passes)) if j < passes else 0
        after = max(
            min(after, masked - 1), passes - j
        )  # one at least now, and one for each pass to come
        counts.append(masked - after)
        masked = after
    return tuple(counts)


def _default(scales: ScaleList) -> Schedule:
    start = _PUBLISHED_STARTS.get(scales.sides)
    if start is None:
        return _after_first(
            scales,
            tuple(
                cosine(length, _PASSES)
                for length in scales.lengths[1:]
                if length <= _REFINED_TOKENS
            ),
        )
    return _after_first(scales, start[1:])


def _after_first(scales: ScaleList, rows: Schedule) -> Schedule:
    """The rows of the scales after the first; those left out are one pass."""
    return (scales.lengths[:1], *rows, *((length,) for length in scales.lengths[1 + len(rows) :]))


def _checked(scales: ScaleList, rows: Sequence[Sequence[int]]) -> Schedule:
    try:
        rows = tuple(tuple(row) for row in rows)
    except TypeError:
        raise InputError(f"schedule {rows!r}: a list of lists is wanted, one a scale") from None
    if len(rows) != scales.num_scales:
        raise InputError(f"schedule has {len(rows)} rows, the model {scales.num_scales} scales")
    for k, (row, length, side) in enumerate(zip(rows, scales.lengths, scales.sides)):
        if not row or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in row):
            raise InputError(
                f"schedule of scale {k} ({side}x{side}) is {list(row)}: whole numbers of 1 or more are wanted"
            )
        if k == 0 and len(row) > 1:
            raise InputError(
                f"schedule of scale 0 ({side}x{side}) is {list(row)}: the first scale has no masked passes, [{length}] is wanted"
            )
        if sum(row) != length:
            raise InputError(
                f"schedule of scale {k} ({side}x{side}) sums to {sum(row)}, but the scale has {length} tokens"
            )
    return rows
