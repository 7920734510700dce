"""Does a training run fit on a pod, and what would a step cost: found out without the pod.

For TPUs the real training step is compiled for the topology by libtpu on the CPU: memory,
collectives and kernels are those of the program that would run. For GPUs, for which nothing can be
compiled here, the same is estimated from shapes (gpu_estimate.py). Times are what the chips'
published figures allow at best (roofline, Williams et al. 2009); nothing is measured.

Letters: B images of a step.
"""

import dataclasses
import functools
import logging
import math
import os
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from hmar_jax.autoencoders.base import AutoencoderSpec
from hmar_jax.data.sources import records_directory
from hmar_jax.errors import InputError
from hmar_jax.experiment import task_kind, task_shapes
from hmar_jax.parallel import sharding
from hmar_jax.parallel.chips import Chip
from hmar_jax.planning import gpu_estimate, hlo, jaxpr
from hmar_jax.planning.memory import MemoryPlan, Traffic, by_kind, divided_bytes, num_elements
from hmar_jax.planning.topology import Topology
from hmar_jax.training import step as training_step
from hmar_jax.training.compiled_steps import compile_steps
from hmar_jax.training.trainable import IMAGENET, Parent

_log = logging.getLogger(__name__)

# Names of the kernels in pallas_kernels/mosaic_tpu.py.
_KERNELS = ("block_attention_forward", "block_attention_d_q", "block_attention_d_kv")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What is known of a training step before it has run.

    `how` says which values are the compiler's and which are estimated.
    """

    config: str
    topology: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    grad_accum_steps: int
    parameters: int  # trained
    frozen_parameters: int
    model_flops: float  # a step, all devices, in closed form; 0 where there is none
    # With what is computed twice, cells under a mask, the frozen autoencoder: counted in the step.
    step_flops: float
    memory: MemoryPlan
    traffic: tuple[Traffic, ...]
    memory_traffic: float | None  # bytes a step to and from a device's memory
    kernels: tuple[str, ...]
    # "compute", "memory", "interconnect" (all links), "interconnect_one_dimension" (of the torus)
    seconds: dict[str, float]
    how: dict[str, str]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.memory.available

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Roofline: all at the same time (no step is faster), and one after another."""
        names = ("compute", "memory", "interconnect")
        parts = [self.seconds[name] for name in names if name in self.seconds]
        return max(parts), sum(parts)

    def to_json(self) -> dict[str, Any]:
        low, high = self.step_seconds
        return dataclasses.asdict(self) | {
            "fits": self.fits,
            "roofline_step_seconds": [low, high],
            "roofline_images_per_second": self.batch_size / low,
        }


@dataclasses.dataclass(frozen=True)
class StepAnalysis:
    """What is found out of a step, by compiling it or from shapes."""

    memory: MemoryPlan
    traffic: tuple[Traffic, ...]
    memory_traffic: float | None  # bytes
    interconnect: float | None  # seconds over all links
    kernels: tuple[str, ...]
    how: dict[str, str]


def prepare_environment() -> None:
    """For compiling with libtpu where there is no TPU. Call it before JAX starts its backends."""
    jax.config.update("jax_platforms", "cpu")
    # Otherwise libtpu looks for the host on the network, and complains.
    for name, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_LOG_DIR", "disabled"),
    ):
        os.environ.setdefault(name, value)


def make_plan(
    config: ConfigDict,
    topology: Topology,
    *,
    name: str = "",
    parent_config: ConfigDict | None = None,
) -> TrainingPlan:
    """Compiles, or for GPUs estimates; takes minutes for large models.

    Args:
      config: of any task; neither data nor parent models need exist yet.
      topology: of topology.parse.
      name: what to call the config.
      parent_config: of the model that a task trains on top of, where the config names none.

    Raises:
      InputError: the mesh does not make the topology's devices, the batch does not divide, libtpu
        is missing, or the config is wrong.
    """
    for key in ("batch_size", "grad_accum_steps"):
        if config.get(key, 1) < 1:
            raise InputError(f"config.{key} must be at least 1; got {config[key]}")
    sizes = sharding.mesh_sizes(**config.mesh, devices=topology.num_devices)
    devices = topology.devices() if topology.chip.kind == "tpu" else None
    axes = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes), sharding.AXES, axis_types=axes)
    grad_accum_steps = config.get("grad_accum_steps", 1)
    sharding.check_batch(mesh, config.batch_size, grad_accum_steps)
    task, frozen, batch, kind = _shapes(config, parent_config)
    task.check_mesh(mesh)
    init = functools.partial(training_step.init_state, task, ema_decay=config.ema_decay)
    state = jax.eval_shape(init, jax.random.key(0), frozen)
    arguments = _argument_bytes(task, mesh, state, frozen, batch)

    if devices:
        real_mesh = sharding.make_mesh(*sizes, devices=devices)
        steps = compile_steps(task, real_mesh, frozen, config.ema_decay)
        traced = steps.train_step.trace(steps.state, steps.frozen, steps.batch(batch), steps.rng)
        counted = jaxpr.count(traced.jaxpr)
        found = _compile(traced, topology, arguments)
    else:
        train = functools.partial(training_step.train_step, task, ema_decay=config.ema_decay)
        rng = jax.random.key(0)  # made here: nothing can be computed on a mesh without devices
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(train).trace(state, frozen, batch, rng)
        counted = jaxpr.count(traced.jaxpr)
        stack = task.layer_stack(state.params, kind)
        if stack is None:
            raise InputError(
                f"{topology.name}: what this task needs on GPUs cannot be estimated, as its "
                "network has no repeated layers; plan it for a TPU, for which it is compiled"
            )
        found = StepAnalysis(
            *gpu_estimate.estimate(task, stack, mesh, topology, state, counted, arguments)
        )
    return TrainingPlan(
        config=name,
        topology=topology.name,
        devices=topology.num_devices,
        mesh=dict(zip(sharding.AXES, sizes)),
        batch_size=config.batch_size,
        grad_accum_steps=grad_accum_steps,
        parameters=num_elements(state.params),
        frozen_parameters=num_elements(frozen),
        model_flops=(task.flops_per_image or 0.0) * config.batch_size,
        step_flops=counted.total,
        memory=found.memory,
        traffic=found.traffic,
        memory_traffic=found.memory_traffic,
        kernels=found.kernels,
        seconds=_seconds(counted, found, topology.chip, topology.num_devices),
        how=found.how,
    )


