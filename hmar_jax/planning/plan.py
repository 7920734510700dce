"""Does a training run fit on a pod, and what would a step cost: found out without the pod.

For TPUs the real training step is compiled for the topology by libtpu on the CPU: memory, collectives and kernels are
those of the program that would run. For GPUs, for which nothing can be compiled here, the same is estimated from shapes.
Times are what the chips' figures allow at best (roofline, Williams et al. 2009); nothing is measured.

Letters: B images of a step, L tokens, N blocks, C width.
"""

import dataclasses
import functools
import logging
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from hmar_jax import config_files
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import tasks
from hmar_jax.parallel import sharding
from hmar_jax.planning import chips, hlo, jaxpr
from hmar_jax.training import compiled_steps
from hmar_jax.training import state as run_state

_log = logging.getLogger(__name__)

_KERNELS = (
    "block_attention_forward",
    "block_attention_d_q",
    "block_attention_d_kv",
)  # of pallas_kernels/mosaic_tpu.py


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over groups of one size, of one device, a step."""

    kind: str
    group: int  # devices
    times: int
    bytes: float  # of the arrays
    sent: float  # bytes that leave the device at least


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    arguments: float  # parameters, optimizer, batch; what comes out takes their place
    unused: float  # of them: on the device for other programs, such as the tokenizer's decoder
    temporaries: float | None  # None: the compiler gave up before it could say
    peak: float
    available: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a training step before it has run. `how` says which figures are the compiler's and which estimated."""

    config: str
    topology: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    parameters: int  # trained
    frozen_parameters: int
    model_flops: float  # a step, all devices, in closed form; 0 where there is none (tokenizers)
    step_flops: float  # with what is computed twice, cells under a mask, the frozen tokenizer: counted in the traced step
    memory: Memory
    traffic: tuple[Traffic, ...]
    memory_traffic: float | None  # bytes a step to and from a device's memory
    kernels: tuple[str, ...]
    seconds: dict[
        str, float
    ]  # "compute", "memory", "interconnect" (all links), "interconnect_one_dimension" (of the torus)
    how: dict[str, str]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.memory.available

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Roofline: all at the same time, and one after another. No step is faster than the first."""
        parts = [
            self.seconds[name]
            for name in ("compute", "memory", "interconnect")
            if name in self.seconds
        ]
        return max(parts), sum(parts)

    def to_json(self) -> dict[str, Any]:
        low, high = self.step_seconds
        return dataclasses.asdict(self) | {
            "fits": self.fits,
            "roofline_step_seconds": [low, high],
            "roofline_images_per_second": self.batch_size / low,
        }


def prepare_environment() -> None:
    """For compiling with libtpu where there is no TPU. Call it before JAX starts its backends."""
    jax.config.update("jax_platforms", "cpu")
    for name, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_LOG_DIR", "disabled"),
    ):  # else libtpu looks for the host on the network, and complains
        os.environ.setdefault(name, value)


def make_plan(
    config: ConfigDict,
    topology: chips.Topology,
    *,
    name: str = "",
    stage1: ConfigDict | None = None,
) -> Plan:
    """Compiles, or for GPUs estimates; minutes for large models.

    Args:
      config: of a tokenizer or a stage of the transformer; neither data nor tokenizer need exist yet.
      topology: of chips.parse.
      name: what to call the config.
      stage1: the config of the stage 1 under a stage 2 for which init_from is empty.

    Raises:
      InputError: the mesh does not make the topology's devices, the batch does not divide, libtpu is missing, or the
        config is wrong.
    """
    for key in ("batch_size", "accumulate"):
        if config.get(key, 1) < 1:
            raise InputError(f"config.{key}={config[key]}: 1 or more is wanted")
    sizes = sharding.mesh_sizes(**config.mesh, devices=topology.num_devices)
    devices = topology.devices() if topology.chip.kind == "tpu" else None
    mesh = AbstractMesh(tuple(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    accumulate = config.get("accumulate", 1)
    sharding.check_batch(mesh, config.batch_size, accumulate)
    if config.task == "tokenizer" and topology.chip.kind == "gpu":
        raise InputError(
            f"{topology.name}: what a tokenizer needs on GPUs is not estimated; compile it for a TPU, or plan a transformer"
        )
    task, extra, batch = _shapes(config, stage1)
    state = jax.eval_shape(
        functools.partial(run_state.init, task, ema_decay=config.ema_decay),
        jax.random.key(0),
        *extra,
    )

    if devices:
        step = compiled_steps.build(
            task, sharding.make_mesh(*sizes, devices=devices), extra, config.ema_decay
        )
        traced = step.train_step.trace(step.state, step.batch(batch), step.rng, *step.extra)
        counted = jaxpr.count(traced.jaxpr)
        found = _compiled(traced, topology, _arguments(task, mesh, state, extra, batch))
    else:
        rng = jax.random.key(0)  # made here: nothing can be computed on a mesh without devices
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(task.train_step).trace(state, batch, rng, *extra)
        counted = jaxpr.count(traced.jaxpr)
        found = _estimated(config, task, mesh, topology, state, extra, batch, counted)
    memory, traffic, memory_traffic, interconnect, kernels, how = found

    chip, n = topology.chip, topology.num_devices
    seconds = {
        "compute": (counted.bfloat16 + counted.kernels + counted.float32 * chip.float32_passes)
        / n
        / chip.flops
    }
    if memory_traffic is not None:
        seconds["memory"] = memory_traffic / chip.memory_bandwidth
        seconds |= {
            "interconnect": interconnect,
            "interconnect_one_dimension": interconnect * chip.dimensions,
        }
    return Plan(
        config=name,
        topology=topology.name,
        devices=n,
        mesh=dict(zip(sharding.AXES, sizes)),
        batch_size=config.batch_size,
        accumulate=accumulate,
        parameters=_count(state.params),
        frozen_parameters=_count(extra),
        model_flops=(task.flops_per_image or 0.0) * config.batch_size,
        step_flops=counted.total,
        memory=memory,
        traffic=traffic,
        memory_traffic=memory_traffic,
        kernels=kernels,
        seconds=seconds,
        how=how,
    )


def _shapes(config: ConfigDict, stage1: ConfigDict | None) -> tasks.Shapes:
    """The task; its tokenizer and stage 1 from where the config says, else the published ones."""
    tokenizer = below = None
    if config.get("tokenizer") or config.get("init_from"):
        from hmar_jax.pipeline import (
            load_spec_and_params,
        )  # not needed otherwise, and it reads parameters

        spec, _ = load_spec_and_params(config.get("tokenizer") or config.init_from)
        tokenizer, below = spec.tokenizer, spec.transformer
    more = {"num_classes": below.num_classes} if below is not None else {}
    if config.task == "masked" and below is None:
        if stage1 is None:
            raise InputError(
                "config.init_from is empty: give --config.init_from=RUN, or a config NAME,stage=masked whose NAME is its stage 1"
            )
        below = tasks.shapes(stage1, tokenizer=tokenizer).task.transformer
    shapes = tasks.shapes(config, tokenizer=tokenizer, stage1=below, **more)
    source = config.data.source
    if (
        "tokens" in shapes.batch
        and source
        and not source.startswith("tokens:")
        and not config.data.get("cached_copies")
    ):
        side = shapes.task.tokenizer.image_side  # images, which the step encodes
        shapes.batch["image"] = jax.ShapeDtypeStruct((config.batch_size, side, side, 3), jnp.uint8)
        del shapes.batch["tokens"]
    return shapes


# TPUs


def _compiled(traced, topology: chips.Topology, arguments: float):
    """What libtpu makes of the step."""
    how = {
        "memory": "compiled: libtpu's figures for this program",
        "traffic": "compiled: read from the program, times the turns of its loops",
        "memory_traffic": "compiled: what each instruction reads and writes, times the turns of its loops",
    }
    _log.info("compiling for %s: minutes, where the model is large", topology.name)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        needed = out_of_memory(str(e))
        if needed is None:
            raise
        how = {
            "memory": "the compiler refused the program, and says only how much it would have needed"
        }
        return Memory(arguments, 0.0, None, *needed), (), None, None, (), how
    analysis = compiled.memory_analysis()
    module = hlo.Program(compiled.as_text())
    unused = max(
        0.0, arguments - analysis.argument_size_in_bytes
    )  # the compiler leaves out what the step does not use
    memory = Memory(
        arguments,
        unused,
        float(analysis.temp_size_in_bytes),
        analysis.peak_memory_in_bytes + unused,
        topology.chip.memory,
    )
    collectives = module.collectives()
    interconnect = sum(c.sent for c in collectives) / topology.chip.link_bandwidth
    return (
        memory,
        _by_kind(collectives),
        module.memory_bytes(),
        interconnect,
        tuple(k for k in _KERNELS if module.mentions(k)),
        how,
    )


def out_of_memory(message: str) -> tuple[float, float] | None:
    """Bytes needed and available, from the error of a program that does not fit into the chip's memory; None of others."""
    numbers = re.search(
        r"Ran out of memory.*?\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
        message,
        re.DOTALL,
    )
    if not numbers:
        return None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(numbers[1]) * unit[numbers[2]], float(numbers[3]) * unit[numbers[4]]


