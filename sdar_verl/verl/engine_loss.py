"""The loss as verl's engine calls it: with the logits of a micro-batch first, where a divergence was asked for."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from sdar_verl.config import LossConfig
from sdar_verl.verl.head import columns_of_this_step
from sdar_verl.verl.loss import sdar_loss


def distribution_loss(
    config: Any,
    settings: LossConfig,
    model_output: dict[str, Any] | None = None,
    data: TensorDict | None = None,
    dp_group: Any = None,
    student_logits: torch.Tensor | None = None,
) -> Any:
    """:func:`sdar_verl.verl.loss.sdar_loss`, which verl's engine also calls with logits.

    With ``student_logits`` (1, tokens, V): the columns of the divergence per token, which the engine puts into
    ``model_output``. Without: the loss and its metrics.
    """
    if student_logits is not None:
        return columns_of_this_step(student_logits)
    assert model_output is not None
    assert data is not None
    return sdar_loss(config, settings, model_output, data, dp_group)
