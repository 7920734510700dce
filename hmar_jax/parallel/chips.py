"""Accelerator chips: peak FLOP/s by JAX's device kind, and the numbers that planning needs.

All numbers are the manufacturers'; none is measured here. Sources: Cloud TPU's pages on v2, v3, v4,
v5e, v5p, v6e and TPU7x (docs.cloud.google.com/tpu/docs/v5p and so on), GKE's pages for its labels,
and for the links of v4 arXiv 2304.01433, table 4; NVIDIA's data sheets of A100, H100, H200 and B200
(SXM), H100 PCIe, GH200, L4 and L40S, dense rates, without sparsity; for the network between
machines the data sheets of DGX A100, H100, H200 and B200. The memory of a TPU is what libtpu 0.0.42
lets a program use: less than the manufacturer's number, because the system keeps a part.
"""

import dataclasses

import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them. Rates are per second."""

    name: str
    kind: str  # "tpu" or "gpu"
    flops: float  # of bfloat16 matrix products
    device_kinds: tuple[str, ...]  # jax.Device.device_kind, or its beginning
    # For planning; no run can be planned for a chip without them.
    memory: float = 0.0  # bytes that a program may use
    memory_bandwidth: float = 0.0  # bytes
    link_bandwidth: float = 0.0  # bytes sent by the device over all its links, one direction
    float32_passes: int = 1  # time of an exact float32 matrix product, relative to bfloat16
    dimensions: int = 1  # of the torus; the links of a GPU go through one switch
    network_bandwidth: float = 0.0  # bytes sent by a GPU to other machines
    topologies: tuple[str, ...] = ()  # the shapes in which TPUs are offered
    options: tuple[tuple[str, object], ...] = ()  # for libtpu
    devices_per_chip: int = 1
    gke_label: str = ""  # GKE's name of the chip
    cloud_type: str = ""  # Cloud TPU's accelerator type is CLOUD_TYPE-N
    cores_per_chip: int = 1  # N counts these


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
    # JAX sees each of the two cores as a device; libtpu no longer compiles for them.
    Chip("v2", "tpu", 45e12 / 2, ("TPU v2",)),
    Chip("v3", "tpu", 123e12 / 2, ("TPU v3",)),
    # v4 and v5p: JAX sees the two cores as one device. The pages give twice link_bandwidth, the sum
    # of both directions.
    Chip(
        "v4",
        "tpu",
        275e12,
        ("TPU v4",),
        memory=30.75 * _GIB,
        memory_bandwidth=1.2e12,
        link_bandwidth=300e9,
        float32_passes=6,
        dimensions=3,
        topologies=(*_CUBES[:10], "12x16x16"),
        gke_label="tpu-v4-podslice",
        cloud_type="v4",
        cores_per_chip=2,
        options=(("chip_config_name", "megacore"),),
    ),
    Chip(
        "v5e",
        "tpu",
        197e12,
        ("TPU v5 lite",),
        memory=15.75 * _GIB,
        memory_bandwidth=819e9,
        link_bandwidth=200e9,
        float32_passes=6,
        dimensions=2,
        topologies=_FLAT,
        gke_label="tpu-v5-lite-podslice",
        cloud_type="v5litepod",
    ),
    Chip(
        "v5p",
        "tpu",
        459e12,
        ("TPU v5p", "TPU v5"),
        memory=95.74 * _GIB,
        memory_bandwidth=2765e9,
        link_bandwidth=600e9,
        float32_passes=6,
        dimensions=3,
        topologies=(*_CUBES, "16x16x24"),
        gke_label="tpu-v5p-slice",
        cloud_type="v5p",
        cores_per_chip=2,
    ),
    Chip(
        "v6e",
        "tpu",
        918e12,
        ("TPU v6 lite",),
        memory=31.25 * _GIB,
        memory_bandwidth=1638e9,
        link_bandwidth=400e9,
        float32_passes=6,
        dimensions=2,
        topologies=_FLAT,
        gke_label="tpu-v6e-slice",
        cloud_type="v6e",
    ),
    # JAX sees each of the two halves of a chip as a device.
    Chip(
        "tpu7x",
        "tpu",
        2307e12 / 2,
        ("TPU7x",),
        memory=94.75 * _GIB,
        memory_bandwidth=7380e9 / 2,
        link_bandwidth=600e9 / 2,
        float32_passes=6,
        dimensions=3,
        topologies=_CUBES[:-1],
        gke_label="tpu7x",
        cloud_type="tpu7x",
        cores_per_chip=2,
        devices_per_chip=2,
    ),
    # A GPU computes an exact float32 product without its tensor cores. 0.92 of the memory is what
    # launch/gpus.sh lets JAX use.
    Chip(
        "a100",
        "gpu",
        312e12,
        ("NVIDIA A100",),
        memory=0.92 * 80e9,
        memory_bandwidth=2039e9,
        link_bandwidth=300e9,
        float32_passes=16,
        network_bandwidth=25e9,
    ),
    Chip(
        "h100",
        "gpu",
        989e12,
        ("NVIDIA H100",),
        memory=0.92 * 80e9,
        memory_bandwidth=3350e9,
        link_bandwidth=450e9,
        float32_passes=15,
        network_bandwidth=50e9,
    ),
    Chip(
        "h200",
        "gpu",
        989e12,
        ("NVIDIA H200",),
        memory=0.92 * 141e9,
        memory_bandwidth=4800e9,
        link_bandwidth=450e9,
        float32_passes=15,
        network_bandwidth=50e9,
    ),
    Chip(
        "b200",
        "gpu",
        2250e12,
        ("NVIDIA B200",),
        memory=0.92 * 180e9,
        memory_bandwidth=7700e9,
        link_bandwidth=900e9,
        float32_passes=30,
        network_bandwidth=50e9,
    ),
    Chip("h100_pcie", "gpu", 756e12, ("NVIDIA H100 PCIe",)),
    Chip("gh200", "gpu", 989e12, ("NVIDIA GH200",)),
    Chip("l4", "gpu", 121e12, ("NVIDIA L4",)),
    Chip("l40s", "gpu", 362e12, ("NVIDIA L40S",)),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a jax.Device.device_kind such as "NVIDIA A100-SXM4-80GB"; None if it is unknown.

    Of several names that the device kind begins with, the longest applies.
    """
    matches = [
        (len(name), chip)
        for chip in CHIPS.values()
        for name in chip.device_kinds
        if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))
    ]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device, None if it is unknown."""
    chip = find_chip(device.device_kind)
    return chip.flops if chip is not None else None
