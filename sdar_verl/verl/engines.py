"""Our engines in verl's registry, under a model type of their own.

So a run without a teacher, and any other run on the same machine, has verl's engine; our workers ask for ours by name
(:class:`sdar_verl.verl.worker.SdarTrainingWorker`).
"""

from __future__ import annotations

from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from sdar_verl.verl import symbols
from sdar_verl.verl.engine import MODEL_TYPE, WithRequests

symbols.check("engines")


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu"])
class SdarFSDPEngine(WithRequests, FSDPEngineWithLMHead):
    """verl's FSDP and FSDP2 engine on accelerators, with requests."""
