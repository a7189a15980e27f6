"""Task panels: sorted, hashed by content, balanced when cut down, and whole or not there."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdar_verl.envs.base import Task
from sdar_verl.panels import (
    PANEL_FILE,
    PanelError,
    choose,
    panel_digest,
    panel_hash,
    read_panel,
    read_panels_file,
    write_panel,
    write_panels,
)


def tasks(count: int = 12, types: tuple[str, ...] = ("look", "pick")) -> list[Task]:
    return [
        Task(
            "maze", f"t{i:03d}", types[i % len(types)], f"go to room {i}", {"game_file": f"/a/{i}", "sha256": f"{i:x}"}
        )
        for i in range(count)
    ]


def test_a_panel_survives_the_round_trip_sorted(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(tasks(), 12)
    digest = write_panel(shuffled, tmp_path / "new" / "train.parquet", "train")
    assert read_panel(tmp_path / "new" / "train.parquet") == tasks()
    assert panel_digest(tmp_path / "new" / "train.parquet") == digest == panel_hash(tasks())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["train.parquet"]


def test_the_rows_are_what_verl_reads(tmp_path: Path) -> None:
    write_panel(tasks(), tmp_path / "p.parquet", "train")
    row = pq.read_table(tmp_path / "p.parquet").to_pylist()[3]
    assert row["prompt"] == [{"role": "user", "content": "go to room 3"}]
    assert row["data_source"] == "maze"
    assert row["reward_model"]["ground_truth"] == "t003"
    assert row["extra_info"] == {"index": 3, "split": "train", "task_id": "t003", "task_type": "pick"}
    assert Task(**json.loads(row["task"])) == tasks()[3]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"number": np.int64(3)}, "int64 is not JSON"),
        ({"grid": np.zeros(2)}, "ndarray is not JSON"),
        ({"day": date(2026, 1, 1)}, "date is not JSON"),
        ({"rooms": {0: "kitchen"}}, "they would come back as {'rooms': {'0': 'kitchen'}}"),
        ({"place": (1, 2)}, r"they would come back as {'place': \[1, 2\]}"),
        ({"share": float("nan")}, "they would come back as {'share': nan}"),
        ({"moves": [{("a", "b"): 1}]}, "keys must be str, int, float, bool or None, not tuple"),
    ],
)
def test_data_that_would_not_come_back_are_refused(tmp_path: Path, data: dict[str, Any], told: str) -> None:
    with pytest.raises(PanelError, match=rf"the data of task 't000' are no JSON \(.*{told}.*; use texts, numbers"):
        write_panels({"train": [replace(task, data=data) for task in tasks(2)]}, tmp_path, {})


def test_tasks_may_come_one_by_one(tmp_path: Path) -> None:
    write_panels({"train": iter(tasks())}, tmp_path, {})
    assert read_panel(tmp_path / "train.parquet") == tasks()


def test_the_bytes_are_the_same_for_every_order(tmp_path: Path) -> None:
    for name, order in (("a", tasks()), ("b", tasks()[::-1])):
        write_panel(order, tmp_path / name, "train")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_hash_knows_content_and_not_places() -> None:
    base = panel_hash(tasks())
    moved = [replace(t, data={**t.data, "game_file": "/elsewhere" + t.data["game_file"]}) for t in tasks()]
    assert panel_hash(moved) == panel_hash(tasks()[::-1]) == base
    changed = {
        panel_hash([*tasks()[:-1], replace(tasks()[-1], **change)])
        for change in (
            {"task_id": "t999"},
            {"task_type": "heat"},
            {"description": "go to room 12"},
            {"env": "attic"},
            {"data": {"game_file": "/a/11", "sha256": "other content"}},
        )
    }
    assert len(changed - {base}) == 5
    assert panel_hash(tasks()[:-1]) != base


def test_a_smaller_panel_is_a_balanced_part_of_a_larger_one() -> None:
    everything = tasks(60, ("a", "a", "a", "b", "b", "c"))  # 30, 20, 10
    for seed in (0, 1):
        chosen = {count: {t.task_id for t in choose(everything, count, seed)} for count in (6, 24, 60)}
        assert chosen[6] < chosen[24] < chosen[60]
        assert Counter(t.task_type for t in choose(everything, 24, seed)) == {"a": 12, "b": 8, "c": 4}
        assert choose(everything[::-1], 24, seed) == choose(everything, 24, seed)
    assert choose(everything, 24, 0) != choose(everything, 24, 1)


@pytest.mark.parametrize("count", [0, -1, 13])
def test_choosing_what_is_not_there(count: int) -> None:
    with pytest.raises(PanelError, match=f"cannot choose {count} of 12 tasks"):
        choose(tasks(), count)


def test_no_tasks_and_double_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PanelError, match="no tasks"):
        write_panel([], tmp_path / "p", "train")
    with pytest.raises(PanelError, match="twice: t005"):
        write_panel([*tasks(), tasks()[5]], tmp_path / "p", "train")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_panel(tasks(), tmp_path / "p", "train")

    def fail(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_panel(tasks(3), tmp_path / "p", "train")
    assert read_panel(tmp_path / "p") == tasks()


def test_changed_and_foreign_files_are_noticed(tmp_path: Path) -> None:
    write_panel(tasks(), tmp_path / "p", "train")
    table = pq.read_table(tmp_path / "p")
    pq.write_table(table.slice(1), tmp_path / "cut")
    with pytest.raises(PanelError, match="cut was changed after it was made"):
        read_panel(tmp_path / "cut")
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "bare")
    with pytest.raises(PanelError, match="no panel hash"):
        panel_digest(tmp_path / "bare")
    (tmp_path / "text").write_text("hello")
    for name in ("text", "missing"):
        fault = "is not a task panel" if name == "text" else "does not exist"
        with pytest.raises(PanelError, match=f"{name} {fault}.*sdar-verl prepare"):
            read_panel(tmp_path / name)


def test_the_side_file_describes_the_panels_and_is_checked(tmp_path: Path) -> None:
    assert read_panels_file(tmp_path) is None
    panels = {"train": tasks(), "test": tasks(3)}
    described = write_panels(panels, tmp_path, {"seed": 0}, {"maze": "1.0"})
    assert read_panels_file(tmp_path) == described
    assert described["panels"]["train"] == {
        "file": "train.parquet",
        "hash": panel_hash(tasks()),
        "tasks": 12,
        "task_types": {"look": 6, "pick": 6},
    }
    shutil.copy(tmp_path / "test.parquet", tmp_path / "train.parquet")
    with pytest.raises(PanelError, match=r"train.parquet is not the panel that panel.json describes"):
        read_panels_file(tmp_path)
    (tmp_path / "train.parquet").unlink()
    assert read_panels_file(tmp_path) == described, "who made it can make it again"
    (tmp_path / PANEL_FILE).write_text('{"panels": 3}')
    with pytest.raises(PanelError, match="damaged"):
        read_panels_file(tmp_path)
