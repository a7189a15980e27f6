"""NaN and infinity in a step's rows: who is named, what is left of the step; without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from sdar_verl.config import load_config
from sdar_verl.errors import NonFiniteError
from sdar_verl.finite import ADVANTAGES, check_student, check_teacher
from sdar_verl.observe.base import StepRows
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.teacher.rows import nested
from sdar_verl.requests import TEACHER_HIDDEN

KEYS = ["s1p0_0_0", "s1p0_0_1", "s1p1_0_0", "pad_0_0"]
LENGTHS = [3, 2, 4, 1]
EOS = 7


class Rows(StepRows):
    """A step whose fields live in this process instead of the TransferQueue."""

    stored: dict[str, list[torch.Tensor]]
    tags: dict[int, dict[str, Any]]

    def get(self, names: Any) -> TensorDict:
        fields = {name: nested(self.stored[name]) for name in names if name in self.stored}
        return TensorDict(fields, batch_size=len(KEYS))

    def put(self, fields: TensorDict) -> None:
        self.stored |= {name: list(values.unbind()) for name, values in fields.items()}

    def tag(self, numbers: Any, **tags: Any) -> None:
        self.tags |= dict.fromkeys(numbers, tags)


def make_rows(on_nonfinite: str = "error", **broken: list[tuple[int, int, float]]) -> Rows:
    """A step of three rows and a padding row; ``field=[(row, token, value)]`` breaks some numbers."""
    infos = [RowInfo(0, "pick", task_id="a"), RowInfo(1, "pick", task_id="a"), RowInfo(0, "pick", task_id="b"), None]
    settings = load_config({"on_nonfinite": on_nonfinite})
    rows = Rows(3, SimpleNamespace(keys=KEYS), infos, {}, settings, None)  # type: ignore[arg-type]
    rows.tags = {}
    rows.stored = {
        name: [torch.arange(1, length + 1) for length in LENGTHS] for name in ("prompts", "responses", "input_ids")
    }
    for name in ("response_mask", "loss_mask"):
        rows.stored[name] = [torch.ones(length, dtype=torch.long) for length in LENGTHS[:-1]]
        rows.stored[name].append(torch.zeros(1, dtype=torch.long))
    for name in ("old_log_probs", "ref_log_prob", "rm_scores", "advantages"):
        rows.stored[name] = [-torch.ones(length) for length in LENGTHS]
    for name, places in broken.items():
        for row, token, value in places:
            rows.stored[name][row][token] = value
    return rows


def test_a_step_of_finite_numbers_is_left_alone() -> None:
    rows = make_rows("drop")
    before = {name: [row.clone() for row in column] for name, column in rows.stored.items()}
    check_student(rows, EOS)
    check_student(rows, EOS, ADVANTAGES)
    assert rows.metrics == {"sdar/nonfinite_rows": 0}
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], rows.stored[name], strict=True))
    rows = make_rows("error")
    check_student(rows, EOS)
    assert rows.metrics == {}


def test_numbers_that_do_not_count_may_be_anything() -> None:
    rows = make_rows(old_log_probs=[(0, 1, float("nan")), (3, 0, float("nan"))])
    rows.stored["response_mask"][0][1] = 0  # what an environment said in a conversation
    check_student(rows, EOS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_by_default_the_step_stops_and_names_the_rows(value: float) -> None:
    rows = make_rows(old_log_probs=[(1, 0, value)], ref_log_prob=[(1, 1, value), (2, 3, value)])
    with pytest.raises(NonFiniteError) as error:
        check_student(rows, EOS)
    text = str(error.value)
    assert text.startswith("step 3: the student's log-probs hold NaN or infinity in 1 of 4 rows: s1p0_0_1 (task a, ")
    assert "the reference's log-probs hold NaN or infinity in 2 of 4 rows: s1p0_0_1 (task a, turn 2), s1p1_0_0" in text
    assert "sdar.on_nonfinite=drop" in text and "actor_rollout_ref.actor.optim.lr" in text


def test_long_lists_of_rows_are_cut() -> None:
    keys, masks = [f"u_0_{i}" for i in range(20)], [torch.ones(1)] * 20
    scored = {"sdar_teacher_log_probs": nested([torch.full((1,), float("nan"))] * 20)}
    with pytest.raises(NonFiniteError, match=r"in 20 of 20 rows: u_0_0 .*u_0_7 \(task , turn 1\) and 12 more"):
        check_teacher(scored, masks, keys, [RowInfo(0, "pick")] * 20, "error")


def test_dropped_rows_become_padding() -> None:
    """Same lengths, other tokens: the model's own pass over the row would come out broken again."""
    rows = make_rows("drop", old_log_probs=[(1, 0, float("nan"))])
    check_student(rows, EOS)
    assert rows.metrics["sdar/nonfinite_rows"] == 1
    assert rows.infos[1] is None and rows.infos[0] is not None
    assert rows.tags == {1: {"is_padding": True}}
    for name in ("prompts", "responses", "input_ids"):
        assert rows.stored[name][1].tolist() == [EOS, EOS]
        assert rows.stored[name][2].tolist() == [1, 2, 3, 4]
    for name in ("response_mask", "loss_mask", "old_log_probs", "ref_log_prob", "rm_scores", "advantages"):
        assert rows.stored[name][1].tolist() == [0, 0], name
        assert rows.stored[name][1].dtype == rows.stored[name][0].dtype
    assert rows.stored["old_log_probs"][0].tolist() == [-1, -1, -1]


