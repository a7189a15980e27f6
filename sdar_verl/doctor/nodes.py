"""Facts about every node of a Ray cluster, and one all-reduce over all ranks; ``cloud.py`` judges them."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 300
_WARM, _TIMES = 2, 5


@dataclass(frozen=True)
class Node:
    """One machine.

    Attributes:
        name: its host name.
        versions: package -> version, None when it is not installed.
        free: bytes on the disk of the run's folder.
        shm: bytes of ``/dev/shm``.
        cards: accelerators that torch can use.
        clock: seconds that its clock is ahead of this process's.
    """

    name: str
    versions: dict[str, str | None]
    free: int
    shm: int
    cards: int
    clock: float


@contextmanager
def cluster(ranks: int) -> Iterator[None]:
    """The cluster of ``RAY_ADDRESS``, or of this machine alone, for the time of the context."""
    import ray

    started = not ray.is_initialized()
    if started:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        own: dict[str, Any] = (
            {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": 2 * ranks, "include_dashboard": False}
        )
        ray.init(**quiet, **own)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def look_at_nodes(folder: Path) -> list[Node]:
    """Every node of the cluster.

    Args:
        folder: the run's, whose disk counts.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_facts)
    found = []
    for node in sorted(one["NodeID"] for one in ray.nodes() if one["Alive"]):
        there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        ray.get(there.remote(folder), timeout=TIMEOUT_S)  # starts the worker
        before = time.time()
        facts = ray.get(there.remote(folder), timeout=TIMEOUT_S)
        after = time.time()
        found.append(Node(**{**facts, "clock": facts["clock"] - (before + after) / 2}))
    return found


def _facts(folder: Path) -> dict[str, Any]:
    from sdar_verl.doctor.machine import PACKAGES, _torch, _version

    while not folder.exists():
        folder = folder.parent
    shm = Path("/dev/shm")
    return {
        "name": platform.node(),
        "versions": {name: _version(name) for name in ("sdar-verl", *PACKAGES)},
        "free": shutil.disk_usage(folder).free,
        "shm": shutil.disk_usage(shm).total if shm.is_dir() else 0,
        "cards": _torch()[1],
        "clock": time.time(),
    }


def all_reduce(ranks: int, cards: bool, size: int = 256 * 1024 * 1024) -> float:
    """Bytes a second that an all-reduce of ``size`` bytes moves per rank, 2 (n - 1) / n of them, over all ranks.

    Args:
        ranks: one per card; without cards, one per process on the CPU.
        cards: through NCCL; else through gloo.
        size: of one tensor.
    """
    import ray

    actor: Any = ray.remote(num_cpus=1, num_gpus=1 if cards else 0, max_restarts=0)(_Rank)
    members = [actor.options(scheduling_strategy="SPREAD").remote(rank, ranks, cards) for rank in range(ranks)]
    try:
        address = ray.get(members[0].address.remote(), timeout=TIMEOUT_S)
        ray.get([member.join.remote(address) for member in members], timeout=TIMEOUT_S)
        seconds = max(ray.get([member.reduce.remote(size) for member in members], timeout=TIMEOUT_S))
    finally:
        for member in members:
            ray.kill(member)
    return 2 * (ranks - 1) / ranks * size / seconds


class _Rank:
    def __init__(self, rank: int, ranks: int, cards: bool):
        self._rank, self._ranks, self._cards = rank, ranks, cards

    def address(self) -> str:
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, address: str) -> None:
        import torch

        backend = "nccl" if self._cards else "gloo"
        torch.distributed.init_process_group(backend, init_method=address, rank=self._rank, world_size=self._ranks)

    def reduce(self, size: int) -> float:
        """Seconds of one all-reduce, the mean of some."""
        import torch

        tensor = torch.ones(size // 4, device="cuda" if self._cards else "cpu")
        for number in range(_WARM + _TIMES):
            if number == _WARM:
                torch.distributed.barrier()
                began = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            tensor.fill_(1)
        if self._cards:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / _TIMES
