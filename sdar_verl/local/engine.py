"""verl's FSDP2 engine on the CPU: the stock class, without what needs an accelerator."""

from __future__ import annotations

import copy
from typing import Any

from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class CpuFSDPEngine(FSDPEngineWithLMHead):
    """Language-model engine for device ``cpu``.

    Raises:
        ValueError: for settings that FSDP has on accelerators only.
    """

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        if engine_config.strategy != "fsdp2":
            raise ValueError(
                f"actor.strategy={engine_config.strategy} (FSDP1) cannot run on the CPU: torch broadcasts its module "
                "states on an accelerator only. Set actor_rollout_ref.actor.strategy=fsdp2 (ref follows it), or start "
                "from the config group hardware: cpu"
            )
        if engine_config.offload_policy:
            raise ValueError(
                "fsdp_config.offload_policy=True pins memory for an accelerator, and there is none on the CPU: set "
                "actor_rollout_ref.actor.fsdp_config.offload_policy=False (and the same under ref)"
            )
        super().__init__(model_config, engine_config, *args, **kwargs)

    def _build_fsdp_module(self, module: Any) -> Any:
        # verl gives forward-only models (the reference) CPUOffloadPolicy(pin_memory=True), and pinning memory needs an
        # accelerator; forward_only is read for nothing else in here.
        engine_config = self.engine_config
        self.engine_config = copy.copy(engine_config)
        object.__setattr__(self.engine_config, "forward_only", False)  # verl's configs are frozen
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = engine_config
