"""The CPU's checkpoint engine: what a trainer's rank sends is what every rollout worker gets, bit for bit."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sdar_verl.local import weights as module
from sdar_verl.local.weights import GlooCheckpointEngine

WEIGHTS = [
    ("embed", torch.randn(3, 5)),
    ("ids", torch.arange(7)),
    ("large", torch.randn(100).bfloat16()),  # more than a bucket
    ("scalar", torch.tensor(2.5, dtype=torch.float64)),
    ("strided", torch.randn(4, 6).t()),
]
BUCKET = 96


def processes(monkeypatch: pytest.MonkeyPatch, actors: int, rollouts: int) -> list[GlooCheckpointEngine]:
    """Actor ranks, then rollout workers, as verl makes them; here they are threads."""
    monkeypatch.setattr(module, "_own_address", lambda: "127.0.0.1")
    trainer = [GlooCheckpointEngine(bucket_size=BUCKET, is_master=rank == 0) for rank in range(actors)]
    return [*trainer, *(GlooCheckpointEngine(bucket_size=BUCKET) for _ in range(rollouts))]


def sync(engines: list[GlooCheckpointEngine], actors: int, weights: list[tuple[str, torch.Tensor]]) -> list[Any]:
    """One transfer, in the steps of verl's CheckpointEngineManager; what each engine got, None for the actors."""
    metadata = [engine.prepare() for engine in engines]
    assert [bool(data) for data in metadata] == [True] + [False] * (len(engines) - 1)
    actor, rollout = GlooCheckpointEngine.build_topology(actors, len(engines) - actors, metadata)
    read: list[int] = []

    def run(number: int) -> Any:
        kwargs, place = (actor, number) if number < actors else (rollout, number - actors)
        engine = engines[number]
        engine.init_process_group(**{name: values[place] for name, values in kwargs.items()})
        if number < actors:
            asyncio.run(engine.send_weights(_counted(weights, read), global_steps=1))
            return None

        async def receive() -> list[tuple[str, torch.Tensor]]:
            return [pair async for pair in engine.receive_weights(global_steps=1)]

        return asyncio.run(receive())

    with ThreadPoolExecutor(len(engines)) as pool:
        got = list(pool.map(run, range(len(engines)), timeout=60))
    for engine in engines:
        engine.finalize()
    assert len(read) == actors * len(weights), "reading weights is collective: every actor rank must read them all"
    return got


def _counted(weights: list[tuple[str, torch.Tensor]], read: list[int]) -> Any:
    for pair in weights:
        read.append(1)
        yield pair


def test_every_rollout_worker_gets_every_weight_each_time(monkeypatch):
    engines = processes(monkeypatch, actors=2, rollouts=2)
    for scale in (1, 3):
        sent = [(name, tensor * scale) for name, tensor in WEIGHTS]
        for received in sync(engines, 2, sent)[2:]:
            assert [name for name, _ in received] == [name for name, _ in sent]
            for (name, found), (_, wanted) in zip(received, sent, strict=True):
                assert found.dtype == wanted.dtype, name
                assert torch.equal(found, wanted), name


def test_another_number_of_rollout_workers_makes_a_new_group(monkeypatch):
    engines = processes(monkeypatch, actors=1, rollouts=2)
    sync(engines[:2], 1, WEIGHTS)
    received = sync(engines, 1, WEIGHTS)[2]
    assert torch.equal(dict(received)["large"], dict(WEIGHTS)["large"])


def test_verl_finds_the_engine_by_its_name():
    from verl.checkpoint_engine import CheckpointEngineRegistry

    assert isinstance(CheckpointEngineRegistry.new("gloo", bucket_size=1), GlooCheckpointEngine)
