"""What the trainer makes of the rollout server's answers: columns, masks, the comparison with its own log-probs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdar_verl.config import SdarConfig, TeacherConfig
from sdar_verl.config.loss import LossConfig
from sdar_verl.envs.base import Task
from sdar_verl.errors import NonFiniteError, TeacherError
from sdar_verl.fields import SUPPORT_IDS, SUPPORT_LOG_PROBS, TEACHER_LOG_PROBS, TEACHER_MASK, TEACHER_PROMPTS
from sdar_verl.finite import check_teacher
from sdar_verl.requests import StepRequests
from sdar_verl.rollout.outputs import Episode, OutputMaker, Turn
from sdar_verl.rollout.rows import ROW_KEY, EpisodeNote, RowInfo
from sdar_verl.table import StepTable
from sdar_verl.teacher.server_check import answer_metrics
from sdar_verl.verl.teacher import PrivilegedTeacher
from tests.support.table import make_table, stored

ANSWERED = [-0.25, -9.0, -0.75]
KEYS = ["a_0_0", "a_1_0", "b_0_0"]


def teacher(**settings: Any) -> PrivilegedTeacher:
    settings = {"source": "actor", "placement": "rollout_server", **settings}
    trainer = SimpleNamespace(global_steps=1, config=None, tokenizer=range(1000), bypasses=False)
    return PrivilegedTeacher(TeacherConfig(**settings), StepRequests(), trainer)


def record(values=None, **given: Any) -> RowInfo:
    found = None if values is None else np.asarray(values, dtype=np.float32)
    ids = np.asarray([5, 5], dtype=np.int32)
    return RowInfo(0, "t", teacher_prompt_ids=ids, teacher_prompt_tokens=2, teacher_log_probs=found, **given)


def step(*infos: RowInfo | None, rollout: bool = True) -> StepTable:
    """Three rows: two sampled tokens around one of the environment's; one token; padding. Their answers are columns."""
    answers = [
        torch.zeros(length) if info is None or info.teacher_log_probs is None else info.teacher_log_probs
        for length, info in zip((3, 1, 1), infos, strict=True)
    ]
    columns: dict[str, list[Any]] = {
        "response_mask": [[1, 0, 1], [1], [0]],
        "old_log_probs": [[-1.0, 0.0, -2.0], [-0.5], [-0.5]],
        "rollout_log_probs": [[-1.1, 0.0, -2.0], [-0.5], [-0.5]],
        TEACHER_LOG_PROBS: answers,
    }
    if not rollout:
        del columns["rollout_log_probs"]
    return make_table(KEYS, infos, columns)


# ---------------------------------------------------------------- what the agent loop gives along


def node(answered: bool, **loss: Any) -> SdarConfig:
    teacher = TeacherConfig(source="actor", placement="rollout_server" if answered else "colocated")
    return SdarConfig(teacher=teacher, loss=LossConfig(**loss))


def rows_of(*infos: RowInfo, mask: int = 3, arm: str | None = None, answered: bool = False) -> list[Any]:
    """verl's rows, one turn of three sampled tokens each."""
    turns = [Turn([1, 2], [7, 8, 9][:mask], [-0.5] * mask, info) for info in infos]
    task = Task("e", "task", "t", "do it", {})
    return OutputMaker(0, log_probs=True, sdar=node(answered)).rows(Episode(turns), task, arm, whole=False)


def test_answers_become_columns_of_the_row():
    answered, alone = rows_of(record(ANSWERED), RowInfo(0, "t", context_missing=True), answered=True)
    fields = answered.as_dict()
    assert fields[TEACHER_PROMPTS].tolist() == [5, 5] and fields[TEACHER_PROMPTS].dtype == torch.int32
    assert fields[TEACHER_LOG_PROBS].tolist() == ANSWERED and fields[TEACHER_LOG_PROBS].dtype == torch.float32
    assert fields[TEACHER_MASK].tolist() == [1, 1, 1] and fields[TEACHER_MASK].dtype == torch.int64
    assert "columns" not in fields and fields["responses"].tolist() == [7, 8, 9]
    fields = alone.as_dict()
    assert fields[TEACHER_PROMPTS].tolist() == [] and fields[TEACHER_PROMPTS].dtype == torch.int32
    assert fields[TEACHER_LOG_PROBS].tolist() == [0.0] * 3 and fields[TEACHER_MASK].tolist() == [0, 0, 0]


