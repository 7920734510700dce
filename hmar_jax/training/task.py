"""What the trainer needs to know of a model: the Task protocol, and defaults of its parts.

A task is a frozen dataclass of pure functions. The trainer (step.py, loop.py) does the rest for
every task: gradients, gradient accumulation, clipping, the optimizer, the moving average of the
parameters, skipped steps.

Letters: B images of a batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import AbstractMesh, Mesh

from hmar_jax.parallel.sharding import Rules
from hmar_jax.training.metrics import Mean
from hmar_jax.training.optimizer import OptimizerConfig, kernels

Params = Any  # a pytree of arrays
Batch = dict[str, jax.Array]  # arrays (B, ...)
Metrics = dict[str, Any]  # scalars and Means


class LayerStack(NamedTuple):
    """The repeated layers of a network: for estimating a step's memory without compiling it."""

    params: Params  # the parameters (or their shapes) that are stacked on a leading axis
    depth: int  # layers
    activation: jax.ShapeDtypeStruct  # (B, L, C) what one layer passes to the next
    output: jax.ShapeDtypeStruct  # (B, L, V) the logits
    encoding_bytes: float = 0.0  # largest arrays while images are encoded inside the step


class Task(Protocol):
    """One kind of training. `frozen` is a pytree of parameters that are used and never changed."""

    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    grad_accum_steps: int
    partition_rules: Rules  # for parameters, frozen parameters and the optimizer's state
    input_kinds: frozenset[
        str
    ]  # which batches it takes: "image", or kinds of records such as "tokens"
    num_preview_images: int  # held-out images that `preview` takes; 0: none
    flops_per_image: float | None  # of one training step, counted by hand; None: not known

    def batch_shapes(self, kind: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of one of the input kinds."""
        ...

    def decay_mask(self, params: Params) -> Any:
        """A tree of bool: the leaves that weight decay acts on."""
        ...

    def check_mesh(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises InputError where the network cannot be divided over the mesh."""
        ...

    def init_params(self, rng: jax.Array, frozen: Params) -> Params:
        """The parameters before the first step."""
        ...

    def prepare_batch(self, batch: Batch, rng: jax.Array) -> tuple[Batch, jax.Array]:
        """Random choices for each image of a whole batch, and the key that is left for `loss`.

        They are made before the batch is cut into microbatches: accumulation does not change them.
        """
        ...

    def loss(
        self, params: Params, frozen: Params, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The mean loss over a prepared (micro)batch, and its metrics."""
        ...

    def eval_metrics(
        self, params: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> dict[str, Mean]:
        """Means over the images that batch["valid"] marks; "loss" among them."""
        ...

    def preview(
        self, params: Params, frozen: Params, images: Any, rng: jax.Array, step: jax.Array
    ) -> jax.Array:
        """Rows of images to look at while training: (rows, columns, h, w, 3) float32 in [0, 1].

        Args:
          images: (num_preview_images, h, w, 3) uint8, held out; None for tasks that take none.
        """
        ...

    def preview_labels(self) -> list[str]:
        """What stands at the left of each row of the preview."""
        ...

    def layer_stack(self, params: Params, kind: str) -> LayerStack | None:
        """For memory estimates; None where the network has no repeated layers."""
        ...


class CustomUpdateTask(Task, Protocol):
    """A task with its own update, such as two networks that are trained against each other."""

    def init_state(self, rng: jax.Array, frozen: Params) -> Any:
        """The TrainState before the first step, without the moving average."""
        ...

    def train_step(
        self, state: Any, frozen: Params, batch: Batch, rng: jax.Array
    ) -> tuple[Any, Metrics]:
        """The next state and scalar metrics; `rng` is the key of the run."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskDefaults:
    """Defaults of what most tasks have no use for."""

    grad_accum_steps = 1
    num_preview_images = 0
    flops_per_image = None

    def decay_mask(self, params: Params) -> Any:
        return kernels(params)

    def check_mesh(self, mesh: Mesh | AbstractMesh) -> None:
        del mesh

    def prepare_batch(self, batch: Batch, rng: jax.Array) -> tuple[Batch, jax.Array]:
        return batch, rng

    def layer_stack(self, params: Params, kind: str) -> LayerStack | None:
        del params, kind
        return None


Loss = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]
