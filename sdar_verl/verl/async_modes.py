"""Trainer modes ``sdar_colocate_async`` and ``sdar_separate_async``: SDAR on verl's asynchronous trainers.

docs/async.md says what they are and what off-policy data mean for the teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync

from sdar_verl.table import StepTable
from sdar_verl.verl.continuing import ContinuingClient
from sdar_verl.verl.teacher import put_worker
from sdar_verl.verl.trainer import SdarTraining


@register_trainer("sdar_colocate_async")
class SdarColocateAsync(SdarTraining, PPOTrainerColocateAsync):
    """Training and rollout take turns on the same devices; episodes that are not over go on after the update."""

    verl_mode = "colocate_async"

    def get_llm_client(self) -> Any:
        """verl's, with our client."""
        return self.llm_server_manager.get_client(client_cls=ContinuingClient)


@register_trainer("sdar_separate_async")
class SdarSeparateAsync(SdarTraining, PPOTrainerSeparateAsync):
    """Rollout has devices of its own and never waits; several updates per weight sync."""

    verl_mode = "separate_async"

    def get_llm_client(self) -> Any:
        """verl's, with our client."""
        return self.standalone_server_manager.get_client(client_cls=ContinuingClient)

    def _setup(self) -> None:
        # With hybrid_engine=False verl 0.9.1 hands its logger an argument of print's (flush), which is an error as soon
        # as the line is to be shown.
        logger = logging.getLogger(PPOTrainerSeparateAsync.__module__)
        level = logger.level
        if not self.config.actor_rollout_ref.hybrid_engine:
            logger.setLevel(max(level, logging.WARNING))
        try:
            super()._setup()
        finally:
            logger.setLevel(level)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if self.teacher is None:
            from sdar_verl.verl.detach import DetachWorker

            put_worker(self, DetachWorker)

    def _teacher_worker(self) -> type:
        from sdar_verl.verl.worker import DetachTeacherWorker

        return DetachTeacherWorker

    def score_teacher(self, table: StepTable) -> dict[str, float]:
        """The pass, with the weights of the step."""
        with self._weights_of_the_step():
            return super().score_teacher(table)

    @contextmanager
    def _weights_of_the_step(self) -> Iterator[None]:
        """For a teacher that is the actor: the weights with which verl computes the step's old log-probs.

        Those of the last weight sync, also for the later updates of a step; so both sides of the gap are of one policy.
        """
        part, workers = self.local_trigger_step, self.actor_rollout_wg
        if self.teacher is None or not self.teacher.reads_actor or self.parameter_sync_step == 1:
            yield
        elif part == 0:
            if self.bypasses:  # otherwise verl has saved them, for its log-probs
                workers.save_model_to_cpu(0)
            yield
        else:
            workers.save_model_to_cpu(part)
            workers.restore_model_from_cpu(0)
            try:
                yield
            finally:
                workers.restore_model_from_cpu(part)
                workers.clear_cpu_model(part)