def test_a_row_whose_request_failed_has_no_teacher():
    (row,) = rows_of(record(teacher_failure="RuntimeError: no"), answered=True)
    assert row.columns[TEACHER_MASK].tolist() == [0, 0, 0] and row.columns[TEACHER_LOG_PROBS].tolist() == [0.0] * 3
    assert RowInfo.from_extra_fields(row.extra_fields).error is None


@pytest.mark.parametrize(("found", "words"), [(None, "has no answer"), ([-1.0, -1.0], "3 tokens has 2 log-probs")])
def test_a_row_without_the_answer_it_asked_for_is_an_error(found, words):
    (row,) = rows_of(record(found), answered=True)
    assert words in RowInfo.from_extra_fields(row.extra_fields).error
    assert not row.columns[TEACHER_MASK].any()


def test_a_row_without_a_sampled_token_needs_no_answer():
    (row,) = rows_of(record(), mask=0, answered=True)
    assert row.response_mask == [0] and row.columns[TEACHER_MASK].tolist() == [0]
    assert RowInfo.from_extra_fields(row.extra_fields).error is None


def test_only_rows_of_training_have_a_teacher_and_only_asked_servers_an_answer():
    (row,) = rows_of(record(ANSWERED), arm="student", answered=True)
    assert row.columns == {}
    (row,) = rows_of(record(ANSWERED))
    assert set(row.columns) == {TEACHER_PROMPTS}
    (row,) = OutputMaker(
        0, log_probs=True, sdar=SdarConfig(teacher=TeacherConfig(source="none"), loss=LossConfig(coef=0.0))
    ).rows(Episode([Turn([1], [2], [-0.5], RowInfo(0, "t"))]), Task("e", "task", "t", "do it", {}), None, whole=False)
    assert row.columns == {}


def test_the_row_of_a_failed_episode_has_the_columns_of_the_others():
    row = OutputMaker(0, log_probs=True, sdar=node(answered=True)).failed_row(
        Task("e", "task", "t", "do it", {}), None, 3, failure="died"
    )
    fields = row.as_dict()
    shown = {name: fields[name].tolist() for name in (TEACHER_PROMPTS, TEACHER_LOG_PROBS, TEACHER_MASK)}
    assert shown == {TEACHER_PROMPTS: [], TEACHER_LOG_PROBS: [0.0], TEACHER_MASK: [0]}


# ---------------------------------------------------------------- what the trainer makes of it


def test_the_teachers_mean_is_that_of_the_sampled_tokens():
    metrics = teacher().verify(step(record(ANSWERED), record([-1.5]), None))
    assert metrics["sdar/teacher_log_prob"] == pytest.approx((-0.25 - 0.75 - 1.5) / 3)
    assert metrics["sdar/teacher_staleness"] == 0
    assert metrics["sdar/teacher_failed_share"] == 0.0


def test_an_answer_of_nan_stops_the_step_or_leaves_the_distillation_term():
    infos = [record([float("nan"), -9.0, -0.75]), record([-1.5]), None]
    with pytest.raises(NonFiniteError, match="teacher's log-probs hold NaN or infinity in 1 of 3 rows"):
        check_teacher(step(*infos), "error")
    table = step(*infos)
    assert check_teacher(table, "drop") == {"sdar/nonfinite_teacher_rows": 1}
    assert teacher().verify(table)["sdar/teacher_log_prob"] == -1.5
    assert [row.tolist() for row in stored(table)[TEACHER_MASK]] == [[0, 0, 0], [1], [0]]
    assert [row.tolist() for row in stored(table)[TEACHER_LOG_PROBS]] == [[0.0] * 3, [-1.5], [0.0]]


def test_a_row_whose_request_failed_leaves_the_distillation_term_and_is_counted():
    table = step(record(ANSWERED), record(teacher_failure="RuntimeError: no"), None)
    assert table.mask.tolist() == [[True, False, True], [False] * 3, [False] * 3]
    assert teacher().verify(table)["sdar/teacher_failed_share"] == 0.5


def test_a_step_without_any_answer_stops_with_the_reason():
    failed = record(teacher_failure="RuntimeError: the engine is dead")
    with pytest.raises(TeacherError, match=r"none of the teacher's 2 requests.*the engine is dead.*colocated"):
        teacher().verify(step(failed, failed, None))


def test_a_failure_beside_rows_without_a_context_is_still_no_answer():
    alone = RowInfo(0, "t", context_missing=True)
    with pytest.raises(TeacherError, match="none of the teacher's 1 requests"):
        teacher().verify(step(record(teacher_failure="RuntimeError: no"), alone, None))


