"""A trainer in which something goes wrong; loaded into every process by VERL_USE_EXTERNAL_MODULES.

Selected by ``trainer.v1.trainer_mode=sdar_faults``; environment variables say what:

- ``SDAR_STOP_SAVE=N:FILE``: the checkpoint of step N stops for ever, when the workers' files are there but not the
  trainer's; FILE appears then.
- ``SDAR_POISON=N``: at step N one row of the student's log-probs and one of the teacher's hold NaN.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import wrapt

FAULTS = "sdar_verl.plugin,tests.support.faults"


def _register(_) -> None:
    import torch
    import transfer_queue as tq
    from sdar_verl.teacher.privileged import PrivilegedTeacher
    from tensordict import TensorDict
    from verl.trainer.ppo.v1.trainer_base import register_trainer

    from sdar_verl.fields import TEACHER_LOG_PROBS
    from sdar_verl.teacher.rows import nested
    from sdar_verl.verl.trainer import SdarTrainer

    def poisoned(values: torch.Tensor, infos: list) -> torch.Tensor:
        rows = [row.clone() for row in values.unbind()]
        first = next(i for i, info in enumerate(infos) if info is not None)
        rows[first][0] = float("nan")
        return nested(rows)

    class Teacher(PrivilegedTeacher):
        def _receive(self, sent):
            scored = super()._receive(sent)
            if os.environ.get("SDAR_POISON") == str(self._trainer.global_steps):
                scored[TEACHER_LOG_PROBS] = poisoned(scored[TEACHER_LOG_PROBS], self._trainer._infos)
            return scored

    class StopsForEver:
        def __init__(self, file: str):
            self.file = Path(file)

        def state_dict(self):
            self.file.touch()
            time.sleep(3600)

    @register_trainer("sdar_faults")
    class FaultyTrainer(SdarTrainer):
        def __init__(self, config):
            super().__init__(config)
            self._teacher = Teacher(self.sdar.teacher, self)

        def _compute_old_log_prob(self, batch, metrics):
            batch = super()._compute_old_log_prob(batch, metrics)
            if os.environ.get("SDAR_POISON") == str(self.global_steps):
                name = "old_log_probs"
                data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[name])
                fields = TensorDict({name: poisoned(data[name], self._infos)}, batch_size=len(batch))
                tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
            return batch

        def _save_checkpoint(self):
            step, _, file = os.environ.get("SDAR_STOP_SAVE", "").partition(":")
            if step == str(self.global_steps):
                self.train_dataloader = StopsForEver(file)
            super()._save_checkpoint()


wrapt.register_post_import_hook(_register, "sdar_verl.verl.trainer")
