"""Rows by which verl fills a batch up: one token of their own, and what an agent loop stored beside a whole row."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.utils import tensordict_utils as tu

from sdar_verl.fields import ANCHOR_LOG_PROBS, SUPPORT_IDS, TEACHER_MASK
from sdar_verl.requests import SCORING_PASS, HeadRequest, ScoringPass
from sdar_verl.table import nested
from sdar_verl.verl.worker import SdarTrainingWorker
from tests.support.small_engine import make_engine, make_model

K = 3


class Worker(SdarTrainingWorker):
    """Ours, on a small model, alone."""

    def __init__(self) -> None:
        engine = make_engine(make_model(1))
        engine.eval_mode = lambda **_: nullcontext()
        engine.infer_batch = self._infer_batch
        self.engine = engine
        self.engine_config = SimpleNamespace(
            use_dynamic_bsz=True,
            use_fused_kernels=False,
            infer_max_token_len_per_gpu=9999,
            infer_micro_batch_size_per_gpu=None,
        )
        self.model_config: Any = {"use_remove_padding": False}

    def _agreed(self, numbers: list[int], rows: int) -> list[int]:
        return numbers

    def _infer_batch(self, batch: TensorDict, loss_function: Any = None) -> Any:
        with torch.no_grad():
            return self.engine.forward_step(batch, loss_function=None, forward_only=True)[1]


@pytest.mark.parametrize("tokens", [1, 4, 200])
def test_the_anchors_pass_reads_of_them_what_belongs_to_them(tokens: int) -> None:
    """With ``placement=rollout_server`` mask and support lie beside the rows before the batch is filled up."""
    row = {
        "prompts": torch.arange(3),
        "responses": torch.arange(tokens) % 5 + 5,
        "response_mask": torch.ones(tokens, dtype=torch.int64),
        "input_ids": torch.arange(3 + tokens),
        "position_ids": torch.arange(3 + tokens),
        TEACHER_MASK: torch.ones(tokens, dtype=torch.int64),
        SUPPORT_IDS: torch.arange(K, dtype=torch.int32).repeat(tokens, 1),
    }
    filling, _ = construct_minimal_padding_template(row, {}, 0)
    assert len(filling[TEACHER_MASK]) == tokens and len(filling["responses"]) == 1, "verl cuts our columns itself now"

    def scored(*rows: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        names = ("prompts", "responses", TEACHER_MASK, SUPPORT_IDS)
        data = TensorDict({name: nested([row[name] for row in rows]) for name in names}, batch_size=len(rows))
        scoring = ScoringPass.anchor(HeadRequest("on_support", True, 128, K), (SUPPORT_IDS,))
        tu.assign_non_tensor(data, temperature=1.0, pad_token_id=0, **{SCORING_PASS: scoring.to_json()})
        return list(Worker().score(data)[ANCHOR_LOG_PROBS].unbind())

    (alone,), (beside, filled) = scored(row), scored(row, filling)
    torch.testing.assert_close(beside, alone)
    assert filled.shape == (1, K + 1)
