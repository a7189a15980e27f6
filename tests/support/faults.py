"""A trainer in which something goes wrong; loaded into every process by VERL_USE_EXTERNAL_MODULES.

Selected by ``trainer.v1.trainer_mode=sdar_faults``; environment variables say what:

- ``SDAR_STOP_SAVE=N:FILE``: the checkpoint of step N stops for ever, when the workers' files are there but not the
  trainer's; FILE appears then.
- ``SDAR_POISON=N``: at step N one row of the student's log-probs and another one of the teacher's hold NaN.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import wrapt

FAULTS = "sdar_verl.plugin,tests.support.faults"


def _register(_) -> None:
    import torch
    from verl.trainer.ppo.v1.trainer_base import register_trainer

    from sdar_verl.fields import TEACHER_LOG_PROBS
    from sdar_verl.table import nested
    from sdar_verl.verl.trainer import SdarTrainer

    def poisoned(values: torch.Tensor, row: int) -> torch.Tensor:
        rows = [row.clone() for row in values.unbind()]
        rows[row][0] = float("nan")
        return nested(rows)

    class StopsForEver:
        def __init__(self, file: str):
            self.file = Path(file)

        def state_dict(self):
            self.file.touch()
            time.sleep(3600)

    @register_trainer("sdar_faults")
    class FaultyTrainer(SdarTrainer):
        def score_teacher(self, table):
            metrics = super().score_teacher(table)
            if os.environ.get("SDAR_POISON") == str(self.global_steps):
                seen = [row for row, info in enumerate(table.infos) if info is not None and info.has_teacher]
                for name, row in (("old_log_probs", seen[0]), (TEACHER_LOG_PROBS, seen[-1])):
                    table.rows.write({name: poisoned(table.rows.read([name])[name], row)})
            return metrics

        def _save_checkpoint(self):
            step, _, file = os.environ.get("SDAR_STOP_SAVE", "").partition(":")
            if step == str(self.global_steps):
                self.train_dataloader = StopsForEver(file)
            super()._save_checkpoint()


wrapt.register_post_import_hook(_register, "sdar_verl.verl.trainer")
