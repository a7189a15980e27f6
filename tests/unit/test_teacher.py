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
from sdar_verl.teacher.privileged import PrivilegedTeacher, check_not_lost
from sdar_verl.teacher.rows import TeacherRows, nested, response_part, stop_without_contexts
from sdar_verl.fields import TEACHER_ENTROPY, TEACHER_LOG_PROBS

VOCABULARY = 1000
CHANCE = -math.log(VOCABULARY)


def teacher(
    step: int = 1, adapter: str | None = None, precision: str | None = None, **settings: Any
) -> PrivilegedTeacher:
    fsdp = {"mixed_precision": precision and {"param_dtype": precision}}
    config = OmegaConf.create(
        {"actor_rollout_ref": {"model": {"lora_adapter_path": adapter}, "actor": {"fsdp_config": fsdp}}}
    )
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


def test_the_tolerance_is_stated_or_the_default_of_engine_and_precision():
    assert teacher(source="actor", precision="fp32").tolerance == 1e-3
    assert teacher(source="actor", precision="bf16").tolerance == 0.05
    assert teacher(source="actor").tolerance == 0.05, "verl's default is bf16"
    assert teacher(source="reference", precision="fp32").tolerance == 0.05
    assert teacher(source="actor", precision="fp32", placement="rollout_server").tolerance == 0.05
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


class PoolOfOne:
    """A teacher's workers: the log-prob of every token is minus the length of its row's prompt."""

    def __init__(self, queue: dict[str, Any]):
        self.queue = queue
        self.calls = 0

    def compute_teacher_log_prob(self, meta: Any) -> Any:
        self.calls += 1
        rows = self.queue[meta.partition_id]
        lengths = zip(rows["prompts"].unbind(), rows["responses"].unbind(), strict=True)
        values = nested([-len(prompt) * torch.ones(len(response)) for prompt, response in lengths])
        self.queue[meta.partition_id] = {TEACHER_LOG_PROBS: values, TEACHER_ENTROPY: values}
        return SimpleNamespace(futures=[Rows(fields=["prompts", TEACHER_LOG_PROBS, TEACHER_ENTROPY])])


class Rows(SimpleNamespace):
    """verl's description of two rows: some of its attributes."""

    def __len__(self) -> int:
        return 2

    @classmethod
    def concat(cls, parts: list[Rows]) -> Rows:
        return parts[0]


def test_a_pool_scores_while_the_student_is_scored(monkeypatch):
    """The early pass is the one that counts, whatever other pass comes in between."""
    queue: dict[str, Any] = {
        "train": {
            "prompts": nested([torch.tensor([1, 2]), torch.tensor([3])]),
            "responses": nested([torch.tensor([7, 8]), torch.tensor([6])]),
            "response_mask": nested([torch.tensor([1, 1]), torch.tensor([1])]),
            "old_log_probs": nested([torch.tensor([-2.0, -2.0]), torch.tensor([-1.0])]),
        }
    }
    monkeypatch.setattr("ray.get", lambda futures: futures)
    monkeypatch.setattr(tq, "kv_batch_get", lambda keys, partition_id, select_fields: queue[partition_id])
    monkeypatch.setattr(tq, "kv_clear", lambda keys, partition_id: queue.pop(partition_id))

    def put(keys, partition_id, fields, tags=None):
        queue[partition_id] = {**queue.get(partition_id, {}), **{name: fields[name] for name in fields.keys()}}  # noqa: SIM118

    monkeypatch.setattr(tq, "kv_batch_put", put)
    one = teacher(source="reference", placement="pool", pool_gpus_per_node=1)
    one._trainer.config.actor_rollout_ref.rollout = {"temperature": 1.0}
    one._trainer.tokenizer = range(VOCABULARY)
    one._trainer.sdar = SimpleNamespace(on_nonfinite="error")
    one._pool = PoolOfOne(queue)
    step = Rows(keys=["a_0_0", "b_0_0"], partition_id="train", tags=[{}, {}])
    seen = RowInfo(turn=0, task_type="t", teacher_prompt_ids=torch.tensor([5, 5, 5, 5]).numpy())

    one.begin(step, [seen, None])
    assert one._pool.calls == 1
    assert one.check_empty_context(step) == 0.0  # on the student's prompts: minus their lengths
    assert one.score(step, [seen, None])["sdar/teacher_log_prob"] == -4.0
    assert one._pool.calls == 2
    assert [row.tolist() for row in queue["train"][TEACHER_LOG_PROBS].unbind()] == [[-4.0, -4.0], [-1.0]]
    assert set(queue) == {"train"}, "rows are left behind"

    one.begin(step, [seen, None], carry=["sdar_support_ids"])
    assert one._pool.calls == 2, "a pass that reads the student's numbers cannot start before them"


def test_the_response_part_is_what_predicts_the_response():
    """Position i of a sequence is about token i + 1; the response is the sequence's end."""
    about = nested([torch.arange(1, length + 1) for length in (5, 3, 7)])  # the index of the token it is about
    part = response_part(about, (2, 1, 4))
    assert [row.tolist() for row in part.unbind()] == [[3, 4], [2], [3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("info", "at_first", "later"),
    [
        ({}, "no context on any row", "no context on any row"),
        ({"context_empty": True}, "no context on any row", None),
        ({"truncated": True}, "not one teacher prompt of this step fits sdar.teacher.max_prompt_length", None),
        ({"context_missing": True}, None, None),
        ({"teacher_prompt_ids": torch.ones(2).numpy()}, None, None),
    ],
)
def test_a_step_without_any_context_is_an_error_when_it_is_the_set_ups_fault(info, at_first, later):
    """A later step may have nothing but tasks that an option leaves without a teacher: that must not kill the run."""
    infos = [RowInfo(turn=0, task_type="t", **info), RowInfo(turn=0, task_type="t", failed=True), None]
    for step, said in ((1, at_first), (2, later)):
        if said is None:
            stop_without_contexts(infos, step)
        else:
            with pytest.raises(TeacherError, match=said):
                stop_without_contexts(infos, step)
