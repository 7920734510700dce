"""What a training step needs on GPUs, estimated from shapes: arguments exactly, the rest roughly.

Letters: B images, L tokens, C width, V logits of a token.
"""

import math
from typing import Any

import jax

from hmar_jax.parallel import sharding
from hmar_jax.planning import jaxpr
from hmar_jax.planning.hlo import Collective
from hmar_jax.planning.memory import (
    MemoryPlan,
    Traffic,
    by_kind,
    divided_bytes,
    num_bytes,
    num_elements,
)
from hmar_jax.planning.topology import Topology
from hmar_jax.training.task import LayerStack, Task


def estimate(
    task: Task,
    stack: LayerStack,
    mesh: Any,
    topology: Topology,
    state: Any,
    counted: jaxpr.OperationCounts,
    arguments: float,
) -> tuple[MemoryPlan, tuple[Traffic, ...], float, float, tuple[str, ...], dict[str, str]]:
    """The fields of plan.StepAnalysis.

    Args:
      stack: the network's repeated layers.
      state: shapes.
      counted: of the traced step.
      arguments: bytes of one device.
    """
    turns, parts = task.grad_accum_steps, sharding.batch_parts(mesh)
    params = divided_bytes(state.params, task.partition_rules, mesh)
    # Gradients; what the loops keep for the backward pass, less the stacked gradients that they
    # also make; gathered weights of two layers; logits with their gradient and the probabilities
    # between.
    stacked = sum(map(num_bytes, jax.tree.leaves(stack.params)))
    kept = max(0.0, counted.residuals / turns - stacked) / parts
    item = stack.activation.dtype.itemsize
    gathered = 2 * stacked / stack.depth / mesh.shape["tensor"] * (1 + item / 4)
    logits = 3 * 4 * math.prod(stack.output.shape) / parts / turns
    encoding = stack.encoding_bytes / parts / turns
    temporaries = params + gathered + max(kept + logits, encoding)
    memory = MemoryPlan(arguments, 0.0, temporaries, arguments + temporaries, topology.chip.memory)

    collectives = [pair for pair in _collectives(task, stack, mesh, state) if pair[0].group > 1]
    interconnect = sum(one.sent / topology.bandwidth(reach) for one, reach in collectives)
    # Operands and results of matrix products, what is kept written and read, and AdamW's four reads
    # and three writes.
    moved = counted.moved / topology.num_devices + 2 * kept * turns + 7 * params
    how = {
        "memory": "estimate from shapes; arguments exactly, temporaries roughly",
        "traffic": "estimate from shapes",
        "memory_traffic": "estimate from shapes: matrix products, what is kept for the backward "
        "pass, the optimizer; not what lies between",
    }
    return memory, by_kind(one for one, _ in collectives), moved, interconnect, (), how


def _collectives(task: Task, stack: LayerStack, mesh: Any, state: Any):
    """Pairs of a collective and the number of neighbouring devices that a group reaches over."""
    tensor, fsdp, data = (mesh.shape[axis] for axis in ("tensor", "fsdp", "data"))
    turns = task.grad_accum_steps
    whole = stack.activation.dtype.itemsize * num_elements(state.params) / tensor
    activations = num_bytes(stack.activation) / sharding.batch_parts(mesh) / turns
    reach = tensor * fsdp
    return [
        (Collective("all-gather", int(whole), fsdp, 2 * turns), reach),
        (Collective("reduce-scatter", int(whole), fsdp, turns), reach),
        (Collective("all-reduce", int(whole / fsdp), data, turns), reach * data),
        (Collective("all-reduce", int(activations), tensor, 4 * stack.depth * turns), tensor),
    ]
