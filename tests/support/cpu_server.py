"""The CPU rollout server in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sdar_verl.local.server import TransformersServer


def rollout_config(**given: Any) -> Any:
    """verl's rollout settings: short texts, few slots."""
    from verl.workers.config import RolloutConfig

    settings = {"name": "transformers", "tensor_model_parallel_size": 1, "dtype": "float32", "max_num_seqs": 8}
    return RolloutConfig(**{**settings, "prompt_length": 40, "response_length": 12, **given})


def make_server(model_path: Path | str, **given: Any) -> TransformersServer:
    """A server for the model in a folder, still without weights; ``given`` as :func:`rollout_config`."""
    model_config = OmegaConf.create(
        {
            "_target_": "verl.workers.config.HFModelConfig",
            "path": str(model_path),
            "override_config": {"attn_implementation": "sdpa"},
        }
    )
    return TransformersServer(rollout_config(**given), model_config, replica_rank=0)
