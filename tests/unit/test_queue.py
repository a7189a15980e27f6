"""What verl's workers are sent of the rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta

from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK, TEACHER_PROMPTS, contrast_pass, prompts_of
from sdar_verl.verl import queue
from sdar_verl.verl.queue import QueueRows, RowColumns

NUMBERS = ("input_ids", "response_mask", TEACHER_LOG_PROBS)
PROMPTS = (TEACHER_PROMPTS, prompts_of(contrast_pass(0)))
OBJECTS = ("extra_fields", "raw_prompt", "task")
READ = ("multi_modal_inputs", "uid")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Keys of each look into the queue."""
    calls: list[list[str]] = []

    def kv_batch_get(keys: list[str], partition_id: str, select_fields: Any = None) -> TensorDict:
        calls.append(keys)
        columns = {name: torch.zeros(len(keys), 2) for name in (*NUMBERS, *PROMPTS)}
        columns |= {name: NonTensorStack(*[{"a": 1}] * len(keys)) for name in (*OBJECTS, *READ)}
        return TensorDict(columns, batch_size=len(keys))

    monkeypatch.setattr(queue, "tq", SimpleNamespace(kv_batch_get=kv_batch_get))
    return calls


def rows(fields: list[str] | None = None, columns: RowColumns | None = None) -> QueueRows:
    keys, tags = ["p_0_0", "a_0_0", "a_1_0"], [{"is_padding": True}, {}, {}]
    return QueueRows(KVBatchMeta(keys=keys, tags=tags, partition_id="train", fields=fields, extra_info={}), columns)


def test_workers_are_sent_numbers_and_what_they_read(asked: list[list[str]]) -> None:
    one = rows()
    assert one.lean() is one.batch
    assert set(one.batch.fields) == {*NUMBERS, *READ}
    assert asked == [["a_0_0"]], "one row says which columns are objects"


def test_a_teacher_within_the_update_gets_its_prompts(asked: list[list[str]]) -> None:
    assert set(rows().lean(TEACHER_PROMPTS).fields) == {*NUMBERS, *READ, TEACHER_PROMPTS}


def test_a_retired_teachers_log_probs_stay_behind(asked: list[list[str]]) -> None:
    """Of rows that the rollout server would have scored."""
    fields = [*NUMBERS, TEACHER_MASK]
    assert rows(fields).lean().fields == fields
    assert rows(fields).lean(teacher=False).fields == [name for name in NUMBERS if name != TEACHER_LOG_PROBS]


def test_after_a_phase_of_verls_all_columns_are_named_again_and_none_is_looked_up_twice(asked: list[list[str]]) -> None:
    one = rows()
    one.lean()
    one.batch = rows([*NUMBERS, *PROMPTS, *OBJECTS, *READ, "old_log_probs"]).batch
    assert one.lean().fields == [*NUMBERS, *READ, "old_log_probs"]
    assert len(asked) == 1


def test_a_run_looks_at_one_row_of_its_first_step(asked: list[list[str]]) -> None:
    columns = RowColumns()
    sent = [rows(columns=columns).lean().fields for _ in range(3)]
    assert sent == [sorted([*NUMBERS, *READ])] * 3
    assert len(asked) == 1
