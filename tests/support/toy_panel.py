"""Panels for the toy environment."""

from __future__ import annotations

from pathlib import Path

from sdar_verl.envs.base import Task
from sdar_verl.panels import write_panel

# Here and not in toy_env: importing that registers the environment, which is for the runs, not for the test process.
PLACES = ("fridge 1", "cabinet 1", "desk 1")
OBJECTS = ("apple", "egg", "mug", "book")


def write_toy_panels(folder: Path, train: int = 8, validation: int = 4) -> list[str]:
    """Train and validation panel; returns verl's overrides for them and for the environment."""
    files = {}
    for name, count in (("train", train), ("validation", validation)):
        tasks = [
            Task(
                env="toy_search",
                task_id=f"{name}-{i:03d}",
                task_type="pick_and_place_simple",
                description=f"put some {OBJECTS[i % len(OBJECTS)]} in fridge",
                data={"place": PLACES[i % len(PLACES)]},
            )
            for i in range(count)
        ]
        files[name] = folder / f"{name}.parquet"
        write_panel(tasks, files[name], name)
    return [
        f"data.train_files={files['train']}",
        f"data.val_files={files['validation']}",
        "sdar.env.name=toy_search",
        "sdar.modules=[tests.support.toy_env]",
        "~sdar.env.options",
        "+sdar.env.options={}",
    ]
