"""A corpus of passages: one JSON object a line, in the forms that retrieval servers of the field use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_verl.errors import SdarError
from sdar_verl.text_files import TextFileError, numbered_lines
from sdar_verl.untrusted import parse_json, whole_characters

_TAIL_BYTES = 1 << 20
_HEAD_LINES = 100


class CorpusError(SdarError, ValueError):
    """A corpus file that is missing, cut off or in another form; the message says where and what to do."""


@dataclass(frozen=True)
class Passage:
    """One passage.

    Attributes:
        passage_id: unique in its corpus.
        title: what it is about; may be empty.
        text: its text.
    """

    passage_id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        """Search-R1's form: the title in quotes, a line break, the text."""
        return f'"{self.title}"\n{self.text}' if self.title else self.text

    def as_document(self) -> dict[str, str]:
        """What a server sends."""
        return {"id": self.passage_id, "contents": self.contents}


def passage_from(document: Mapping[str, Any], default_id: str = "") -> Passage:
    """Read ``{"id", "contents"}`` (first line: the title in quotes) or ``{"id", "title", "text"}``. Halves of surrogate
    pairs become U+FFFD.

    Raises:
        ValueError: there is neither ``contents`` nor ``text``, or one of them is no text.
    """
    passage_id = whole_characters(str(document.get("id", default_id)))
    title, text, contents = (
        whole_characters(value) if isinstance(value, str) else value
        for value in (document.get(key) for key in ("title", "text", "contents"))
    )
    if isinstance(text, str):
        return Passage(passage_id, title if isinstance(title, str) else "", text.strip())
    if not isinstance(contents, str):
        raise ValueError("a passage needs `contents`, or `title` and `text`")
    head, line_break, rest = contents.strip().partition("\n")
    quoted = len(head) > 1 and head.startswith('"') and head.endswith('"')
    if line_break and (quoted or isinstance(title, str)):
        return Passage(passage_id, head.strip('"').strip(), rest.strip())
    return Passage(passage_id, title if isinstance(title, str) else "", contents.strip())


def read_corpus(path: str | Path) -> list[Passage]:
    """All passages of a file, in its order.

    Raises:
        CorpusError: the file is missing or empty, a line is not a passage (of a half-made file, the last one), or an
            id comes twice.
    """
    passages = []
    seen: set[str] = set()
    for number, line in _lines(path):
        passage = _parse(path, number, line)
        if passage.passage_id in seen:
            raise CorpusError(f"{path}, line {number}: the id {passage.passage_id!r} comes twice; ids must be unique")
        seen.add(passage.passage_id)
        passages.append(passage)
    if not passages:
        raise CorpusError(f"{path} holds no passages")
    return passages


def check_corpus(path: str | Path) -> None:
    """Look at the first and the last lines only, so that it is quick whatever the size.

    Raises:
        CorpusError: see :func:`read_corpus`.
    """
    number = 0
    for number, line in _lines(path):
        _parse(path, number, line)
        if number >= _HEAD_LINES:
            break
    if number == 0:
        raise CorpusError(f"{path} holds no passages")
    with Path(path).open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _TAIL_BYTES))
        tail = stream.read().rstrip().rsplit(b"\n", 1)
    if len(tail) == 2 or size <= _TAIL_BYTES:  # else: one line longer than the tail
        _parse(path, "last", tail[-1].decode("utf-8", "replace"))


def write_corpus(passages: Iterable[Passage], path: str | Path) -> None:
    """Write passages, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        for passage in passages:
            stream.write(json.dumps(passage.as_document(), ensure_ascii=False) + "\n")
    partial.replace(path)


def corpus_digest(passages: Iterable[Passage]) -> str:
    """SHA-256 (hex) of what the passages say, in their order."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps([passage.passage_id, passage.title, passage.text]).encode())
    return digest.hexdigest()


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    try:
        yield from numbered_lines(Path(path))
    except TextFileError as error:
        raise CorpusError(f"corpus {error}") from error


def _parse(path: str | Path, number: int | str, line: str) -> Passage:
    where = f"{path}, {number} line" if isinstance(number, str) else f"{path}, line {number}"
    try:
        document = parse_json(line)
    except ValueError as error:
        raise CorpusError(
            f"{where} is not JSON ({error}): the file is cut off, or not one JSON object a line; make or download it "
            "again"
        ) from error
    if not isinstance(document, dict):
        raise CorpusError(f"{where} is no JSON object; a passage is {{'id', 'contents'}} or {{'id', 'title', 'text'}}")
    if "id" not in document and "_id" in document:
        document = {**document, "id": document["_id"]}
    try:
        return passage_from(document, default_id=f"line-{number}")
    except ValueError as error:
        raise CorpusError(f"{where}: {error}") from error
