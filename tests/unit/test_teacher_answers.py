"""What the trainer makes of the rollout server's answers: fields, masks, the comparison with its own log-probs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transfer_queue as tq
from omegaconf import OmegaConf

from sdar_verl.config import TeacherConfig
from sdar_verl.errors import NonFiniteError, TeacherError
from sdar_verl.rollout.rows import EpisodeNote, RowInfo
from sdar_verl.teacher.answers import answer_metrics
from sdar_verl.teacher.privileged import PrivilegedTeacher
from sdar_verl.teacher.rows import nested
from sdar_verl.fields import TEACHER_ENTROPY, TEACHER_LOG_PROBS, TEACHER_MASK


class Rows(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.keys)


BATCH = Rows(keys=["a_0_0", "a_1_0", "b_0_0"], partition_id="train", tags=[{}, {}, {}])


@pytest.fixture
def queue(monkeypatch):
    """Three rows: two sampled tokens around one of the environment's; one token; padding."""
    fields = {
        "prompts": nested([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([3])]),
        "responses": nested([torch.tensor([7, 8, 9]), torch.tensor([6]), torch.tensor([6])]),
        "response_mask": nested([torch.tensor([1, 0, 1]), torch.tensor([1]), torch.tensor([1])]),
        "old_log_probs": nested([torch.tensor([-1.0, 0.0, -2.0]), torch.tensor([-0.5]), torch.tensor([-0.5])]),
        "rollout_log_probs": nested([torch.tensor([-1.1, 0.0, -2.0]), torch.tensor([-0.5]), torch.tensor([-0.5])]),
    }

    def put(keys, partition_id, fields: Any, tags=None):
        stored.update({name: fields[name] for name in fields.keys()})  # noqa: SIM118

    stored = dict(fields)
    monkeypatch.setattr(tq, "kv_batch_get", lambda keys, partition_id, select_fields: stored)
    monkeypatch.setattr(tq, "kv_batch_put", put)
    return stored


def teacher(on_nonfinite: str = "error", **settings: Any) -> PrivilegedTeacher:
    config = OmegaConf.create({"actor_rollout_ref": {"model": {}}})
    settings = {"source": "actor", "placement": "rollout_server", **settings}
    sdar = SimpleNamespace(on_nonfinite=on_nonfinite)
    trainer = SimpleNamespace(global_steps=1, config=config, tokenizer=range(1000), sdar=sdar)
    return PrivilegedTeacher(TeacherConfig(**settings), trainer)


def record(values=None, **given: Any) -> RowInfo:
    found = None if values is None else np.asarray(values, dtype=np.float32)
    return RowInfo(0, "t", teacher_prompt_ids=np.asarray([5, 5]), teacher_log_probs=found, **given)


ANSWERED = [-0.25, -9.0, -0.75]


def test_answers_become_the_fields_of_a_pass(queue):
    one = teacher()
    metrics = one.score(BATCH, [record(ANSWERED), record([-1.5]), None])
    assert [row.tolist() for row in queue[TEACHER_LOG_PROBS].unbind()] == [ANSWERED, [-1.5], [0.0]]
    assert [row.tolist() for row in queue[TEACHER_MASK].unbind()] == [[1, 0, 1], [1], [0]]
    assert TEACHER_ENTROPY not in queue
    assert metrics["sdar/teacher_log_prob"] == pytest.approx((-0.25 - 0.75 - 1.5) / 3)
    assert metrics["sdar/teacher_staleness"] == 0
    assert metrics["sdar/teacher_failed_share"] == 0.0


def test_an_answer_of_nan_stops_the_step_or_leaves_the_distillation_term(queue):
    infos = [record([float("nan"), -9.0, -0.75]), record([-1.5]), None]
    with pytest.raises(NonFiniteError, match="teacher's log-probs hold NaN or infinity in 1 of 3 rows"):
        teacher().score(BATCH, infos)
    metrics = teacher("drop").score(BATCH, infos)
    assert metrics["sdar/nonfinite_teacher_rows"] == 1
    assert metrics["sdar/teacher_log_prob"] == -1.5
    assert [row.tolist() for row in queue[TEACHER_MASK].unbind()] == [[0, 0, 0], [1], [0]]
    assert [row.tolist() for row in queue[TEACHER_LOG_PROBS].unbind()] == [[0.0] * 3, [-1.5], [0.0]]


