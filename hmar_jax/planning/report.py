"""A training plan as text."""

from hmar_jax.planning.advice import Advice
from hmar_jax.planning.plan import TrainingPlan
from hmar_jax.planning.topology import PLANNED_CHIPS


def format_plan(plan: TrainingPlan, advice: tuple[Advice, ...] = ()) -> str:
    """A table of several lines, for people.

    Args:
      advice: what to change if the plan does not fit, from advice.find_advice.
    """
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items())
    count = plan.grad_accum_steps
    parts = f" in {count} microbatches" if count > 1 else ""
    compiled = plan.how["memory"].startswith("compiled")
    source = "compiled for the topology, not run" if compiled else plan.how["memory"]
    formula = f"{_si(plan.model_flops)}FLOP by formula; " if plan.model_flops else ""
    lines = [
        (
            "plan",
            f"{plan.config} on {plan.topology}, {plan.devices} devices, mesh {mesh}; "
            f"batch {plan.batch_size}{parts}",
        ),
        ("", f"nothing here is measured: {source}"),
        ("parameters", f"{plan.parameters:,} trained, {plan.frozen_parameters:,} frozen"),
        (
            "FLOPs a step",
            f"{formula}{_si(plan.step_flops)}FLOP in the traced step, with what is computed twice",
        ),
    ]
    if compiled:
        kernels = f"Pallas kernels inside: {', '.join(plan.kernels)}"
        lines.append(("attention", kernels if plan.kernels else "no Pallas kernel in the program"))
    lines += [("bytes a device", _memory(plan)), *_traffic(plan)]
    if plan.memory_traffic is not None:
        lines.append(("memory traffic", f"{_gib(plan.memory_traffic)} a device and step"))
    if "memory" in plan.seconds:
        lines += _roofline(plan)
    lines.append(("verdict", _verdict(plan, compiled, advice)))
    return "\n".join(f"{name:15}{text}" for name, text in lines)


def _memory(plan: TrainingPlan) -> str:
    memory = plan.memory
    unused = f" ({_gib(memory.unused)} not used by the step)" if memory.unused else ""
    temporaries = ""
    if memory.temporaries is not None:
        temporaries = f", temporaries {_gib(memory.temporaries)}"
    return (
        f"arguments {_gib(memory.arguments)}{unused}{temporaries}, "
        f"peak {_gib(memory.peak)} of {_gib(memory.available)}"
    )


def _traffic(plan: TrainingPlan) -> list[tuple[str, str]]:
    shown = [t for t in plan.traffic if t.sent >= 1e-3 * plan.traffic[0].sent]
    lines = [
        (
            "" if i else "collectives",
            f"{t.kind} among {t.group}: {t.times} times, {_gib(t.bytes)} in all, "
            f"{_gib(t.sent)} sent",
        )
        for i, t in enumerate(shown)
    ]
    if len(shown) < len(plan.traffic):
        lines.append(("", f"and {sum(t.times for t in plan.traffic[len(shown) :])} small ones"))
    return lines


def _roofline(plan: TrainingPlan) -> list[tuple[str, str]]:
    chip, seconds = PLANNED_CHIPS[plan.topology.split(":")[0]], plan.seconds
    low, high = plan.step_seconds
    links = _ms(seconds["interconnect"])
    if chip.dimensions > 1:
        one = _ms(seconds["interconnect_one_dimension"])
        links += f" over all links, {one} along one dimension of the torus"
    return [
        (
            "roofline",
            f"compute {_ms(seconds['compute'])} at {chip.flops / 1e12:g} TFLOP/s, memory "
            f"{_ms(seconds['memory'])} at {chip.memory_bandwidth / 1e9:g} GB/s, "
            f"interconnect {links}",
        ),
        (
            "step",
            f"{_ms(low)} at least, {_ms(high)} if nothing overlaps; "
            f"{plan.batch_size / high:,.0f} to {plan.batch_size / low:,.0f} images a second "
            "(makers' peak rates, which no program reaches)",
        ),
    ]


def _verdict(plan: TrainingPlan, compiled: bool, advice: tuple[Advice, ...]) -> str:
    memory = plan.memory
    if plan.fits:
        share = f"{memory.peak / memory.available:.0%} of what a program may use"
        return f"fits: {share}{'' if compiled else ', estimated'}"
    return (
        f"DOES NOT FIT: needs {_gib(memory.peak)}, has {_gib(memory.available)}; {_advise(advice)}"
    )


def _advise(advice: tuple[Advice, ...]) -> str:
    elsewhere = "more devices, a smaller batch_size or a smaller model"
    if not advice:
        return f"try {elsewhere}"
    if all(one.fits for one in advice):
        return "fits with " + ", or ".join(
            f"{one.arguments()} (needs {_gib(one.peak or 0.0)})" for one in advice
        )
    if advice[0].fits is None:
        return f"try {', '.join(one.arguments() for one in advice)} (not checked), or {elsewhere}"
    return (
        f"even with {advice[0].arguments()} it needs {_gib(advice[0].peak or 0.0)}: try {elsewhere}"
    )


def _gib(x: float) -> str:
    return f"{x / 2**30:.2f} GiB" if x >= 2**27 else f"{x / 2**20:.2f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:,.1f} µs"


def _si(x: float) -> str:
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if x >= factor:
            return f"{x / factor:.4g} {letter}"
    return f"{x:.4g} "
