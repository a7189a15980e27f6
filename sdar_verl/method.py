"""The method: the ``sdar.loss`` settings made into one object.

    L = L_RL + lambda * Agg[ g_t * objective_t ],      g_t = sg[ gate(gap_t; beta) ]      (arXiv:2605.15155, equation 8)

The trainer sees all rows of a step, a worker a micro-batch; both ask the same object:

    Strengths.at(step)      lambda, beta and the policy gradient's weight            trainer
    Method.judge(table)     what spans rows; gap and gate; shaped advantages         trainer, once per local update
    Method.terms(rows)      the gated objective per token, with gradient             worker, once per micro-batch

Whatever spans rows is decided in the trainer and travels with the batch, so the loss does not depend on how rows are
dealt to micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch

from sdar_verl.algorithm.gap import StepStatistics, step_statistics, token_gap, trajectory_scale
from sdar_verl.algorithm.gates import Ranges, gate_reads
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.masking import clean
from sdar_verl.algorithm.schedules import Scheduled, make_schedule, measures_of
from sdar_verl.algorithm.signals import SignalRows, shaped_advantages, shapes_advantages, signal_reads
from sdar_verl.algorithm.terms import DistillationTerms
from sdar_verl.config.loss import LossConfig, ScheduleConfig
from sdar_verl.errors import ConfigError
from sdar_verl.fields import CONTRAST, GAP_POOLED, GAP_SHIFT, LOSS_SCALE, STATISTICS, TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.table import StepTable


@dataclass(frozen=True)
class StepValues:
    """What the trainer tells the workers at each step.

    Attributes:
        coef: lambda of the auxiliary loss; 0 when the signal enters elsewhere.
        beta: sharpness of the gate.
        ranges: of entropy and gap over the step, for gates that ask for them.
        measure: the step's number when both gradients are to be measured in weight space, else None.
        only: ``rl`` or ``distillation`` during such a measurement: the loss that is differentiated alone.
    """

    coef: float
    beta: float
    ranges: tuple[float, float, float, float] | None = None
    measure: int | None = None
    only: str | None = None


@dataclass(frozen=True)
class Judgement:
    """What :meth:`Method.judge` found out of all rows of a local update.

    Attributes:
        values: for the workers.
        columns: (rows, response_length) to write beside the rows: statistics, shaped advantages.
        gap, gate: (rows, response_length), at the weights the step began with.
        change: mean absolute change of an advantage over the sampled tokens; None where the signal leaves them alone.
    """

    values: StepValues
    columns: dict[str, torch.Tensor]
    gap: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    change: float | None = None


class Method:
    """Gate, objective, signal and statistics of one run.

    Args:
        settings: the ``sdar.loss`` node.
    """

    def __init__(self, settings: LossConfig):
        self.settings = settings
        self.in_loss = signal_reads(settings.signal, "loss", settings.signal_options)
        self.shapes = shapes_advantages(settings.signal)
        self.reads_entropy = gate_reads(settings.gate, "entropy")
        self.reads_advantages = gate_reads(settings.gate, "advantages")
        self._shape: dict[str, Any] = {name: getattr(settings, name) for name in ("granularity", "centre", "clamp")}
        self._gate: dict[str, Any] = {"gate": settings.gate, "gate_options": settings.gate_options}

    def judge(self, table: StepTable, coef: float, beta: float, rl: float = 1.0) -> Judgement:
        """Look at all rows of a local update before it is made.

        Args:
            table: with log-probs, the teacher's where there are any, and advantages.
            coef: lambda of the step.
            beta: of the step.
            rl: weight of the policy gradient in the step.
        """
        settings, measure = self.settings, self._measure(table, coef)
        coef_of_loss = coef if self.in_loss else 0.0
        advantages = rl * table.columns["advantages"]
        weighted = {} if rl == 1.0 else {"advantages": advantages}
        if TEACHER_LOG_PROBS not in table.columns:  # a teacher that is scored inside the update, or has retired
            if settings.divide_by == "trajectory":
                weighted[LOSS_SCALE] = trajectory_scale(table.response, table.episode_ids)
            return Judgement(StepValues(coef_of_loss, beta, measure=measure), weighted)
        old = clean("old_log_probs", table.columns["old_log_probs"], table.mask)
        teacher = clean("teacher_log_probs", table.columns[TEACHER_LOG_PROBS], table.mask)
        entropy = table.columns.get("entropy") if self.reads_entropy else None
        known = {"distill_mask": table.mask, "entropy": entropy, "beta": beta, **self._gate, **self._shape}
        known["advantages"] = advantages if self.reads_advantages else None
        against = table.contrast
        statistics = step_statistics(
            old if against is None else against,
            teacher,
            table.response,
            table.episode_ids,
            divide_by=settings.divide_by,
            gap_threshold=settings.gap_threshold,
            **known,
        )
        terms = distillation_terms(old, teacher, table.response, against=against, statistics=statistics, **known)
        columns = {GAP_SHIFT: statistics.shift, GAP_POOLED: statistics.pooled, LOSS_SCALE: statistics.scale}
        columns |= {CONTRAST: against, **weighted}
        change = None
        if self.shapes and coef == 0:
            change = 0.0  # plain GRPO, whatever the signal
        elif self.shapes:
            shaped = self._shape_advantages(table, advantages, old, teacher, terms, statistics, coef)
            change = _mean_change(shaped, advantages, table)
            columns["advantages"] = shaped
        return Judgement(
            StepValues(coef_of_loss, beta, statistics.ranges, measure),
            {name: value for name, value in columns.items() if value is not None},
            terms.gap,
            terms.gate,
            change,
        )

    def terms(
        self,
        log_probs: torch.Tensor,
        rows: Mapping[str, torch.Tensor],
        values: StepValues,
        *,
        entropy: torch.Tensor | None = None,
        divergence: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> DistillationTerms:
        """The distillation term per token of a micro-batch, with gradient to ``log_probs``.

        Args:
            log_probs: (rows, response_length), the student's of now, nats.
            rows: ``response_mask``, ``old_log_probs``, the teacher's log-probs and mask, what statistics there are, and
                ``advantages`` for a gate that reads them.
            values: of the step.
            entropy: (rows, response_length), the student's, nats, for a gate that reads it.
            divergence: (rows, response_length), between the two distributions, nats, for an objective that is one.
            target: (rows, response_length), log-probs of the sampled tokens under an anchored target, nats.

        Raises:
            ConfigError: the gate reads the entropy, and there is none.
        """
        settings = self.settings
        if entropy is None and self.reads_entropy:
            raise ConfigError(
                f"sdar.loss.gate={settings.gate} reads the student's entropy, but the engine gives none; use an "
                "engine that computes it (actor_rollout_ref.actor.strategy fsdp or fsdp2), or another gate"
            )
        shift, pooled, scale = (rows.get(name) for name in STATISTICS)
        return distillation_terms(
            log_probs,
            rows[TEACHER_LOG_PROBS],
            rows["response_mask"],
            beta=values.beta,
            objective=settings.objective,
            objective_options=settings.objective_options,
            importance_clip=settings.importance_clip,
            entropy=entropy if self.reads_entropy else None,
            old_log_probs=rows["old_log_probs"],
            advantages=rows["advantages"] if self.reads_advantages else None,
            against=rows.get(CONTRAST),
            target_log_probs=target,
            distill_mask=rows[TEACHER_MASK].bool(),
            statistics=StepStatistics(shift, pooled, scale, Ranges(*values.ranges) if values.ranges else None),
            divergence=divergence,
            **self._gate,
            **self._shape,
        )

    def _measure(self, table: StepTable, coef: float) -> int | None:
        every = self.settings.measure_every
        due = every is not None and coef > 0 and self.in_loss and (table.step - 1) % every == 0
        return table.step if due else None

    def _shape_advantages(
        self,
        table: StepTable,
        advantages: torch.Tensor,
        old: torch.Tensor,
        teacher: torch.Tensor,
        terms: DistillationTerms,
        statistics: StepStatistics,
        strength: float,
    ) -> torch.Tensor:
        settings = self.settings
        rows = SignalRows(
            advantages=advantages,
            response_mask=table.response,
            mask=table.mask,
            old_log_probs=old,
            teacher_log_probs=teacher,
            gap=token_gap(terms.gap, table.mask, centre=settings.centre, clamp=settings.clamp, statistics=statistics),
            gate=terms.gate,
            episode_ids=table.episode_ids,
            group_ids=table.group_ids,
            turns=table.turns,
            scores=table.columns["rm_scores"].sum(dim=-1),
        )
        return shaped_advantages(settings.signal, rows, strength, settings.signal_options)


def _mean_change(shaped: torch.Tensor, base: torch.Tensor, table: StepTable) -> float:
    change = (shaped - base).abs()[table.response]
    return change.double().mean().item() if len(change) else 0.0


class StepStrengths(NamedTuple):
    """Lambda, beta and the weight of the policy gradient at a step."""

    coef: float
    beta: float
    rl: float


class Strengths:
    """Lambda, beta and the other weights over the steps; what their schedules have learned is part of a
    checkpoint.

    Args:
        settings: the ``sdar.loss`` node.
    """

    name = "distillation"

    def __init__(self, settings: LossConfig):
        self._reference = settings.anchor.reference
        self._told: set[str] = set()
        self._values = {
            "coef": scheduled(settings.coef, settings.coef_schedule),
            "beta": scheduled(settings.beta, settings.beta_schedule),
            "rl": scheduled(settings.rl_coef, settings.rl_schedule),
            "anchor": scheduled(settings.anchor.student, settings.anchor.student_schedule),
        }

    def at(self, step: int) -> StepStrengths:
        """Those of a step, from 1. ValueError where a schedule makes one negative, or no number."""
        found = StepStrengths(*(self._values[name].value(step) for name in StepStrengths._fields))
        for name, value in found._asdict().items():
            if not 0.0 <= value < math.inf:
                raise ValueError(
                    f"sdar.loss.{name}_schedule comes to {value:g} at step {step}; its factor must be finite and at "
                    "least 0"
                )
        return found

    def anchor(self, step: int) -> float:
        """The student's weight in an anchored target. ValueError where it leaves the teacher none."""
        weight = self._values["anchor"].value(step)
        if not 0.0 <= weight < 1.0 - self._reference:
            raise ValueError(
                f"sdar.loss.anchor.student_schedule makes the student's weight {weight:g} at step {step}; beside "
                f"anchor.reference={self._reference:g} it must lie in [0, {1.0 - self._reference:g})"
            )
        return weight

    def retired(self, step: int) -> bool:
        """Whether lambda is 0 at this step and at all later ones: nobody asks the teacher any more."""
        return self._values["coef"].ended(step)

    @property
    def measures(self) -> set[str]:
        """The metrics that the schedules follow."""
        return {name for value in self._values.values() for name in measures_of(value.schedule)}

    def observe(self, step: int, metrics: Mapping[str, Any]) -> None:
        """What the schedules follow, after the step's updates; one that follows what nobody measures is told once."""
        for option, value in self._values.items():
            names = measures_of(value.schedule)
            if not names or not value.learns(step):
                continue
            missing = [name for name in names if metrics.get(name) is None]
            if not missing:
                value.schedule.observe(value.value(step), *(float(metrics[name]) for name in names))
            for name in {*missing} - self._told:
                near = ", ".join(get_close_matches(name, metrics, n=3, cutoff=0.5)) or "nothing like it"
                print(f"sdar: the schedule of {option} follows {name}, not measured at step {step}; there is {near}")
            self._told |= {*missing}

    def state_dict(self) -> dict[str, Any]:
        """What they have learned; empty where they learn nothing."""
        return {name: value.schedule.state for name, value in self._values.items() if value.schedule.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back. ValueError where a schedule that learns finds nothing."""
        for name, value in self._values.items():
            if name in state:
                value.schedule.state = state[name]
            elif value.schedule.state:
                raise ValueError(f"it holds nothing of the schedule of {name} (sdar.loss)")


def scheduled(base: float, node: ScheduleConfig) -> Scheduled:
    """A value and its ``..._schedule`` node. ValueError when the schedule does not take the options."""
    return Scheduled(base, make_schedule(node.name, node.options), node.start_step, node.stop_step, node.warmup_steps)
