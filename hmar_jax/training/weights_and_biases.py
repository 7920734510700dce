"""Metrics of a run on Weights & Biases, beside metrics.jsonl and TensorBoard.

One run there belongs to one run directory: wandb/run_id.txt names it, so that a run that resumes,
also on another machine, continues its curves. A copy of a run directory, whose original is still
there, is another run. WANDB_MODE=offline writes to the run directory alone; `wandb sync` sends that
later.
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
from hmar_jax.progress import phase
from hmar_jax.training.metrics import LOGGER

_PROJECT = re.compile(r"(?:[\w.-]+/)?[^/\\#?%:]{1,128}")
_INIT_SECONDS = 60.0
_ID_FILE = "wandb/run_id.txt"


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
      InputError: nobody is logged in, or the environment has settings that the library refuses.
    """
    import pydantic  # which the library checks its settings with
    import wandb

    entity, _, name = project.rpartition("/")
    # Event files are appended to, which object stores cannot.
    local = os.fspath(directory) if files.is_local(directory) else tempfile.mkdtemp()
    try:
        with phase("connecting to Weights & Biases"):
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
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise InputError(
            f"config.wandb={project} needs a login: run wandb login, or set WANDB_API_KEY, or "
            f"WANDB_MODE=offline ({_reason(error)})"
        ) from None
    except pydantic.ValidationError as error:
        wrong = ", ".join(f"{'.'.join(map(str, e['loc']))}={e['input']}" for e in error.errors())
        raise InputError(
            f"config.wandb={project}: Weights & Biases refuses the settings {wrong}, of "
            f"environment variables such as WANDB_MODE ({error.errors()[0]['msg']})"
        ) from None
    except Exception as error:
        LOGGER.warning(
            "metrics are not sent to Weights & Biases, training continues: %s; with "
            "WANDB_MODE=offline they are kept for wandb sync",
            _reason(error),
        )
        return None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if run.disabled:
        LOGGER.warning("metrics are not sent to Weights & Biases: WANDB_MODE=disabled")
    else:
        place = run.url or f"offline, in {run.dir.removesuffix('/files')}"
        LOGGER.info("Weights & Biases: %s", place)
    return WandbRun(run)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _run_id(directory: epath.Path) -> str:
    """The id of the directory's run; a new one where the directory is a copy of another."""
    path = directory / _ID_FILE
    found, place = _read_id(path)
    here = os.fspath(directory)
    if place not in ("", here) and not _same_directory(place, here):
        if _read_id(epath.Path(place) / _ID_FILE)[0] == found:
            found = ""
    if not found or place != here:
        found = found or uuid.uuid4().hex[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, f"{found}\n{here}\n")
    return found


def _read_id(path: epath.Path) -> tuple[str, str]:
    """An id, and the directory that it was written to; empty where they are not known."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return "", ""
    found, place = (*lines, "", "")[:2]
    return found.strip(), place


def _same_directory(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


class WandbRun:
    """Where metrics are sent to."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # Not as W&B's own step, which must not fall: a run resumes before its last lines.
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()
