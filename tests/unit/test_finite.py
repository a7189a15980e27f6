"""NaN and infinity in a step's rows: who is named, what is left of the step; without Ray."""

from __future__ import annotations

import pytest
import torch

from sdar_verl.errors import NonFiniteError
from sdar_verl.fields import SUPPORT_IDS, SUPPORT_LOG_PROBS, TEACHER_HIDDEN, TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.finite import ADVANTAGE_COLUMNS, UPDATE_COLUMNS, check_rows, check_teacher
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.table import StepTable
from sdar_verl.verl.worker import _broken
from tests.support.table import StoredRows, make_table, stored

KEYS = ["s1p0_0_0", "s1p0_0_1", "s1p1_0_0", "pad_0_0"]
LENGTHS = [3, 2, 4, 1]
EOS = 7
NAN, INF = float("nan"), float("inf")


def table_of(**broken: list[tuple[int, int, float]]) -> StepTable:
    """A step of three rows and a padding row; ``column=[(row, token, value)]`` breaks some numbers."""
    seen = {"task_type": "pick", "teacher_prompt_tokens": 5}
    infos = [RowInfo(0, task_id="a", **seen), RowInfo(1, task_id="a", **seen), RowInfo(0, task_id="b", **seen), None]
    mask = [torch.ones(length, dtype=torch.long) for length in LENGTHS[:-1]] + [torch.zeros(1, dtype=torch.long)]
    columns = {
        name: [torch.arange(1, length + 1) for length in LENGTHS] for name in ("prompts", "responses", "input_ids")
    }
    columns |= {name: [row.clone() for row in mask] for name in ("response_mask", "loss_mask", TEACHER_MASK)}
    for name in ("old_log_probs", "ref_log_prob", "rm_scores", "advantages", TEACHER_LOG_PROBS):
        columns[name] = [-torch.ones(length) for length in LENGTHS]
    for name, places in broken.items():
        for row, token, value in places:
            columns[name][row][token] = value
    return make_table(KEYS, infos, columns, step=3)


def check_student(table: StepTable, on_nonfinite: str = "error") -> dict[str, float]:
    return check_rows(table, UPDATE_COLUMNS, on_nonfinite, EOS)


def test_a_step_of_finite_numbers_is_left_alone() -> None:
    table = table_of()
    before = {name: [row.clone() for row in column] for name, column in stored(table).items()}
    assert check_student(table, "drop") == {"sdar/nonfinite_rows": 0}
    assert check_rows(table, ADVANTAGE_COLUMNS, "drop", EOS) == {"sdar/nonfinite_rows": 0}
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], stored(table)[name], strict=True))
    assert check_student(table_of()) == {}


def test_numbers_that_do_not_count_may_be_anything() -> None:
    table = table_of(old_log_probs=[(0, 1, NAN), (3, 0, NAN)], response_mask=[(0, 1, 0)])  # an environment said it
    assert check_student(table) == {}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_by_default_the_step_stops_and_names_the_rows(value: float) -> None:
    table = table_of(old_log_probs=[(1, 0, value)], ref_log_prob=[(1, 1, value), (2, 3, value)])
    with pytest.raises(NonFiniteError) as error:
        check_student(table)
    text = str(error.value)
    assert text.startswith("step 3: the student's log-probs hold NaN or infinity in 1 of 4 rows: s1p0_0_1 (task a, ")
    assert "the reference's log-probs hold NaN or infinity in 2 of 4 rows: s1p0_0_1 (task a, turn 2), s1p1_0_0" in text
    assert "sdar.on_nonfinite=drop" in text and "actor_rollout_ref.actor.optim.lr" in text


def test_long_lists_of_rows_are_cut() -> None:
    columns = {"response_mask": [torch.ones(1)] * 20, TEACHER_LOG_PROBS: [torch.full((1,), NAN)] * 20}
    infos = [RowInfo(0, "pick", teacher_prompt_tokens=5)] * 20
    table = make_table([f"u_0_{i}" for i in range(20)], infos, columns)
    with pytest.raises(NonFiniteError, match=r"in 20 of 20 rows: u_0_0 .*u_0_7 \(task , turn 1\) and 12 more"):
        check_teacher(table, "error")


