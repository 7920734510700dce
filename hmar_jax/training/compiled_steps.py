"""A task's steps, compiled for a mesh, with shapes and shardings of what they take.

For running, and for planning without devices: any mesh will do, also one of a topology.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hmar_jax.parallel import sharding
from hmar_jax.training import step
from hmar_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """Jitted functions. Their arguments are laid out as `state`, `frozen` and `batch` say.

    To see what the compiler makes of a step without any device of the mesh:
        traced = steps.train_step.trace(steps.state, steps.frozen, steps.batch(shapes), steps.rng)
        traced.lower().compile()
    """

    mesh: Mesh
    state: Any  # TrainState of jax.ShapeDtypeStruct with shardings
    frozen: Any  # the same of the frozen parameters
    rng: jax.ShapeDtypeStruct
    init: Callable  # (rng, frozen) -> state
    train_step: Callable  # (state, frozen, batch, rng) -> (state, metrics); the state is donated
    eval_step: Callable  # (state, frozen, batch) -> {name: Mean}
    preview: Callable  # (state, frozen, images, rng) -> images, on every device

    def batch(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of all hosts, arrays (B, ...), with the images divided over the mesh."""
        place = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for name, x in shapes.items()
        }


def compile_steps(
    task: Task, mesh: Mesh, frozen: Any = None, ema_decay: float = 0.0
) -> CompiledSteps:
    """The steps of a task for a mesh. Nothing is computed or placed yet.

    Args:
      mesh: of sharding.make_mesh.
      frozen: parameters that the task does not change, arrays or jax.ShapeDtypeStruct.
      ema_decay: of the moving average of the parameters; 0: none.
    """

    def shapes(tree):
        leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)
        return sharding.with_shardings(leaves, task.partition_rules, mesh)

    def places(tree):
        return jax.tree.map(lambda x: x.sharding, tree)

    def compiled(function, *arguments, out, **options):
        function = sharding.traced_on_mesh(mesh, function)
        return jax.jit(function, in_shardings=arguments, out_shardings=out, **options)

    init = functools.partial(step.init_state, task, ema_decay=ema_decay)
    train = functools.partial(step.train_step, task, ema_decay=ema_decay)
    evaluate, preview = (functools.partial(f, task) for f in (step.eval_step, step.preview))
    copied, by_image = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=copied)
    frozen = shapes({} if frozen is None else frozen)
    state = shapes(jax.eval_shape(init, rng, frozen))
    states, fixed = places(state), places(frozen)
    return CompiledSteps(
        mesh,
        state,
        frozen,
        rng,
        init=compiled(init, copied, fixed, out=states),
        train_step=compiled(
            train, states, fixed, by_image, copied, out=(states, copied), donate_argnums=0
        ),
        eval_step=compiled(evaluate, states, fixed, by_image, out=copied),
        preview=compiled(preview, states, fixed, copied, copied, out=copied),
    )
