"""A trainer that also writes down what the update reads; loaded into every process by VERL_USE_EXTERNAL_MODULES."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import wrapt


def _register(_) -> None:
    import torch
    from verl.trainer.ppo.v1.trainer_base import register_trainer

    from sdar_verl.fields import (
        CONTRAST,
        TEACHER_LOG_PROBS,
        TEACHER_MASK,
        TEACHER_PROMPTS,
        contrast_pass,
        log_probs_of,
        teacher_pass,
    )
    from sdar_verl.verl.async_modes import SdarColocateAsync, SdarSeparateAsync
    from sdar_verl.verl.trainer import SdarTrainer

    fields = [
        "prompts",
        "responses",
        "response_mask",
        "old_log_probs",
        "rollout_log_probs",
        "ref_log_prob",
        "advantages",
        "entropy",
        "rm_scores",
        TEACHER_PROMPTS,
        TEACHER_LOG_PROBS,
        TEACHER_MASK,
        CONTRAST,
        log_probs_of(teacher_pass(1)),
        *(log_probs_of(contrast_pass(text)) for text in range(4)),
    ]

    class Recording:
        def update_actor(self, table, metrics):
            data = table.rows.read(fields)
            record = {name: [row.clone() for row in data[name].unbind()] for name in fields if name in data}
            infos = [
                info and replace(info, teacher_prompt_ids=ids.numpy() if len(ids) else None)
                for info, ids in zip(table.infos, record.pop(TEACHER_PROMPTS, [()] * len(table.infos)), strict=True)
            ]
            record |= {"keys": list(table.batch.keys), "infos": infos, "tags": list(table.batch.tags)}
            part = f"_{self.local_trigger_step}" if self.local_trigger_step else ""
            torch.save(record, Path(os.environ["SDAR_RECORD"]) / f"step_{self.global_steps}{part}.pt")
            super().update_actor(table, metrics)

    for mode, trainer in (
        ("sdar", SdarTrainer),
        ("sdar_colocate_async", SdarColocateAsync),
        ("sdar_separate_async", SdarSeparateAsync),
    ):
        register_trainer(f"{mode}_recording")(type(f"Recording{trainer.__name__}", (Recording, trainer), {}))


wrapt.register_post_import_hook(_register, "sdar_verl.verl.async_modes")
