"""Chips by the names that JAX gives to devices."""

import types

import pytest

from hmar_jax.parallel import chips


@pytest.mark.parametrize(
    "device_kind, name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", "a100", 312),
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H100 PCIe", "h100_pcie", 756),
        ("NVIDIA H200", "h200", 989),
        ("NVIDIA GH200 480GB", "gh200", 989),
        ("NVIDIA B200", "b200", 2250),
        ("NVIDIA L4", "l4", 121),
        ("NVIDIA L40S", "l40s", 362),
        ("TPU v2", "v2", 22.5),
        ("TPU v3", "v3", 61.5),
        ("TPU v4", "v4", 275),
        ("TPU v5 lite", "v5e", 197),
        ("TPU v5", "v5p", 459),
        ("TPU v5p", "v5p", 459),
        ("TPU v6 lite", "v6e", 918),
        ("TPU7x", "tpu7x", 1153.5),
    ],
)
def test_chip_of_a_device(device_kind, name, tflops):
    assert chips.find_chip(device_kind).name == name
    device = types.SimpleNamespace(device_kind=device_kind)
    assert chips.peak_flops(device) == tflops * 1e12


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA L40", "NVIDIA A1000", "TPU v9", ""])
def test_unknown_devices(device_kind):
    assert chips.find_chip(device_kind) is None
    assert chips.peak_flops(types.SimpleNamespace(device_kind=device_kind)) is None


def test_every_chip_has_names_and_either_all_planning_numbers_or_none():
    for chip in chips.CHIPS.values():
        assert chip.device_kinds and chip.flops > 0
        numbers = (chip.memory, chip.memory_bandwidth, chip.link_bandwidth)
        assert all(numbers) or not any(numbers)
        if chip.memory:
            assert bool(chip.topologies) == (chip.kind == "tpu")
            assert bool(chip.network_bandwidth) == (chip.kind == "gpu")
