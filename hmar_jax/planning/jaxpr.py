"""Reads a traced program (JAX's jaxpr): operations of its matrix products, and what its loops keep, with loops multiplied out.

The compiler's own count sees the body of a loop once and a kernel not at all, so it is of no use for scanned blocks.
A multiplication and an addition are two operations; only matrix products, convolutions and kernels are counted.
"""

import dataclasses
import math
from typing import Any

import jax


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
            setattr(
                self, field.name, getattr(self, field.name) + times * getattr(other, field.name)
            )

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
            flops = (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
            )
            total.add(_product(flops, params["precision"]))
            total.moved += _bytes(*eqn.invars, *eqn.outvars)
        elif name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            kernel = eqn.invars[1].aval.shape
            flops = (
                2
                * math.prod(eqn.outvars[0].aval.shape)
                * math.prod(kernel)
                // kernel[numbers.rhs_spec[0]]
            )
            # Zeros between the rows, as in gradients of strided convolutions, are skipped or not; here they are not counted.
            total.add(_product(flops / math.prod(params["lhs_dilation"]), params["precision"]))
            total.moved += _bytes(*eqn.invars, *eqn.outvars)
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total.kernels += estimate.flops if estimate else 0
        elif name == "scan":
            inner = count(params["jaxpr"])
            total.add(inner, params["length"])
            # What it carries has the same shape inside and outside; what it stacks has an axis more outside.
            pairs = zip(
                eqn.outvars, getattr(params["jaxpr"], "jaxpr", params["jaxpr"]).outvars, strict=True
            )
            total.residuals += _bytes(
                *(outer for outer, inner in pairs if outer.aval.shape != inner.aval.shape)
            )
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
    return float(
        sum(math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 8) for v in variables)
    )


def _inner(params) -> list:
    values = [
        v
        for value in params.values()
        for v in (value if isinstance(value, (tuple, list)) else [value])
    ]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
