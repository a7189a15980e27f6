"""Packed rows must not see each other: measured on the run's own workers, before their first log-probs are used.

With ``use_remove_padding`` verl lays the rows of a micro-batch end to end in one row and trusts attention to keep them
apart by their position ids. An attention that does not, or a layer that carries a state from token to token, lets a row
read the one before it: training goes on, and every log-prob is of another question. The student's and the teacher's
leak alike, so no comparison between the two shows it.

Here every rank scores one row of the step twice in one micro-batch. Kept apart, both copies get the same log-probs;
else the second finds its own text in front of it, which no language model ignores.
"""

from __future__ import annotations

from typing import Any

import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from sdar_verl.checks.engine import sequence_parallel
from sdar_verl.errors import ConfigError
from sdar_verl.table import StepTable
from sdar_verl.teacher.rows import teacher_row
from sdar_verl.teacher.tolerance import same_engine

PARTITION = "sdar_packing"
MAX_TOKENS = 256


def check_packing(run: Any, table: StepTable) -> float:
    """How far the log-probs of two copies of a row are apart, mean nats per token.

    Args:
        run: verl's trainer.
        table: of the first step.

    Raises:
        ConfigError: packed rows see each other.
    """
    gap = _measure(run, table)
    tolerance = same_engine(run.config)
    if not gap <= tolerance:
        attention = OmegaConf.select(run.config, "actor_rollout_ref.model.override_config.attn_implementation")
        raise ConfigError(
            "actor_rollout_ref.model.use_remove_padding=True packs rows into one, and they see each other: the "
            f"same row twice in one micro-batch gets log-probs that differ by {gap:.3g} nats per token on average "
            f"(allowed: {tolerance:g}). The attention (attn_implementation={attention or 'flash_attention_2'}) or "
            "another layer of this model does not separate them by position ids. Set use_remove_padding=False, or use "
            "flash_attention_2 (docs/engines.md)"
        )
    return gap


def _measure(run: Any, table: StepTable) -> float:
    settings = run.config.actor_rollout_ref
    ranks = run.actor_rollout_wg.world_size // sequence_parallel(settings.actor)[1]
    keys, row = [f"copy_{index}" for index in range(2 * ranks)], _row(table)
    tags = [{"prompt_len": len(row["prompts"]), "seq_len": len(row["input_ids"])} for _ in keys]
    tq.kv_batch_put(
        keys=keys, partition_id=PARTITION, fields=list_of_dict_to_tensordict([row for _ in keys]), tags=tags
    )
    extra = {
        "calculate_entropy": False,
        "compute_loss": False,
        "temperature": settings.rollout.temperature,
        # Both copies in one micro-batch, whatever the run's own sizes.
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": 2 * len(row["input_ids"]),
    }
    try:
        meta = KVBatchMeta(partition_id=PARTITION, keys=keys, tags=tags, extra_info=extra)
        run.actor_rollout_wg.compute_log_prob(meta)
        data = tq.kv_batch_get(keys=keys, partition_id=PARTITION, select_fields=["log_probs"])
    finally:
        tq.kv_clear(keys=keys, partition_id=PARTITION)
    copies = torch.stack([values[:-1] for values in data["log_probs"].unbind()]).float()  # the last is of no token
    return (copies[0::2] - copies[1::2]).abs().mean().item()


def _row(table: StepTable) -> dict[str, torch.Tensor]:
    """The step's shortest row, at most its first MAX_TOKENS tokens; verl's padding rows are no text."""
    data = table.rows.read(["prompts", "responses", "position_ids"])
    texts = [
        torch.cat([prompt, response])
        for prompt, response, info in zip(
            data["prompts"].unbind(), data["responses"].unbind(), table.infos, strict=True
        )
        if info is not None
    ]
    text = min(texts, key=len)[:MAX_TOKENS]
    half = len(text) // 2
    form = data["position_ids"].unbind()[0]
    return teacher_row(
        text[:half], text[half:], torch.ones_like(text[half:]), axes=len(form) if form.dim() == 2 else None
    )
