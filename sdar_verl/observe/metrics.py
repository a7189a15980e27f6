"""A step's numbers, over all its rows, micro-batches and ranks (docs/metrics.md lists them with healthy ranges)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from sdar_verl.algorithm.schedules import GAP_SIZE, GRAD_SHARE, GRAD_SHARE_WEIGHTS
from sdar_verl.algorithm.stats import finalize_stats
from sdar_verl.algorithm.turns import episode_means, row_turns, turn_sums
from sdar_verl.fields import NORM_PREFIX, SUMS_PREFIX
from sdar_verl.table import StepTable

_DISTRIBUTIONS = {
    "divergence": "divergence",
    "student_entropy": "support_entropy/student",
    "teacher_entropy": "support_entropy/teacher",
    "student_tail": "tail_mass/student",
    "teacher_tail": "tail_mass/teacher",
}


def row_metrics(table: StepTable) -> dict[str, float]:
    """What the agent loop recorded, over the rows of an update that count."""
    real = [(row.episode, info) for row, info in zip(table.ids, table.infos, strict=True) if info is not None]
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
    steps = [step for info in played for step in info.steps]
    seen = [info for info in played if info.teacher_prompt_tokens is not None]
    metrics |= {
        "sdar/turns": len(steps) / len({key for key, info in real if not info.failed}),
        "sdar/invalid_share": _share(step.invalid for step in steps),
        "sdar/unparsed_share": _share(step.unparsed for step in steps),
        "sdar/history_dropped_share": _share(info.history_dropped > 0 for info in played),
        "sdar/context_share": len(seen) / len(played),
        "sdar/truncated_share": _share(info.truncated for info in played),
        "sdar/no_match_share": _share(info.no_match for info in played),
        "sdar/skills_dropped_share": _share(info.skills_dropped > 0 for info in played),
        "sdar/context_missing_share": _share(info.context_missing for info in played),
        "sdar/context_empty_share": _share(info.context_empty for info in played),
    }
    if any(info.rewarded for info in played):
        metrics["sdar/foreign_prompt_share"] = _share(info.foreign for info in played)
    if any(info.turns for info in played):
        metrics["sdar/cut_episodes"] = sum(info.cut for info in played)
    if seen:
        tokens = [info.context_tokens for info in seen]
        metrics["sdar/context_tokens/mean"] = sum(tokens) / len(tokens)
        metrics["sdar/context_tokens/max"] = max(tokens)
        if any(info.contrast_prompt_ids for info in seen):
            metrics["sdar/contrast_texts"] = sum(len(info.contrast_prompt_ids) for info in seen) / len(seen)
    skills = Counter(name for info in episodes.values() for name in info.skills)
    metrics |= {f"sdar/skill_episodes/{name}": count for name, count in sorted(skills.items())}
    return metrics


def gap_metrics(
    gap: torch.Tensor,
    mask: torch.Tensor,
    response_mask: torch.Tensor,
    episode_ids: Sequence[Hashable],
    turns: Sequence[int],
    entropy: torch.Tensor | None = None,
) -> dict[str, float]:
    """Where in an episode the gap sits, what is left of it after centring, and how sure the student is.

    All over the distilled tokens of the step, at the weights it began with.

    Args:
        gap: (rows, response_length), nats.
        mask: (rows, response_length) bool, distilled tokens.
        response_mask: (rows, response_length) bool, sampled tokens; a turn is a run of them.
        episode_ids: (rows,).
        turns: (rows,), 0-based index of the row's first turn in its episode.
        entropy: (rows, response_length), the student's, nats, or None.
    """
    if not mask.any():
        return {}
    turn = row_turns(response_mask) + torch.tensor(turns, device=mask.device).unsqueeze(-1)
    length: dict[Hashable, int] = {}
    for episode, last in zip(episode_ids, turn.amax(dim=-1).tolist(), strict=True):
        length[episode] = max(length.get(episode, 0), last + 1)
    third = 3 * turn // torch.tensor([length[name] for name in episode_ids], device=mask.device).unsqueeze(-1)
    metrics = {}
    for index, name in enumerate(("first", "middle", "last")):
        inside = gap[mask & (third == index)]
        if len(inside):
            metrics[f"sdar/gap_mean/{name}_third"] = inside.double().mean().item()
    centred = (gap.double() - episode_means(gap.double(), mask, episode_ids))[mask]
    metrics["sdar/gap_centred_std"] = centred.square().mean().sqrt().item()
    metrics["sdar/gap_centred_positive_share"] = (centred > 0).double().mean().item()
    if entropy is not None:
        metrics["sdar/student_entropy"] = entropy[mask].double().mean().item()
    return metrics


def gap_size(gap: torch.Tensor, mask: torch.Tensor, response_mask: torch.Tensor) -> dict[str, float]:
    """Mean of the absolute gap over the distilled tokens of a turn, then over the step's turns; empty without any.

    Args:
        gap, mask, response_mask: as of :func:`gap_metrics`.
    """
    sums, counts = turn_sums(gap.abs(), mask, row_turns(response_mask))
    judged = counts > 0
    return {GAP_SIZE: (sums[judged] / counts[judged]).mean().item()} if judged.any() else {}


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
    if sums.get("grad_rl_squared", 0.0) > 0.0:
        share = math.sqrt(sums["grad_distill_squared"] / sums["grad_rl_squared"])
        means[GRAD_SHARE] = metrics.get("sdar/lambda", 1.0) * share
    means |= column_means(sums)
    norms = {part: metrics.pop(f"actor/{NORM_PREFIX}{part}", 0.0) for part in ("rl", "distillation")}
    if norms["rl"] > 0.0:
        means[GRAD_SHARE_WEIGHTS] = metrics.get("sdar/lambda", 1.0) * norms["distillation"] / norms["rl"]
    means["sdar/loss"] = metrics.pop("actor/sdar/loss")
    return means


def column_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics from the sums over all micro-batches and ranks; empty where the objective reads no distributions."""
    tokens = sums.get("tokens", 0.0)
    if not tokens or "distribution_divergence" not in sums:
        return {}
    return {f"sdar/{metric}": sums[f"distribution_{name}"] / tokens for name, metric in _DISTRIBUTIONS.items()}


def _share(flags: Any) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)
