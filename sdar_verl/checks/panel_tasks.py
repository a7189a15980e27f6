"""Tasks of a run's data, as far as they can be read here: panels of the text environments, or a recipe's own files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.envs.base import Task
from sdar_verl.panels import PanelError, panel_digest, read_panel
from sdar_verl.recipe import plays_environments
from sdar_verl.rollout.recipe_rows import task_of
from sdar_verl.text_files import numbered_lines
from sdar_verl.untrusted import shorten

ROWS_READ = 2000
"""Rows of a recipe's file that are looked at before the start."""


def panel_files(config: DictConfig, option: str) -> list[str]:
    """The local files of ``data.train_files`` or ``data.val_files``; remote ones (``hdfs://``) are verl's to fetch.

    As they are written: verl's dataset does not expand a ``~`` either.
    """
    files = config.data[option]
    listed = list(files or [""]) if OmegaConf.is_list(files) else [files]
    return [str(file) for file in listed if "://" not in str(file)]


def panel_digests(config: DictConfig, option: str) -> list[str]:
    """The hash of each of :func:`panel_files`.

    Raises:
        PanelError: one is missing, or, with a text environment, not a panel of ours.
    """
    digest = panel_digest if plays_environments(config) else file_digest
    return [digest(file) for file in panel_files(config, option)]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes. PanelError when it cannot be read."""
    try:
        with Path(path).open("rb") as stream:
            found = hashlib.sha256()
            while block := stream.read(1 << 20):
                found.update(block)
            return found.hexdigest()
    except OSError as error:
        raise PanelError(f"{path} cannot be read: {error}") from error


def panel_tasks(config: DictConfig, option: str) -> list[Task]:
    """Tasks of ``data.train_files`` or ``data.val_files``, of a recipe's files the first :data:`ROWS_READ`; what cannot
    be read is named by the data check."""
    tasks: list[Task] = []
    files = panel_files(config, option)
    for file in files:
        if not Path(file).is_file():
            continue
        try:
            if plays_environments(config):
                tasks += read_panel(file)
            else:
                key = config.data.get("prompt_key", "prompt")
                for row in read_rows(file, max(20, ROWS_READ // len(files))):
                    with suppress(KeyError, TypeError, ValueError):
                        tasks.append(task_of({**row, "raw_prompt": row[key]}))
        except PanelError:
            continue
    return tasks


def row_count(path: str | Path) -> int:
    """Rows of such a file.

    Raises:
        PanelError: it cannot be read.
    """
    import pyarrow.parquet as pq

    if str(path).endswith(".parquet"):
        return pq.ParquetFile(path).metadata.num_rows
    return sum(1 for _ in read_rows(path, sys.maxsize))


def read_rows(path: str | Path, limit: int = ROWS_READ) -> Iterator[dict[str, Any]]:
    """The first rows of a file of verl's data: Parquet, JSON or JSON lines.

    Raises:
        PanelError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not str(path).endswith((".parquet", ".json", ".jsonl")):
        raise PanelError(f"{path}: verl reads files that end in .parquet, .json or .jsonl")
    try:
        if str(path).endswith(".parquet"):
            file, left = pq.ParquetFile(path), limit
            for batch in file.iter_batches(batch_size=min(limit, 512)):
                yield from batch.to_pylist()[:left]
                left -= batch.num_rows
                if left <= 0:
                    return
        else:
            lines = (line for _, line in numbered_lines(Path(path)))
            first = next(lines, "[]")
            # An array of JSON may be a file's whole text; as lines, only so many are read.
            whole = json.loads("\n".join([first, *lines])) if first.startswith("[") else None
            rows = whole if whole is not None else map(json.loads, chain([first], lines))
            for number, row in enumerate(islice(rows, limit)):
                if not isinstance(row, dict):
                    raise ValueError(f"row {number} is {shorten(row)}, not an object of columns")
                yield row
    except (OSError, pa.ArrowException, ValueError) as error:
        raise PanelError(f"{path} cannot be read: {error}") from error
