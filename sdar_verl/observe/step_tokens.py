"""A step's tokens as numpy arrays: what traces and distributions are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sdar_verl.algorithm.gap import StepStatistics
from sdar_verl.algorithm.gates import Ranges, gate_reads
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.config import LossConfig
from sdar_verl.observe.base import StepRows
from sdar_verl.report.distributions import Tokens
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.verl.fields import (
    GAP_POOLED,
    GAP_SHIFT,
    LOSS_SCALE,
    STEP_VALUES,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    StepValues,
)

_WANTED = ("responses", "response_mask", "old_log_probs", "entropy", "advantages", "rm_scores", "ref_log_prob")
_STATISTICS = (GAP_SHIFT, GAP_POOLED, LOSS_SCALE)


@dataclass(frozen=True)
class StepTokens:
    """Per-row arrays of one step, in the order of the batch's keys.

    Attributes:
        columns: field -> one array (response tokens,) per row; a field that this run does not have is absent. ``gap``
            and ``gate`` are there with a teacher; they hold NaN where the distillation term does not read it.
        lengths: (rows,) response tokens.
    """

    columns: dict[str, list[np.ndarray]]
    lengths: list[int]

    def distilled(self, rows: StepRows) -> Tokens | None:
        """All distilled tokens of the step, flat; None when there is none."""
        if "gap" not in self.columns:
            return None
        gap = np.concatenate(self.columns["gap"]).astype(np.float64)
        keep = np.isfinite(gap)
        if not keep.any():
            return None
        places = [_places(info, length) for info, length in zip(rows.infos, self.lengths, strict=True)]
        kl = None
        if "ref_log_prob" in self.columns:
            ratio = np.concatenate(self.columns["ref_log_prob"]).astype(np.float64)
            ratio -= np.concatenate(self.columns["old_log_probs"])
            kl = (np.expm1(ratio) - ratio)[keep]
        return Tokens(
            gap=gap[keep],
            gate=np.concatenate(self.columns["gate"]).astype(np.float64)[keep],
            turn=np.concatenate([turn for turn, _ in places])[keep],
            position=np.concatenate([position for _, position in places])[keep],
            kl=kl,
        )


def joined_tokens(parts: Sequence[StepTokens]) -> StepTokens:
    """The tokens of all ``parts`` of a step, one after the other."""
    names = set.intersection(*(set(part.columns) for part in parts))
    return StepTokens(
        {name: [row for part in parts for row in part.columns[name]] for name in parts[0].columns if name in names},
        [length for part in parts for length in part.lengths],
    )


def _places(info: RowInfo | None, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn of each token of a row, and its position within that turn's answer."""
    turn, position = np.full(length, 0 if info is None else info.turn), np.arange(length)
    for number, note in enumerate(info.turns if info is not None else ()):
        turn[note.start : note.stop] = number
        position[note.start : note.stop] = np.arange(note.stop - note.start)
    return turn, position


def read_tokens(rows: StepRows) -> StepTokens:
    """Fetch the step's token fields; gap and gate are those of the weights that played the episodes."""
    wanted = (*_WANTED, TEACHER_LOG_PROBS, TEACHER_MASK, *_STATISTICS)
    data = rows.get(wanted)
    present = set(data.keys())
    columns = {name: [row.float().cpu() for row in data[name].unbind()] for name in wanted if name in present}
    lengths = [len(row) for row in columns["responses"]]
    if TEACHER_LOG_PROBS in columns:
        step = rows.batch.extra_info.get(STEP_VALUES)
        columns |= gaps_and_gates(columns, rows.settings.loss, StepValues.from_dict(step) if step else None)
    return StepTokens({name: [row.numpy() for row in column] for name, column in columns.items()}, lengths)


def gaps_and_gates(
    columns: dict[str, list[torch.Tensor]], settings: LossConfig, step: StepValues | None = None
) -> dict[str, list[torch.Tensor]]:
    """``gap`` and ``gate`` of every row by the run's own loss; NaN where it does not read the teacher.

    Args:
        columns: per row ``response_mask``, ``old_log_probs``, the teacher's fields, ``entropy`` and the step's
            statistics where there are any.
        settings: the ``sdar.loss`` node.
        step: what the workers are told of this step; None: beta of the node.
    """
    names = {"response_mask", "old_log_probs", "entropy", TEACHER_LOG_PROBS, TEACHER_MASK, *_STATISTICS}
    padded = {
        name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True)
        for name, column in columns.items()
        if name in names
    }
    shift, pooled, scale = (padded.get(name) for name in _STATISTICS)
    terms = distillation_terms(
        padded["old_log_probs"],
        padded[TEACHER_LOG_PROBS],
        padded["response_mask"].bool(),
        gate=settings.gate,
        beta=settings.beta if step is None else step.beta,
        entropy=padded.get("entropy") if gate_reads(settings.gate, "entropy") else None,
        distill_mask=padded[TEACHER_MASK].bool(),
        gate_options=settings.gate_options,
        granularity=settings.granularity,
        centre=settings.centre,
        clamp=settings.clamp,
        statistics=StepStatistics(shift, pooled, scale, Ranges(*step.ranges) if step and step.ranges else None),
    )
    nan = torch.full_like(terms.gap, float("nan"))
    lengths = [len(row) for row in columns["old_log_probs"]]
    return {
        name: [row[:length] for row, length in zip(torch.where(terms.mask, values, nan), lengths, strict=True)]
        for name, values in (("gap", terms.gap), ("gate", terms.gate))
    }
