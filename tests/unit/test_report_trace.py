"""Traces: which episodes, which pieces of text, what a file holds."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_verl.report.layout import RecordError, step_file
from sdar_verl.report.trace import PER_GROUP, choose_episodes, read_trace, split_tokens, thin, trace_schema, write_trace

EPISODES = [f"g{group}_{session}" for group in range(3) for session in range(8)]


def turn(**values):
    tokens = {"token_ids": [1, 2], "tokens": ["a", " b"], "gap": [0.5, None], "gate": [0.9, None]}
    return {
        "step": 1,
        "group": "g0",
        "episode": "g0_0",
        "turn": 0,
        "skills": ["x"],
        "success": True,
        **tokens,
        **values,
    }


def test_up_to_four_episodes_of_a_group_are_chosen():
    chosen = choose_episodes(EPISODES[::-1], 100)
    assert chosen == [f"g{group}_{session}" for group in range(3) for session in range(PER_GROUP)]


@given(st.integers(1, 30), st.permutations(EPISODES))
def test_the_choice_keeps_its_limit_and_does_not_depend_on_order(limit, order):
    chosen = choose_episodes(order, limit)
    assert len(chosen) == min(limit, 3 * PER_GROUP)
    assert chosen == choose_episodes(EPISODES, limit)


def test_sessions_are_ordered_as_numbers():
    assert choose_episodes([f"g_{i}" for i in (10, 2, 9, 1, 3)], 2) == ["g_1", "g_2"]


def decode_bytes(ids):
    """A byte-level vocabulary whose id is the byte."""
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=30))
def test_pieces_joined_are_the_text_even_where_a_character_spans_tokens(text):
    ids = list(text.encode())
    pieces = split_tokens(ids, decode_bytes)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_leading_space_that_a_tokenizer_drops_at_the_start_is_kept():
    words = ["▁go", "▁to", "▁bed"]

    def decode(ids):
        return "".join(words[i].replace("▁", " ") for i in ids).removeprefix(" ")

    assert split_tokens([0, 1, 2], decode) == ["go", " to", " bed"]


def test_a_text_that_ends_inside_a_character_keeps_its_last_token():
    assert split_tokens(list("é".encode()[:1]), decode_bytes) == ["\ufffd"]


def test_a_trace_is_read_as_it_was_written(tmp_path):
    path = step_file(tmp_path / "traces", 3)
    write_trace([turn(), turn(turn=1, gap=None, action=None)], path)
    first, second = read_trace(path)
    assert first["gap"] == [0.5, None] and first["tokens"] == ["a", " b"] and first["skills"] == ["x"]
    assert second["gap"] is None and second["action"] is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_another_schema_is_an_error_that_names_both_versions(tmp_path):
    table = pa.Table.from_pylist([turn()], schema=trace_schema().with_metadata({b"sdar_trace_schema": b"99"}))
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(RecordError, match="99, not 1"):
        read_trace(tmp_path / "t.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really"])
def test_a_damaged_trace_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(RecordError, match=r"t\.parquet"):
        read_trace(tmp_path / "t.parquet")


def test_thinning_keeps_the_limit_and_the_spacing(tmp_path):
    for step in range(2, 34, 2):
        step_file(tmp_path, step).write_bytes(b"x" * 100)
    assert thin(tmp_path, 1600, 2) == 2
    assert thin(tmp_path, 500, 2) == 8
    assert sorted(int(p.stem[5:]) for p in tmp_path.iterdir()) == [8, 16, 24, 32]


@pytest.mark.parametrize(("steps", "every"), [([10, 20, 30, 35], 7), ([10, 20, 30, 40, 50, 54], 6), ([10, 30], 10)])
def test_thinning_after_a_resume_with_another_interval_keeps_half_and_the_newest(tmp_path, steps, every):
    for step in steps:
        step_file(tmp_path, step).write_bytes(b"x" * 100)
    assert thin(tmp_path, 100 * len(steps) - 1, every) == 2 * every
    assert sorted(int(p.stem[5:]) for p in tmp_path.iterdir()) == steps[1::2]


def test_thinning_always_keeps_one_trace(tmp_path):
    step_file(tmp_path, 5).write_bytes(b"x" * 100)
    assert thin(tmp_path, 1, 5) == 5
    assert len(list(tmp_path.iterdir())) == 1
