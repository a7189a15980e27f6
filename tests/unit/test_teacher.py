"""What the trainer's side of the teacher pass guarantees, without workers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transfer_queue as tq
from omegaconf import OmegaConf

from sdar_verl.config import TeacherConfig
from sdar_verl.errors import TeacherError
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.training.teacher import PrivilegedTeacher, check_not_lost
from sdar_verl.training.teacher_rows import TeacherRows, nested, response_part

VOCABULARY = 1000
CHANCE = -math.log(VOCABULARY)


def teacher(step: int = 1, adapter: str | None = None, **settings: Any) -> PrivilegedTeacher:
    config = OmegaConf.create({"actor_rollout_ref": {"model": {"lora_adapter_path": adapter}}})
    return PrivilegedTeacher(TeacherConfig(**settings), SimpleNamespace(global_steps=step, config=config))


@pytest.mark.parametrize("mean", [CHANCE, 1.3 * CHANCE, 0.99 * CHANCE, float("nan")])
def test_a_teacher_that_knows_nothing_stops_the_run(mean):
    with pytest.raises(TeacherError, match=r"weights are lost.*sdar\.teacher\.path"):
        check_not_lost(mean, -0.3, VOCABULARY)


@pytest.mark.parametrize(("mean", "student"), [(-0.5, -0.3), (0.9 * CHANCE, -0.3), (CHANCE, CHANCE)])
def test_a_teacher_that_knows_something_or_as_little_as_its_student_does_not(mean, student):
    check_not_lost(mean, student, VOCABULARY)


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        (True, {"source": "actor", "step": 50}),
        (True, {"source": "actor_fresh", "step": 50}),
        (True, {"source": "ema"}),
        (True, {"source": "snapshot", "adapter": "some/adapter"}),
        (True, {"source": "reference"}),
        (True, {"source": "lora_base"}),
        (False, {"source": "ema", "step": 2}),
        (False, {"source": "reference", "step": 50}),
        (False, {"source": "reference", "path": "another/model"}),
        (False, {"source": "lora_base", "adapter": "some/adapter"}),
    ],
)
def test_the_empty_context_is_checked_where_the_weights_are_the_students(expected, arguments):
    assert teacher(**arguments).equals_student is expected


def test_the_tolerance_is_stated_or_the_default_of_the_source():
    assert teacher(source="actor").tolerance == 1e-3
    assert teacher(source="reference").tolerance == 0.02
    assert teacher(source="reference", sanity_tolerance=0.5).tolerance == 0.5


class Queue:
    """TransferQueue's functions over a dict."""

    def __init__(self, monkeypatch, **fields):
        self.fields = fields
        monkeypatch.setattr(tq, "kv_batch_get", lambda keys, partition_id, select_fields: self.fields)


def batch() -> Any:
    return SimpleNamespace(keys=["a_0_0", "b_0_0"], partition_id="train", tags=[{}, {}])


def test_rows_without_a_context_keep_the_students_prompt_and_get_a_mask_of_zeros(monkeypatch):
    Queue(
        monkeypatch,
        prompts=nested([torch.tensor([1, 2]), torch.tensor([3])]),
        responses=nested([torch.tensor([7, 8, 9]), torch.tensor([6])]),
        response_mask=nested([torch.tensor([1, 0, 1]), torch.tensor([1])]),
    )
    seen = RowInfo(turn=0, task_type="t", teacher_prompt_ids=torch.tensor([5, 5, 1, 2]).numpy())
    rows = TeacherRows.read(batch(), [seen, None])
    inputs = rows.inputs()
    assert inputs[0]["input_ids"].tolist() == [5, 5, 1, 2, 7, 8, 9]
    assert inputs[0]["position_ids"].tolist() == list(range(7))
    assert inputs[1]["input_ids"].tolist() == [3, 6]
    assert [mask.tolist() for mask in rows.teacher_masks()] == [[1, 0, 1], [0]]
    own = TeacherRows.read(batch(), None)
    assert [row["input_ids"].tolist() for row in own.inputs()] == [[1, 2, 7, 8, 9], [3, 6]]


def test_the_response_part_is_what_predicts_the_response():
    """Position i of a sequence is about token i + 1; the response is the sequence's end."""
    about = nested([torch.arange(1, length + 1) for length in (5, 3, 7)])  # the index of the token it is about
    part = response_part(about, (2, 1, 4))
    assert [row.tolist() for row in part.unbind()] == [[3, 4], [2], [3, 4, 5, 6]]


def test_a_step_without_any_context_is_an_error(monkeypatch):
    fields = {
        name: nested([torch.tensor([1]), torch.tensor([1])]) for name in ("prompts", "responses", "response_mask")
    }
    Queue(monkeypatch, **fields)
    with pytest.raises(TeacherError, match="no context on any row"):
        TeacherRows.read(batch(), [RowInfo(turn=0, task_type="t"), None])
