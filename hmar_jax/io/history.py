"""The history of a run: what was changed after its start, from which step on, and with which data.

It stands in the run's config.json under "history", one entry for each change; a run that was never
changed has none. The entries and the config alone say which images each step has trained on: a
change begins a segment, whose first image has a known position in the stream of training images
(data/loader.py).
"""

import dataclasses
import datetime
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from hmar_jax.errors import InputError


class Segment(NamedTuple):
    """Steps with one batch size and one data set.

    Attributes:
      from_step: the steps after this one belong to it.
      position: in the stream of training images, of the first image after from_step.
      batch_size: images of a step.
    """

    from_step: int
    position: int
    batch_size: int

    @property
    def offset(self) -> int:
        """The position of batch n's first image is n * batch_size + offset; n counts from 0."""
        return self.position - self.from_step * self.batch_size

    def position_at(self, step: int) -> int:
        """The position of the first image after a step."""
        return step * self.batch_size + self.offset


@dataclasses.dataclass(frozen=True)
class Change:
    """An entry of the history: what changed after a step.

    Attributes:
      from_step: the last step before it; the newest checkpoint's.
      last_step: the run's last step before and after the change.
      changes: dotted config keys, with the values before and after.
      position: of the next image, see Segment.
      new_data: the stream began anew, with the first epoch of another data set.
      images: how the data set changed, in words; "" if it did not.
      kept: config keys whose value the run does not take from the command: the value that was
        given, and the run's own.
      time: UTC.
      versions: of this package and of JAX.
    """

    from_step: int
    last_step: tuple[int, int]
    changes: Mapping[str, tuple[Any, Any]]
    position: int
    new_data: bool = False
    images: str = ""
    kept: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    time: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry, in JSON types."""
        return {
            "time": self.time,
            "from_step": self.from_step,
            "last_step": list(self.last_step),
            "changes": {key: list(values) for key, values in sorted(self.changes.items())},
            "position": self.position,
            "new_data": self.new_data,
            **({"images": self.images} if self.images else {}),
            **({"kept": {key: list(v) for key, v in self.kept.items()}} if self.kept else {}),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Change":
        """The entry that `to_json` wrote. Raises KeyError, TypeError or ValueError for others."""
        pairs = lambda found: {key: (old, new) for key, (old, new) in found.items()}
        before, after = data["last_step"]
        return cls(
            int(data["from_step"]),
            (int(before), int(after)),
            pairs(data["changes"]),
            int(data["position"]),
            bool(data["new_data"]),
            data.get("images", ""),
            pairs(data.get("kept", {})),
            data.get("time", ""),
            data.get("versions", {}),
        )

    def stamped(self) -> "Change":
        """The entry with the present time and versions."""
        package = importlib.import_module(__name__.partition(".")[0])  # it imports this module
        return dataclasses.replace(
            self,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions={"hmar_jax": package.__version__, "jax": jax.__version__},
        )

    def __str__(self) -> str:
        """What changed, in words."""
        parts = [
            f"{key} {_shown(old)} -> {_shown(new)}" for key, (old, new) in self.changes.items()
        ]
        parts += [f"other images ({self.images})"] if self.images else []
        before, after = self.last_step
        if before != after and "steps" not in self.changes:
            parts.append(f"last step {before:,} -> {after:,}")
        if self.new_data:
            parts.append("the data begin anew")
        return ", ".join(parts)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "''"


@dataclasses.dataclass(frozen=True)
class History:
    """The history of a run when a command starts it.

    Attributes:
      segment: the one that the next step belongs to.
      recorded: the changes before this start.
      new: what this start changes, if anything; not recorded yet.
    """

    segment: Segment
    recorded: tuple[Change, ...] = ()
    new: Change | None = None

    def __iter__(self):
        return iter((*self.recorded, *([self.new] if self.new else [])))

    def was_last(self, step: int) -> bool:
        """Whether a step was the run's last one, before a change."""
        return any(change.last_step[0] == step for change in self)


def read(contents: Mapping[str, Any], where: str) -> tuple[Change, ...]:
    """The history in the contents of a run's config.json.

    Raises:
      InputError: there is one and it cannot be read.
    """
    try:
        return tuple(Change.from_json(entry) for entry in contents.get("history", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the history in {where} must have entries as hmar train --extend writes them; "
            f"cannot read it: {type(error).__name__} {error}"
        ) from None


def segments(changes: Sequence[Change], batch_size: int) -> list[Segment]:
    """The segments of a run, in order; the first one begins with the run.

    Args:
      batch_size: the present one.
    """
    found = []
    for change in reversed(changes):
        found.append(Segment(change.from_step, change.position, batch_size))
        batch_size = change.changes.get("batch_size", (batch_size,))[0]
    return [Segment(0, 0, batch_size), *reversed(found)]


def rewound(changes: Sequence[Change], batch_size: int, step: int) -> tuple[Change, ...]:
    """The history of a run whose newest checkpoint is of a step before some changes.

    The checkpoints that the changes began with are lost, so the changes begin with an older one.

    Args:
      batch_size: the present one.
      step: of the newest checkpoint.
    """
    former, *later = segments(changes, batch_size)
    found = []
    for change, segment in zip(changes, later, strict=True):
        if change.from_step > step:
            position = 0 if change.new_data else former.position_at(step)
            change = dataclasses.replace(change, from_step=step, position=position)
            segment = segment._replace(from_step=step, position=position)
        found.append(change)
        former = segment
    return tuple(found)