def test_dropped_rows_become_padding() -> None:
    """Same lengths, other tokens: the model's own pass over the row would come out broken again."""
    table = table_of(old_log_probs=[(1, 0, NAN)])
    assert check_student(table, "drop")["sdar/nonfinite_rows"] == 1
    assert table.infos[1] is None and table.infos[0] is not None
    assert isinstance(table.rows, StoredRows) and table.rows.tags == {1: {"is_padding": True}}
    rows = stored(table)
    for name in ("prompts", "responses", "input_ids"):
        assert rows[name][1].tolist() == [EOS, EOS]
        assert rows[name][2].tolist() == [1, 2, 3, 4]
    for name in ("response_mask", "loss_mask", "old_log_probs", "ref_log_prob", "rm_scores", "advantages"):
        assert rows[name][1].tolist() == [0, 0], name
        assert rows[name][1].dtype == rows[name][0].dtype
    assert rows[TEACHER_MASK][1].tolist() == [0, 0]
    assert rows["old_log_probs"][0].tolist() == [-1, -1, -1]
    for name, column in table.columns.items():
        assert not column[1].any(), f"the trainer still has {name}"
    assert table.response.sum(1).tolist() == table.mask.sum(1).tolist() == [3, 0, 4, 0]


def test_rows_are_counted_over_all_looks_of_a_step() -> None:
    table = table_of(old_log_probs=[(1, 0, NAN)], advantages=[(0, 0, INF)])
    check_student(table, "drop")
    assert check_rows(table, ADVANTAGE_COLUMNS, "drop", EOS) == {"sdar/nonfinite_rows": 2}
    assert [info is None for info in table.infos] == [True, True, False, True]


def test_a_step_without_a_row_left_stops_in_any_case() -> None:
    table = table_of(old_log_probs=[(row, 0, NAN) for row in range(3)])
    with pytest.raises(NonFiniteError, match="No row is left to train on"):
        check_student(table, "drop")


def test_a_broken_teacher_is_named_or_not_listened_to() -> None:
    broken = {TEACHER_LOG_PROBS: [(1, 0, NAN), (3, 0, NAN)]}  # the last row is padding: nobody reads it
    with pytest.raises(
        NonFiniteError, match=r"teacher's log-probs .* 1 of 4 rows: s1p0_0_1 \(task a, turn 2\)\. .*drop"
    ):
        check_teacher(table_of(**broken), "error")
    table = table_of(**broken)
    assert check_teacher(table, "drop") == {"sdar/nonfinite_teacher_rows": 1}
    assert [row.tolist() for row in stored(table)[TEACHER_MASK]] == [[1, 1, 1], [0, 0], [1, 1, 1, 1], [0]]
    assert stored(table)[TEACHER_LOG_PROBS][1].tolist() == [0, 0]
    assert stored(table)[TEACHER_LOG_PROBS][0].tolist() == [-1, -1, -1]
    assert table.mask.sum(1).tolist() == [3, 0, 4, 0] and table.response.sum(1).tolist() == [3, 2, 4, 0]
    assert table.infos[1] is not None, "its student is trained"


def test_a_teacher_without_a_fault_is_left_alone() -> None:
    table = table_of()
    before = dict(stored(table))
    assert check_teacher(table, "error") == {}
    assert check_teacher(table, "drop") == {"sdar/nonfinite_teacher_rows": 0}
    assert stored(table) == before, "nothing is written"


def test_a_teacher_that_is_scored_later_has_nothing_to_look_at() -> None:
    table = make_table(["u_0_0"], [RowInfo(0, "pick")], {"response_mask": [[1]]})
    assert check_teacher(table, "drop") == {}


def test_the_worker_looks_at_the_head_as_well_and_not_at_hidden_states() -> None:
    """They are too many to look at; the log-probs come from them."""
    found = {
        TEACHER_LOG_PROBS: [-torch.ones(length) for length in LENGTHS],
        SUPPORT_LOG_PROBS: [-torch.ones(length, 2) for length in LENGTHS],
        SUPPORT_IDS: [torch.ones(length, 2, dtype=torch.int32) for length in LENGTHS],
        TEACHER_HIDDEN: [torch.full((length, 2), NAN) for length in LENGTHS],
    }
    masks = [torch.ones(length, dtype=torch.long) for length in LENGTHS]
    masks[3][0] = 0
    assert _broken(found, masks) == []
    found[SUPPORT_LOG_PROBS][2][1, 0] = INF
    found[TEACHER_LOG_PROBS][0][2] = NAN
    found[TEACHER_LOG_PROBS][3][0] = NAN  # not sampled
    assert _broken(found, masks) == [0, 2]
