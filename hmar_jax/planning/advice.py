"""What to change where a plan does not fit. Only changes that the config does not have yet.

Where plans are cheap (GPUs: seconds), each change is planned too, and only what then fits is named.
For TPUs, each plan is a compilation of minutes: the changes are named unchecked.
"""

import bisect
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from hmar_jax import config_files, settings
from hmar_jax.experiment import task_kind
from hmar_jax.planning.plan import TrainingPlan, make_plan
from hmar_jax.planning.topology import Topology

_log = logging.getLogger(__name__)

Changes = dict[str, str]  # config keys and their new values


@dataclasses.dataclass(frozen=True)
class Advice:
    """Changes of the config that belong together."""

    changes: Changes
    peak: float | None  # bytes that a device needs with them; None: not checked
    fits: bool | None  # None: not checked

    def arguments(self) -> str:
        """The changes as arguments of the command line."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())


def find_advice(
    config: ConfigDict,
    topology: Topology,
    plan: TrainingPlan,
    parent_config: ConfigDict | None = None,
) -> tuple[Advice, ...]:
    """Alternatives, of which each may be enough; nothing for a plan that fits.

    Args:
      config, topology, parent_config: what `plan` was made of, by make_plan.

    Returns:
      For GPUs, alternatives that fit; or else a single one that does not, the most that can be
      done on these devices. For TPUs, the next change of each kind, unchecked. Empty where there is
      nothing left to change.
    """
    ladders = list(_ladders(config, plan))
    if plan.fits or not ladders:
        return ()
    if topology.chip.kind == "tpu":
        # What shrinks temporaries alone cannot help where the arguments are too large.
        too_large = plan.memory.arguments > plan.memory.available
        useful = [ladder[0] for ladder in ladders if not too_large or "mesh.fsdp" in ladder[0]]
        return tuple(Advice(changes, None, None) for changes in useful)

    _log.info("checking which changes would fit")

    def check(changes: Changes) -> Advice:
        changed = ConfigDict(config.to_dict())
        for key, value in changes.items():
            config_files.override(changed, key, value)
        memory = make_plan(changed, topology, parent_config=parent_config).memory
        return Advice(changes, memory.peak, memory.peak <= memory.available)

    alone = [first for ladder in ladders if (first := _first_that_fits(ladder, check))]
    if alone:
        return tuple(alone)
    # Together, in the order of what they cost.
    together: Changes = {}
    found = None
    for ladder in ladders:
        for changes in (ladder[0], ladder[-1]):
            together = together | changes
            found = check(together)
            if found.fits:
                return (found,)
    return (found,) if found else ()


def _first_that_fits(ladder: Sequence[Changes], check: Callable[[Changes], Advice]):
    """The least of the changes, each of which needs less memory than the one before; or None."""
    checked = {len(ladder) - 1: check(ladder[-1])}
    if not checked[len(ladder) - 1].fits:
        return None

    def fits(index: int) -> bool:
        if index not in checked:
            checked[index] = check(ladder[index])
        return bool(checked[index].fits)

    index = bisect.bisect_left(range(len(ladder)), True, key=fits)
    return checked[index]


def _ladders(config: ConfigDict, plan: TrainingPlan) -> Iterator[list[Changes]]:
    """For each kind of change that is left: changes, each stronger than the one before."""
    copies, fsdp = plan.mesh["data"], plan.mesh["fsdp"]
    others = {} if config.mesh.data == -1 else {"mesh.data": "-1"}  # one axis may be -1
    if config.mesh.tensor == -1:
        others["mesh.tensor"] = str(plan.mesh["tensor"])
    wider = [fsdp * n for n in range(2, copies + 1) if copies % n == 0]
    if wider:
        yield [others | {"mesh.fsdp": str(n)} for n in wider]
    schema = task_kind(config)[1].schema
    if "remat" in schema.fields("model"):
        levels = list(settings.declaration(schema.fields("model")["remat"][1]).choices)
        stronger = levels[levels.index(config.model.remat) + 1 :]
        if stronger:
            yield [{"model.remat": level} for level in stronger]
    if "grad_accum_steps" in schema.fields(""):
        accumulated = plan.grad_accum_steps * copies * fsdp
        images = plan.batch_size // accumulated  # of a device and microbatch
        steps = [n for n in range(2, images + 1) if images % n == 0]
        if steps:
            yield [{"grad_accum_steps": str(plan.grad_accum_steps * n)} for n in steps]