def _by_kind(collectives) -> tuple[Traffic, ...]:
    found: dict = {}
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


# GPUs


def _estimated(
    config, task, mesh, topology: chips.Topology, state, extra, batch, counted: jaxpr.Counted
):
    """From shapes: arguments exactly, the rest roughly."""
    rules = task.partition_rules
    itemsize = jnp.dtype(config.model.dtype).itemsize
    turns, parts = config.get("accumulate", 1), sharding.batch_parts(mesh)
    params = _divided(state.params, rules, mesh)
    arguments = _arguments(task, mesh, state, extra, batch)
    # Gradients; what the loops keep for the backward pass, less the stacked gradients that they also make; weights of two
    # blocks gathered; logits with their gradient and the probabilities between.
    blocks = jax.tree.leaves(state.params["blocks"])
    stacked, depth = sum(map(_bytes, blocks)), blocks[0].shape[0]
    kept = max(0.0, counted.residuals / turns - stacked) / parts
    gathered = 2 * stacked / depth / mesh.shape["tensor"] * (1 + itemsize / 4)
    logits = (
        3
        * 4
        * task.transformer.scale_list.length
        * task.transformer.vocab_size
        * config.batch_size
        / parts
        / turns
    )
    temporaries = params + gathered + max(kept + logits, _encoding(task, batch) / parts / turns)
    memory = Memory(arguments, 0.0, temporaries, arguments + temporaries, topology.chip.memory)

    count, tensor, fsdp, data = (
        _count(state.params),
        mesh.shape["tensor"],
        mesh.shape["fsdp"],
        mesh.shape["data"],
    )
    whole = itemsize * count / tensor
    model = task.transformer
    activations = (
        itemsize * config.batch_size // parts // turns * model.scale_list.length * model.width
    )
    collectives = [
        (one, reach)
        for one, reach in (  # and how many neighbouring devices a group reaches over
            (hlo.Collective("all-gather", int(whole), fsdp, 2 * turns), tensor * fsdp),
            (hlo.Collective("reduce-scatter", int(whole), fsdp, turns), tensor * fsdp),
            (hlo.Collective("all-reduce", int(whole / fsdp), data, turns), tensor * fsdp * data),
            (hlo.Collective("all-reduce", activations, tensor, 4 * model.depth * turns), tensor),
        )
        if one.group > 1
    ]
    interconnect = sum(one.sent / topology.bandwidth(reach) for one, reach in collectives)
    # Operands and results of matrix products, what is kept written and read, and AdamW's four reads and three writes.
    moved = counted.moved / topology.num_devices + 2 * kept * turns + 7 * params
    how = {
        "memory": "estimate from shapes; arguments exactly, temporaries roughly",
        "traffic": "estimate from shapes",
        "memory_traffic": "estimate from shapes: matrix products, what is kept for the backward pass, the optimizer; not what lies between",
    }
    return memory, _by_kind(one for one, _ in collectives), moved, interconnect, (), how


