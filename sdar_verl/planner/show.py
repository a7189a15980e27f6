"""A plan as text, as JSON and as a stacked bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdar_verl.planner.hardware import GIB
from sdar_verl.planner.layout import Layout
from sdar_verl.planner.plan import Plan
from sdar_verl.planner.timing import tokens_per_step

BAR_WIDTH = 40


def as_dict(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """Everything the plan says, in bytes, seconds and GPU-hours."""
    return {
        "gpu": plan.gpu.name,
        "gpus": plan.cards,
        "fits": plan.fits,
        "faults": plan.faults,
        "memory_bytes": {phase.name: phase.parts for phase in plan.phases},
        "seconds": plan.seconds,
        "seconds_per_step": plan.step,
        "tokens_per_step": tokens_per_step(plan.layout),
        "guessed": list(plan.layout.guessed),
        "steps": plan.layout.steps,
        "validations": [{"times": times, "episodes": size} for times, size in plan.layout.validations],
        "validation_seconds": plan.validating,
        "gpu_hours": plan.gpu_hours if plan.layout.known else None,
        "cost": None if price is None or not plan.layout.known else plan.gpu_hours * price,
    }


def as_text(plan: Plan, price: float | None = None) -> str:
    """Tables for a terminal: memory per phase with a bar, time per phase, the whole run."""
    layout, memory = plan.layout, plan.gpu.memory
    lines = [
        f"{layout.architecture.name}, {layout.architecture.parameters / 1e9:.2f} billion weights, on {plan.cards} x "
        f"{plan.gpu.name}; teacher: {layout.teacher}, {layout.teacher_placement}{_passes(layout)}; "
        f"objective: {layout.objective}",
        f"{layout.episodes} episodes of {layout.turns:g} turns a step: {layout.rows:,.0f} rows of "
        f"{layout.prompt:.0f} + {layout.response:.0f} tokens, {layout.context:.0f} more for the teacher",
        *_guesses(layout),
        *_writings(layout),
        "",
        f"memory of one GPU, GiB of {memory / GIB:.0f}",
    ]
    for phase in plan.phases:
        share = phase.total / memory
        bar = ("#" * min(round(BAR_WIDTH * share), BAR_WIDTH)).ljust(BAR_WIDTH, ".")
        lines.append(f"  {phase.name:14} {phase.total / GIB:6.1f}  {bar}{'' if share <= 1 else '  does not fit'}")
        parts = sorted(phase.parts.items(), key=lambda part: -part[1])
        lines.append("  " + " " * 15 + ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts))
    lines += ["", "seconds of one step"]
    for name, seconds in plan.seconds.items():
        lines.append(f"  {name:14} {seconds:7.0f}  {100 * seconds / plan.step:3.0f} %")
    beside = (
        f"  (the rollout, on {layout.rollout_gpus} GPUs of its own, beside the rest)" if layout.rollout_gpus else ""
    )
    lines.append(f"  {'all':14} {plan.step:7.0f}{beside}")
    total = f"{layout.steps} steps{_untaught(layout)}{_validating(plan)}: {plan.hours:.1f} h, "
    total += f"{plan.gpu_hours:,.0f} GPU-hours"
    if price is not None:
        total += f", {plan.gpu_hours * price:,.0f} at {price:g} a GPU-hour"
    if not layout.known:
        total = f"hours and cost are unknown, since {layout.unknown}"
    lines += ["", total, "", "fits" if plan.fits else "does not fit:"]
    lines += [f"  - {fault}" for fault in plan.faults]
    return "\n".join(lines)


def _guesses(layout: Layout) -> list[str]:
    """What of these lengths is none of the user's, and how to give it."""
    if not layout.guessed:
        return []
    given = " ".join(f"--{name} {getattr(layout, name):.4g}" for name in layout.guessed)
    return [f"guesses from the limits, until you give them: {given}; a step's metrics have them (docs/planner.md)"]


def _writings(layout: Layout) -> list[str]:
    if not layout.writer:
        return []
    who = "the policy" if layout.writer == "policy" else "the endpoint"
    total = layout.writings * (layout.steps - layout.untaught_steps)
    return [
        f"up to {layout.writings} contexts a step, {total:,} in all, written by {who}: "
        f"{layout.writer_prompt:g} tokens read and {layout.writer_answer:g} written for each"
    ]


def _passes(layout: Layout) -> str:
    number, share = layout.teacher_passes, layout.teacher_share
    over = "each row" if share == 1.0 else f"{share:.2g} of the rows"
    return "" if (number, share) == (1, 1.0) else f", {number} pass{'es' if number > 1 else ''} over {over}"


def _validating(plan: Plan) -> str:
    if not plan.layout.validations:
        return ""
    sizes = ", ".join(f"{times} of {size:,} episodes" for times, size in plan.layout.validations)
    return f", and validations ({sizes}; {plan.validating / 3600:.1f} h)"


def _untaught(layout: Layout) -> str:
    return f", the last {layout.untaught_steps} without a teacher" if layout.untaught_steps else ""


def draw(plan: Plan, path: str | Path) -> None:
    """Write the memory of all phases as stacked bars.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install "sdar-verl[local]"') from error
    names = [phase.name for phase in plan.phases]
    parts = list(dict.fromkeys(part for phase in plan.phases for part in phase.parts))
    figure = Figure(figsize=(9, 0.7 * len(names) + 2), layout="constrained")
    axes = figure.subplots()
    colours = _colours(len(parts))
    left = [0.0] * len(names)
    for part, colour in zip(parts, colours, strict=True):
        widths = [phase.parts.get(part, 0.0) / GIB for phase in plan.phases]
        axes.barh(names, widths, left=left, label=part, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(plan.gpu.memory / GIB, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"GiB on one {plan.gpu.name} (dashed: its memory)")
    axes.set_title(f"{plan.layout.architecture.name} on {plan.cards} GPUs")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def _colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab20"](index % 20) for index in range(number)]