def test_a_row_whose_request_failed_leaves_the_distillation_term_and_is_counted(queue):
    metrics = teacher().score(BATCH, [record(ANSWERED), record(teacher_failure="RuntimeError: no"), None])
    assert [row.tolist() for row in queue[TEACHER_MASK].unbind()] == [[1, 0, 1], [0], [0]]
    assert [row.tolist() for row in queue[TEACHER_LOG_PROBS].unbind()] == [ANSWERED, [0.0], [0.0]]
    assert metrics["sdar/teacher_failed_share"] == 0.5


def test_a_step_without_any_answer_stops_with_the_reason(queue):
    failed = record(teacher_failure="RuntimeError: the engine is dead")
    with pytest.raises(TeacherError, match=r"none of the teacher's 2 requests.*the engine is dead.*colocated"):
        teacher().score(BATCH, [failed, failed, None])


def test_a_failure_beside_rows_without_a_context_is_still_no_answer(queue):
    alone = RowInfo(0, "t", context_missing=True)
    with pytest.raises(TeacherError, match="none of the teacher's 1 requests"):
        teacher().score(BATCH, [record(teacher_failure="RuntimeError: no"), alone, None])


@pytest.mark.parametrize(
    ("found", "words"),
    [(None, "no answer to it; its agent loop is not sdar_agent"), ([-1.0, -1.0], "2 log-probs for 3 tokens")],
)
def test_rows_of_an_agent_loop_that_does_not_ask_are_an_error(queue, found, words):
    with pytest.raises(TeacherError, match=words):
        teacher().score(BATCH, [record(found), record([-1.5]), None])


def test_a_row_without_a_sampled_token_needs_no_answer(queue):
    queue["response_mask"] = nested([torch.tensor([1, 0, 1]), torch.tensor([0]), torch.tensor([1])])
    metrics = teacher().score(BATCH, [record(ANSWERED), record(), None])
    assert [row.tolist() for row in queue[TEACHER_LOG_PROBS].unbind()] == [ANSWERED, [0.0], [0.0]]
    assert metrics["sdar/teacher_failed_share"] == 0.0


def checked(values: list[float]) -> RowInfo:
    return record(ANSWERED, student_log_probs=np.asarray(values, dtype=np.float32))


def test_server_and_trainer_are_compared_at_every_step(queue):
    """On sampled tokens alone: what the environment said is not the model's."""
    one = teacher()
    for _ in range(2):
        metrics = one.score(BATCH, [checked([-1.02, -7.0, -1.99]), record([-1.5]), None])
        assert metrics["sdar/server_check/trainer"] == pytest.approx(0.015)
        assert metrics["sdar/server_check/bias"] == pytest.approx(-0.005)
        assert metrics["sdar/server_check/rollout"] == pytest.approx((0.08 + 0.01) / 2)
    del queue["rollout_log_probs"]
    metrics = one.score(BATCH, [checked([-1.02, -7.0, -1.99]), record([-1.5]), None])
    assert "sdar/server_check/rollout" not in metrics


def test_a_server_that_is_not_the_trainers_model_stops_the_first_step(queue):
    one = teacher()
    assert one.tolerance == 0.05
    with pytest.raises(TeacherError, match=r"by 0\.5 nats.*sanity_tolerance=0\.05.*placement=colocated"):
        one.score(BATCH, [checked([-1.5, 0.0, -1.5]), record([-1.5]), None])
    with pytest.raises(TeacherError, match="by nan nats"):
        one.score(BATCH, [checked([float("nan"), 0.0, -1.5]), record([-1.5]), None])
    assert teacher(sanity_tolerance=0.6).score(BATCH, [checked([-1.5, 0.0, -1.5]), record([-1.5]), None])


def test_the_first_comparison_counts_even_if_it_is_not_in_the_first_step(queue):
    one = teacher()
    one.score(BATCH, [record(ANSWERED), record([-1.5]), None])  # its request failed, say
    with pytest.raises(TeacherError, match="scores the student's own prompts"):
        one.score(BATCH, [checked([-1.5, 0.0, -1.5]), record([-1.5]), None])
    later = teacher()
    later.score(BATCH, [checked([-1.0, 0.0, -2.0]), record([-1.5]), None])
    metrics = later.score(BATCH, [checked([-1.5, 0.0, -1.5]), record([-1.5]), None])
    assert metrics["sdar/server_check/trainer"] == pytest.approx(0.5), "later steps report it"


def test_waits_are_those_of_episodes(queue):
    def episode(wait):
        return record(ANSWERED, episode=EpisodeNote({}, teacher_wait_s=wait))

    metrics = answer_metrics([episode(0.5), record([-1.0]), episode(1.5), None])
    assert metrics["sdar/teacher_wait_s/mean"] == 1.0 and metrics["sdar/teacher_wait_s/max"] == 1.5
