"""Corpora: both forms of the field are read, and a damaged file says where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdar_verl.envs.search.passages import (
    NOTE_SUFFIX,
    CorpusError,
    Passage,
    check_corpus,
    corpus_digest,
    passage_from,
    read_corpus,
    write_corpus,
)

PASSAGES = [Passage("a", "Oslo", "A city.\nIn the north."), Passage("b", "", "No title."), Passage("c", 'A "b"', "x")]


def write_lines(folder: Path, *lines: object) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_what_was_written_is_read_back(tmp_path):
    write_corpus(PASSAGES, tmp_path / "corpus.jsonl")
    read = read_corpus(tmp_path / "corpus.jsonl")
    assert read[:2] == PASSAGES[:2]
    assert corpus_digest(read[:2]) == corpus_digest(PASSAGES[:2]) != corpus_digest(PASSAGES[1::-1])


@pytest.mark.parametrize(
    ("document", "passage"),
    [
        ({"id": "1", "contents": '"Oslo"\nA city.'}, Passage("1", "Oslo", "A city.")),
        ({"id": 1, "title": "Oslo", "text": "A city."}, Passage("1", "Oslo", "A city.")),
        ({"id": "1", "contents": "Oslo\nA city.", "title": "Oslo"}, Passage("1", "Oslo", "A city.")),
        ({"id": "1", "contents": "first line\nsecond line"}, Passage("1", "", "first line\nsecond line")),
        ({"contents": "one line"}, Passage("7", "", "one line")),
        ({"_id": None, "text": "x"}, Passage("7", "", "x")),
        ({"_id": "d3", "text": "x"}, Passage("d3", "", "x")),
        ({"id": "1", "text": " ", "contents": '"T"\nThe text.'}, Passage("1", "T", "The text.")),
        ({"id": "1", "title": "T", "contents": "One paragraph.\nTwo."}, Passage("1", "T", "One paragraph.\nTwo.")),
    ],
)
def test_both_forms_are_understood(document, passage):
    assert passage_from(document, default_id="7") == passage


GOOD = {"id": "1", "contents": "x"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["holds no passages"]),
        ([GOOD, '{"id": "2", "conte'], ["not JSON", "cut off"]),
        ([GOOD, "[1]"], ["no JSON object"]),
        ([GOOD, {"id": "2", "body": "x"}], ["`contents`, or `title` and `text`"]),
        ([GOOD, {"id": "2", "contents": 3}], ["`contents`"]),
    ],
)
def test_a_damaged_corpus_says_what_and_where(tmp_path, lines, words):
    path = write_lines(tmp_path, *lines)
    for read in (read_corpus, check_corpus):
        with pytest.raises(CorpusError) as error:
            read(path)
        for word in [str(path), *words]:
            assert word in str(error.value)


def test_line_numbers_and_double_ids_are_named(tmp_path):
    with pytest.raises(CorpusError, match="line 3: the id '1' comes twice"):
        read_corpus(write_lines(tmp_path, GOOD, {"id": "2", "contents": "y"}, GOOD))


def test_a_file_that_is_missing_or_packed_says_so(tmp_path):
    with pytest.raises(CorpusError, match="cannot be read here"):
        read_corpus(tmp_path / "none.jsonl")
    (tmp_path / "packed").write_bytes(b"\x1f\x8b\x08\xff\xfe")
    with pytest.raises(CorpusError, match="unpack it first"):
        read_corpus(tmp_path / "packed")


def test_the_check_reads_the_whole_file_once(tmp_path, monkeypatch):
    lines = [{"id": str(i), "contents": "word " * 100} for i in range(5000)]
    path = write_lines(tmp_path, *lines)
    found = check_corpus(path)
    assert (found.passages, found.empty, found.digest) == (5000, 0, corpus_digest(read_corpus(path)))
    with monkeypatch.context() as patched:
        patched.setattr("sdar_verl.envs.search.passages._read", lambda path: pytest.fail("read again"))
        assert check_corpus(path) == found
    for damaged, message in (
        (path.read_bytes()[:-20], "line 5000 is not JSON"),
        (path.read_bytes().replace(b'"id": "2500"', b'"id": 25"00"'), "line 2501 is not JSON"),
        (path.read_bytes().replace(b'"id": "2500"', b'"id": "2499"'), "line 2501: the id '2499' comes twice"),
    ):
        broken = tmp_path / "broken.jsonl"
        broken.write_bytes(damaged)
        with pytest.raises(CorpusError, match=message):
            check_corpus(broken)
    note = tmp_path / f"corpus.jsonl{NOTE_SUFFIX}"
    for spoilt in ("", "[]", '{"file": 1}', note.read_text().replace('"passages"', '"other"')):
        note.write_text(spoilt)
        assert check_corpus(path) == found
    path.write_text('{"id": "1", "contents": "another"}')
    assert check_corpus(path).passages == 1


EMPTY = ({"contents": ""}, {"contents": " \u200b\u3000 "}, {"title": "t", "text": "..."}, {"contents": '"t"\n'})


def test_an_empty_passage_is_no_passage(tmp_path):
    lines = [{"id": str(i), **line} for i, line in enumerate(EMPTY)]
    for read in (read_corpus, check_corpus):
        with pytest.raises(CorpusError, match="none of its 4 passages has a text"):
            read(write_lines(tmp_path, *lines))
    path = write_lines(tmp_path, *lines, {"id": "5", "contents": "42"})
    assert [passage.text for passage in read_corpus(path)] == ["42"]
    assert (check_corpus(path).passages, check_corpus(path).empty) == (1, 4)
