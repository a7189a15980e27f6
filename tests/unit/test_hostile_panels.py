"""Panels of others: read as they are, or refused with the file's name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from sdar_verl.envs.base import Task
from sdar_verl.envs.search.dataset import QuestionFile, QuestionFileError, read_questions
from sdar_verl.panels import PanelError, panel_hash, read_panel, read_panels_file, task_from_json, write_panels
from tests.support.fuzzing import damaged, mutations, quick

TASK = Task("alfworld", "t-1", "pick", "put a mug on desk", {"game_file": "/games/1", "answers": ["x"]})


@quick(80)
@given(fields=mutations(asdict(TASK)))
def test_a_task_with_wrong_parts_is_read_or_refused(fields: object) -> None:
    try:
        task = task_from_json(json.dumps(fields))
    except PanelError as error:
        assert len(str(error)) < 1000
        return
    for text in (task.env, task.task_id, task.task_type, task.description):
        text.encode()
    assert isinstance(task.data, dict)


def panel_of(folder: Path, **columns: list) -> Path:
    """A panel with any columns, signed as ours."""
    path = folder / "panel.parquet"
    table = pa.table(columns).replace_schema_metadata({b"sdar_panel_hash": panel_hash([TASK]).encode()})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"task": ["{"]}, "cannot be read"),
        ({"task": [None]}, "cannot be read"),
        ({"task": [3]}, "cannot be read"),
        ({"task": ["[" * 100_000]}, "nested too deeply"),
        ({"other": ["x"]}, "is damaged"),
        ({"task": [json.dumps({**asdict(TASK), "description": "another"})]}, "was changed after it was made"),
    ],
)
def test_a_panel_with_other_rows_is_refused(tmp_path: Path, columns: dict, message: str) -> None:
    path = panel_of(tmp_path, **columns)
    with pytest.raises(PanelError, match=rf"panel\.parquet.*{message}"):
        read_panel(path)


@quick(60)
@given(cut=damaged(b"x" * 4000))
def test_a_damaged_file_is_refused(tmp_path: Path, cut: bytes) -> None:
    path = panel_of(tmp_path, task=[json.dumps(asdict(TASK))])
    content = path.read_bytes()
    at, rest = len(cut.rstrip(b"x")) % len(content), cut.replace(b"x", b"")
    path.write_bytes(content[:at] + rest + content[at + len(rest) + 1 :])
    try:
        assert read_panel(path) == [TASK]  # what was hit means nothing
    except PanelError as error:
        assert "panel.parquet" in str(error)


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"panels": 3}', '{"panels": {"a": {"file": 3, "hash": ""}}}', "[" * 100_000]
    + [json.dumps({"panels": {"a": {"file": file, "hash": "x"}}}) for file in ("../p", "/etc/passwd", "a\0b", "no")],
)
def test_a_panel_description_that_is_none_or_leads_away_is_refused(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "panels"
    folder.mkdir()
    (folder / "panel.json").write_text(content)
    with pytest.raises(PanelError):
        read_panels_file(folder)


def test_halves_of_characters_in_a_task_are_written_as_replacements(tmp_path: Path) -> None:
    task = Task("search", "q\ud800", "nq", "who \ud800?", {"answers": ["\ud800"]})
    write_panels({"train": [task]}, tmp_path, {})
    assert read_panel(tmp_path / "train.parquet") == [task]
    assert task.description == "who \ufffd?"


# ---------------------------------------------------------------- files of questions, from which panels are made

QUESTION = {"question": "who?", "golden_answers": ["a", "b"], "data_source": "nq", "extra_info": {"question": "who?"}}


def questions_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "train.jsonl"
    path.write_bytes(content)
    try:
        found = read_questions([QuestionFile("train", path)])
    except QuestionFileError as error:
        assert "train.jsonl" in str(error)
        return
    for task in found.tasks.values():
        "".join((task.task_id, task.description, *task.data["answers"])).encode()


@quick(80)
@given(row=mutations(QUESTION))
def test_a_question_with_wrong_parts_is_read_or_left_out(tmp_path: Path, row: object) -> None:
    questions_or_refused(tmp_path, json.dumps(row).encode())


@quick(60)
@given(content=damaged(json.dumps(QUESTION).encode()))
def test_a_damaged_file_of_questions_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    questions_or_refused(tmp_path, content)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe\xff", b'{"question": ' + b"9" * 5000 + b"}"])
def test_lines_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(QuestionFileError, match=r"train\.jsonl, line 1 is not (JSON|UTF-8)"):
        read_questions([QuestionFile("train", tmp_path / "train.jsonl")])
