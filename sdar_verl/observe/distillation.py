"""What the trainer adds to a step for the distillation term: lambda and beta, statistics over all rows, signals.

Workers see micro-batches. Whatever spans rows is computed here, once per step, from all rows; whatever changes with
the step is decided here and travels with the batch.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from omegaconf import open_dict
from tensordict import TensorDict

from sdar_verl.algorithm.gap import StepStatistics, step_statistics, token_gap
from sdar_verl.algorithm.gates import gate_reads
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.masking import clean
from sdar_verl.algorithm.schedules import Scheduled, make_schedule
from sdar_verl.algorithm.signals import SignalRows, get_signal, signal_reads
from sdar_verl.config import LossConfig, ScheduleConfig, SdarConfig
from sdar_verl.observe.base import StepRows, TrainerPart
from sdar_verl.observe.metrics import gap_metrics
from sdar_verl.verl.fields import (
    GAP_POOLED,
    GAP_SHIFT,
    LOSS_SCALE,
    STEP_VALUES,
    TEACHER_ENTROPY,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    StepValues,
)

_READ = (
    "response_mask",
    "old_log_probs",
    "advantages",
    "rm_scores",
    "entropy",
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    TEACHER_ENTROPY,
)


class Distillation(TrainerPart):
    """Lambda and beta of the step, the step's statistics, and the signals that change advantages.

    Args:
        settings: the ``sdar`` node.
        config: verl's whole config; it is told to compute the student's entropy during the update when the gate
            reads it.
    """

    name: ClassVar[str] = "distillation"

    def __init__(self, settings: SdarConfig, config: Any):
        self._settings = settings.loss
        self._coef = scheduled(settings.loss.coef, settings.loss.coef_schedule)
        self._beta = scheduled(settings.loss.beta, settings.loss.beta_schedule)
        if gate_reads(settings.loss.gate, "entropy"):
            with open_dict(config):
                config.actor_rollout_ref.actor.calculate_entropy = True

    def on_advantages(self, rows: StepRows) -> None:
        """Before the update: advantages, statistics and the step's values into the batch."""
        coef, beta = self._coef.value(rows.step), self._beta.value(rows.step)
        rows.metrics["sdar/lambda"], rows.metrics["sdar/beta"] = coef, beta
        stored = rows.get(_READ)
        ranges = None
        if TEACHER_LOG_PROBS in stored:
            table = StepTable.from_rows(stored, rows)
            statistics = table.statistics(self._settings, beta)
            ranges = statistics.ranges
            fields = {GAP_SHIFT: statistics.shift, GAP_POOLED: statistics.pooled, LOSS_SCALE: statistics.scale}
            if not signal_reads(self._settings.signal, "loss", self._settings.signal_options):
                shaped = table.shape_advantages(self._settings, coef, beta, statistics)
                rows.metrics["sdar/advantage_change"] = table.mean_change(shaped)
                fields["advantages"] = shaped
            put_padded(rows, {name: value for name, value in fields.items() if value is not None}, stored)
            rows.metrics.update(table.metrics())
        in_loss = signal_reads(self._settings.signal, "loss", self._settings.signal_options)
        every = self._settings.measure_every
        due = every is not None and coef > 0 and in_loss and (rows.step - 1) % every == 0
        values = StepValues(measure=rows.step if due else None, coef=coef if in_loss else 0.0, beta=beta, ranges=ranges)
        rows.batch.extra_info[STEP_VALUES] = values.as_dict()

    def on_trained(self, step: int, metrics: dict[str, Any]) -> None:
        """After the update: what the schedules follow."""
        for value in (self._coef, self._beta):
            measured = metrics.get(value.schedule.measures) if value.schedule.measures else None
            if measured is not None:
                value.schedule.observe(value.value(step), float(measured))

    def state_dict(self) -> dict[str, Any]:
        """What the schedules have learned."""
        states = {"coef": self._coef.schedule.state, "beta": self._beta.schedule.state}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for name, value in (("coef", self._coef), ("beta", self._beta)):
            if name in state:
                value.schedule.state = state[name]


def scheduled(base: float, node: ScheduleConfig) -> Scheduled:
    """A value and its ``..._schedule`` node. ValueError when the schedule does not take the options."""
    return Scheduled(base, make_schedule(node.name, node.options), node.start_step, node.stop_step, node.warmup_steps)


