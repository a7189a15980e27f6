"""The record of a run: started once, gone on with after a resume, readable after a kill."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from sdar_verl.config import LossConfig, load_config
from sdar_verl.observe.base import StepRows
from sdar_verl.observe.record import RunRecord, plain, write_outcomes
from sdar_verl.observe.step_tokens import StepTokens, gaps_and_gates
from sdar_verl.panels import PanelError
from sdar_verl.report import layout
from sdar_verl.report.distributions import reward_statistics
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK, StepValues
from tests.support.toy_panel import write_toy_panels


@pytest.fixture
def config(tmp_path):
    write_toy_panels(tmp_path)
    return OmegaConf.create(
        {
            "sdar": {"env": {"max_steps": 3}},
            "trainer": {
                "default_local_dir": str(tmp_path / "checkpoints"),
                "project_name": "p",
                "experiment_name": "e",
                "total_training_steps": 4,
                "n_gpus_per_node": 2,
                "nnodes": 1,
            },
            "data": {
                "train_files": str(tmp_path / "train.parquet"),
                "val_files": [str(tmp_path / "validation.parquet")],
                "max_response_length": 8,
            },
        }
    )


def record(config, **trace) -> RunRecord:
    return RunRecord(load_config({"trace": trace}), config)


def test_a_record_says_what_the_run_is(config):
    part = record(config)
    part.on_step_end(1, {"a": np.float32(0.5), "bad": float("nan")})
    run = json.loads((part.folder / layout.RUN_FILE).read_text())
    assert run["schema"] == layout.SCHEMA and run["experiment"] == "e" and run["gpus"] == 2
    assert len(run["panels"]["val_files"][0]) == 64 and run["panels"]["val_files"] != run["panels"]["train_files"]
    assert layout.read_lines(part.folder / layout.METRICS_FILE) == [{"step": 1, "data": {"a": 0.5, "bad": None}}]


def test_a_new_run_moves_the_record_of_an_earlier_one_out_of_the_way(config):
    for value in (1.0, 2.0):
        record(config).on_step_end(1, {"a": value})
    folder = record(config).folder
    assert layout.read_lines(folder / layout.METRICS_FILE)[0]["data"] == {"a": 2.0}
    assert layout.read_lines(folder.with_name("record.1") / layout.METRICS_FILE)[0]["data"] == {"a": 1.0}


def test_a_resumed_run_goes_on_and_forgets_what_is_played_again(config):
    first = record(config, every=1)
    for step in (1, 2, 3):
        first.on_step_end(step, {"a": step})
    for name in (layout.TRACES, layout.OUTCOMES):
        for step in (2, 3):
            path = layout.step_file(first.folder / name, step)
            path.parent.mkdir(exist_ok=True)
            path.touch()
    resumed = record(config, every=1)
    resumed.load_state_dict({"step": 2, "every": 4})
    resumed.on_step_end(3, {"a": 30})
    lines = layout.read_lines(resumed.folder / layout.METRICS_FILE)
    assert [(line["step"], line["data"]["a"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]
    assert list(layout.step_files(resumed.folder / layout.TRACES)) == [2]
    assert list(layout.step_files(resumed.folder / layout.OUTCOMES)) == [2]
    assert not resumed.folder.with_name("record.1").exists()


def test_the_updates_of_a_step_are_one_step_of_the_record(config, monkeypatch):
    part = record(config, every=1)
    tokens = [
        StepTokens({"rm_scores": [np.array([0.0, score])], "responses": [np.array([5, 6])], "gap": [gap]}, [2])
        for score, gap in ((1.0, np.array([0.5, np.nan])), (0.0, np.array([1.5, 2.5])))
    ]
    for one in tokens:
        one.columns["gate"], one.columns["old_log_probs"] = one.columns["gap"], one.columns["gap"]
    pending = iter(tokens)
    monkeypatch.setattr("sdar_verl.observe.record.read_tokens", lambda rows: next(pending))
    trainer = SimpleNamespace(logger=None)
    for number in range(2):
        assert not part.latest, "before the last update of a step there is nothing to say of it"
        batch = KVBatchMeta(partition_id="train", keys=[f"s1p{number}_0_0"], tags=[{}])
        infos = [RowInfo(turn=0, task_type="t")]
        part.on_advantages(StepRows(1, batch, infos, {}, load_config({}), trainer, number, 2))
    lines = layout.read_lines(part.folder / layout.DISTRIBUTIONS_FILE)
    assert len(lines) == 1
    assert lines[0] == {"step": 1, **part.latest}
    assert lines[0]["reward"] == reward_statistics([1.0, 0.0])
    assert sum(lines[0]["gap_histogram"]) == 3


def test_a_file_that_a_kill_left_unfinished_is_read_up_to_there(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "da')
    assert layout.read_lines(path) == [{"step": 1}]
    path.write_text('{"step": 1, \n{"step": 2}\n')
    with pytest.raises(layout.RecordError, match="line 1"):
        layout.read_lines(path)


def test_outcomes_of_a_validation_are_kept_per_episode(tmp_path):
    outcomes = {"arm": ["s", "s"], "task_id": ["a", "b"], "acc": [1.0, 0.0], "other": [1, 2], "turns": [3.0, 4.0]}
    write_outcomes(outcomes, tmp_path / "o.parquet")
    table = pq.read_table(tmp_path / "o.parquet").to_pydict()
    assert table == {"arm": ["s", "s"], "task_id": ["a", "b"], "acc": [1.0, 0.0], "turns": [3.0, 4.0]}


def test_plain_values():
    assert plain({"a": (np.int64(1), torch.tensor(2.0), None, True, object)})["a"][:4] == [1, 2.0, None, True]


def test_gaps_and_gates_are_the_losss_own_and_nan_without_a_teacher():
    student, teacher = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-0.5, -2.5, -0.5])
    columns = {
        "old_log_probs": [student, student[:2]],
        TEACHER_LOG_PROBS: [teacher, teacher[:2]],
        TEACHER_MASK: [torch.ones(3), torch.zeros(2)],
        "response_mask": [torch.tensor([1.0, 1.0, 0.0]), torch.ones(2)],
    }
    found = gaps_and_gates(columns, LossConfig(), StepValues(coef=0.0, beta=2.0))
    torch.testing.assert_close(found["gap"][0][:2], torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(found["gate"][0][:2], torch.sigmoid(torch.tensor([1.0, -1.0])))
    assert found["gap"][0][2].isnan() and found["gate"][1].isnan().all() and len(found["gap"][1]) == 2


def test_a_panel_without_a_hash_is_not_taken_for_one(config, tmp_path):
    import pyarrow as pa

    pq.write_table(pa.table({"a": [1]}), tmp_path / "train.parquet")
    with pytest.raises(PanelError, match="prepare"):
        record(config).on_step_end(1, {})