def test_rows_are_counted_over_all_looks_of_a_step() -> None:
    rows = make_rows("drop", old_log_probs=[(1, 0, float("nan"))], advantages=[(0, 0, float("inf"))])
    check_student(rows, EOS)
    check_student(rows, EOS, ADVANTAGES)
    assert rows.metrics["sdar/nonfinite_rows"] == 2
    assert [info is None for info in rows.infos] == [True, True, False, True]


def test_a_step_without_a_row_left_stops_in_any_case() -> None:
    rows = make_rows("drop", old_log_probs=[(row, 0, float("nan")) for row in range(3)])
    with pytest.raises(NonFiniteError, match="No row is left to train on"):
        check_student(rows, EOS)


def teacher(broken: dict[int, float]) -> dict[str, torch.Tensor]:
    columns = [-torch.ones(length) for length in LENGTHS]
    heads = [-torch.ones(length, 2) for length in LENGTHS]
    for row, value in broken.items():
        columns[row][0] = value
        heads[row][-1, 1] = value
    ids = [torch.ones(length, 2, dtype=torch.long) for length in LENGTHS]
    return {"sdar_teacher_log_probs": nested(columns), "sdar_head": nested(heads), "sdar_ids": nested(ids)}


def test_a_broken_teacher_is_named_or_not_listened_to() -> None:
    masks = [torch.ones(length, dtype=torch.long) for length in LENGTHS[:-1]] + [torch.zeros(1, dtype=torch.long)]
    rows = make_rows()
    scored = teacher({1: float("nan"), 3: float("nan")})  # the last row is padding: nobody reads it
    with pytest.raises(
        NonFiniteError, match=r"teacher's log-probs .* 1 of 4 rows: s1p0_0_1 \(task a, turn 2\)\. .*drop"
    ):
        check_teacher(scored, masks, KEYS, rows.infos, "error")
    kept, left, count = check_teacher(scored, masks, KEYS, rows.infos, "drop")
    assert count == 1
    assert [mask.tolist() for mask in left] == [[1, 1, 1], [0, 0], [1, 1, 1, 1], [0]]
    for name in ("sdar_teacher_log_probs", "sdar_head"):
        assert not kept[name].unbind()[1].any()
        assert (kept[name].unbind()[0] == -1).all()
    assert kept["sdar_ids"].unbind()[1].all(), "token ids are no numbers to be broken"
    assert masks[1].all(), "changed in place"


def test_only_the_head_of_a_row_may_be_broken() -> None:
    scored = teacher({})
    heads = list(scored["sdar_head"].unbind())
    heads[2] = heads[2].clone()
    heads[2][1, 0] = float("inf")
    masks = [torch.ones(length, dtype=torch.long) for length in LENGTHS]
    _, left, count = check_teacher({**scored, "sdar_head": nested(heads)}, masks, KEYS, make_rows().infos, "drop")
    assert count == 1 and not left[2].any() and left[0].all()


def test_hidden_states_go_with_their_rows() -> None:
    """They are too many to look at; the log-probs come from them."""
    scored = teacher({1: float("nan")})
    scored[TEACHER_HIDDEN] = nested([torch.full((length, 2), float("nan")) for length in LENGTHS])
    masks = [torch.ones(length, dtype=torch.long) for length in LENGTHS]
    kept, _, count = check_teacher(scored, masks, KEYS, make_rows().infos, "drop")
    assert count == 1
    assert [bool(row.isnan().any()) for row in kept[TEACHER_HIDDEN].unbind()] == [True, False, True, True]
