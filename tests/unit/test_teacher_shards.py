"""The teacher's own weights on two ranks: FSDP2 and FSDP1 over gloo, against the same arithmetic on a plain module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, ShardingStrategy, fully_shard

from sdar_verl.teacher.weights import ShadowWeights, trainable_shards
from tests.support.ranks import run_on_ranks

RANKS = 2
DECAY = 0.75


def network() -> nn.Sequential:
    """Odd sizes, so that shards are uneven."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5))


def move(module: nn.Module) -> None:
    """The same step for any sharding: every weight times 1.5."""
    with torch.no_grad():
        for shard in trainable_shards(module).values():
            shard.mul_(1.5)


def shard_fsdp2(module: nn.Sequential) -> nn.Module:
    """The last layer belongs to the root, which stays gathered after a forward pass."""
    fully_shard(module[0])
    return fully_shard(module, reshard_after_forward=False)


def shard_fsdp1(module: nn.Sequential) -> nn.Module:
    """The last layer belongs to the root, which stays gathered after a forward pass."""
    module[0] = FSDP(module[0], device_id=torch.device("cpu"))
    return FSDP(module, device_id=torch.device("cpu"))


def whole_fsdp1(module: nn.Sequential) -> nn.Module:
    """What verl has on one GPU: flat parameters that are not sharded."""
    return FSDP(module, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD)


def views_fsdp1(module: nn.Sequential) -> nn.Module:
    """Flat parameters behind the original ones."""
    return FSDP(module, device_id=torch.device("cpu"), use_orig_params=True)


def bf16_fsdp2(module: nn.Sequential) -> nn.Module:
    return fully_shard(module, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def bf16_fsdp1(module: nn.Sequential) -> nn.Module:
    return FSDP(module, device_id=torch.device("cpu"), mixed_precision=MixedPrecision(torch.bfloat16, torch.float32))


WAYS = {
    "plain": lambda module: module,
    "fsdp2": shard_fsdp2,
    "fsdp1": shard_fsdp1,
    "fsdp1 whole": whole_fsdp1,
    "fsdp1 views": views_fsdp1,
    "fsdp2 bf16": bf16_fsdp2,
    "fsdp1 bf16": bf16_fsdp1,
}


def history(way: str, folder: Path) -> dict[str, Any]:
    """Teacher and student outputs over two averaged steps, and what a checkpoint gives back."""
    module = WAYS[way](network())
    inputs = torch.linspace(-1, 1, 12).reshape(4, 3)
    out: dict[str, Any] = {"outputs": [], "restored": []}
    shadow = ShadowWeights(module, dtype=torch.float32)
    for _ in range(2):
        move(module)
        shadow.blend(DECAY)
        with torch.no_grad():
            before = {name: shard.clone() for name, shard in trainable_shards(module).items()}
            student = module(inputs)  # leaves FSDP roots gathered: the swap must not be lost to that
            with shadow.swapped_in():
                teacher = module(inputs)
            after = trainable_shards(module)
            out["restored"].append(
                all(torch.equal(before[name], after[name]) for name in before) and torch.equal(module(inputs), student)
            )
            out["outputs"].append((student.clone(), teacher.clone()))
    rank = dist.get_rank()
    file = folder / f"{way}_{rank}.pt"
    shadow.save(file, step=2)
    fresh = ShadowWeights(module, dtype=torch.float32)
    fresh.load(file)
    out["resumed"] = all(torch.equal(fresh._weights[name], shadow._weights[name]) for name in shadow._weights)
    out["numbers"] = sum(value.numel() for value in shadow._weights.values())

    module.zero_grad()
    module(inputs).square().sum().backward()
    with shadow.swapped_in(), torch.no_grad():
        module(inputs)
    out["gradient"] = all(parameter.grad is not None for parameter in module.parameters() if parameter.numel())
    return out


def run(rank: int, folder: Path) -> None:
    results = {way: history(way, folder) for way in WAYS}
    torch.save(results, folder / f"rank_{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shards")
    run_on_ranks(run, folder, ranks=RANKS)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(RANKS)]


SHARDED = [way for way in WAYS if way != "plain"]


@pytest.mark.parametrize("way", SHARDED)
def test_sharded_averages_are_the_plain_ones(ranks, way):
    for results in ranks:
        for (student, teacher), (plain_student, plain_teacher) in zip(
            results[way]["outputs"], results["plain"]["outputs"], strict=True
        ):
            same = {"rtol": 2e-2, "atol": 2e-2} if "bf16" in way else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(student.float(), plain_student, **same)
            torch.testing.assert_close(teacher.float(), plain_teacher, **same)
            assert not torch.allclose(plain_student, plain_teacher, rtol=0.05, atol=0.05), "too close to tell"


@pytest.mark.parametrize("way", SHARDED)
def test_the_actors_shards_come_back_to_the_bit(ranks, way):
    assert all(all(results[way]["restored"]) for results in ranks)


@pytest.mark.parametrize("way", SHARDED)
def test_each_ranks_file_gives_its_shards_back(ranks, way):
    assert all(results[way]["resumed"] for results in ranks)


@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_a_rank_keeps_its_own_part_only(ranks, way):
    whole = ranks[0]["plain"]["numbers"]
    parts = [results[way]["numbers"] for results in ranks]
    assert max(parts) < 0.7 * whole
    assert sum(parts) >= whole


@pytest.mark.parametrize("way", SHARDED)
def test_a_pass_after_backward_keeps_the_gradients(ranks, way):
    assert all(results[way]["gradient"] for results in ranks)
