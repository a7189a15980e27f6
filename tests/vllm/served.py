"""One rollout replica of verl with its weight sender, without a trainer: the same few calls for every backend."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import ray
import torch

from sdar_verl.compose import compose_config
from tests.vllm.settings import ENVIRONMENT

ROOT = Path(__file__).parents[2]


@ray.remote(num_gpus=1)
class TrainingWorker:
    """Stands for the training worker beside the server: verl asks it for its node and device."""


def start_ray(replicas: int) -> None:
    """A cluster of this machine alone; Ray counts devices as GPUs, as in hydra_configs/hardware/cpu.yaml."""
    settings = {**ENVIRONMENT, "VERL_PLATFORM": "cpu", "PYTHONPATH": str(ROOT)}
    for attempt in range(3):
        try:
            ray.init(num_cpus=8, num_gpus=replicas, include_dashboard=False, runtime_env={"env_vars": settings})
            return
        except Exception as error:  # Ray waits 30 s for its own start, however busy the machine is
            ray.shutdown()
            if attempt == 2 or "timed out during startup" not in str(error):
                raise


class Served:
    """A running server.

    Args:
        model: Hugging Face folder.
        rank: of the replica; one per server of the test, it is part of verl's names for sockets and actors.
        overrides: of the quick start's recipe, such as the rollout's name.
    """

    def __init__(self, model: Path | str, rank: int, overrides: Sequence[str] = ()) -> None:
        from verl.workers.rollout.base import get_rollout_class
        from verl.workers.rollout.replica import get_rollout_replica_class

        config = compose_config("sdar_quickstart", [f"actor_rollout_ref.model.path={model}", *overrides])
        rollout, model_config = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
        self.engine = rollout.name
        self._replica = get_rollout_replica_class(rollout.name)(rank, rollout, model_config, gpus_per_node=1)
        asyncio.run(self._replica.init_hybrid(_Workers(rank)))
        self._sender = get_rollout_class(rollout.name)(self._replica.config, model_config, None, replica_rank=rank)

    def close(self) -> None:
        """End the server's processes."""
        for server in self._replica.servers:
            ray.kill(server)

    def load(self, weights: Mapping[str, torch.Tensor], step: int) -> None:
        """Send weights the way verl's training worker does after an update."""
        asyncio.run(self._sender.update_weights(iter(weights.items()), global_steps=step))

    def ask(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        """One response (verl's TokenOutput) per prompt, all requests under way together.

        Args:
            prompts: token ids.
            **sampling: sampling parameters; a list of values has one per prompt.
        """
        requests = []
        for i, prompt in enumerate(prompts):
            own = {name: value[i] if isinstance(value, list) else value for name, value in sampling.items()}
            requests.append(self._replica.server_handle.generate.remote(list(prompt), own, uuid4().hex))
        return ray.get(requests)


class _Workers(SimpleNamespace):
    """A worker group with one worker, at the place where the replica looks for its own."""

    def __init__(self, rank: int) -> None:
        worker = TrainingWorker.remote()
        super().__init__(workers=[worker] * (rank + 1))
