"""What can be wrong with ``sdar.advantage`` and is known before Ray starts."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from sdar_verl.config import SdarConfig
from sdar_verl.recipe import plays_environments

_ANCHOR = "sdar.advantage.group_stats=anchor"


def advantage_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault, one line each; ``config`` is verl's whole config."""
    stats, rows = sdar.advantage.group_stats, sdar.rollout.rows
    faults = [] if stats == "anchor" else list(_unread(sdar))
    if stats != "episode" and rows == "trajectory":
        faults.append(
            f"sdar.advantage.group_stats={stats} counts turn rows, sdar.rollout.rows=trajectory has none; use episode"
        )
    return faults + (list(_anchor(config)) if stats == "anchor" else [])


def _unread(sdar: SdarConfig) -> Iterator[str]:
    for name in ("discount", "anchors"):
        value = getattr(sdar.advantage, name)
        if value is not None:
            yield (
                f"sdar.advantage.{name}={value} has no effect with sdar.advantage.group_stats="
                f"{sdar.advantage.group_stats}; leave it at null, or use group_stats=anchor"
            )


def _anchor(config: DictConfig) -> Iterator[str]:
    estimator = config.algorithm.adv_estimator
    if estimator != "sdar":
        yield f"{_ANCHOR} has no effect with algorithm.adv_estimator={estimator}; use adv_estimator=sdar, or episode"
    if not plays_environments(config):
        yield f"{_ANCHOR} compares observations of the text environments, which this recipe has none of; use episode"
    if config.algorithm.get("norm_adv_by_std_in_grpo", True):
        yield (
            f"{_ANCHOR} centres returns and does not divide them, but algorithm.norm_adv_by_std_in_grpo=True; set that "
            "to False"
        )
