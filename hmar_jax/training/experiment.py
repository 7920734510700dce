"""What the loop runs: a task, its data and devices (made by hmar_jax/experiment.py)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hmar_jax.config_files import ConfigSchema
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.io.history import History, Segment
from hmar_jax.io.identity import Inputs
from hmar_jax.training.task import Params, Task
from hmar_jax.training.trainable import InitialParams


class Spec(Protocol):
    """What a model is; the contents of a model directory's config.json."""

    def to_json(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model that a run trains on top of; the run directory keeps a copy."""

    folder: str  # in the run directory
    spec: Spec
    params: Params  # on the host


@dataclasses.dataclass(frozen=True)
class Validation:
    """The held-out images, in batches that the hosts share."""

    loader: grain.IterDataset  # of this host
    batch_size: int  # of all hosts
    num_images: int


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What the loop needs to know of a run."""

    task: Task
    spec: Spec  # of the model that comes out
    mesh: Mesh
    frozen: Params  # what the task uses and does not change, on the host
    loader: Callable[
        [], grain.IterDataset
    ]  # this host's part of the training batches; may take long
    validation: Validation | None
    preview_images: np.ndarray | None  # (task.num_preview_images, h, w, 3) uint8, held out
    decode_errors: DecodeErrorLog
    schema: ConfigSchema
    config: ConfigDict  # as it was given, but for what did not fit into the run
    overview: str  # data, devices and size, in one line
    warnings: tuple[str, ...]  # what was changed, and why the recipe may not work
    parent: FrozenModel | None = None
    inputs: Inputs = Inputs()
    history: History = History(Segment(0, 0, 0))
    # Of a run that starts from another model's parameters; called where there is no checkpoint.
    initial: Callable[[], InitialParams] | None = None
