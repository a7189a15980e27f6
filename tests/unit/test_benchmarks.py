"""Every benchmark's script runs, at sizes that measure nothing, so that it does not rot."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common, loss, pool, teacher_rows
from sdar_verl.envs.base import Step, Task


def command(monkeypatch: pytest.MonkeyPatch, module, *arguments: object) -> None:
    """``python -m benchmarks.MODULE ARGUMENTS`` in this process, which keeps its number of threads."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


def test_arms_are_measured_in_turn_and_compared_round_by_round() -> None:
    calls: list[str] = []
    costs = common.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "b", "a"]  # the first two warm up
    assert [len(values) for values in costs.values()] == [2, 2]
    slow, quick = [[common.Cost(wall, wall) for wall in walls] for walls in ((2.0, 9.0, 40.0), (1.0, 3.0, 10.0))]
    assert common.ratio(slow, quick) == 3.0
    assert common.median(slow) == 9.0
    assert common.table(["x"], [[1]]) == "| x |\n| --- |\n| 1 |"


class FakeSession:
    """Notes when it was stepped; its answer comes at once."""

    def __init__(self, journal: list[str], task: Task) -> None:
        self.journal, self.name = journal, task.task_id

    async def __aenter__(self) -> FakeSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.journal.append(f"{self.name} left")

    async def reset(self) -> Step:
        return Step("", admissible_actions=("go",))

    async def step(self, action: str) -> Step:
        self.journal.append(self.name)
        return Step("", admissible_actions=("go",))


def test_lock_step_waits_for_the_slowest_and_the_pool_does_not() -> None:
    tasks = [Task("toy", name, "", "", {}) for name in ("quick", "slow")]
    drawn = [pool.Script(tasks[0], (0.001,) * 3, 0), pool.Script(tasks[1], (0.05,) * 2, 1)]
    journals: dict[str, list[str]] = {}
    for name, play in pool.ARMS.items():
        journal = journals[name] = []

        class FakePool:
            def session(self, task: Task, journal: list[str] = journal) -> FakeSession:
                return FakeSession(journal, task)

        asyncio.run(play(FakePool(), drawn, 2))
    assert journals["pool"] == ["quick"] * 3 + ["quick left"] + ["slow"] * 2 + ["slow left"]
    assert journals["lock-step"] == ["quick", "slow", "quick", "slow", "quick", "quick left", "slow left"]


def test_step_times_and_teacher_rows_on_a_real_game(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    games = common.real_games(tmp_path / "small_room", 1)
    rows = pool.step_times({"small room": games}, steps=3)
    assert [row[:3] for row in rows] == [["small room", "step", 3], ["small room", "reset", 1]]
    command(monkeypatch, teacher_rows, "--rows", 6, "--games", 1, "--rounds", 1, "--data", tmp_path)
    assert "| trainer |" in capsys.readouterr().out


def test_both_updates_and_all_divergences_run(capsys: pytest.CaptureFixture[str]) -> None:
    batch = loss.MicroBatch(512, 64, 8)
    for kind in ("ppo", "sdar"):
        assert [gradient.abs().sum() > 0 for gradient in batch.update(kind)()] == [True, True]
        assert batch.alone(kind)()[0].abs().sum() > 0
    for name in ("at_once-full", "chunks-full", "at_once-top_k", "chunks-top_k"):
        loss.arm(name, 8, 128, 8)()
    loss.one_peak("chunks-full", "64x512", 16)
    assert float(capsys.readouterr().out) >= 0
