"""Task panels: fixed lists of tasks as the parquet files that verl reads.

A panel holds its tasks sorted by id, whatever order they were found in, and carries a hash of what they are: ids,
types, descriptions and the content of their files, not where the files lie. Two runs with the same hash saw the same
tasks.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdar_verl.atomic import put_in_place, write_text_atomically
from sdar_verl.envs.base import Task
from sdar_verl.errors import SdarError
from sdar_verl.untrusted import is_inside, parse_json, shorten

PANEL_FILE = "panel.json"
_HASH_KEY = b"sdar_panel_hash"

# Keys of Task.data that say where something lies, not what it is.
LOCATIONS = ("game_file", "catalogue")


class PanelError(SdarError):
    """A panel cannot be made or read; the message says what to do."""


def panel_hash(tasks: Iterable[Task]) -> str:
    """SHA-256 (hex) of the tasks, independent of their order and of where their files lie."""
    lines = []
    for task in tasks:
        fields = asdict(task)
        fields["data"] = {key: value for key, value in task.data.items() if key not in LOCATIONS}
        lines.append(json.dumps(fields, sort_keys=True))
    return sha256("\n".join(sorted(lines)).encode()).hexdigest()


def choose(tasks: Iterable[Task], count: int, seed: int = 0) -> list[Task]:
    """The first ``count`` tasks of a seeded permutation that is stratified by task type.

    Every prefix of the permutation holds the types in about the proportions of the whole, so a smaller panel is a part
    of a larger one.

    Args:
        tasks: any order.
        count: how many.
        seed: of the permutation.

    Raises:
        PanelError: there are fewer than ``count`` tasks.
    """
    by_type: dict[str, list[Task]] = {}
    for task in sorted(tasks, key=lambda task: task.task_id):
        by_type.setdefault(task.task_type, []).append(task)
    available = sum(map(len, by_type.values()))
    if not 0 < count <= available:
        raise PanelError(f"cannot choose {count} of {available} tasks; ask for 1 to {available}")
    ranked = []
    for task_type, members in by_type.items():
        random.Random(f"{seed}/{task_type}").shuffle(members)
        ranked += [((i + 0.5) / len(members), task_type, task) for i, task in enumerate(members)]
    ranked.sort(key=lambda item: item[:2])
    return [task for _, _, task in ranked[:count]]


def write_panel(tasks: Iterable[Task], path: str | Path, split: str) -> str:
    """Write one panel, atomically.

    The columns are those of verl's ``RLHFDataset``: ``prompt`` (the task's description as a chat; the agent loop builds
    the real prompts), ``data_source`` (the environment), ``reward_model``, ``extra_info`` (index, split, task_id,
    task_type), and ``task``, the task as JSON, which the agent loop plays.

    Args:
        tasks: at least one; ids must be unique, data must be JSON.
        path: the parquet file.
        split: name of the split, for ``extra_info``.

    Returns:
        The panel's hash.

    Raises:
        PanelError: no task, an id twice, or data that would not come back from the file as they are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tasks = list(tasks)
    if not tasks:
        raise PanelError(f"no tasks for {path}")
    doubles = [task_id for task_id, n in Counter(task.task_id for task in tasks).items() if n > 1]
    if doubles:
        raise PanelError(f"task ids must be unique in a panel; twice: {', '.join(sorted(doubles)[:5])}")
    rows = [
        {
            "prompt": [{"role": "user", "content": task.description}],
            "data_source": task.env,
            "reward_model": {"style": "rule", "ground_truth": task.task_id},
            "extra_info": {"index": index, "split": split, "task_id": task.task_id, "task_type": task.task_type},
            "task": _as_json(task),
        }
        for index, task in enumerate(sorted(tasks, key=lambda task: task.task_id))
    ]
    digest = panel_hash(tasks)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({_HASH_KEY: digest.encode()})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial)
    partial.replace(path)
    return digest


def _as_json(task: Task) -> str:
    """The task as a line of JSON.

    Raises:
        PanelError: its data would not come back as they are: JSON has texts, numbers, True, False, None, lists, and
            objects whose keys are texts; it would make texts of other keys, and lists of tuples.
    """
    try:
        text = json.dumps(asdict(task), sort_keys=True)
        if (found := json.loads(text)["data"]) != task.data:
            raise TypeError(f"they would come back as {shorten(found)}")
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise PanelError(
            f"the data of task {shorten(task.task_id)} are no JSON ({error}): {shorten(task.data)}; use texts, "
            "numbers, True, False, None, lists and dicts with texts as keys; of numpy's, int(), float() or .tolist()"
        ) from error


