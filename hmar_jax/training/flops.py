"""Operations of a training step: in closed form, and counted in a traced program with loops multiplied out.

The compiler's own count sees the body of a loop once and a kernel not at all, so it is of no use for scanned blocks.
A multiplication and an addition are two operations; only matrix products and convolutions are counted.

Letters: B pictures, L tokens, C width, N blocks, V codebook, Z channels of the code.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from hmar_jax.models.transformer import TransformerConfig
from hmar_jax.scales import ScaleList


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one picture, forward and backward."""

    matmuls: float
    attention: float  # of the score cells that the mask keeps

    @property
    def total(self) -> float:
        return self.matmuls + self.attention


def score_cells(scales: ScaleList, pattern: str) -> int:
    """Pairs of a query and a key that the mask keeps."""
    return sum(l * (l if pattern == "diagonal" else end) for l, end in zip(scales.lengths, scales.offsets[1:]))


def train_flops(c: TransformerConfig, trained_blocks: int | None = None) -> Flops:
    """What training must compute for one picture, whatever is computed twice to save memory.

    Args:
      trained_blocks: None for stage 1. For stage 2, how many of the last blocks are trained; through the others the
        gradient only passes, on its way to the mask embedding at the input.
    """
    length, width, hidden = c.scale_list.length, c.width, round(c.width * c.mlp_ratio)
    modulation = 0 if c.shared_adaln else 6 * width * width  # a picture
    block = 2 * (length * (4 * width * width + 2 * width * hidden) + modulation)  # forward: qkv and projection, MLP
    cells = 2 * 2 * score_cells(c.scale_list, c.pattern) * width  # scores and sums
    head = 2 * (length * width * c.vocab_size + 2 * width * width)
    words = 2 * (length - c.scale_list.lengths[0]) * c.z_channels * width
    shared = 2 * 6 * width * width if c.shared_adaln else 0
    # Forward, and backward for the input and for the weights; what enters from outside needs no gradient for its input.
    trained = c.depth if trained_blocks is None else trained_blocks
    passed = c.depth - trained
    if trained_blocks is None:
        return Flops(3 * (c.depth * block + head + shared) + 2 * words, 3 * c.depth * cells)
    return Flops(3 * (trained * block + head) + passed * (2 * block - 2 * modulation) + 2 * words + shared, (3 * trained + 3 * passed) * cells)


@dataclasses.dataclass
class Counted:
    """Of all devices together, by how exactly products are computed."""

    bfloat16: float = 0.0  # or another fast way of the device
    float32: float = 0.0  # products that were asked for at the highest precision
    kernels: float = 0.0  # as the kernels' own estimates say; cells under the mask are among them
    moved: float = 0.0  # bytes of the products' operands and results
    residuals: float = 0.0  # bytes of what loops keep of each turn: mostly for the backward pass

    def add(self, other: "Counted", times: float = 1) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))

    @property
    def total(self) -> float:
        return self.bfloat16 + self.float32 + self.kernels


def count(jaxpr: Any) -> Counted:
    """Counts in a jaxpr: turns of scans multiplied, the dearest branch of a condition, shard_map's body on each device.

    A `while` whose number of turns is not known counts once: the training steps have none with products inside.
    """
    total = Counted()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
            total.add(_product(flops, params["precision"]))
            total.moved += _bytes(*eqn.invars, *eqn.outvars)
        elif name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            kernel = eqn.invars[1].aval.shape
            flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            # Zeros between the rows, as in gradients of strided convolutions, are skipped or not; here they are not counted.
            total.add(_product(flops / math.prod(params["lhs_dilation"]), params["precision"]))
            total.moved += _bytes(*eqn.invars, *eqn.outvars)
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total.kernels += estimate.flops if estimate else 0
        elif name == "scan":
            inner = count(params["jaxpr"])
            total.add(inner, params["length"])
            total.residuals += _bytes(*eqn.outvars[params["num_carry"]:])
        elif name == "cond":
            total.add(max((count(branch) for branch in params["branches"]), key=lambda c: c.total))
        else:
            times = params["mesh"].size if name == "shard_map" else 1
            for inner in _inner(params):
                total.add(count(inner), times)
    return total


def _product(flops: float, precision) -> Counted:
    pair = precision if isinstance(precision, tuple) else (precision, precision)
    exact = jax.lax.Precision.HIGHEST in pair
    return Counted(float32=flops) if exact else Counted(bfloat16=flops)


def _bytes(*variables) -> float:
    return float(sum(math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 8) for v in variables))


def _inner(params) -> list:
    values = [v for value in params.values() for v in (value if isinstance(value, (tuple, list)) else [value])]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def parameters(tree) -> int:
    return sum(math.prod(np.shape(x)) for x in jax.tree.leaves(tree))
