"""Scale lists: the sides of the token grids, and everything that follows from them alone.

HMAR (arXiv 2506.04421) and VAR (arXiv 2404.02905) describe an image by K grids of tokens, from
1x1 up to SxS. Offsets, level ids, resize matrices and the residual convolution of each scale
depend on the list of sides only. They are plain Python and numpy here, computed once and constant
under jit.

Letters: K scales with sides s_0 < ... < s_{K-1}; l_k = s_k^2 tokens; L = sum of l_k; S = s_{K-1}.
"""

import dataclasses
import functools
import math

import numpy as np

from hmar_jax.errors import InputError

# The published lists, by the side in pixels of the images they are for (16 pixels a token).
PUBLISHED_SIDES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}

_BICUBIC_A = (
    -0.75
)  # cubic kernel of torch's interpolate, with which the published models were trained


@dataclasses.dataclass(frozen=True)
class ScaleList:
    """An increasing list of grid sides.

    Raises:
      InputError: the sides are not increasing positive integers.
    """

    sides: tuple[int, ...]

    def __post_init__(self):
        try:
            sides = tuple(int(s) for s in self.sides)
        except (TypeError, ValueError):
            raise InputError(
                f"scales must be a list of sides such as 1,2,3,4; got {self.sides!r}"
            ) from None
        object.__setattr__(self, "sides", sides)
        increasing = all(a < b for a, b in zip(sides, sides[1:]))
        if not sides or sides[0] < 1 or not increasing:
            given = ",".join(map(str, sides)) or "no sides"
            raise InputError(f"scales must be increasing and start at 1 or more; got {given}")

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.sides)

    @property
    def side(self) -> int:
        """S, the side of the finest grid."""
        return self.sides[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """l_k = s_k^2, the number of tokens of each scale."""
        return tuple(s * s for s in self.sides)

    @property
    def length(self) -> int:
        """L, the number of tokens of all scales."""
        return sum(self.lengths)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each scale begins in a sequence of L tokens; K + 1 numbers, the last one is L."""
        return tuple(int(o) for o in np.cumsum((0,) + self.lengths))

    def slice(self, k: int) -> slice:
        """The positions of scale k in a sequence of L tokens."""
        return slice(self.offsets[k], self.offsets[k + 1])

    def ratio(self, k: int) -> float:
        """k / (K - 1): 0 at the first scale and 1 at the last; 0 if there is one scale only."""
        return k / max(self.num_scales - 1, 1)

    @functools.cached_property
    def level_ids(self) -> np.ndarray:
        """(L,) int32: the scale of each position."""
        return np.repeat(np.arange(self.num_scales), self.lengths).astype(np.int32)

    def downsample_matrix(self, k: int) -> np.ndarray:
        """(s_k, S) float32: adaptive average pooling of one axis from S to s_k."""
        return area_matrix(self.side, self.sides[k])

    def upsample_matrix(self, k: int) -> np.ndarray:
        """(S, s_k) float32: bicubic interpolation of one axis from s_k to S."""
        return bicubic_matrix(self.sides[k], self.side)

    def phi_index(self, k: int, num_phi: int) -> int:
        """The residual convolution that scale k uses.

        VAR shares `num_phi` convolutions among the scales: scale k uses the one whose tick is
        nearest to k / (K - 1), where the ticks are evenly spread over [0, 1]. The first minimum
        in float64 wins; with five scales and four convolutions the rounding decides.

        Args:
          num_phi: number of shared convolutions; 0: each scale has its own.
        """
        if num_phi == 0:
            return k
        if num_phi == 1:
            return 0
        edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
        ticks = np.linspace(edge, 1 - edge, num_phi)
        return int(np.argmin(np.abs(ticks - self.ratio(k))))

    @classmethod
    def parse(cls, text: str) -> "ScaleList":
        """A scale list from text such as "1,2,3,4"."""
        return cls(tuple(text.split(",")))


def find_published_list(num_scales: int, length: int) -> ScaleList | None:
    """The published list with this K and L, or None."""
    for sides in PUBLISHED_SIDES.values():
        scales = ScaleList(sides)
        if (scales.num_scales, scales.length) == (num_scales, length):
            return scales
    return None


@functools.cache
def area_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float32: adaptive average pooling of one axis.

    Output i is the mean of the inputs in [floor(i source/target), ceil((i+1) source/target)).
    """
    matrix = np.zeros((target, source))
    for i in range(target):
        start, stop = (i * source) // target, -((-(i + 1) * source) // target)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix.astype(np.float32)


@functools.cache
def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float32: cubic convolution of one axis.

    As in torch's interpolate: a = -0.75, half-pixel centres, clamped edges, no antialiasing.
    """
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        first = math.floor(centre) - 1
        for tap in range(first, first + 4):
            matrix[i, min(max(tap, 0), source - 1)] += _cubic(centre - tap)
    return matrix.astype(np.float32)


def _cubic(x: float) -> float:
    """Keys' cubic convolution kernel at distance x (IEEE Trans. ASSP 29, 1981, equation 4)."""
    a, x = _BICUBIC_A, abs(x)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return 0.0
