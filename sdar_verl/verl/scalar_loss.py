"""The distillation term as one number, without a trainer: for a method of one's own, or to try a gate."""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.core_algos import agg_loss

from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.stats import stats_sums


def gated_distillation_loss(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, float]]:
    """L_SDAR as a scalar, aggregated by verl's ``agg_loss``, and its sums for the metrics.

    The tensors and ``options`` are the arguments of :func:`distillation_terms`. The last four below are verl's numbers
    of the global batch: with them, gradients accumulated over micro-batches and averaged over ranks do not depend on
    how the batch was split (a worker passes ``**config.global_batch_info``). Without them the loss is the mean over
    this batch.

    Args:
        loss_agg_mode: one of verl's modes (token-mean, token-sum, seq-mean-token-sum, seq-mean-token-sum-norm,
            seq-mean-token-mean). The paper's Agg is seq-mean-token-mean when a row is a trajectory.
        dp_size: data-parallel ranks that average their gradients.
        batch_num_tokens: valid response tokens in the global batch.
        global_batch_size: rows in the global batch.
        loss_scale_factor: divisor of seq-mean-token-sum-norm; None: response_length.

    Returns:
        loss: scalar; 0 with a gradient of 0 when no token is valid.
        stats: see :func:`sdar_verl.algorithm.stats.stats_sums`.

    Raises:
        ValueError: as :func:`distillation_terms`; an unknown ``loss_agg_mode``; dp_size > 1 without the global
            number that the mode divides by.
    """
    terms = distillation_terms(student_log_probs, teacher_log_probs, response_mask, **options)
    loss = agg_loss(
        loss_mat=terms.loss,
        loss_mask=terms.response_mask,
        loss_agg_mode=loss_agg_mode,
        dp_size=dp_size,
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        loss_scale_factor=loss_scale_factor,
    )
    if not response_mask.any():
        loss = terms.loss.sum()  # the mean over nothing would be 0 / 0; this 0 is still part of the graph
    return loss, stats_sums(terms)
