"""An evaluation plan: arms, seeds, their order by information per dollar, and when an arm is given up.

``sdar-verl sweep --plan FILE`` runs it; docs/cloud.md describes the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdar_verl.errors import ConfigError
from sdar_verl.observe.warnings import NAMES
from sdar_verl.report import layout
from sdar_verl.report.read import RunData, read_run
from sdar_verl.report.stats import wilson


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Below(_Node):
    """Give an arm up that is below the baseline: by at least ``by``, and below its 95 % interval, at step ``at``.

    Recipes of verl's count no episodes: there ``by`` alone decides.
    """

    by: float = Field(..., ge=0, lt=1)
    at: int = Field(..., ge=1)


class Kill(_Node):
    """When an arm is given up. A run that ends on NaN, or fails otherwise, always is the last of its arm."""

    warnings: tuple[str, ...] = Field((), description="names of docs/metrics.md that a healthy run does not show")
    below: Below | None = None

    @model_validator(mode="after")
    def _known(self) -> Kill:
        unknown = sorted(set(self.warnings) - set(NAMES))
        if unknown:
            raise ValueError(f"no such warning: {', '.join(unknown)}; known: {', '.join(NAMES)}")
        return self


class Plan(_Node):
    """The file."""

    config: str = Field(..., min_length=1)
    overrides: tuple[str, ...] = ()
    baseline: str
    arms: dict[str, tuple[str, ...]] = Field(..., min_length=2)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    kill: Kill = Kill()
    validation: str = "student"
    hours: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="of a run, as measured; null: by the planner"
    )

    @model_validator(mode="after")
    def _baseline(self) -> Plan:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={self.baseline!r} is none of the arms: {', '.join(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names a seed twice")
        bad = [name for name in self.arms if not re.fullmatch(r"[\w.+-]+", name, re.ASCII)]
        if bad:
            raise ValueError(f"arms are names of folders, of letters, digits and . _ + - alone: {bad}")
        return self


def read_plan(file: Path) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: names the file, the place and what is known.
    """
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Plan.model_validate(raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--plan {file}: cannot be read: {error}") from error
    except ValidationError as error:
        faults = []
        for item in error.errors():
            place = ".".join(map(str, item["loc"]))
            known = ""
            if item["type"] == "extra_forbidden":
                known = f"; known: {', '.join((Kill if place.startswith('kill.') else Plan).model_fields)}"
            faults.append(f"{place or 'plan'}: {item['msg'].removeprefix('Value error, ')}{known}")
        raise ConfigError(f"--plan {file}: " + "\n".join(faults)) from None


@dataclass(frozen=True)
class Planned:
    """One run of a plan: an arm with a seed, its hours and, with a price, its cost; its steps, 0 where unknown."""

    arm: str
    seed: int
    hours: float
    usd: float | None
    steps: int

    def usd_from(self, step: int) -> float:
        """USD that the steps after ``step`` take; all of them where nobody knows how many there are, or the price."""
        share = max(1 - step / self.steps, 0.0) if self.steps else 1.0
        return (self.usd or 0.0) * share


def order(plan: Plan, hours: Mapping[str, float], price: float | None, steps: Mapping[str, int]) -> list[Planned]:
    """All runs, those that tell most per hour first.

    What is asked is each arm's difference to the baseline. With k runs of an arm its mean has the variance 1/k (in
    units of the seeds' variance); the next run takes 1/k - 1/(k + 1) off, once for each difference that it is part of:
    for the baseline, that of every arm. An arm without a run has no difference at all, so first seeds come first, the
    baseline's before all.
    """
    taken = dict.fromkeys(plan.arms, 0)
    runs: list[Planned] = []

    def worth(arm: str) -> tuple[bool, float]:
        k, differences = taken[arm], len(plan.arms) - 1 if arm == plan.baseline else 1
        gain = 1.0 if k == 0 else 1 / k - 1 / (k + 1)
        return k == 0, differences * gain / hours[arm]

    while len(runs) < len(plan.arms) * len(plan.seeds):
        arm = max((name for name in plan.arms if taken[name] < len(plan.seeds)), key=worth)
        usd = None if price is None else hours[arm] * price
        runs.append(Planned(arm, plan.seeds[taken[arm]], hours[arm], usd, steps[arm]))
        taken[arm] += 1
    return runs


def affordable(runs: Sequence[Planned], budget: float | None) -> int:
    """How many of the runs, in their order, the budget pays for by the estimate."""
    spent = 0.0
    for number, run in enumerate(runs):
        spent += run.usd or 0.0
        if budget is not None and spent > budget:
            return number
    return len(runs)


def give_up(plan: Plan, arm: str, run: RunData, baselines: Sequence[RunData]) -> str | None:
    """Why an arm is not worth another step; None while it is.

    Args:
        plan: whose criteria count.
        arm: of the run.
        run: as far as it has come.
        baselines: the baseline's runs so far.
    """
    told = sorted({str(warning.get("name")) for warning in run.warnings} & set(plan.kill.warnings))
    if told:
        return f"it warns of {', '.join(told)}"
    below = plan.kill.below
    if below is None or arm == plan.baseline:
        return None
    key, episodes = (f"sdar-val/{plan.validation}/{name}" for name in ("success", "episodes"))
    own = dict(run.column(key)).get(below.at)
    theirs = [
        (dict(one.column(key))[below.at], dict(one.column(episodes)).get(below.at, 0.0))
        for one in baselines
        if below.at in dict(one.column(key))
    ]
    if own is None or not theirs:
        return None
    solved, played = sum(share * number for share, number in theirs), sum(number for _, number in theirs)
    mean = solved / played if played else sum(share for share, _ in theirs) / len(theirs)
    low = wilson(solved, played)[0] if played else mean
    if own <= mean - below.by and own < low:
        return f"success {own:.3f} at step {below.at}, the baseline {mean:.3f}" + (
            f" (95 % interval from {low:.3f})" if played else ""
        )
    return None


def look(folder: Path) -> RunData | None:
    """A run as far as it has come; None before its first line."""
    if layout.find_record(folder) is None:
        return None
    return read_run(folder)


def step_counts(configs: Mapping[str, Any]) -> dict[str, int]:
    """Training steps of a run of each arm; 0 where nobody knows."""
    from sdar_verl.planner.own_data import count_steps, train_rows

    return {arm: count_steps(config, train_rows(config)) for arm, config in configs.items()}


def validation_faults(plan: Plan, configs: Mapping[str, Any], steps: Mapping[str, int]) -> list[str]:
    """What of the plan's validation its runs do not make: the arm that counts, the step at which one is given up."""
    from sdar_verl.config import load_config
    from sdar_verl.recipe import plays_environments
    from sdar_verl.report.recipe_metrics import arm_names

    faults, below = [], plan.kill.below
    for arm, config in configs.items():
        known = arm_names(load_config(config.sdar).validation.arms, plays_environments(config))
        if plan.validation not in known:
            faults.append(f"validation={plan.validation!r} is no arm of {arm}'s validations: {', '.join(known)}")
        if below is None:
            continue
        frequency, last = int(config.trainer.test_freq), steps[arm]
        # verl validates after the last step, too.
        validates = frequency > 0 and (below.at % frequency == 0 or below.at == last)
        if not validates or 0 < last < below.at:
            faults.append(
                f"kill.below.at={below.at}: {arm} does not validate then (trainer.test_freq={frequency}"
                + (f", {last} steps)" if last else ")")
            )
    return faults


def planned_hours(plan: Plan, configs: Mapping[str, Any], gpu: str) -> tuple[dict[str, float], list[str]]:
    """Hours of a run of each arm: the plan's own number, else the planner's; and what the latter does not know.

    Raises:
        ConfigError: the planner does not know the model or how many steps a run has, or a run does not fit.
    """
    if plan.hours is not None:
        return dict.fromkeys(plan.arms, plan.hours), []
    from sdar_verl.config import load_config
    from sdar_verl.planner.hardware import find_gpu
    from sdar_verl.planner.own_data import read_layout
    from sdar_verl.planner.plan import make_plan

    hours, told = {}, []
    for arm, config in configs.items():
        layout, notes, stops = read_layout(config, load_config(config.sdar))
        if not layout.known:
            raise ConfigError(f"arm {arm}: {layout.unknown}, or the plan's hours")
        made = make_plan(layout, find_gpu(gpu))
        if not made.fits:
            raise ConfigError(f"arm {arm} does not fit on {made.cards} x {gpu}: {'; '.join(made.faults)}")
        hours[arm] = made.hours
        told += [f"{arm}: {note}" for note in [*notes, *(f"would not start: {why}" for why in stops)]]
    return hours, told
