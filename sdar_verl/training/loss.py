"""The actor worker's loss: verl's own PPO loss plus lambda times the gated self-distillation term."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.stats import stats_sums
from sdar_verl.config import LossConfig
from sdar_verl.training.fields import SUMS_PREFIX, TEACHER_LOG_PROBS, TEACHER_MASK


def sdar_loss(
    config: ActorConfig,
    settings: LossConfig,
    model_output: dict[str, Any],
    data: TensorDict,
    dp_group: Any = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """``L = L_PPO + lambda * Agg[g_t * objective_t]`` of one micro-batch (paper, equation 8).

    Both terms are normalised by verl's numbers of the global mini-batch, so the gradient does not depend on how the
    batch is split into micro-batches and ranks.

    Args:
        config: verl's actor config; verl's loss and ``loss_agg_mode`` come from it.
        settings: the ``sdar.loss`` node.
        model_output: the engine's, with ``log_probs`` of the whole sequences.
        data: the micro-batch: verl's fields, ``teacher_log_probs`` and ``teacher_mask`` (nested, response tokens).
        dp_group: unused, part of verl's signature.

    Returns:
        The loss to differentiate, and metrics; those of this package are sums, so that they reduce exactly.
    """
    loss, metrics = ppo_loss(config=config, model_output=model_output, data=data, dp_group=dp_group)

    log_probs = no_padding_2_padding(model_output["log_probs"], data)
    fields = data.select("response_mask", "old_log_probs", TEACHER_LOG_PROBS, TEACHER_MASK).to_padded_tensor()
    response_mask = fields["response_mask"].to(bool)
    terms = distillation_terms(
        log_probs,
        fields[TEACHER_LOG_PROBS],
        response_mask,
        gate=settings.gate,
        beta=settings.beta,
        objective=settings.objective,
        old_log_probs=fields["old_log_probs"],
        distill_mask=fields[TEACHER_MASK].to(bool),
    )
    distillation = agg_loss(
        loss_mat=terms.loss,
        loss_mask=response_mask,
        loss_agg_mode=config.loss_agg_mode,
        **config.global_batch_info,
    )
    metrics["sdar/loss"] = Metric(value=distillation, aggregation=AggregationType.SUM)
    for name, value in stats_sums(terms).items():
        metrics[f"{SUMS_PREFIX}{name}"] = Metric(value=value, aggregation=AggregationType.SUM)
    if settings.coef == 0:
        return loss, metrics  # exactly verl's graph: GRPO bit for bit
    return loss + settings.coef * distillation, metrics
