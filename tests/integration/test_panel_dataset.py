"""verl's own dataset class reads a panel, each task once and in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdar_verl.envs.base import Task
from sdar_verl.panels import write_panel

pytestmark = pytest.mark.integration


def test_verl_reads_a_panel(tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    tasks = [Task("maze", f"t{i}", "walk", f"go to {i}", {"game_file": f"/a/{i}", "sha256": f"{i}"}) for i in range(5)]
    write_panel(tasks, tmp_path / "p.parquet", "train")
    config = OmegaConf.create({"filter_overlong_prompts": False, "cache_dir": str(tmp_path / "cache")})
    dataset = RLHFDataset(str(tmp_path / "p.parquet"), tokenizer=None, config=config)
    batch = collate_fn([dataset[i] for i in range(len(dataset))])
    assert [Task(**json.loads(text)) for text in batch["task"]] == tasks
    assert list(batch["index"]) == [0, 1, 2, 3, 4]
    assert list(batch["raw_prompt"][2]) == [{"role": "user", "content": "go to 2"}]
    assert set(batch["data_source"]) == {"maze"}
    assert batch["reward_model"][3]["ground_truth"] == "t3"
