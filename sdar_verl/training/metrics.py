"""A step's numbers, over all its rows, micro-batches and ranks (docs/metrics.md lists them with healthy ranges)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sdar_verl.algorithm.stats import finalize_stats
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.training.fields import SUMS_PREFIX


def row_metrics(keys: Sequence[str], infos: Sequence[RowInfo | None]) -> dict[str, float]:
    """What the agent loop recorded, over the rows of a step; padding rows (None) do not count.

    Args:
        keys: verl's row keys, ``{uid}_{session}_{turn}``.
        infos: one record per row.
    """
    real = [(key.rsplit("_", 1)[0], info) for key, info in zip(keys, infos, strict=True) if info is not None]
    if not real:
        return {}
    played = [info for _, info in real if not info.failed]
    episodes = dict(real)  # one record per episode: success and failure are the same on all its rows
    metrics = {
        "sdar/success": sum(info.success for info in episodes.values()) / len(episodes),
        "sdar/score": sum(info.score for info in episodes.values()) / len(episodes),
        "sdar/episodes": len(episodes),
        "sdar/failed_episodes": sum(info.failed for info in episodes.values()),
        "sdar/rows": len(real),
    }
    if not played:
        return metrics
    seen = [info for info in played if info.teacher_prompt_ids is not None]
    metrics |= {
        "sdar/turns": len(played) / len({key for key, info in real if not info.failed}),
        "sdar/invalid_share": _share(info.invalid for info in played),
        "sdar/unparsed_share": _share(info.unparsed for info in played),
        "sdar/history_dropped_share": _share(info.history_dropped > 0 for info in played),
        "sdar/context_share": len(seen) / len(played),
        "sdar/truncated_share": _share(info.truncated for info in played),
        "sdar/no_match_share": _share(info.no_match for info in played),
    }
    if seen:
        tokens = [info.context_tokens for info in seen]
        metrics["sdar/context_tokens/mean"] = sum(tokens) / len(tokens)
        metrics["sdar/context_tokens/max"] = max(tokens)
    skills = Counter(name for info in episodes.values() for name in info.skills)
    metrics |= {f"sdar/skill_episodes/{name}": count for name, count in sorted(skills.items())}
    return metrics


def reduce_loss_sums(metrics: dict[str, Any]) -> dict[str, float]:
    """Take the workers' sums out of ``metrics`` and return the means they stand for, under ``sdar/``.

    verl averages a metric over ranks and mini-batches; that scales all sums by one factor, which the ratios lose.
    """
    prefix = f"actor/{SUMS_PREFIX}"
    sums = {key.removeprefix(prefix): metrics.pop(key) for key in list(metrics) if key.startswith(prefix)}
    if not sums:
        return {}
    stats = finalize_stats(sums)
    stats.pop("tokens")
    means = {f"sdar/{name}": value for name, value in stats.items()}
    means["sdar/loss"] = metrics.pop("actor/sdar/loss")
    return means


def _share(flags: Any) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)
