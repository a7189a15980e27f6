"""Objectives over distributions in a training step: what each pass is asked for, and what becomes of the answers.

    objective              student pass (old log-probs)   teacher pass              update
    forward_kl, top_k      -                              top_k                     divergence
    reverse_kl, jsd top_k  top_k_ids                      on_support of those ids   divergence
    any, full              -                              hidden, and the head      divergence

A teacher's distribution is kept as k log-probs per token, or as the hidden state from which its head makes all of
them: 4 * (2 * k + 1) bytes per token, or the hidden size in the model's precision, whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdar_verl.algorithm.divergences import COLUMNS, DIVERGENCES, SUPPORT_OF
from sdar_verl.config import LossConfig
from sdar_verl.verl.requests import COLUMN_PREFIX, SUPPORT_IDS, HeadRequest

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDict

TOP_K = 100
CHUNK_TOKENS = 128

_METRICS = {
    "divergence": "divergence",
    "student_entropy": "support_entropy/student",
    "teacher_entropy": "support_entropy/teacher",
    "student_tail": "tail_mass/student",
    "teacher_tail": "tail_mass/teacher",
}


@dataclass(frozen=True)
class StepRequests:
    """The requests of a step's passes; None: the pass has nothing to do here.

    Attributes:
        student: with the old log-probs.
        teacher: of the teacher pass.
        update: of the actor's update.
        carry: fields of the training rows that the teacher pass reads.
    """

    student: HeadRequest | None = None
    teacher: HeadRequest | None = None
    update: HeadRequest | None = None
    carry: tuple[str, ...] = ()


def reads_distributions(loss: LossConfig) -> bool:
    """Whether the objective is one over distributions."""
    return loss.objective in DIVERGENCES


def step_requests(loss: LossConfig) -> StepRequests:
    """What the passes of a step are asked for by the ``sdar.loss`` node."""
    if not reads_distributions(loss):
        return StepRequests()
    chunk = CHUNK_TOKENS if loss.chunk_tokens is None else loss.chunk_tokens
    if loss.support != "top_k":
        teacher = HeadRequest("hidden", chunk)
        return StepRequests(
            teacher=teacher, update=HeadRequest("divergence", chunk, 0, loss.objective, teacher=teacher)
        )
    k = top_k(loss)
    own = SUPPORT_OF[loss.objective] == "teacher"
    teacher = HeadRequest("top_k", chunk, k) if own else HeadRequest("on_support", chunk, k)
    return StepRequests(
        student=None if own else HeadRequest("top_k_ids", chunk, k),
        teacher=teacher,
        update=HeadRequest("divergence", chunk, k, loss.objective, loss.tail or "bucket", teacher),
        carry=() if own else (SUPPORT_IDS,),
    )


def top_k(loss: LossConfig) -> int:
    """``sdar.loss.top_k``, or its default."""
    return TOP_K if loss.top_k is None else loss.top_k


def divergence_signal(model_output: Mapping[str, Any], data: TensorDict) -> dict[str, torch.Tensor]:
    """``divergence`` (batch, response_length), with gradient, for an objective over distributions; else empty."""
    values = model_output.get(f"{COLUMN_PREFIX}divergence")
    return {} if values is None else {"divergence": _response(values, data)}


def column_sums(model_output: Mapping[str, Any], data: TensorDict, mask: torch.Tensor) -> dict[str, float]:
    """Sum of each column over the distilled tokens, ``mask`` (batch, response_length); empty without columns."""
    if f"{COLUMN_PREFIX}{COLUMNS[0]}" not in model_output:
        return {}
    columns = {name: _response(model_output[f"{COLUMN_PREFIX}{name}"].detach(), data) for name in COLUMNS}
    return {f"distribution_{name}": values[mask].double().sum().item() for name, values in columns.items()}


def column_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics from the sums over all micro-batches and ranks; empty where the objective reads no distributions."""
    tokens = sums.get("tokens", 0.0)
    if not tokens or "distribution_divergence" not in sums:
        return {}
    return {f"sdar/{metric}": sums[f"distribution_{name}"] / tokens for name, metric in _METRICS.items()}


def _response(values: torch.Tensor, data: TensorDict) -> torch.Tensor:
    from verl.workers.utils.padding import no_padding_2_padding

    return no_padding_2_padding(values, data)
