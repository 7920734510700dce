"""Chips that one can plan for, and the shapes in which they come: figures of their makers, none of them measured here.

Sources: Cloud TPU's pages on v4, v5e, v5p, v6e and TPU7x (docs.cloud.google.com/tpu/docs/v5p and so on), for v4's links TPU
v4's paper (arXiv 2304.01433, table 4); NVIDIA's data sheets of A100, H100, H200 and B200 (SXM), dense figures, without
sparsity; for the network between machines those of DGX A100, H100, H200 and B200. TPU memory is what libtpu 0.0.42 tells that programs may use; it is
less than what the maker names, for the system keeps a part.
"""

import dataclasses
import math
import re

from hmar_jax.errors import InputError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them. Rates a second."""

    name: str
    kind: str  # "tpu" or "gpu"
    flops: float  # of bfloat16 matrix products
    memory: float  # bytes that a program may use
    memory_bandwidth: float  # bytes
    link_bandwidth: float  # bytes out of the device over all of its links, one direction
    float32_passes: (
        int  # how many times longer an exact float32 matrix product takes than one of bfloat16
    )
    dimensions: int = 1  # of the torus; a GPU's links go through one switch
    network_bandwidth: float = 0.0  # bytes out of a GPU to other machines
    topologies: tuple[str, ...] = ()  # the shapes in which TPUs are lent
    options: tuple[tuple[str, object], ...] = ()  # for libtpu
    devices_a_chip: int = 1


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
)

_CHIPS = (
    # v4 and v5p: two cores that JAX sees as one device. Docs give twice link_bandwidth, both directions together.
    Chip(
        "v4",
        "tpu",
        275e12,
        30.75 * _GIB,
        1.2e12,
        300e9,
        6,
        3,
        topologies=(*_CUBES[:10], "12x16x16"),
        options=(("chip_config_name", "megacore"),),
    ),
    Chip("v5e", "tpu", 197e12, 15.75 * _GIB, 819e9, 200e9, 6, 2, topologies=_FLAT),
    Chip("v5p", "tpu", 459e12, 95.74 * _GIB, 2765e9, 600e9, 6, 3, topologies=(*_CUBES, "16x16x24")),
    Chip("v6e", "tpu", 918e12, 31.25 * _GIB, 1638e9, 400e9, 6, 2, topologies=_FLAT),
    # JAX sees each of the two halves of a chip as a device.
    Chip(
        "tpu7x",
        "tpu",
        2307e12 / 2,
        94.75 * _GIB,
        7380e9 / 2,
        600e9 / 2,
        6,
        3,
        topologies=_CUBES[:-1],
        devices_a_chip=2,
    ),
    # A GPU gives an exact float32 product to its plain units. 0.92 of the memory is what launch/gpus.sh lets JAX take.
    Chip("a100", "gpu", 312e12, 0.92 * 80e9, 2039e9, 300e9, 16, network_bandwidth=25e9),
    Chip("h100", "gpu", 989e12, 0.92 * 80e9, 3350e9, 450e9, 15, network_bandwidth=50e9),
    Chip("h200", "gpu", 989e12, 0.92 * 141e9, 4800e9, 450e9, 15, network_bandwidth=50e9),
    Chip("b200", "gpu", 2250e12, 0.92 * 180e9, 7700e9, 900e9, 30, network_bandwidth=50e9),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips, and how they are joined."""

    name: str  # "v5p:4x4x4", "h100:8", "h100:4x8" (machines x GPUs)
    chip: Chip
    sides: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        return math.prod(self.sides) * self.chip.devices_a_chip

    def bandwidth(self, reach: int) -> float:
        """Bytes a second out of a device to others among so many neighbours: between GPU machines the network is narrow."""
        return (
            self.chip.network_bandwidth
            if self.chip.kind == "gpu" and reach > self.sides[-1]
            else self.chip.link_bandwidth
        )

    def devices(self) -> list:
        """Of a TPU, for compilation only. Needs libtpu.

        Raises:
          InputError: libtpu is not installed.
        """
        from jax.experimental import topologies

        try:
            import libtpu  # noqa: F401
        except ImportError:
            raise InputError(
                'planning for a TPU compiles with libtpu, which is not installed: pip install "hmar_jax[tpu]"'
            ) from None
        options = dict(self.chip.options)
        if self.sides == (1, 1):
            options["chips_per_host_bounds"] = [1, 1, 1]
        name = f"{self.chip.name}:{'x'.join(map(str, self.sides))}"
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
        )


def parse(text: str) -> Topology:
    """From "v5p:4x4x4" or "h100:8".

    Raises:
      InputError: there is no such chip or shape; the message lists those that there are.
    """
    name, _, shape = text.lower().partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        raise InputError(
            f"topology {text!r}: there is no such chip; there are {'; '.join(map(_shapes, _CHIPS))}"
        )
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", shape) or not _exists(chip, shape):
        others = ", ".join(other for other in CHIPS if other != name)
        raise InputError(
            f"topology {text!r}: there is none; there are {_shapes(chip)} (and others of {others})"
        )
    sides = tuple(map(int, shape.split("x")))
    return Topology(
        f"{name}:{shape}", chip, sides if chip.kind == "tpu" or len(sides) == 2 else (1, *sides)
    )


def _exists(chip: Chip, shape: str) -> bool:
    if chip.kind == "tpu":
        return shape in chip.topologies
    return len(shape.split("x")) < 3 and int(shape.split("x")[-1]) <= 8


def _shapes(chip: Chip) -> str:
    """In words."""
    return (
        f"{chip.name}: {' '.join(chip.topologies)}"
        if chip.topologies
        else f"{chip.name}: 1 to 8, MACHINESx1 to MACHINESx8"
    )
