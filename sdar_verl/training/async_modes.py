"""Trainer modes ``sdar_colocate_async`` and ``sdar_separate_async``: SDAR on verl's asynchronous trainers.

docs/async.md says what they are and what off-policy data mean for the teacher.
"""

from __future__ import annotations

from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync

from sdar_verl.training.teacher.privileged import put_worker
from sdar_verl.training.trainer import SdarTraining


@register_trainer("sdar_colocate_async")
class SdarColocateAsync(SdarTraining, PPOTrainerColocateAsync):
    """Training and rollout take turns on the same devices; episodes that are not over go on after the update."""

    verl_mode = "colocate_async"


@register_trainer("sdar_separate_async")
class SdarSeparateAsync(SdarTraining, PPOTrainerSeparateAsync):
    """Rollout has devices of its own and never waits; several updates per weight sync."""

    verl_mode = "separate_async"

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if not (self._has_teacher and self.sdar.teacher.placement == "colocated"):
            from sdar_verl.training.detach import DetachWorker

            put_worker(self, DetachWorker)

    def _teacher_worker(self) -> type:
        from sdar_verl.training.teacher.worker import DetachTeacherWorker

        return DetachTeacherWorker
