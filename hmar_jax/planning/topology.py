"""Topologies: a number of chips and how they are connected, such as "v5p:4x4x4" or "h100:8"."""

import dataclasses
import math
import re

from hmar_jax.errors import InputError
from hmar_jax.parallel.chips import CHIPS, Chip

# The chips that a run can be planned for.
PLANNED_CHIPS = {name: chip for name, chip in CHIPS.items() if chip.memory}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and their arrangement."""

    name: str  # "v5p:4x4x4", "h100:8", "h100:4x8" (machines x GPUs)
    chip: Chip
    sides: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Devices as JAX counts them."""
        return math.prod(self.sides) * self.chip.devices_per_chip

    def bandwidth(self, reach: int) -> float:
        """Bytes per second that a device sends to others of a group.

        Args:
          reach: number of neighbouring devices that the group extends over. Between machines with
            GPUs, the network is the bottleneck.
        """
        if self.chip.kind == "gpu" and reach > self.sides[-1]:
            return self.chip.network_bandwidth
        return self.chip.link_bandwidth

    def devices(self) -> list:
        """Devices of a TPU topology, for compilation only. Needs libtpu.

        Raises:
          InputError: libtpu is not installed.
        """
        from jax.experimental import topologies

        try:
            import libtpu  # noqa: F401
        except ImportError:
            raise InputError(
                "planning for a TPU compiles with libtpu, which is not installed: "
                'pip install "hmar_jax[tpu]"'
            ) from None
        options = dict(self.chip.options)
        if self.sides == (1, 1):
            options["chips_per_host_bounds"] = [1, 1, 1]
        name = f"{self.chip.name}:{'x'.join(map(str, self.sides))}"
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
        )


def parse(text: str) -> Topology:
    """The topology of a name such as "v5p:4x4x4" or "h100:8".

    Raises:
      InputError: there is no such chip or shape; the message lists the known ones.
    """
    name, _, shape = text.lower().partition(":")
    chip = PLANNED_CHIPS.get(name)
    if chip is None:
        known = "; ".join(map(_describe_shapes, PLANNED_CHIPS.values()))
        raise InputError(f"topology {text!r}: unknown chip; known: {known}")
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", shape) or not _exists(chip, shape):
        others = ", ".join(other for other in PLANNED_CHIPS if other != name)
        raise InputError(
            f"topology {text!r}: unknown shape; known: {_describe_shapes(chip)} "
            f"(other chips: {others})"
        )
    sides = tuple(map(int, shape.split("x")))
    if chip.kind == "gpu" and len(sides) == 1:
        sides = (1, *sides)
    return Topology(f"{name}:{shape}", chip, sides)


def _exists(chip: Chip, shape: str) -> bool:
    if chip.kind == "tpu":
        return shape in chip.topologies
    return len(shape.split("x")) < 3 and int(shape.split("x")[-1]) <= 8


def _describe_shapes(chip: Chip) -> str:
    """A chip and its shapes, for messages."""
    shapes = " ".join(chip.topologies) or "1 to 8, MACHINESx1 to MACHINESx8"
    return f"{chip.name}: {shapes}"
