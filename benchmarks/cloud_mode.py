"""Trainer mode ``sdar_cloud_bench``: ``sdar``, with its mirror in every other block of steps only; for ``cloud.py``."""

from __future__ import annotations

import os
from typing import Any

from verl.trainer.ppo.v1.trainer_base import register_trainer

from sdar_verl.verl.trainer import SdarTrainer


@register_trainer("sdar_cloud_bench")
class Bench(SdarTrainer):
    """Switches the mirror at the beginning of a step."""

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        cloud = self.cloud
        if not hasattr(self, "_mirror"):
            self._mirror, self._stores = cloud._mirror, list(cloud._stores)
        on = self.global_steps // int(os.environ["SDAR_BENCH_BLOCK"]) % 2 == 1
        cloud._mirror = self._mirror if on else None
        cloud._stores = self._stores if on else self._stores[:1]
        return super().step(metrics, timing_raw)
