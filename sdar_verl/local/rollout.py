"""Rollout backend ``transformers``: what verl's replica and rollout registries load.

``TransformersReplica`` starts the server (one process per replica); ``ServerAdapter`` lives in the training worker and
sends it the weights.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutMode, RolloutReplica
from verl.workers.rollout.utils import ensure_async_iterator


def _server_name(replica_rank: int) -> str:
    return f"transformers_server_{replica_rank}_0"


class TransformersReplica(RolloutReplica):
    """One rollout server on the CPU, beside the training worker of its rank.

    In mode ``sdar_separate_async`` there are more, each beside a worker that does nothing but receive weights.
    """

    async def launch_servers(self) -> None:
        """Start the server, on the node of its training worker.

        Raises:
            ValueError: for settings of ``actor_rollout_ref.rollout`` that only a GPU engine has.
        """
        from sdar_verl.local.server import TransformersServer

        self._check_config()
        name = _server_name(self.replica_rank)
        worker: Any = self.workers[0]
        node = await worker.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
        actor_class: Any = ray.remote(TransformersServer)
        server = actor_class.options(
            name=name,
            max_concurrency=self.max_concurrency,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
        ).remote(self.config, self.model_config, self.replica_rank)
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = name

    def _check_config(self) -> None:
        required = {
            "tensor_model_parallel_size": 1,
            "data_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "logprobs_mode": "processed_logprobs",
            "full_determinism": False,  # verl's request ids do not tell the rollouts of a group apart
            "quantization": None,
            "enable_rollout_routing_replay": False,
        }
        for key, value in required.items():
            if self.config.get(key) != value:
                raise ValueError(
                    f"actor_rollout_ref.rollout.{key}={self.config.get(key)!r}: rollout.name=transformers (the CPU "
                    f"default) knows only {value!r}; set it so, or use rollout.name=vllm on a GPU"
                )
        if self.is_reward_model or self.is_teacher_model or self.rollout_mode == RolloutMode.COLOCATED:
            raise ValueError(
                "rollout.name=transformers serves the policy, with weights from the trainer's workers, and no model of "
                "its own: leave reward.reward_model.enable and distillation.enabled at False, or use rollout.name=vllm "
                "on a GPU"
            )


class ServerAdapter(BaseRollout):
    """The training worker's side: one per rank, the first rank of a replica talks to the server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.is_leader_rank = True  # a replica has one rank: tensor, data and pipeline parallel size are 1
        self._server: Any = None

    @property
    def server(self) -> Any:
        """Handle of the server, which starts after this worker."""
        if self._server is None:
            self._server = ray.get_actor(_server_name(self.replica_rank))
        return self._server

    async def resume(self, tags: list[str]) -> None:
        """Wake the server, see ``TransformersServer.wake_up``."""
        await self.server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        """Put the server to sleep."""
        await self.server.sleep.remote()

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None] | AsyncGenerator[tuple[str, torch.Tensor], None],
        wire_format: str = "named_tensors",
        *,
        global_steps: int | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        """Send all weights.

        Args:
            weights: (name, full tensor) pairs; gathering them is collective, so every rank reads them all.
            wire_format: ``named_tensors``.
            global_steps: the trainer's step they belong to.
            peft_config: None: adapters are merged (``model.lora.merge=True``) or not used.
            kwargs: what verl tells other backends.
        """
        if wire_format != "named_tensors" or peft_config is not None:
            raise ValueError(
                "rollout.name=transformers takes full weights: set model.lora.merge=True, or lora_rank=0, and "
                "rollout.checkpoint_engine.backend=gloo"
            )
        # A copy each: the generator may hand out views of buffers that it reuses.
        tensors = {name: tensor.detach().clone() async for name, tensor in ensure_async_iterator(weights)}
        await self.server.update_weights.remote(tensors, global_steps)
