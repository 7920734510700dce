"""How far a run is: its checkpoints and losses, read from its directory alone."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hmar_jax.io import checkpoints, files
from hmar_jax.io.history import Change
from hmar_jax.training.metrics import read_metrics


def describe_run(
    workdir: os.PathLike | str,
    config: Mapping[str, Any],
    command: str,
    history: Sequence[Change] = (),
) -> list[tuple[str, str]]:
    """Rows (name, text) of `hmar info`: step, losses, and how to resume.

    Args:
      workdir: the run directory; the run may be training.
      config: its config.
      command: the one that trains it, "train" or "train-tokenizer".
      history: what was changed since its start.
    """
    directory = files.absolute(workdir)
    saved, lines = checkpoints.steps_of_run(directory), []
    with contextlib.suppress(OSError):  # the losses alone are missing then
        lines = read_metrics(directory / "metrics.jsonl")
    step = max(saved, default=0)
    total: int | None
    if history:  # the checkpoint may be older than the last change
        total = history[-1].last_step[1]
    else:
        metadata = checkpoints.metadata_of_run(directory, step) if saved else {}
        total = metadata.get("steps_of_run")
        total = total or config.get("steps") or None  # of runs of earlier versions
    if total is not None and step >= total:
        state = f"finished, step {step:,} of {total:,}"
    else:
        of_total = f" of {total:,}" if total else ""
        state = (
            f"not finished, step {step:,}{of_total}; to resume, rerun its command: hmar {command} "
            f"--config=... --workdir={workdir}"
        )
    rows = [("run", state), ("checkpoints", ", ".join(f"{s:,}" for s in sorted(saved)))]
    for number, change in enumerate(history):
        when = change.time.replace("T", " ").partition("+")[0]
        text = f"from step {change.from_step:,}: {change} ({when} UTC)"
        rows.append(("" if number else "history", text))
    found = _losses(lines)
    return rows + ([("loss", found)] if found else [])


def _losses(lines: list[dict[str, Any]]) -> str:
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "validation/loss" in line]
    parts = []
    if training:
        parts.append(f"training {training[-1]['loss']:.4g} (step {training[-1]['step']:,})")
    if validation:
        last = validation[-1]
        best = min(validation, key=lambda line: line["validation/loss"])
        parts.append(
            f"validation {last['validation/loss']:.4g} (step {last['step']:,}), "
            f"best {best['validation/loss']:.4g} (step {best['step']:,})"
        )
    return "; ".join(parts)
