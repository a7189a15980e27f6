"""A run that was killed after its first step and goes on, against one that was not."""

from __future__ import annotations

import shutil
from pathlib import Path


def back_to_step_one(folder: Path) -> None:
    """As if the run had been killed after its first checkpoint."""
    shutil.rmtree(folder / "checkpoints" / "global_step_2")
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    (folder / "metrics.jsonl").unlink()


def differing(one: dict, other: dict) -> list[str]:
    """Names of the numbers that differ."""
    # Seconds, bytes, what depends on who shared a batch, and a check that every process makes at its first step.
    left_out = ("timing", "perf/", "actor/perf", "critic/perf", "rollout_corr/", "training/rollout_", "sdar/empty_")
    names = {name for name in {*one, *other} if not name.startswith(left_out)}
    return sorted(name for name in names if one.get(name) != other.get(name))