@dataclass(frozen=True)
class StepTable:
    """All rows of a step as padded tensors (rows, response_length), and who they are.

    Attributes:
        response: bool, sampled tokens.
        mask: bool, sampled tokens that have a teacher.
        old: the student's log-probs at the start of the step, nats.
        teacher: the teacher's, nats.
        advantages: as the estimator gave them.
        scores: (rows,), return of the row's episode.
        entropy: the student's at the start of the step, nats, or None.
        teacher_entropy: nats, or None.
        episode_ids, group_ids, turns: per row.
    """

    response: torch.Tensor
    mask: torch.Tensor
    old: torch.Tensor
    teacher: torch.Tensor
    advantages: torch.Tensor
    scores: torch.Tensor
    entropy: torch.Tensor | None
    teacher_entropy: torch.Tensor | None
    episode_ids: list[Hashable]
    group_ids: list[Hashable]
    turns: list[int]

    @classmethod
    def from_rows(cls, stored: TensorDict, rows: StepRows) -> StepTable:
        """From the stored fields; verl's row keys are ``{uid}_{session}_{turn}``."""
        padded = stored.to_padded_tensor()
        mask = padded[TEACHER_MASK].bool() & padded["response_mask"].bool()
        return cls(
            response=padded["response_mask"].bool(),
            mask=mask,
            old=clean("old_log_probs", padded["old_log_probs"], mask),
            teacher=clean("teacher_log_probs", padded[TEACHER_LOG_PROBS], mask),
            advantages=padded["advantages"],
            scores=padded["rm_scores"].sum(dim=-1),
            entropy=padded.get("entropy", None),
            teacher_entropy=padded.get(TEACHER_ENTROPY, None),
            episode_ids=[key.rsplit("_", 1)[0] for key in rows.batch.keys],
            group_ids=[key.rsplit("_", 2)[0] for key in rows.batch.keys],
            turns=[0 if info is None else info.turn for info in rows.infos],
        )

    def statistics(self, settings: LossConfig, beta: float) -> StepStatistics:
        """What rows must know of each other under these settings."""
        return step_statistics(
            self.old,
            self.teacher,
            self.response,
            self.episode_ids,
            distill_mask=self.mask,
            entropy=self.entropy if gate_reads(settings.gate, "entropy") else None,
            gate=settings.gate,
            beta=beta,
            gate_options=settings.gate_options,
            granularity=settings.granularity,
            centre=settings.centre,
            clamp=settings.clamp,
            divide_by=settings.divide_by,
            gap_threshold=settings.gap_threshold,
        )

    def shape_advantages(
        self, settings: LossConfig, strength: float, beta: float, statistics: StepStatistics
    ) -> torch.Tensor:
        """The advantages as the signal wants them, (rows, response_length)."""
        terms = distillation_terms(
            self.old,
            self.teacher,
            self.response,
            gate=settings.gate,
            beta=beta,
            entropy=self.entropy if gate_reads(settings.gate, "entropy") else None,
            distill_mask=self.mask,
            gate_options=settings.gate_options,
            granularity=settings.granularity,
            centre=settings.centre,
            clamp=settings.clamp,
            statistics=statistics,
        )
        table = SignalRows(
            advantages=self.advantages,
            response_mask=self.response,
            mask=self.mask,
            old_log_probs=self.old,
            teacher_log_probs=self.teacher,
            gap=token_gap(terms.gap, self.mask, centre=settings.centre, clamp=settings.clamp, statistics=statistics),
            gate=terms.gate,
            episode_ids=self.episode_ids,
            group_ids=self.group_ids,
            turns=self.turns,
            scores=self.scores,
        )
        shaped = get_signal(settings.signal)(table, strength=strength, **settings.signal_options)
        if shaped.shape != self.advantages.shape:
            raise ValueError(
                f"signal {settings.signal!r} returned shape {tuple(shaped.shape)}; "
                f"expected {tuple(self.advantages.shape)}"
            )
        return clean(f"signal {settings.signal}", shaped, self.response).to(self.advantages.dtype)

    def mean_change(self, shaped: torch.Tensor) -> float:
        """Mean absolute change of an advantage over all sampled tokens."""
        change = (shaped - self.advantages).abs()[self.response]
        return change.double().mean().item() if len(change) else 0.0

    def metrics(self) -> dict[str, float]:
        """Gap and entropies over the step."""
        return gap_metrics(
            self.teacher - self.old,
            self.mask,
            self.response,
            self.episode_ids,
            self.turns,
            self.entropy,
            self.teacher_entropy,
        )


def put_padded(rows: StepRows, fields: dict[str, torch.Tensor], stored: TensorDict) -> None:
    """Write padded tensors (rows, response_length) as verl stores them, nested over the tokens of each response."""
    if not fields:
        return
    from verl.workers.utils.padding import response_to_nested

    nested = {name: response_to_nested(value.contiguous(), stored["response_mask"]) for name, value in fields.items()}
    rows.put(TensorDict(nested, batch_size=len(rows.batch.keys)))