def _encoding(task, batch) -> float:
    """Bytes while images are made into tokens, which is over before blocks begin: a residual block's widest arrays."""
    if "image" not in batch:
        return 0.0
    tokenizer, (images, height, width, _) = task.tokenizer, batch["image"].shape
    return (
        3.0
        * images
        * height
        * width
        * tokenizer.channels
        / tokenizer.patch_size**2
        * jnp.dtype(tokenizer.dtype).itemsize
    )


def _arguments(task, mesh, state, extra, batch) -> float:
    """Bytes of one device: parameters, optimizer, what is frozen, its images."""
    rules = task.partition_rules
    return (
        _divided(state, rules, mesh)
        + _divided(extra, rules, mesh)
        + sum(_bytes(x) for x in batch.values()) / sharding.batch_parts(mesh)
    )


def _divided(tree, rules, mesh) -> float:
    """Bytes of one device."""
    places = sharding.shardings(tree, rules, mesh)
    return float(
        sum(
            math.prod(place.shard_shape(x.shape)) * _itemsize(x.dtype)
            for x, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
        )
    )


def _count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes(x) -> float:
    return float(math.prod(x.shape) * _itemsize(x.dtype))


def _itemsize(dtype) -> int:
    return getattr(dtype, "itemsize", 8)


# In words


