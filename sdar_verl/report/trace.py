"""Traces: episodes written down token by token, as Parquet files of one row per turn.

import pandas as pd
turns = pd.read_parquet("outputs/quickstart/checkpoints/record/traces")
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdar_verl.report.layout import SCHEMA, RecordError, step_files

PER_GROUP = 4
_SCHEMA_KEY = b"sdar_trace_schema"
_EPISODE = re.compile(r".*_\d{1,9}", re.DOTALL)

TOKEN_COLUMNS = ("student_log_prob", "teacher_log_prob", "gap", "gate", "entropy", "advantage")
"""Lists of one number per token (float32); null where the run does not have them. Log-probs and gap in nats."""


def trace_schema() -> Any:
    """Columns of a trace (a ``pyarrow.Schema``); docs/report.md explains them."""
    import pyarrow as pa

    text, numbers = pa.string(), pa.list_(pa.float32())
    fields = [
        ("step", pa.int32()),
        ("group", text),
        ("episode", text),
        ("turn", pa.int32()),
        ("task_id", text),
        ("task_type", text),
        ("task", text),
        ("skills", pa.list_(text)),
        ("context", text),
        ("prompt", text),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(text)),
        *((name, numbers) for name in TOKEN_COLUMNS),
        ("observation", text),
        ("action", text),
        ("unparsed", pa.bool_()),
        ("inadmissible", pa.bool_()),
        ("truncated", pa.bool_()),
        ("result", text),
        ("reward", pa.float32()),
        ("episode_reward", pa.float32()),
        ("success", pa.bool_()),
    ]
    return pa.schema(fields, metadata={_SCHEMA_KEY: str(SCHEMA).encode()})


def write_trace(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one step's turns, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=trace_schema()), partial, compression="zstd")
    partial.replace(path)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Turns of one step, as written.

    Raises:
        RecordError: not a trace, one of another schema version, or one whose columns are not a trace's.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RecordError(f"{path} is not a readable trace ({error})") from error
    found = (table.schema.metadata or {}).get(_SCHEMA_KEY, b"none").decode()
    if found != str(SCHEMA):
        raise RecordError(f"{path} has trace schema {found}, not {SCHEMA}; read it with the version that wrote it")
    wanted = trace_schema()
    if table.schema.names != wanted.names:
        different = sorted({*table.schema.names} ^ {*wanted.names})
        raise RecordError(f"{path} has other columns than a trace: {', '.join(different) or 'in another order'}")
    try:
        turns = table.cast(wanted).to_pylist()
    except (ValueError, pa.ArrowException) as error:
        raise RecordError(f"{path} has columns of another kind than a trace ({error})") from error
    for turn in turns:
        if None in (turn["step"], turn["turn"], turn["group"]) or not _EPISODE.fullmatch(turn["episode"] or ""):
            raise RecordError(f"{path} has a turn without its step, its number, its group or its episode")
    return turns


def choose_episodes(episodes: Sequence[str], limit: int) -> list[str]:
    """At most ``limit`` of a step's episodes, up to four of each group, whatever their outcome.

    Args:
        episodes: ``{group}_{session}``, any order.
        limit: at least 1.

    Returns:
        Sorted; the first sessions of the first groups. Rollouts of a group differ by their random numbers alone and
        tasks come shuffled, so this is a fair sample.
    """
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for episode in set(episodes):
        group, session = episode.rsplit("_", 1)
        groups[group].append((int(session), episode))
    chosen: list[str] = []
    for group in sorted(groups):
        members = [episode for _, episode in sorted(groups[group])[:PER_GROUP]]
        chosen += members[: limit - len(chosen)]
    return chosen


def split_tokens(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each token adds to the text; the pieces joined are the text.

    A token that ends inside a character (byte-level vocabularies) adds nothing, the one that completes it adds it all.
    A token is decoded after its predecessor, because some tokenizers drop a leading space at the start.

    Args:
        ids: token ids of an answer.
        decode: ids -> text, special tokens included.
    """
    pieces: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[start:read]) if read > start else "", decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        start, read = read, end
    return pieces


def thin(folder: Path, max_bytes: float, every: int) -> int:
    """Drop every other trace, never the newest, when all together are larger than ``max_bytes``.

    Args:
        folder: holds the traces.
        max_bytes: allowed for all of them.
        every: steps between traces so far.

    Returns:
        Steps between traces from now on: ``every``, or a multiple of it after traces were dropped.
    """
    while len(files := step_files(folder)) > 1 and sum(path.stat().st_size for path in files.values()) > max_bytes:
        every *= 2
        # By their order, not their steps: before a resume, ``every`` may have been another.
        for path in list(files.values())[-2::-2]:
            path.unlink()
    return every
