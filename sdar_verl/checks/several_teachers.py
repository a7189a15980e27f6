"""What can be wrong with ``sdar.context.teachers`` and is known before Ray starts."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from sdar_verl.checks.panel_tasks import panel_tasks
from sdar_verl.config import SdarConfig
from sdar_verl.context.builder import choosing_value, chosen_source
from sdar_verl.context.registry import ContextError
from sdar_verl.requests import distribution_option, reads_distributions

NODE = "sdar.context.teachers"


def several_teachers_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault, one line each; ``config`` is verl's whole config."""
    teachers, sources = sdar.context.teachers, sdar.context.sources
    faults = []
    if teachers.choice and teachers.by is None:
        faults.append(f"{NODE}.choice={teachers.choice} has no effect with {NODE}.by=null; name the column there")
    if teachers.weights and teachers.by is not None:
        faults.append(
            f"{NODE}.weights={teachers.weights} mixes the teachers of a row, {NODE}.by={teachers.by} chooses one; "
            "leave one of them out"
        )
    if teachers.several and len(sources) < 2:
        faults.append(f"{NODE} needs several sdar.context.sources, a teacher each; there is one: {sources}")
    if faults:
        return faults
    return [*_mixed(sdar), *_chosen(config, sdar)]


def _mixed(sdar: SdarConfig) -> Iterator[str]:
    weights, sources = sdar.context.teachers.weights, sdar.context.sources
    if not weights:
        return
    if len(weights) != len(sources):
        yield f"{NODE}.weights={weights} must have a number per source; sdar.context.sources={sources}"
    if reads_distributions(sdar.loss):
        yield (
            f"{NODE}.weights={weights} mixes the probabilities of the sampled token, but "
            f"{distribution_option(sdar.loss)} reads the teacher's distribution; use sdar.loss.objective=sampled, k1, "
            f"k2 or k3 without an anchor, or a teacher per row ({NODE}.by)"
        )


def _chosen(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    teachers, sources = sdar.context.teachers, sdar.context.sources
    if teachers.by is None:
        return
    if not teachers.choice:
        yield f"{NODE}.by={teachers.by} needs {NODE}.choice, a source for each value of it"
        return
    for value, name in teachers.choice.items():
        if name not in sources:
            yield f"{NODE}.choice.{value}={name} is none of sdar.context.sources={sources}; name it there"
    idle = [name for name in sources if name not in teachers.choice.values()]
    if idle:
        yield (
            f"sdar.context.sources={sources}: {', '.join(idle)} would teach no row, since {NODE}.choice does not name "
            f"{'it' if len(idle) == 1 else 'them'}; add it there, or leave it out"
        )
    shown = any(arm.context == "teacher" for arm in sdar.validation.arms.values())
    for option in ("train_files", *(["val_files"] if shown else [])):
        for task in {choosing_value(teachers, task): task for task in reversed(panel_tasks(config, option))}.values():
            try:
                chosen_source(teachers, task)
            except ContextError as error:
                yield f"data.{option}: {error}"
