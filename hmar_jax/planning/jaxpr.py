"""Counts the operations of a traced program (JAX's jaxpr) and what its loops store.

The compiler's own cost analysis counts the body of a loop once and a kernel not at all, which says
little about scanned blocks. A multiplication and an addition are two operations. Only matrix
products, convolutions and kernels are counted.
"""

import dataclasses
import math
from typing import Any

import jax


@dataclasses.dataclass
class OperationCounts:
    """Operations of all devices together, by precision, and bytes."""

    bfloat16: float = 0.0  # products at the device's default precision
    float32: float = 0.0  # products at the highest precision
    kernels: float = 0.0  # by the kernels' own estimates, which include masked cells
    moved: float = 0.0  # bytes of the products' operands and results
    residuals: float = 0.0  # bytes that loops store per iteration, mostly for the backward pass

    def add(self, other: "OperationCounts", times: float = 1) -> None:
        """Adds other counts, multiplied."""
        for field in dataclasses.fields(self):
            setattr(
                self, field.name, getattr(self, field.name) + times * getattr(other, field.name)
            )

    @property
    def total(self) -> float:
        """All operations."""
        return self.bfloat16 + self.float32 + self.kernels


def count(jaxpr: Any) -> OperationCounts:
    """Counts the operations of a jaxpr.

    The body of a scan counts once per iteration, that of a shard_map once per device, and of a cond
    the most expensive branch. The body of a `while` counts once, because its trip count is unknown;
    no training step has a `while` with products inside.
    """
    total = OperationCounts()
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
            # Gradients of strided convolutions have zeros between the rows. Devices may skip them;
            # they are not counted.
            total.add(_product(flops / math.prod(params["lhs_dilation"]), params["precision"]))
            total.moved += _bytes(*eqn.invars, *eqn.outvars)
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total.kernels += estimate.flops if estimate else 0
        elif name == "scan":
            inner = count(params["jaxpr"])
            total.add(inner, params["length"])
            # The carry has the same shape inside and outside; stacked outputs have one axis more
            # outside.
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


def _product(flops: float, precision) -> OperationCounts:
    """The operations of a product, by its precision."""
    pair = precision if isinstance(precision, tuple) else (precision, precision)
    exact = jax.lax.Precision.HIGHEST in pair
    return OperationCounts(float32=flops) if exact else OperationCounts(bfloat16=flops)


def _bytes(*variables) -> float:
    return float(
        sum(math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 8) for v in variables)
    )


def _inner(params) -> list:
    """The jaxprs among the parameters of an equation."""
    values = [
        v
        for value in params.values()
        for v in (value if isinstance(value, (tuple, list)) else [value])
    ]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