def task_from_json(text: str) -> Task:
    """The task in a panel's column ``task``.

    Raises:
        PanelError: it is no JSON object with the fields of a :class:`Task`, of their types.
    """
    try:
        return Task(**parse_json(text))
    except (ValueError, TypeError) as error:
        raise PanelError(f"a task of the panel cannot be read ({error}); make the panel again") from error


def read_panel(path: str | Path) -> list[Task]:
    """Tasks of a panel, in its order.

    Raises:
        PanelError: not a panel of ours, or its rows are not those it was written with.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = panel_digest(path)
    try:
        texts = pq.read_table(path, columns=["task"])["task"].to_pylist()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise PanelError(f"{path} is damaged ({error}); make the panel again with `sdar-verl prepare`") from error
    try:
        tasks = [task_from_json(text) for text in texts]
    except PanelError as error:
        raise PanelError(f"{path}: {error}") from error
    if panel_hash(tasks) != digest:
        raise PanelError(f"{path} was changed after it was made (its hash does not fit its rows); make it again")
    return tasks


def panel_digest(path: str | Path) -> str:
    """The hash that a panel was written with.

    Raises:
        PanelError: the file is missing or not a panel of ours.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).exists():
        raise PanelError(f"{path} does not exist; make the task panels with `sdar-verl prepare`")
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise PanelError(f"{path} is not a task panel ({error}); make one with `sdar-verl prepare`") from error
    if _HASH_KEY not in metadata:
        raise PanelError(f"{path} has no panel hash, so it was not made by `sdar-verl prepare`; make it again")
    return metadata[_HASH_KEY].decode(errors="replace")


def write_panels(
    panels: Mapping[str, Iterable[Task]],
    folder: str | Path,
    settings: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
    beside: Mapping[Path, Path | None] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write ``<name>.parquet`` for each panel and ``panel.json`` beside them, last: without it they are unfinished.

    What is there stays until all of the new is written.

    Args:
        panels: name -> tasks.
        folder: where to write.
        settings: what the panels were made with; JSON-serialisable.
        versions: of the packages that made them, for the record.
        beside: what belongs to the panels, target -> the new file or folder that takes its place; None: it goes.

    Returns:
        Content of ``panel.json``: per panel its file, hash, number of tasks and their types; settings; versions.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {"panels": {}, "settings": dict(settings), "versions": dict(versions or {})}
    for name, given in panels.items():
        tasks = list(given)
        described["panels"][name] = {
            "file": f"{name}.parquet",
            "hash": write_panel(tasks, folder / f".{name}.parquet.new", name),
            "tasks": len(tasks),
            "task_types": dict(sorted(Counter(task.task_type for task in tasks).items())),
        }
    text = json.dumps(described, indent=2) + "\n"
    (folder / PANEL_FILE).unlink(missing_ok=True)
    for target, new in beside.items():
        put_in_place(new, target)
    for name in panels:
        (folder / f".{name}.parquet.new").replace(folder / f"{name}.parquet")
    write_text_atomically(folder / PANEL_FILE, text)
    return described


def read_panels_file(folder: str | Path) -> dict[str, Any] | None:
    """Content of ``panel.json``, or None when the folder holds no finished panels.

    Raises:
        PanelError: the file is not JSON, or a panel that it names is damaged or another one; one may be missing.
    """
    folder = Path(folder)
    if not (folder / PANEL_FILE).is_file():
        return None
    try:
        described = parse_json((folder / PANEL_FILE).read_bytes())
        files = [(folder / panel["file"], panel["hash"]) for panel in described["panels"].values()]
        if not files or not isinstance(described["settings"], Mapping):
            raise ValueError("it describes no panels")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PanelError(
            f"{folder / PANEL_FILE} is damaged ({type(error).__name__}: {error}); make the panels again with --force"
        ) from error
    for file, digest in files:
        if not is_inside(file, folder):
            raise PanelError(f"{folder / PANEL_FILE} names {file}, which is not in its folder; make the panels again")
        if file.is_file() and _digest_of(file) != digest:
            raise PanelError(f"{file} is not the panel that {PANEL_FILE} describes; make the panels again with --force")
    return described


def _digest_of(file: Path) -> str | None:
    try:
        return panel_digest(file)
    except PanelError:
        return None


def missing_files(tasks: Iterable[Task]) -> list[str]:
    """Files and folders that the tasks need (:data:`LOCATIONS`) and that are not there, sorted."""
    needed = {str(task.data[key]) for task in tasks for key in LOCATIONS if key in task.data}
    return sorted(place for place in needed if not Path(place).exists())
