"""The actor worker's loss: verl's own PPO loss plus lambda times the gated self-distillation term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from sdar_verl.algorithm.divergences import COLUMNS, DIVERGENCES
from sdar_verl.algorithm.masking import ROWS_NAMED, NonFiniteValues
from sdar_verl.algorithm.stats import stats_sums
from sdar_verl.errors import ConfigError, NonFiniteError
from sdar_verl.fields import CONTRAST, STATISTICS, STEP_VALUES, SUMS_PREFIX, TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.method import Method, StepValues
from sdar_verl.verl import symbols
from sdar_verl.verl.head import COLUMN_PREFIX

symbols.check("loss")


def sdar_loss(
    config: ActorConfig,
    method: Method,
    model_output: dict[str, Any],
    data: TensorDict,
    dp_group: Any = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """``L = L_PPO + lambda * Agg[g_t * objective_t]`` of one micro-batch (paper, equation 8).

    Both terms are normalised by verl's numbers of the global mini-batch, and what spans rows comes from the trainer, so
    the gradient does not depend on how the batch is split into micro-batches and ranks. Lambda and beta are those of
    the step, which the trainer sends along.

    Args:
        config: verl's actor config; verl's loss and ``loss_agg_mode`` come from it.
        method: of the run; :meth:`sdar_verl.verl.trainer.SdarTraining.on_init_end` binds it.
        model_output: the engine's, with ``log_probs`` of the whole sequences, and ``entropy`` where it was asked for.
        data: the micro-batch: verl's fields, ``sdar_teacher_log_probs`` and ``sdar_teacher_mask`` (nested, response
            tokens), the trainer's statistics where an option needs them, and :class:`StepValues`.
        dp_group: unused, part of verl's signature.

    Returns:
        The loss to differentiate, and metrics; those of this package are sums, so that they reduce exactly.

    Raises:
        NonFiniteError: a log-prob of this micro-batch is NaN or infinite; names the rows. The trainer has looked at the
            step's numbers before (:mod:`sdar_verl.finite`): what is broken here broke within the update.
    """
    if "entropy" in model_output and not config.entropy_coeff:
        # Asked for by the gate or for a metric: nothing must be kept for a gradient that is zero.
        model_output = {**model_output, "entropy": model_output["entropy"].detach()}
    loss, metrics = ppo_loss(
        config, model_output, data if method.settings.policy_gradient else _without_advantages(data)
    )

    sent = tu.get_non_tensor_data(data, STEP_VALUES, None)
    if sent is None:
        raise ConfigError("sdar_loss needs the step's lambda and beta, which trainer.v1.trainer_mode=sdar sends along")
    values = StepValues(**sent)
    if values.coef == 0 and TEACHER_LOG_PROBS not in data:  # the teacher has retired
        return loss, metrics
    entropy, divergence, target = (
        None if name not in model_output else no_padding_2_padding(model_output[name], data)
        for name in ("entropy", f"{COLUMN_PREFIX}divergence", f"{COLUMN_PREFIX}target")
    )
    log_probs = no_padding_2_padding(model_output["log_probs"], data)
    try:
        # verl asks for the loss within its autocast, in which a gate's or an objective's products would be bf16.
        with torch.autocast(log_probs.device.type, enabled=False):
            terms = method.terms(
                log_probs, _columns(data, method), values, entropy=entropy, divergence=divergence, target=target
            )
    except NonFiniteValues as error:
        raise NonFiniteError(f"{error}{_named(data, error.rows)}") from error
    distillation = agg_loss(
        loss_mat=terms.loss,
        loss_mask=terms.response_mask,
        loss_agg_mode=config.loss_agg_mode,
        **config.global_batch_info,
    )
    metrics["sdar/loss"] = Metric(value=distillation, aggregation=AggregationType.SUM)
    sums = stats_sums(terms)
    sums |= column_sums(model_output, data, terms.mask)
    if values.only is not None:
        return (loss if values.only == "rl" else _differentiable(distillation, log_probs)), metrics
    if values.coef > 0 and loss.requires_grad and method.settings.objective not in DIVERGENCES:
        sums |= gradient_squares(loss, distillation, model_output["log_probs"], log_probs)
    for name, total in sums.items():
        metrics[f"{SUMS_PREFIX}{name}"] = Metric(value=total, aggregation=AggregationType.SUM)
    if values.coef == 0:
        return loss, metrics  # exactly verl's graph
    return loss + values.coef * distillation, metrics


def gradient_squares(
    loss: torch.Tensor, distillation: torch.Tensor, log_probs: torch.Tensor, padded: torch.Tensor
) -> dict[str, float]:
    """Squared norms of both losses' gradients with respect to the log-probs of the sampled tokens.

    No backward pass through the model: this is the gradient before the model's Jacobian, one number per token, so its
    squares add up exactly over micro-batches and ranks. It says how hard each loss pushes on the sampled tokens; where
    pushes cancel in the weights (a constant gate pushes all tokens up and moves nothing on average) it says more than
    is felt there; :class:`sdar_verl.verl.engine.WithRequests` measures that.

    Args:
        loss: verl's loss: policy gradient, and KL to the reference where it is on.
        distillation: the distillation term before lambda.
        log_probs: the engine's nested log-probs, from which ``loss`` was computed.
        padded: the same of the responses, (batch, response_length), from which ``distillation`` was computed.
    """
    (rest,) = torch.autograd.grad(loss, log_probs, retain_graph=True, allow_unused=True)
    (ours,) = torch.autograd.grad(distillation, padded, retain_graph=True, allow_unused=True)
    flat = None if rest is None else (rest.values() if rest.is_nested else rest)
    return {
        "grad_rl_squared": 0.0 if flat is None else flat.double().square().sum().item(),
        "grad_distill_squared": 0.0 if ours is None else ours.double().square().sum().item(),
    }


def _columns(data: TensorDict, method: Method) -> dict[str, torch.Tensor]:
    """What the method reads of the rows, (rows, response_length)."""
    names = ["response_mask", "old_log_probs", TEACHER_LOG_PROBS, TEACHER_MASK]
    names += ["advantages"] * method.reads_advantages
    names += [name for name in (*STATISTICS, CONTRAST) if name in data]
    return dict(data.select(*names).to_padded_tensor().items())


def column_sums(model_output: Mapping[str, Any], data: TensorDict, mask: torch.Tensor) -> dict[str, float]:
    """Sum of each column over the distilled tokens, ``mask`` (batch, response_length); empty without columns."""
    if f"{COLUMN_PREFIX}{COLUMNS[0]}" not in model_output:
        return {}
    columns = {name: model_output[f"{COLUMN_PREFIX}{name}"].detach() for name in COLUMNS}
    return {
        f"distribution_{name}": no_padding_2_padding(values, data)[mask].double().sum().item()
        for name, values in columns.items()
    }


def _named(data: TensorDict, rows: Sequence[int]) -> str:
    """What these rows are called, where the micro-batch says it."""
    columns = [tu.get(data, name, None) for name in ("uid", "session_id")]
    if any(not isinstance(column, (list, torch.Tensor)) or len(column) <= max(rows) for column in columns):
        return ""
    uids, sessions = (list(column) for column in columns)
    names = [f"{uids[row]}_{int(sessions[row])}" for row in rows[:ROWS_NAMED]]
    return f" Rows of this micro-batch, by episode: {', '.join(names)}."


def _differentiable(distillation: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """The term, also of a micro-batch in which no row has a teacher."""
    return distillation if distillation.requires_grad else distillation + 0.0 * log_probs.sum()


def _without_advantages(data: TensorDict) -> TensorDict:
    """The same micro-batch with advantages of 0: verl's policy gradient is then 0, its KL and entropy terms stay."""
    data = data.copy()
    data["advantages"] = torch.zeros_like(data["advantages"])
    return data
