"""What a self-teacher needs of verl's FSDP engines: requests at the language-model head, gradients in weight space.

:mod:`sdar_verl.verl.engines` registers them, and :mod:`sdar_verl.local.engine` the CPU's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.fsdp import FullyShardedDataParallel
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_
from verl.utils.metric import AggregationType, Metric

from sdar_verl.fields import NORM_PREFIX, STEP_VALUES
from sdar_verl.requests import HEAD_REQUEST, HeadRequest
from sdar_verl.verl.head import HeadPass, Heads

MODEL_TYPE = "sdar_language_model"
PROBED = ("rl", "distillation")


class WithRequests:
    """Answers requests at the language-model head and measures gradients; put it before one of verl's FSDP engines."""

    module: Any

    def __init__(self, model_config: Any, *args: Any, **kwargs: Any):
        model_config.model_type = "language_model"  # what it is to verl, which loads the model by this
        super().__init__(model_config, *args, **kwargs)  # type: ignore[call-arg]
        self.heads = Heads()
        self._pass: HeadPass | None = None
        self._hooked = False
        self._measured: int | None = None

    # ---------------------------------------------------------------- at the head

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """verl's, with the request of the batch answered, where it has one."""
        text = tu.get_non_tensor_data(micro_batch, HEAD_REQUEST, default=None)
        if text is None:
            return super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]
        request = HeadRequest.from_json(text)
        self._hook_in(request)
        micro_batch = micro_batch.to(get_device_id())
        if request.what in ("divergence", "target"):
            tu.assign_non_tensor(micro_batch, distillation_use_topk=True)
        self._pass = asked = HeadPass(request, micro_batch, self.heads)
        try:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]
        finally:
            self._pass = None
        if not asked.seen and request.what != "log_probs":
            raise RuntimeError(
                "the model's output embeddings were not called in its forward pass, so their input is unknown; "
                "set actor_rollout_ref.model.use_fused_kernels=False, or use sdar.loss.objective=sampled without an "
                "anchor"
            )
        output.get("model_output", {}).update(asked.fields)
        return loss, output

    def prepare_model_outputs(
        self, output: Any, output_args: Any, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """verl's; of a teacher pass, log-probs of the responses alone."""
        asked = self._pass
        if asked is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)  # type: ignore[misc]
        log_probs = asked.response_log_probs(output)
        if log_probs is not None:
            return {"log_probs": log_probs}
        result = super().prepare_model_outputs(  # type: ignore[misc]
            output, output_args, micro_batch, lambda student_logits, data: asked.spread(student_logits)
        )
        return {"log_probs": asked.response_part(result["log_probs"])} if asked.teacher else result

    def _hook_in(self, request: HeadRequest) -> None:
        head = self.module.get_output_embeddings()
        if request.what != "log_probs" and not isinstance(head, torch.nn.Linear):
            raise RuntimeError(
                f"the model's output embeddings are {type(head).__name__}, and a divergence over distributions reads "
                "torch.nn.Linear only; leave lm_head out of the LoRA targets, or use sdar.loss.objective=sampled "
                "without an anchor"
            )
        if self._hooked or head is None:
            return
        head.register_forward_pre_hook(self._before_head)
        head.register_forward_hook(self._at_head, prepend=True)  # before FSDP's own, which frees the weights
        self._hooked = True

    def _before_head(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self._pass is None else (self._pass.before_head(args[0]), *args[1:])

    def _at_head(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        return None if self._pass is None else self._pass.at_head(module, args[0], output)

    # ---------------------------------------------------------------- gradients in weight space

    def train_batch(self, data: TensorDict, loss_function: Callable[..., Any]) -> Any:
        """verl's update, after a measurement where one is due (``sdar.loss.measure_every``).

        The update's rows then go through two passes of their own, forward and backward, one per loss; the norms are
        taken over all weights and ranks, and the gradients thrown away. Pushes on different tokens that cancel in the
        weights are seen to cancel, which :func:`sdar_verl.verl.loss.gradient_squares` cannot see.
        """
        values = tu.get_non_tensor_data(data, STEP_VALUES, None)
        norms: dict[str, float] = {}
        if values is not None and values["measure"] not in (None, self._measured):
            self._measured = values["measure"]
            norms = {part: self._norm(data, loss_function, values, part) for part in PROBED}
        output = super().train_batch(data, loss_function)  # type: ignore[misc]
        if norms and self.is_mp_src_rank_with_outputs():  # type: ignore[attr-defined]
            for part, norm in norms.items():
                output["metrics"][f"{NORM_PREFIX}{part}"] = Metric(value=norm, aggregation=AggregationType.MEAN)
        return output

    def _norm(self, data: TensorDict, loss_function: Callable[..., Any], values: dict[str, Any], part: str) -> float:
        """Norm over all weights and ranks of the gradient of one of the two losses."""
        engine: Any = self
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