def report(plan: Plan) -> str:
    """For people."""
    n, memory = plan.devices, plan.memory
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items())
    parts = f", {plan.accumulate} parts one after another" if plan.accumulate > 1 else ""
    low, high = plan.step_seconds
    compiled = plan.how["memory"].startswith("compiled")
    lines = [
        (
            "plan",
            f"{plan.config} on {plan.topology}, {n} devices, mesh {mesh}; batch {plan.batch_size}{parts}",
        ),
        (
            "",
            "nothing here is measured: "
            + ("compiled for the topology, not run" if compiled else plan.how["memory"]),
        ),
        ("parameters", f"{plan.parameters:,} trained, {plan.frozen_parameters:,} frozen"),
        (
            "FLOPs a step",
            (f"{_si(plan.model_flops)}FLOP by formula; " if plan.model_flops else "")
            + f"{_si(plan.step_flops)}FLOP in the traced step, with what is computed twice",
        ),
        (
            "attention",
            f"Pallas kernels inside: {', '.join(plan.kernels)}"
            if plan.kernels
            else "no Pallas kernel in the program",
        )
        if compiled
        else ("", ""),
        (
            "bytes a device",
            f"arguments {_gib(memory.arguments)}"
            + (f" ({_gib(memory.unused)} not used by the step)" if memory.unused else "")
            + ("" if memory.temporaries is None else f", temporaries {_gib(memory.temporaries)}")
            + f", peak {_gib(memory.peak)} of {_gib(memory.available)}",
        ),
    ]
    shown = [t for t in plan.traffic if t.sent >= 1e-3 * plan.traffic[0].sent]
    for i, t in enumerate(shown):
        lines.append(
            (
                "collectives" if i == 0 else "",
                f"{t.kind} among {t.group}: {t.times} times, {_gib(t.bytes)} in all, {_gib(t.sent)} sent",
            )
        )
    if len(shown) < len(plan.traffic):
        lines.append(("", f"and {sum(t.times for t in plan.traffic[len(shown) :])} small ones"))
    if plan.memory_traffic is not None:
        lines.append(("memory traffic", f"{_gib(plan.memory_traffic)} a device and step"))
    chip = chips.CHIPS[plan.topology.split(":")[0]]
    if "memory" in plan.seconds:
        links = _ms(plan.seconds["interconnect"])
        if chip.dimensions > 1:
            links += f" over all links, {_ms(plan.seconds['interconnect_one_dimension'])} along one dimension of the torus"
        lines += [
            (
                "roofline",
                f"compute {_ms(plan.seconds['compute'])} at {chip.flops / 1e12:g} TFLOP/s, memory {_ms(plan.seconds['memory'])} at "
                f"{chip.memory_bandwidth / 1e9:g} GB/s, interconnect {links}",
            ),
            (
                "step",
                f"{_ms(low)} at the very least, {_ms(high)} if nothing overlaps; {plan.batch_size / high:,.0f} to {plan.batch_size / low:,.0f} "
                "images a second (makers' peak figures, which no program reaches)",
            ),
        ]
    share = memory.peak / memory.available
    if plan.fits:
        lines.append(
            (
                "verdict",
                f"fits: {share:.0%} of what a program may use"
                + ("" if compiled else ", estimated"),
            )
        )
    else:
        lines.append(
            (
                "verdict",
                f"DOES NOT FIT: {_gib(memory.peak)} wanted, {_gib(memory.available)} there; try --config.model.remat=matmuls or blocks, "
                "--config.accumulate=2, --config.mesh.fsdp=N, or more devices",
            )
        )
    return "\n".join(f"{name:15}{text}" for name, text in lines if name or text)


def _gib(x: float) -> str:
    return f"{x / 2**30:.2f} GiB" if x >= 2**27 else f"{x / 2**20:.2f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:,.1f} µs"


def _si(x: float) -> str:
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if x >= factor:
            return f"{x / factor:.4g} {letter}"
    return f"{x:.4g} "


def stage1_of(argument: str) -> ConfigDict | None:
    """From "configs/hmar.py:NAME,stage=masked": the config of NAME, on which that stage 2 would be trained."""
    path, _, spec = argument.partition(":")
    parts = [part.strip() for part in spec.split(",")]
    if "stage=masked" not in parts:
        return None
    return config_files.load_config(f"{path}:{parts[0]}")
