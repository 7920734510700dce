"""Metrics of a run on Weights & Biases, beside metrics.jsonl and TensorBoard.

One run there belongs to one run directory: wandb/run_id.txt names it, so that a run that resumes,
also on another machine, continues its curves. WANDB_MODE=offline writes to the run directory alone;
`wandb sync` sends that later.
"""

import importlib.util
import os
import re
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from hmar_jax.errors import InputError
from hmar_jax.io import files
from hmar_jax.training.metrics import LOGGER

_PROJECT = re.compile(r"(?:[\w.-]+/)?[^/\\#?%:]{1,128}")
_INIT_SECONDS = 60.0


def check_project(name: str) -> None:
    """Raises InputError where metrics cannot be sent to a project; empty: nothing to check."""
    if not name:
        return
    if not _PROJECT.fullmatch(name):
        raise InputError(
            f"config.wandb must be PROJECT or ENTITY/PROJECT, without / \\ # ? % : in the name of "
            f"the project; got {name!r}"
        )
    if importlib.util.find_spec("wandb") is None:
        raise InputError(f'config.wandb={name} requires wandb: pip install "hmar_jax[wandb]"')


def start(directory: epath.Path, project: str, config: Mapping[str, Any]) -> "WandbRun | None":
    """Begins or continues the run of a run directory.

    Args:
      directory: the run directory; the run has its name.
      project: PROJECT or ENTITY/PROJECT.
      config: the whole training config.

    Returns:
      None if Weights & Biases cannot be reached, which a warning says.

    Raises:
      InputError: nobody is logged in.
    """
    import wandb

    entity, _, name = project.rpartition("/")
    # Event files are appended to, which object stores cannot.
    local = os.fspath(directory) if files.is_local(directory) else tempfile.mkdtemp()
    try:
        run = wandb.init(
            entity=entity or None,
            project=name,
            dir=local,
            id=_run_id(directory),
            name=directory.name,
            config=dict(config),
            allow_val_change=True,  # harmless settings, or an extended run
            resume="allow",
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=_INIT_SECONDS, disable_git=True
            ),
        )
    except wandb.errors.UsageError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"config.wandb={project} needs a login: run wandb login, or set WANDB_API_KEY, or "
            f"WANDB_MODE=offline ({reason})"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        LOGGER.warning("metrics are not sent to Weights & Biases, training continues: %s", reason)
        return None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    LOGGER.info("Weights & Biases: %s", run.url or f"offline, in {run.dir.removesuffix('/files')}")
    return WandbRun(run)


def _run_id(directory: epath.Path) -> str:
    path = directory / "wandb" / "run_id.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


class WandbRun:
    """Where metrics are sent to."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # Not as W&B's own step, which must not fall: a run resumes before its last lines.
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()
