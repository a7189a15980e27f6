"""The table of a local update: its tokens, who counts, and several updates of a step as one."""

from __future__ import annotations

import pytest
import torch

from sdar_verl.errors import RolloutError
from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.table import StepTable, joined, stop_on_errors
from tests.support.table import make_table, stored


def seen(turn: int = 0) -> RowInfo:
    return RowInfo(turn, "t", teacher_prompt_tokens=3)


def two_episodes(**columns: list[list[float]]) -> StepTable:
    """Two rows of an episode, one of another, which has no context, and one that fills up."""
    infos = [seen(), seen(1), RowInfo(0, "t"), None]
    mask = [[1, 1, 0, 1], [1], [1, 1], [0]]
    return make_table(["a_0_0", "a_0_1", "a_1_0", "p_0_0"], infos, {"response_mask": mask, **columns})


def test_columns_are_padded_with_zeros_and_those_that_nobody_has_are_left_out():
    table = two_episodes(old_log_probs=[[-1.0] * 4, [-2.0], [-3.0, -4.0], [-5.0]])
    assert set(table.columns) == {"response_mask", "old_log_probs"}
    assert table.columns["old_log_probs"].tolist() == [[-1] * 4, [-2, 0, 0, 0], [-3, -4, 0, 0], [-5, 0, 0, 0]]
    assert table.lengths == [4, 1, 2, 1]
    assert table.response.sum(1).tolist() == [3, 1, 2, 0]
    assert table.mask.sum(1).tolist() == [3, 1, 0, 0], "a teacher's say is where it has a prompt"


def test_what_is_written_is_read_back_as_it_was_stored():
    table = two_episodes()
    values = torch.arange(16.0).reshape(4, 4)
    table.write({"new": values})
    assert [row.tolist() for row in stored(table)["new"]] == [[0, 1, 2, 3], [4], [8, 9], [12]]
    assert table.columns["new"] is values


def test_a_mask_that_is_read_again_is_the_one_that_counts():
    """verl's rejection takes tokens out of the response's mask after it was read."""
    table = two_episodes()
    assert table.mask[0].tolist() == [True, True, False, True]
    stored(table)["response_mask"][0] = torch.tensor([1, 0, 0, 1])
    table.read(["response_mask"])
    assert table.mask[0].tolist() == table.response[0].tolist() == [True, False, False, True]
    assert table.lengths[0] == 4


def test_who_the_rows_are():
    table = two_episodes()
    assert table.episode_ids == ["a_0", "a_0", "a_1", "p_0"] and table.group_ids == ["a", "a", "a", "p"]
    assert table.turns == [0, 1, 0, 0]
    assert {name: [row for row, _ in rows] for name, rows in table.episodes().items()} == {"a_0": [0, 1], "a_1": [2]}


def test_a_row_that_is_taken_out_counts_nowhere():
    table = two_episodes(old_log_probs=[[-1.0] * 4, [-2.0], [-3.0, -4.0], [-5.0]])
    assert table.mask.any(1).tolist() == [True, True, False, False]  # known before, and known anew
    table.take_out([0, 2])
    assert table.taken_out == 2 and table.episodes().keys() == {"a_0"}
    assert table.response.any(1).tolist() == table.mask.any(1).tolist() == [False, True, False, False]
    assert not table.columns["old_log_probs"][[0, 2]].any()


def test_a_row_that_is_silenced_is_trained_without_its_teacher():
    table = two_episodes()
    assert table.mask[0].any()
    table.silence([0, 3], "no answer")
    assert table.mask.any(1).tolist() == [False, True, False, False]
    assert table.response.any(1).tolist() == [True, True, True, False]
    assert table.infos[0].teacher_failure == "no answer" and table.infos[3] is None


def test_the_updates_of_a_step_are_one_table():
    """With the columns that all of them have, at the width of the widest."""
    wide = two_episodes(old_log_probs=[[-1.0] * 4, [-2.0], [-3.0, -4.0], [-5.0]], rm_scores=[[0.0] * 4] * 4)
    narrow = make_table(
        ["b_0_0"], [seen()], {"response_mask": [[1, 1]], "old_log_probs": [[-6.0, -7.0]], TEACHER_LOG_PROBS: [[0, 0]]}
    )
    for table, value in ((wide, 1.0), (narrow, 2.0)):
        stored(table)["advantages"] = [torch.full((length,), value) for length in table.lengths]
        table.read(["advantages"])
    whole = joined([wide, narrow])
    assert set(whole.columns) == {"response_mask", "old_log_probs", "advantages"}
    assert whole.columns["old_log_probs"][-1].tolist() == [-6, -7, 0, 0]
    assert whole.episode_ids == [*wide.episode_ids, "b_0"] and whole.lengths == [4, 1, 2, 1, 2]
    assert whole.rows.keys == [*wide.rows.keys, "b_0_0"]
    assert whole.mask.sum(1).tolist() == [3, 1, 0, 0, 2]
    assert whole.columns["advantages"][:, 0].tolist() == [1, 1, 1, 1, 2]
    assert joined([wide]) is wide


def test_a_fault_of_the_set_up_stops_the_step_and_is_counted():
    stop_on_errors([None, ""])
    with pytest.raises(RolloutError, match=r"no bank\n\(2 of 3 rows"):
        stop_on_errors([None, "no bank", "another"])
