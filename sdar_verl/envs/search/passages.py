"""A corpus of passages: one JSON object a line, in the forms that retrieval servers of the field use."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdar_verl.atomic import write_atomically, write_text_atomically
from sdar_verl.errors import SdarError
from sdar_verl.text_files import TextFileError, numbered_lines
from sdar_verl.untrusted import parse_json, whole_characters

NOTE_SUFFIX = ".checked.json"
"""Behind a corpus's name: what was found when it was read whole."""


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
    def empty(self) -> bool:
        """Whether there is nothing to read in its text: no letter, no digit."""
        return not any(letter.isalnum() for letter in self.text)

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
    given = next((document[key] for key in ("id", "_id") if document.get(key) is not None), default_id)
    passage_id = whole_characters(str(given))
    title, text, contents = (
        whole_characters(value) if isinstance(value, str) else value
        for value in (document.get(key) for key in ("title", "text", "contents"))
    )
    if isinstance(text, str) and (text.strip() or not isinstance(contents, str)):
        return Passage(passage_id, title if isinstance(title, str) else "", text.strip())
    if not isinstance(contents, str):
        raise ValueError("a passage needs `contents`, or `title` and `text`")
    head, line_break, rest = contents.lstrip().partition("\n")
    head, rest = head.strip(), rest.strip()
    quoted = len(head) > 1 and head.startswith('"') and head.endswith('"')
    named = head.strip('"').strip()
    if line_break and (quoted or (rest and isinstance(title, str) and named == title.strip().strip('"'))):
        return Passage(passage_id, named, rest)
    return Passage(passage_id, title if isinstance(title, str) else "", contents.strip())


def read_corpus(path: str | Path) -> list[Passage]:
    """All passages of a file, in its order; those without text are none, and are left out.

    Raises:
        CorpusError: the file is missing or empty, a line is not a passage (of a half-made file, the last one), an id
            comes twice, or no passage has a text.
    """
    return _read(Path(path))[0]


@dataclass(frozen=True)
class CheckedCorpus:
    """What a corpus file holds.

    Attributes:
        passages: passages with a text.
        empty: lines whose passage has none; they are left out.
        digest: :func:`corpus_digest` of the passages.
    """

    passages: int
    empty: int
    digest: str


def check_corpus(path: str | Path) -> CheckedCorpus:
    """Read a corpus whole, once: what was found is kept beside it (:data:`NOTE_SUFFIX`) as long as it does not change.

    Raises:
        CorpusError: see :func:`read_corpus`.
    """
    path = Path(path)
    note = path.with_name(path.name + NOTE_SUFFIX)
    state = _state(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = parse_json(note.read_bytes())
        if kept["file"] == state:
            return CheckedCorpus(**kept["found"])
    passages, empty = _read(path)
    found = CheckedCorpus(len(passages), empty, corpus_digest(passages))
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the reading again, no more
        write_text_atomically(note, json.dumps({"file": state, "found": asdict(found)}, indent=1) + "\n")
    return found


def _state(path: Path) -> dict[str, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise CorpusError(f"corpus {path.absolute()} cannot be read here ({error.strerror or error})") from error
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _read(path: Path) -> tuple[list[Passage], int]:
    passages: list[Passage] = []
    seen: set[str] = set()
    empty = 0
    for number, line in _lines(path):
        passage = _parse(path, number, line)
        if passage.passage_id in seen:
            raise CorpusError(f"{path}, line {number}: the id {passage.passage_id!r} comes twice; ids must be unique")
        seen.add(passage.passage_id)
        if passage.empty:
            empty += 1
        else:
            passages.append(passage)
    if empty and not passages:
        raise CorpusError(
            f"{path}: none of its {empty} passages has a text (contents, or text): the agent would be shown nothing; "
            "make it again with the texts in it"
        )
    if not passages:
        raise CorpusError(f"{path} holds no passages")
    return passages, empty


def write_corpus(passages: Iterable[Passage], path: str | Path) -> None:
    """Write passages, atomically."""
    lines = (json.dumps(passage.as_document(), ensure_ascii=False) + "\n" for passage in passages)
    write_atomically(Path(path), lambda stream: stream.writelines(line.encode() for line in lines))


def corpus_digest(passages: Iterable[Passage]) -> str:
    """SHA-256 (hex) of what the passages say, in their order."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps([passage.passage_id, passage.title, passage.text]).encode())
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        yield from numbered_lines(path)
    except TextFileError as error:
        raise CorpusError(f"corpus {error}") from error


def _parse(path: Path, number: int, line: str) -> Passage:
    where = f"{path}, line {number}"
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
