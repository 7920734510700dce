"""A task's steps as programs for a mesh, and the shapes and places of what they take: for running, and for planning without devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from hmar_jax.parallel import sharding
from hmar_jax.training import state as run_state


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted functions that call for arrays laid out as `state`, `extra`, `sharding.batch_sharding(mesh)` and, keys, copied.

    What the compiler makes of a step, without any device of the mesh (a topology's will do):
    program.train_step.trace(program.state, program.batch(shapes), program.rng, *program.extra).lower().compile()
    """

    mesh: Mesh
    state: Any  # TrainState of jax.ShapeDtypeStruct with shardings
    extra: tuple  # so are these: what is frozen
    rng: jax.ShapeDtypeStruct
    init: Callable  # (rng, *extra) -> state
    train_step: Callable  # (state, batch, rng, *extra) -> (state, metrics); the state is donated
    eval_step: Callable  # (state, batch, *extra) -> {name: Mean}

    def batch(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of all hosts, (B, …) each, divided by image."""
        place = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for name, x in shapes.items()
        }


def build(task, mesh: Mesh, extra: tuple = (), ema_decay: float = 0.0) -> Program:
    """Nothing is computed or put anywhere yet.

    Args:
      task: init(rng, *extra), train_step(state, batch, rng, *extra), eval_step(state, batch, *extra) and partition_rules.
      mesh: of sharding.make_mesh.
      extra: arrays, or jax.ShapeDtypeStruct.
      ema_decay: of the moving average of the parameters; 0: none.
    """

    def shapes(tree):
        return sharding.with_shardings(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree),
            task.partition_rules,
            mesh,
        )

    def places(tree):
        return jax.tree.map(lambda x: x.sharding, tree)

    begin = functools.partial(run_state.init, task, ema_decay=ema_decay)
    step = functools.partial(run_state.train_step, task, ema_decay=ema_decay)
    copied, constrain_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=copied)
    extra = tuple(shapes(x) for x in extra)
    state = shapes(jax.eval_shape(begin, rng, *extra))

    def compiled(function, *arguments, out, **options):
        return jax.jit(
            sharding.traced_on_mesh(mesh, function),
            in_shardings=arguments,
            out_shardings=out,
            **options,
        )

    frozen = tuple(places(x) for x in extra)
    return Program(
        mesh,
        state,
        extra,
        rng,
        init=compiled(begin, copied, *frozen, out=places(state)),
        train_step=compiled(
            step,
            places(state),
            constrain_batch,
            copied,
            *frozen,
            out=(places(state), copied),
            donate_argnums=0,
        ),
        eval_step=compiled(task.eval_step, places(state), constrain_batch, *frozen, out=copied),
    )
