"""verl's FSDP engines on the CPU: the stock class, without what needs an accelerator."""

from __future__ import annotations

import copy
import gc
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, StateDictType
from verl.utils.fsdp_utils import get_fsdp_wrap_policy
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.fsdp.utils import get_sharding_strategy

from sdar_verl.verl.engine import MODEL_TYPE, WithRequests


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class CpuFSDPEngine(FSDPEngineWithLMHead):
    """Language-model engine for device ``cpu``, FSDP2 and FSDP1.

    Raises:
        ValueError: for settings that FSDP has on accelerators only.
    """

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        if engine_config.offload_policy:
            raise ValueError(
                "fsdp_config.offload_policy=True pins memory for an accelerator, and there is none on the CPU: set "
                "actor_rollout_ref.actor.fsdp_config.offload_policy=False (and the same under ref)"
            )
        super().__init__(model_config, engine_config, *args, **kwargs)

    def initialize(self) -> None:
        """verl's; after it, imports and models are never searched for garbage (docs/local.md)."""
        super().initialize()
        gc.collect()
        gc.freeze()

    def _build_fsdp_module(self, module: Any) -> Any:
        if self.engine_config.strategy == "fsdp":
            return self._build_fsdp1_module(module)
        # verl gives forward-only models (the reference) CPUOffloadPolicy(pin_memory=True), and pinning memory needs an
        # accelerator; forward_only is read for nothing else in here.
        engine_config = self.engine_config
        self.engine_config = copy.copy(engine_config)
        object.__setattr__(self.engine_config, "forward_only", False)  # verl's configs are frozen
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = engine_config

    def _build_fsdp1_module(self, module: nn.Module) -> FSDP:
        """FSDP1 over gloo.

        verl lets FSDP1 send rank 0's weights to the others (``sync_module_states=True``), which torch refuses for
        weights on the CPU. Here they are sent before the module is wrapped.
        """
        load_from_first_rank(module)
        config = self.engine_config
        # verl's defaults.
        dtypes = {
            "param_dtype": "bf16",
            "reduce_dtype": "fp32",
            "buffer_dtype": "fp32",
            **(config.mixed_precision or {}),
        }
        precision = MixedPrecision(**{name: PrecisionType.to_dtype(value) for name, value in dtypes.items()})
        self._autocast_dtype = PrecisionType.to_dtype(dtypes["param_dtype"])
        self.scaler = None  # fp16's, and there is no fp16 training on a CPU
        wrapped = FSDP(
            module,
            device_id=torch.device("cpu"),
            device_mesh=self.device_mesh,
            sharding_strategy=get_sharding_strategy(self.device_mesh, zero3_enable=config.reshard_after_forward),
            auto_wrap_policy=get_fsdp_wrap_policy(
                module=module, config=config.wrap_policy, is_lora=self.model_config.lora_rank > 0
            ),
            mixed_precision=precision,
            forward_prefetch=config.forward_prefetch,
            use_orig_params=config.use_orig_params,
        )
        # What verl's checkpoints and its weight sync expect of a module on one rank, and on several.
        kind = StateDictType.FULL_STATE_DICT if dist.get_world_size() == 1 else StateDictType.SHARDED_STATE_DICT
        FSDP.set_state_dict_type(wrapped, kind)
        return wrapped


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device="cpu")
class CpuSdarEngine(WithRequests, CpuFSDPEngine):
    """The same with requests at the head."""


@torch.no_grad()
def load_from_first_rank(module: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0; a rank may have none yet (verl: tensors on device ``meta``).

    Args:
        module: the same on every rank; its tensors are on the CPU or ``meta``.
    """
    if any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
        module.to_empty(device="cpu")
    for tensor in chain(module.parameters(), module.buffers()):
        dist.broadcast(tensor, src=0)
