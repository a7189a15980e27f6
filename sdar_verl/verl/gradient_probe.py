"""Measures, in weight space, how large the gradients of verl's loss and of the distillation term are.

Before the first update of a step that asks for it, the update's rows go through two passes of their own, forward and
backward, one per loss; the norms are taken over all weights and ranks, and the gradients thrown away. The update is
then made as if nothing had happened. So pushes on different tokens that cancel in the weights are seen to cancel, which
:func:`sdar_verl.verl.loss.gradient_squares` cannot see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.fsdp import FullyShardedDataParallel
from verl.utils import tensordict_utils as tu
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_
from verl.utils.metric import AggregationType, Metric

from sdar_verl.verl.fields import NORM_PREFIX, STEP_VALUES

PARTS = ("rl", "distillation")


class GradientProbe:
    """The probe of one of verl's FSDP engines; it does nothing until a batch asks for a measurement.

    Args:
        engine: the actor's; its ``train_batch`` is wrapped.
    """

    def __init__(self, engine: Any):
        self._engine = engine
        self._train_batch: Callable[..., Any] = engine.train_batch
        self._measured: int | None = None

    @classmethod
    def attach(cls, engine: Any) -> GradientProbe:
        """The probe of ``engine``, put there if it has none."""
        probe = getattr(engine, "sdar_gradient_probe", None)
        if probe is None:
            probe = engine.sdar_gradient_probe = cls(engine)
            engine.train_batch = probe.train_batch
        return probe

    def train_batch(self, data: TensorDict, loss_function: Callable[..., Any]) -> Any:
        """verl's update, after a measurement where one is due: on the first update of a step that asks."""
        values = tu.get_non_tensor_data(data, STEP_VALUES, None)
        norms: dict[str, float] = {}
        if values is not None and values["measure"] not in (None, self._measured):
            self._measured = values["measure"]
            norms = {part: self._norm(data, loss_function, values, part) for part in PARTS}
        output = self._train_batch(data, loss_function)
        if norms and self._engine.is_mp_src_rank_with_outputs():
            for part, norm in norms.items():
                output["metrics"][f"{NORM_PREFIX}{part}"] = Metric(value=norm, aggregation=AggregationType.MEAN)
        return output

    def _norm(self, data: TensorDict, loss_function: Callable[..., Any], values: dict[str, Any], part: str) -> float:
        """Norm over all weights and ranks of the gradient of one of the two losses."""
        engine = self._engine
        tu.assign_non_tensor(data, **{STEP_VALUES: {**values, "only": part}})
        try:
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(data, loss_function, forward_only=False)
            # verl's own ways to a norm over shards; with this limit they scale nothing.
            if isinstance(engine.module, FullyShardedDataParallel):
                norm = engine.module.clip_grad_norm_(math.inf)
            else:
                norm = fsdp2_clip_grad_norm_(engine.module.parameters(), max_norm=math.inf)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        finally:
            engine.optimizer_zero_grad()
            tu.assign_non_tensor(data, **{STEP_VALUES: values})
        return float(norm.item() if isinstance(norm, torch.Tensor) else norm)
