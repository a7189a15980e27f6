"""How far two computations of the same log-probs may be apart before they count as two models.

Mean absolute difference, nats per token.
"""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

FLOAT32 = 1e-3
"""One engine in float32; the order of its sums changes less than 1e-5."""

ROUNDED = 0.05
"""bf16 or fp16, which round differently in another micro-batch or another engine.

Between vLLM and trainers in bf16, root mean squares of .02 to .04 were reported for Qwen2.5-7B
(github.com/ServiceNow/Fast-LLM/pull/525)."""


def same_engine(config: DictConfig) -> float:
    """For the precision that the actor computes in; ``config`` is verl's whole config."""
    precision = OmegaConf.select(config, "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype")
    return FLOAT32 if precision in ("fp32", "float32") else ROUNDED  # verl's default is bf16
