"""Question files of the user's: Search-R1's parquet (NQ, HotpotQA and the evaluation sets) and its descendants'."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_verl.envs.base import Task
from sdar_verl.envs.search.scoring import has_content
from sdar_verl.errors import SdarError
from sdar_verl.text_files import TextFileError, numbered_lines
from sdar_verl.untrusted import parse_json, whole_characters

PANELS = ("train", "validation", "test")
#: First word of a file's name -> panel.
_BY_NAME = {"train": "train", "dev": "validation", "val": "validation", "validation": "validation", "test": "test"}
_COLUMNS = ("question", "golden_answers", "data_source", "extra_info", "env_kwargs", "reward_model", "reward_spec")
_FORMS = (
    "columns `question` and `golden_answers` (Search-R1, FlashRAG), or `extra_info`/`env_kwargs` with a `question` and "
    "`reward_model` with a `ground_truth` (SkyRL, SDAR), and `data_source`"
)

_QUESTION_MARKS = ("?", "？", "؟", "⁇")

# The text of a list or an object, whole or cut off; "[sic]" is an answer.
_LISTED = re.compile(
    r"""(?s)(array\()?[\[{]\s*b?["']|\[\s*[\[{]|\[\s*(None|null|nan|NaN|-?\d[\d.]*)\s*[,\]]|\[\s*\]\Z"""
)
_ARRAY = re.compile(r"(?s)array\((.*?)(?:,\s*dtype=\w+)?\)")
_SIDE_BY_SIDE = re.compile(r"""["']\s+["']""")


class QuestionFileError(SdarError, ValueError):
    """A file of questions that is missing, damaged or in another form; the message names it and the remedy."""


@dataclass(frozen=True)
class QuestionFile:
    """A file and the panel that its questions are for."""

    panel: str
    path: Path

    @classmethod
    def of(cls, given: str) -> QuestionFile:
        """Read ``PANEL=FILE``, or ``FILE`` whose name begins with the panel's (``train.parquet``, ``dev.jsonl``).

        Raises:
            QuestionFileError: no such file, or no telling which panel is meant.
        """
        panel, equals, name = given.partition("=")
        if not equals or panel not in PANELS:
            name = given
            first = Path(given).name.lower().replace("-", "_").replace(".", "_").split("_")[0]
            panel = _BY_NAME.get(first, "")
        path = Path(name).expanduser()
        if not path.is_file():
            raise QuestionFileError(f"--source {given}: {path} does not exist; download the data set first")
        if not panel:
            raise QuestionFileError(
                f"--source {given}: which panel is it for? Write {', '.join(f'{p}=FILE' for p in PANELS)}"
            )
        return cls(panel, path)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Questions:
    """Tasks of one panel by id, and why rows were left out."""

    tasks: Mapping[str, Task]
    skipped: Counter[str]


def read_questions(files: Sequence[QuestionFile]) -> Questions:
    """Tasks of some files: each question once, its type the data set that it comes from.

    A task's id is ``<data set>/<hash of question and answers>``: it does not depend on where in which file it stands.

    Raises:
        QuestionFileError: a file cannot be read, or has no columns that we know.
    """
    tasks: dict[str, Task] = {}
    skipped: Counter[str] = Counter()
    for file in files:
        usable = 0
        for row in _rows(file.path):
            task, reason = _task(row, _source(file.path))
            if task is None:
                skipped[reason] += 1
                continue
            usable += 1
            if task.task_id in tasks:
                skipped["the same question again"] += 1
            tasks[task.task_id] = task
        if not usable:
            reasons = ", ".join(f"{count} rows: {reason}" for reason, count in skipped.items()) or "it has no rows"
            raise QuestionFileError(f"{file.path} holds no question that can be used ({reasons}); needed are {_FORMS}")
    return Questions(tasks, skipped)


def _source(path: Path) -> str:
    """What questions without a ``data_source`` are of: FlashRAG has a folder a data set, with train.jsonl in it."""
    return path.resolve().parent.name if path.stem in ("train", "dev", "val", "validation", "test") else path.stem


def _task(row: Mapping[str, Any], default: str = "") -> tuple[Task | None, str]:
    try:
        question, answers = _question(row), _answers(row)
    except ValueError as error:
        return None, str(error)
    source = (
        str(default if row.get("data_source") is None else row["data_source"])
        .strip()
        .removeprefix("searchR1_")
        .replace("/", "_")
    )
    if not question:
        return None, "no question"
    if not answers:
        return None, "no golden answers"
    if not source:
        return None, "no data_source"
    if not question.endswith(_QUESTION_MARKS):
        question += "?"  # as Search-R1 does
    name = hashlib.sha256(json.dumps([question, answers]).encode()).hexdigest()[:16]
    return Task("search", f"{source}/{name}", source, question, {"answers": answers}), ""


def _question(row: Mapping[str, Any]) -> str:
    for place in (row, _parsed(row.get("extra_info")), _parsed(row.get("env_kwargs"))):
        if isinstance(place, Mapping) and isinstance(place.get("question"), str):
            return " ".join(place["question"].split())
    return ""


def _answers(row: Mapping[str, Any]) -> list[str]:
    found = row.get("golden_answers")
    for name in ("reward_model", "reward_spec", "env_kwargs"):
        holder = _parsed(row.get(name))
        if found is None and isinstance(holder, Mapping):
            found = holder.get("ground_truth")
    answers = list(dict.fromkeys(_texts(_parsed(found))))
    told = [answer for answer in answers if has_content(answer)]  # the others would be met by an answer of nothing
    if answers and not told:
        raise ValueError("golden answers of which the scorer leaves nothing (articles, punctuation)")
    return told


def _texts(value: Any) -> Iterator[str]:
    """Answers in a value of a published file that is no text of a list any more; the texts in it stay as they are:
    "[0, 1]" may be an answer.

    Raises:
        ValueError: an object without a target, or one whose target looks like a list that cannot be read.
    """
    if isinstance(value, Mapping):
        if "target" not in value:
            raise ValueError("golden answers are an object without a `target`")
        yield from _texts(_parsed(value["target"]))
    elif isinstance(value, set | frozenset):
        yield from _texts(sorted(value, key=str))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, float) and value.is_integer():  # how a column of whole numbers with gaps arrives
        yield str(int(value))
    elif isinstance(value, bytes):
        yield from _texts(value.decode("utf-8", "replace"))
    elif value is not None and value == value:  # NaN, which stands for nothing in a table, is not
        yield from filter(None, [whole_characters(str(value)).strip()])


def _parsed(value: Any) -> Any:
    """``value``, or the list or object that it is the text of: its JSON, or as Python prints it.

    Raises:
        ValueError: it looks like a list, but which answers it holds cannot be told.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    text = value.strip().lstrip("\ufeff") if isinstance(value, str) else ""
    if text.startswith('"[') and text.endswith(']"'):  # encoded twice
        with contextlib.suppress(ValueError):
            return _parsed(parse_json(text))
    if text.startswith(("('", '("')):  # a tuple, or an answer in brackets
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(text)
        return value
    if not _LISTED.match(text):
        return value
    with contextlib.suppress(ValueError):
        return parse_json(text)
    if array := _ARRAY.fullmatch(text):
        text = array[1]
    # Of strings side by side, as NumPy prints them, Python would make one.
    if not _SIDE_BY_SIDE.search(text):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(text)
    raise ValueError("golden answers look like a list, but are none that can be read")


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix in (".jsonl", ".json"):
        yield from _json_lines(path)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        if not columns:
            raise QuestionFileError(f"{path} has the columns {', '.join(file.schema_arrow.names)}; needed are {_FORMS}")
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist(maps_as_pydicts="lossy")
    except (OSError, pa.ArrowException) as error:
        raise QuestionFileError(
            f"{path} is no readable parquet file ({error}); download it again, or give a .jsonl file"
        ) from error


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        for number, line in numbered_lines(path):
            try:
                row = parse_json(line)
            except ValueError as error:
                raise QuestionFileError(
                    f"{path}, line {number} is not JSON ({error}): the file is cut off, or not one JSON object a line"
                ) from error
            if not isinstance(row, dict):
                raise QuestionFileError(f"{path}, line {number} is no JSON object; needed are {_FORMS}")
            yield row
    except TextFileError as error:
        raise QuestionFileError(str(error)) from error
