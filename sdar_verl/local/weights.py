"""Weights from the training workers to rollout servers in other processes: verl's checkpoint engine ``gloo``.

verl's own engines (nccl and others) need accelerators. verl imports this module in every process that asks for the
engine (``rollout.checkpoint_engine.custom_backend_module``, set by hydra_configs/hardware/cpu.yaml).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Generator, Iterable
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

_TIMEOUT = timedelta(minutes=30)


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Actor rank 0 broadcasts full tensors to all rollout workers, bucket by bucket.

    The group is made at the first transfer, and anew when the number of rollout workers has changed.

    Args:
        bucket_size: bytes sent at a time; a larger tensor is a bucket of its own.
        is_master: whether this process is actor rank 0.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.bucket_size = bucket_size
        self.is_master = is_master
        self._store: dist.TCPStore | None = None
        self._group: Any = None
        self._place: tuple[int, int, tuple[str, int] | None] | None = None

    def prepare(self) -> dict[str, Any]:
        """``address`` of the group's store; empty on any other process than actor rank 0."""
        if not self.is_master:
            return {}
        if self._store is None:
            self._store = dist.TCPStore(_own_address(), 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        return {"address": (self._store.host, self._store.port)}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Ranks of the group: actor rank 0 is 0, rollout workers follow, other actor ranks (-1) stay outside."""
        world = 1 + rollout_world_size
        ranks = [0] + [-1] * (actor_wg_world_size - 1), list(range(1, world))
        actor, rollout = (
            {"rank": own, "world_size": [world] * len(own), "address": [metadata[0]["address"]] * len(own)}
            for own in ranks
        )
        return actor, rollout

    def init_process_group(self, **kwargs: Any) -> None:
        """Join the group, unless this process is in it.

        Args:
            **kwargs: ``rank``, ``world_size`` and ``address``, of :meth:`build_topology`.
        """
        rank, world_size, address = place = (kwargs["rank"], kwargs["world_size"], kwargs["address"])
        if self._place == place or rank < 0:
            return
        if self._store is None:
            host, port = address
            self._store = dist.TCPStore(host, port, is_master=False, timeout=_TIMEOUT)
        group: Any = dist.ProcessGroupGloo
        self._group = group(dist.PrefixStore(f"weights_{world_size}", self._store), rank, world_size, _TIMEOUT)
        self._place = place

    def finalize(self) -> None:
        """Nothing to free: buckets live for one broadcast."""

    @torch.no_grad()
    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        """Send all weights. Reading them is collective over the actors, so every rank does."""
        if self._group is None:
            for _ in weights:
                pass
            return
        for bucket in _buckets(weights, self.bucket_size):
            self._send(bucket)
        self._send([])

    async def receive_weights(self, global_steps: int | None = None) -> Any:
        """Yield (name, tensor) until an empty bucket comes."""
        while bucket := self._receive():
            for name, tensor in bucket:
                yield name, tensor

    def _send(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        described = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in bucket]
        header = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(header)]))
        self._broadcast(header)
        if bucket:
            self._broadcast(torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in bucket]))

    def _receive(self) -> list[tuple[str, torch.Tensor]]:
        header = self._broadcast(
            torch.empty(int(self._broadcast(torch.zeros(1, dtype=torch.int64))), dtype=torch.uint8)
        )
        described = json.loads(bytes(header.tolist()))
        if not described:
            return []
        kinds = [(name, getattr(torch, dtype), torch.Size(shape)) for name, dtype, shape in described]
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in kinds]
        payload = self._broadcast(torch.empty(sum(sizes), dtype=torch.uint8)).split(sizes)
        # A copy each: a view of another width must begin at a multiple of it.
        return [
            (name, part.clone().view(dtype).reshape(shape))
            for (name, dtype, shape), part in zip(kinds, payload, strict=True)
        ]

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self._group.broadcast(tensor, root=0).wait()
        return tensor


def _buckets(weights: Iterable[tuple[str, torch.Tensor]], size: int) -> Generator[list[tuple[str, torch.Tensor]]]:
    """Consecutive weights whose bytes together are at most ``size``, or one that alone is larger."""
    bucket: list[tuple[str, torch.Tensor]] = []
    filled = 0
    for name, tensor in weights:
        if bucket and filled + tensor.nbytes > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor.detach().contiguous().cpu()))
        filled += tensor.nbytes
    if bucket:
        yield bucket


def _own_address() -> str:
    address = ray.util.get_node_ip_address().strip("[]")
    return address or socket.gethostbyname(socket.gethostname())