def checked(values: list[float]) -> RowInfo:
    return record(ANSWERED, student_log_probs=np.asarray(values, dtype=np.float32))


def test_server_and_trainer_are_compared_at_every_step():
    """On sampled tokens alone: what the environment said is not the model's."""
    one, infos = teacher(), [checked([-1.02, -7.0, -1.99]), record([-1.5]), None]
    for _ in range(2):
        metrics = one.verify(step(*infos))
        assert metrics["sdar/server_check/trainer"] == pytest.approx(0.015)
        assert metrics["sdar/server_check/bias"] == pytest.approx(-0.005)
        assert metrics["sdar/server_check/rollout"] == pytest.approx((0.08 + 0.01) / 2)
    assert "sdar/server_check/rollout" not in one.verify(step(*infos, rollout=False))


def test_rows_that_were_taken_out_are_not_compared():
    table = step(checked([-9.0, -7.0, -9.0]), record([-1.5]), None)
    table.take_out([0])
    assert "sdar/server_check/trainer" not in teacher().verify(table)


def test_a_server_that_is_not_the_trainers_model_stops_the_first_step():
    one = teacher()
    assert one.tolerance == 0.05
    with pytest.raises(TeacherError, match=r"by 0\.5 nats.*sanity_tolerance=0\.05.*placement=colocated"):
        one.verify(step(checked([-1.5, 0.0, -1.5]), record([-1.5]), None))
    with pytest.raises(TeacherError, match="by nan nats"):
        one.verify(step(checked([float("nan"), 0.0, -1.5]), record([-1.5]), None))
    assert teacher(sanity_tolerance=0.6).verify(step(checked([-1.5, 0.0, -1.5]), record([-1.5]), None))


def test_the_first_comparison_counts_even_if_it_is_not_in_the_first_step():
    one = teacher()
    one.verify(step(record(ANSWERED), record([-1.5]), None))  # its request failed, say
    with pytest.raises(TeacherError, match="scores the student's own prompts"):
        one.verify(step(checked([-1.5, 0.0, -1.5]), record([-1.5]), None))
    later = teacher()
    later.verify(step(checked([-1.0, 0.0, -2.0]), record([-1.5]), None))
    metrics = later.verify(step(checked([-1.5, 0.0, -1.5]), record([-1.5]), None))
    assert metrics["sdar/server_check/trainer"] == pytest.approx(0.5), "later steps report it"


def test_waits_are_those_of_episodes():
    def episode(wait):
        return record(ANSWERED, episode=EpisodeNote({}, teacher_wait_s=wait))

    metrics = answer_metrics([episode(0.5), record([-1.0]), episode(1.5), None])
    assert metrics["sdar/teacher_wait_s/mean"] == 1.0 and metrics["sdar/teacher_wait_s/max"] == 1.5


def test_the_teachers_likeliest_tokens_become_columns_of_all_rows():
    sdar = node(True, objective="forward_kl", support="top_k", top_k=2, gate="none")
    info = record(ANSWERED)
    info.teacher_support = np.arange(6, dtype=np.int32).reshape(3, 2), np.full((3, 3), -1.1, np.float32)
    turns = [Turn([1, 2], [7, 8, 9], [-0.5] * 3, one) for one in (info, RowInfo(0, "t", context_missing=True))]
    task = Task("e", "task", "t", "do it", {})
    maker = OutputMaker(0, log_probs=True, sdar=sdar)
    rows = [*maker.rows(Episode(turns), task, None, whole=False), maker.failed_row(task, None, 3, failure="died")]
    answered, alone, failed = (row.as_dict() for row in rows)
    assert answered[SUPPORT_IDS].tolist() == [[0, 1], [2, 3], [4, 5]] and answered[SUPPORT_IDS].dtype == torch.int32
    assert answered[SUPPORT_LOG_PROBS].shape == (3, 3) and answered[SUPPORT_LOG_PROBS].dtype == torch.float32
    for fields, tokens in ((alone, 3), (failed, 1)):
        assert fields[SUPPORT_IDS].shape == (tokens, 2) and not fields[SUPPORT_LOG_PROBS].any()
        assert fields[SUPPORT_IDS].dtype == torch.int32 and fields[SUPPORT_LOG_PROBS].shape == (tokens, 3)
    assert all("teacher_support" not in row.extra_fields[ROW_KEY] for row in rows)
