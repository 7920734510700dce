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

    A TPU slice has several names: "v5p:4x4x4", "v5p:64" (chips), Cloud TPU's "v5p-128" (cores) and
    GKE's label with its topology, "tpu-v5p-slice:4x4x4". launch/slices.sh knows the same.

    Raises:
      InputError: there is no such chip or shape; the message lists the known ones.
    """
    name, _, size = text.lower().rpartition(":" if ":" in text else "-")
    chip = next((chip for chip in PLANNED_CHIPS.values() if name in _names(chip)), None)
    if chip is None and text.lower() in PLANNED_CHIPS:
        chip, size = PLANNED_CHIPS[text.lower()], ""
    if chip is None:
        known = "; ".join(map(_describe_shapes, PLANNED_CHIPS.values()))
        raise InputError(f"topology {text!r}: unknown chip; known: {known}")
    if chip.kind == "gpu":
        known_shape = ":" in text and re.fullmatch(r"([1-9]\d{0,3}x)?[1-8]", size)
        shape = size if known_shape else None
    else:
        shape = _tpu_shape(chip, size, chips=":" in text)
    if shape is None:
        others = ", ".join(other for other in PLANNED_CHIPS if other != chip.name)
        raise InputError(
            f"topology {text!r}: unknown shape; known: {_describe_shapes(chip)} "
            f"(other chips: {others})"
        )
    sides = tuple(map(int, shape.split("x")))
    if chip.kind == "gpu" and len(sides) == 1:
        sides = (1, *sides)
    return Topology(f"{chip.name}:{shape}", chip, sides)


def _names(chip: Chip) -> set[str]:
    return {chip.name, chip.gke_label, chip.cloud_type} - {""}


def _tpu_shape(chip: Chip, size: str, chips: bool) -> str | None:
    """The shape that `size` names: itself, or a number of chips, or of cores."""
    if chips and (size in chip.topologies or _is_cube(chip, size)):
        return size
    per_chip = 1 if chips else chip.cores_per_chip
    numbers = {str(_num_chips(shape) * per_chip): shape for shape in chip.topologies}
    return numbers.get(size)


def _num_chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _is_cube(chip: Chip, shape: str) -> bool:
    """Whether a shape consists of whole cubes of 4x4x4 chips, which are offered in many shapes."""
    if chip.dimensions != 3 or not re.fullmatch(r"[1-9]\d?(x[1-9]\d?){2}", shape):
        return False
    sides = list(map(int, shape.split("x")))
    largest = map(int, chip.topologies[-1].split("x"))
    ascending = sides == sorted(sides)
    return ascending and all(s % 4 == 0 and s <= most for s, most in zip(sides, largest))


def _describe_shapes(chip: Chip) -> str:
    """A chip and its shapes, for messages."""
    if chip.kind == "gpu":
        return f"{chip.name}: 1 to 8, MACHINESx1 to MACHINESx8"
    cubes = " or larger cubes" if chip.dimensions == 3 else ""
    count = "chips" if chip.cores_per_chip == 1 else "cores"
    return (
        f"{chip.name}: {' '.join(chip.topologies)}{cubes} ({chip.name}:CHIPS, "
        f"{chip.cloud_type}-{count.upper()}, {chip.gke_label}:SHAPE)"
    )
