"""What a row carries through verl's queue: its record, and columns beside it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from sdar_verl.rollout.outputs import RowOutput
from sdar_verl.rollout.rows import COLUMNS, ROW_KEY, EpisodeNote, RowInfo, TurnNote
from tests.support.fuzzing import quick

TEXT = st.text(max_size=5)
COUNT = st.integers(0, 9)
WORDS = st.none() | st.fixed_dictionaries({"observation": TEXT, "action": st.none() | TEXT, "reward": st.floats(0, 1)})
NOTES = st.builds(
    EpisodeNote,
    task=st.dictionaries(TEXT, TEXT, max_size=2),
    context=st.none() | TEXT,
    passages=st.dictionaries(TEXT, st.dictionaries(TEXT, TEXT, max_size=2), max_size=2),
    reward=st.floats(-5, 5),
    last_observation=TEXT,
    teacher_wait_s=st.floats(0, 5),
    said=st.dictionaries(TEXT, TEXT, max_size=2),
)
TURNS = st.builds(
    TurnNote,
    start=COUNT,
    stop=COUNT,
    observation=TEXT,
    action=st.none() | TEXT,
    unparsed=st.booleans(),
    parse_error=st.none() | TEXT,
    inadmissible=st.booleans(),
    text=WORDS,
)
RECORDS = st.builds(
    RowInfo,
    turn=COUNT,
    task_type=TEXT,
    turns=st.lists(TURNS, max_size=2).map(tuple),
    task_id=TEXT,
    observation=TEXT,
    action=st.none() | TEXT,
    admissible_actions=st.lists(TEXT, max_size=2).map(tuple),
    episode=st.none() | NOTES,
    skills=st.lists(TEXT, max_size=2).map(tuple),
    teachers=st.lists(TEXT, max_size=2).map(tuple),
    no_match=st.booleans(),
    skills_dropped=COUNT,
    context_missing=st.booleans(),
    context_empty=st.booleans(),
    prompt_tokens=COUNT,
    teacher_prompt_tokens=st.none() | COUNT,
    teacher_failure=st.none() | TEXT,
    context_tokens=COUNT,
    history_dropped=COUNT,
    truncated=st.booleans(),
    unparsed=st.booleans(),
    parse_error=st.none() | TEXT,
    inadmissible=st.booleans(),
    success=st.booleans(),
    score=st.floats(0, 1),
    failed=st.booleans(),
    failure=st.none() | TEXT,
    error=st.none() | TEXT,
    text=WORDS,
    cut=st.booleans(),
    rewarded=st.booleans(),
    foreign=st.booleans(),
    built=st.none() | st.dictionaries(TEXT, TEXT, max_size=2),
)


@quick(60)
@given(info=RECORDS)
def test_a_record_survives_the_queue(info: RowInfo) -> None:
    """As verl's agent loop puts it in, and as the trainer takes it out."""
    queued = list_of_dict_to_tensordict([{"extra_fields": {ROW_KEY: info.as_dict()}}])
    assert RowInfo.from_extra_fields(next(iter(queued["extra_fields"]))) == info


def test_every_field_of_a_record_is_drawn_above() -> None:
    arrays = {"student_log_probs", *COLUMNS}
    for drawn, kind in ((NOTES, EpisodeNote), (TURNS, TurnNote), (RECORDS, RowInfo)):
        names = set(drawn.wrapped_strategy.kwargs)  # type: ignore[attr-defined]
        assert names == {item.name for item in fields(kind)} - arrays, kind.__name__


def test_a_record_holds_what_differs_from_the_defaults_and_nothing_that_is_a_column() -> None:
    assert RowInfo(3, "t").as_dict() == {"turn": 3, "task_type": "t"}
    notes = {"episode": EpisodeNote({"id": "a"}, reward=1.0), "turns": (TurnNote(0, 2), TurnNote(3, 4, unparsed=True))}
    assert RowInfo(0, "t", **notes).as_dict() == {
        "turn": 0,
        "task_type": "t",
        "episode": {"task": {"id": "a"}, "reward": 1.0},
        "turns": [{"start": 0, "stop": 2}, {"start": 3, "stop": 4, "unparsed": True}],
    }
    ids, answer = np.arange(3, dtype=np.int32), np.zeros(2, dtype=np.float32)
    said = np.asarray([-2.0, -0.25], dtype=np.float32)
    info = RowInfo(
        0, "t", teacher_prompt_tokens=3, teacher_prompt_ids=ids, teacher_log_probs=answer, student_log_probs=said
    )
    record = info.as_dict()
    assert set(record) == {"turn", "task_type", "teacher_prompt_tokens", "student_log_probs"}
    read = RowInfo.from_extra_fields({ROW_KEY: record})
    assert np.array_equal(read.student_log_probs, said)
    assert read.has_teacher and read.teacher_prompt_ids is None and read.teacher_log_probs is None


def test_a_row_of_another_agent_loop_is_named() -> None:
    with pytest.raises(ValueError, match="default_agent_loop=sdar_agent"):
        RowInfo.from_extra_fields({})


def test_a_teacher_has_a_say_where_its_prompt_was_made_and_answered() -> None:
    seen = RowInfo(0, "t", teacher_prompt_tokens=3)
    assert seen.has_teacher
    assert not replace(seen, teacher_failure="no").has_teacher
    assert not RowInfo(0, "t").has_teacher


VERLS: dict[str, Any] = {
    "prompt_ids": [1, 2],
    "response_ids": [3, 4, 5],
    "response_mask": [1, 1, 0],
    "response_logprobs": [-0.5, -0.25, 0.0],
    "reward_score": 2.0,
    "num_turns": 1,
    "metrics": AgentLoopMetrics(generate_sequences=1.0),
    "extra_fields": {ROW_KEY: {"turn": 0, "task_type": "t"}},
}


def test_columns_lie_beside_verls_own() -> None:
    columns = {"ids": np.arange(2, dtype=np.int32), "none": np.zeros(0, dtype=np.int32), "numbers": np.ones(3)}
    fields = RowOutput(columns=columns, **VERLS).as_dict()
    verls = AgentLoopOutput(**VERLS).as_dict()
    assert fields.keys() == verls.keys() | columns.keys()
    for name, value in verls.items():
        same = torch.equal(fields[name], value) if isinstance(value, torch.Tensor) else fields[name] == value
        assert same, name
    assert fields["ids"].dtype == torch.int32 and fields["ids"].tolist() == [0, 1]
    assert fields["none"].shape == (0,) and fields["numbers"].tolist() == [1.0] * 3
    assert RowOutput(**VERLS).as_dict().keys() == verls.keys()


def test_columns_of_uneven_rows_become_nested_as_verls_do() -> None:
    lengths = (2, 0, 3)
    rows = [RowOutput(columns={"ids": np.arange(n, dtype=np.int32)}, **VERLS).as_dict() for n in lengths]
    column = list_of_dict_to_tensordict(rows)["ids"]
    assert column.is_nested and [len(row) for row in column.unbind()] == list(lengths)