def _seconds(counted, found: StepAnalysis, chip: Chip, devices: int) -> dict[str, float]:
    flops = counted.bfloat16 + counted.kernels + counted.float32 * chip.float32_passes
    seconds = {"compute": flops / devices / chip.flops}
    if found.memory_traffic is not None:
        seconds["memory"] = found.memory_traffic / chip.memory_bandwidth
        seconds["interconnect"] = found.interconnect
        seconds["interconnect_one_dimension"] = found.interconnect * chip.dimensions
    return seconds


def _shapes(config: ConfigDict, parent_config: ConfigDict | None):
    """Task, frozen parameters, batch and its kind; the parent from the config, else assumed."""
    trainable, kind_of_task = task_kind(config)
    parent, data, key = None, IMAGENET, kind_of_task.parent_key
    if key is not None:
        if config[key]:
            from hmar_jax.loading import load_spec_and_params  # reads parameters

            parent = Parent(config[key], load_spec_and_params(config[key])[0])
        else:
            parent = Parent("", trainable.planning_parent(config, parent_config))
        if not isinstance(parent.spec, AutoencoderSpec):
            data = dataclasses.replace(data, num_classes=parent.spec.num_classes)
    source = config.data.source
    given = source and records_directory(source) is None
    encodes = given and not config.data.get("cached_copies", 0)  # images, inside the step
    kind = "image" if encodes or parent is None else None
    return task_shapes(config, parent, data, kind)


def _argument_bytes(task, mesh, state, frozen, batch) -> float:
    """Bytes of one device: parameters, optimizer, frozen parameters, its images."""
    rules = task.partition_rules
    rows = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values())
    of_batch = rows / sharding.batch_parts(mesh)
    return divided_bytes(state, rules, mesh) + divided_bytes(frozen, rules, mesh) + of_batch


# TPUs


def _compile(traced, topology: Topology, arguments: float) -> StepAnalysis:
    """What libtpu makes of the step."""
    counted = "times the turns of its loops"
    how = {
        "memory": "compiled: libtpu's values for this program",
        "traffic": f"compiled: read from the program, {counted}",
        "memory_traffic": f"compiled: what each instruction reads and writes, {counted}",
    }
    _log.info("compiling for %s: minutes, where the model is large", topology.name)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        needed = out_of_memory(str(e))
        if needed is None:
            raise
        how = {"memory": "the compiler refused the program, and says only how much it would need"}
        return StepAnalysis(MemoryPlan(arguments, 0.0, None, *needed), (), None, None, (), how)
    analysis = compiled.memory_analysis()
    module = hlo.HloModule(compiled.as_text())
    # The compiler leaves out what the step does not use.
    unused = max(0.0, arguments - analysis.argument_size_in_bytes)
    memory = MemoryPlan(
        arguments,
        unused,
        float(analysis.temp_size_in_bytes),
        analysis.peak_memory_in_bytes + unused,
        topology.chip.memory,
    )
    collectives = module.collectives()
    return StepAnalysis(
        memory,
        by_kind(collectives),
        module.memory_bytes(),
        sum(c.sent for c in collectives) / topology.chip.link_bandwidth,
        tuple(k for k in _KERNELS if module.mentions(k)),
        how,
    )


def out_of_memory(message: str) -> tuple[float, float] | None:
    """Bytes needed and available, from the error of a program too large for the chip's memory.

    None for other errors.
    """
    pattern = (
        r"Ran out of memory.*?\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
    )
    numbers = re.search(pattern, message, re.DOTALL)
    if not numbers:
        return None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(numbers[1]) * unit[numbers[2]], float(numbers[3]) * unit[numbers[4]]
