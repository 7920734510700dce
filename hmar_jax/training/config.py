"""Settings that every training run has, whatever it trains. Groups of a config are named beside."""

import dataclasses
from typing import Any

from hmar_jax.data.source_config import SourceConfig
from hmar_jax.settings import Settings, setting


def _interval(default: int, help: str, share_of_run: float) -> Any:
    return setting(default, help, at_least=1, harmless=True, share_of_run=share_of_run)


MAX_STEPS = 2**31 - 1  # the step is an int32 on the devices


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """The top level of a config."""

    family: str = setting("", "What is trained: a name in the registry.", extendable=False)
    task: str = setting("", "Which kind of training of the family.", extendable=False)
    seed: int = setting(
        0, "Seed of all random numbers.", at_least=0, at_most=2**32 - 1, extendable=False
    )
    steps: int = setting(0, "Training steps.", at_least=0, at_most=MAX_STEPS)
    batch_size: int = setting(0, "Images of a step, of all devices together.", at_least=1)
    log_every: int = _interval(100, "Steps between log lines.", 0.1)
    eval_every: int = _interval(5000, "Steps between evaluations.", 0.25)
    sample_every: int = _interval(5000, "Steps between previews.", 0.25)
    checkpoint_every: int = _interval(2500, "Steps between checkpoints.", 0.25)
    keep_checkpoints: int = setting(
        2, "How many new checkpoints to keep.", at_least=1, harmless=True
    )
    keep_best: int = setting(
        1, "How many checkpoints of least validation loss to keep.", at_least=0, harmless=True
    )
    wandb: str = setting(
        "",
        "Project of Weights & Biases that metrics are sent to as well: PROJECT or ENTITY/PROJECT; "
        "empty: none.",
        harmless=True,
    )
    ema_decay: float = setting(
        0.0,
        "Decay of a moving average of the parameters, which evaluation and sampling use; 0: none.",
        at_least=0,
        below=1,
    )


@dataclasses.dataclass(frozen=True)
class GenerativeTrainConfig(TrainConfig):
    """The top level for models that train on top of an autoencoder."""

    epochs: int = setting(
        0,
        "Epochs, where steps is 0; given on the command line alone, it sets steps to 0.",
        at_least=0,
        replaces="steps",
    )
    image_side: int = setting(
        0, "Pixels; checked against the autoencoder's. 0: not checked.", at_least=0
    )
    grad_accum_steps: int = setting(
        1,
        "Microbatches that a batch is computed in, one after another: less memory.",
        at_least=1,
        harmless=True,  # no more than the order of sums
        former_name="accumulate",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The group `data`; its group `transform` is data.transforms.Transform."""

    source: str = setting(
        "",
        "folder:DIR, zip:FILE, hf:NAME_OR_DIR, tfds:NAME, digits, or tokens:DIR of hmar tokenize.",
        is_input=True,
    )
    threads: int = setting(
        2, "Threads that read ahead, in each process.", at_least=0, harmless=True
    )
    workers: int = setting(
        0, "Processes that read ahead; 0: the training process itself.", at_least=0, harmless=True
    )
    in_memory: bool = setting(
        False, "Keep decoded images in memory: for small data sets.", harmless=True
    )


@dataclasses.dataclass(frozen=True)
class EncodedDataConfig(DataConfig):
    """The group `data` of models that train on top of an autoencoder."""

    cached_copies: int = setting(
        0,
        "Encode each image so many times before training; 0: encode while training.",
        at_least=0,
    )
