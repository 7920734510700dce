"""Bytes on a device and between devices: what both kinds of plan are made of."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from hmar_jax.parallel import sharding
from hmar_jax.planning.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over groups of one size, of one device, a step."""

    kind: str
    group: int  # devices
    times: int
    bytes: float  # of the arrays
    sent: float  # bytes that leave the device at least


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device."""

    arguments: float  # parameters, optimizer, batch; the results take their place
    unused: float  # of them: on the device for other programs, such as the decoder
    temporaries: float | None  # None: the compiler gave up before it could say
    peak: float
    available: float


def by_kind(collectives: Iterable[Collective]) -> tuple[Traffic, ...]:
    """Sums over collectives of one kind and group size, the largest first."""
    found: dict[tuple[str, int], list[Collective]] = {}
    for one in collectives:
        found.setdefault((one.kind, one.group), []).append(one)
    traffic = [
        Traffic(
            kind,
            group,
            sum(c.times for c in some),
            float(sum(c.bytes * c.times for c in some)),
            sum(c.sent for c in some),
        )
        for (kind, group), some in found.items()
    ]
    return tuple(sorted(traffic, key=lambda t: -t.sent))


def divided_bytes(tree: Any, rules: sharding.Rules, mesh: Any) -> float:
    """Bytes of one device's part of a tree of shapes."""
    places = jax.tree.leaves(sharding.shardings(tree, rules, mesh))
    pairs = zip(jax.tree.leaves(tree), places, strict=True)
    return float(sum(math.prod(place.shard_shape(x.shape)) * itemsize(x) for x, place in pairs))


def num_elements(tree: Any) -> int:
    """Elements of all arrays of a tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def num_bytes(x: Any) -> float:
    """Bytes of an array, or of its shape."""
    return float(math.prod(x.shape) * itemsize(x))


def itemsize(x: Any) -> int:
    """Bytes of an element; random keys count as 8."""
    return getattr(x.dtype, "itemsize", 8)
