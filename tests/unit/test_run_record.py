"""The record of a run: started once, gone on with after a resume, readable after a kill."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from sdar_verl.config import load_config
from sdar_verl.config.loss import LossConfig
from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.method import Method
from sdar_verl.observe.record import RunRecord, distilled_tokens, plain, trace_rows, write_outcomes
from sdar_verl.panels import PanelError
from sdar_verl.report import layout
from sdar_verl.report.distributions import reward_statistics
from sdar_verl.rollout.rows import RowInfo, TurnNote
from sdar_verl.table import StepTable, joined
from tests.support.table import make_table
from tests.support.toy_panel import write_toy_panels

VALIDATED = {"val-core/s/acc/mean@1": 0.5}


@pytest.fixture
def config(tmp_path):
    write_toy_panels(tmp_path)
    return OmegaConf.create(
        {
            "sdar": {"env": {"max_steps": 3}, "validation": {"arms": {"told": {"temperature": 0.4}}}},
            "actor_rollout_ref": {
                "rollout": {"agent": {"default_agent_loop": "sdar_agent"}, "val_kwargs": {"n": 1, "top_p": 1.0}}
            },
            "trainer": {
                "default_local_dir": str(tmp_path / "checkpoints"),
                "project_name": "p",
                "experiment_name": "e",
                "total_training_steps": 4,
                "test_freq": 2,
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
    run = SimpleNamespace(total_training_steps=5, tokenizer=SimpleNamespace(decode=lambda ids: " ".join(map(str, ids))))
    return RunRecord(load_config({"trace": trace}), config, run)


def test_a_record_says_what_the_run_is(config):
    part = record(config)
    part.after_step(1, {"a": np.float32(0.5), "bad": float("nan")})
    run = json.loads((part.folder / layout.RUN_FILE).read_text())
    assert run["schema"] == layout.SCHEMA and run["experiment"] == "e" and run["gpus"] == 2
    assert len(run["panels"]["val_files"][0]) == 64 and run["panels"]["val_files"] != run["panels"]["train_files"]
    assert layout.read_lines(part.folder / layout.METRICS_FILE) == [{"step": 1, "data": {"a": 0.5, "bad": None}}]


def test_a_new_run_moves_the_record_of_an_earlier_one_out_of_the_way(config):
    for value in (1.0, 2.0):
        record(config).after_step(1, {"a": value})
    folder = record(config).folder
    assert layout.read_lines(folder / layout.METRICS_FILE)[0]["data"] == {"a": 2.0}
    assert layout.read_lines(folder.with_name("record.1") / layout.METRICS_FILE)[0]["data"] == {"a": 1.0}


def test_a_resumed_run_goes_on_and_forgets_what_is_played_again(config):
    first = record(config, every=1)
    for step in (1, 2, 3):
        first.after_step(step, {"a": step})
    for name in (layout.TRACES, layout.OUTCOMES):
        for step in (2, 3):
            path = layout.step_file(first.folder / name, step)
            path.parent.mkdir(exist_ok=True)
            path.touch()
    resumed = record(config, every=1)
    resumed.load_state_dict({"step": 2, "asked": 1, "every": 4})
    resumed.after_step(3, {"a": 30})
    lines = layout.read_lines(resumed.folder / layout.METRICS_FILE)
    assert [(line["step"], line["data"]["a"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]
    assert list(layout.step_files(resumed.folder / layout.TRACES)) == [2]
    assert list(layout.step_files(resumed.folder / layout.OUTCOMES)) == [2]
    assert not resumed.folder.with_name("record.1").exists()


def test_a_new_run_finds_a_free_place_for_the_record_of_an_earlier_one(config):
    for _ in range(3):
        record(config).after_step(1, {"a": 1.0})
    folder = record(config).folder
    shutil.rmtree(folder.with_name("record.1"))
    record(config).after_step(1, {"a": 2.0})
    assert sorted(path.name for path in folder.parent.glob("record*")) == ["record", "record.2", "record.3"]


@pytest.mark.parametrize(
    ("asked", "every", "now", "goes_on"),
    [(1, 4, 1, 4), (0, 0, 10, 10), (10, 10, 5, 5), (10, 20, 0, 0), (10, 20, 10, 20)],
)
def test_a_trace_is_as_rare_as_it_was_unless_another_is_asked_for(config, asked, every, now, goes_on):
    part = record(config, every=now)
    part.load_state_dict({"step": 1, "asked": asked, "every": every})
    part._step = 1
    assert part.state_dict()["every"] == goes_on


def test_a_run_that_goes_on_with_another_panel_or_validation_has_both(config):
    first = record(config)
    first.after_step(1, {"a": 1.0})
    path = first.folder / layout.RUN_FILE
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "started": "2026-01-01"}))
    config.data.val_files, config.trainer.nnodes = config.data.train_files, 2
    config.actor_rollout_ref.rollout.val_kwargs.n = 4
    config.sdar.validation.arms = {"student": {"temperature": 0.4}}
    record(config).load_state_dict({"step": 1, "every": 0})
    after = json.loads(path.read_text())
    assert after["panels"]["val_files"] == [*before["panels"]["val_files"], *before["panels"]["train_files"]]
    assert after["panels"]["train_files"] == before["panels"]["train_files"]
    assert (after["started"], after["gpus"], after["arms"]) == ("2026-01-01", 4, ["student", "told"])
    assert after["validation"] == {
        "actor_rollout_ref.rollout.val_kwargs.n": [1, 4],
        "actor_rollout_ref.rollout.val_kwargs.top_p": [1.0],
        "sdar.validation.arms.student.temperature": [0.4],
        "sdar.validation.arms.told.temperature": [0.4],
    }
    assert before["contents"].keys() == {"sdar.skills.bank", "sdar.prompt.template"}
    for damaged in (
        '{"panels": null}',
        '{"schema": 1, "validation": {"n": [[1]]}}',
        "[]",
        '{"panels": {"val_files": null}}',
        "{",
    ):
        path.write_text(damaged)
        record(config).load_state_dict({"step": 1, "every": 0})
        assert json.loads(path.read_text())["panels"]["val_files"] == before["panels"]["train_files"]


def test_a_kill_between_checkpoint_and_end_of_a_step_leaves_its_numbers(config):
    first = record(config)
    table = judged(
        ["u_0_0"],
        [RowInfo(0, "t", teacher_prompt_tokens=4)],
        response_mask=[[1]],
        rm_scores=[[1.0]],
        old_log_probs=[[-1.0]],
        **{TEACHER_LOG_PROBS: [[-0.5]]},
    )
    metrics = {"sdar/success": 0.5}
    first.after_updates(table, metrics)
    metrics["n"] = np.int64(3)  # of an observer that comes later
    state = json.loads(json.dumps(first.state_dict()))
    first.after_validation(1, {"sdar-val/student/success": 1.0}, {})
    # Killed here: the step's own line was never written.
    record(config).load_state_dict(state)
    lines = layout.read_lines(first.folder / layout.METRICS_FILE)
    assert [line["data"] for line in lines] == [{"sdar-val/student/success": 1.0}, {"sdar/success": 0.5, "n": 3}]
    record(config).load_state_dict(state)
    assert layout.read_lines(first.folder / layout.METRICS_FILE) == lines


@pytest.mark.parametrize(
    ("step", "data", "awaits"), [(1, {}, False), (2, {}, True), (5, {}, True), (2, VALIDATED, False)]
)
def test_a_validation_that_a_kill_took_is_made_when_the_run_goes_on(config, step, data, awaits):
    first = record(config)
    first.after_step(step, {"sdar/success": 0.5, **data})
    resumed = record(config)
    assert not resumed.awaits_validation
    first._step = step
    resumed.load_state_dict(first.state_dict())
    assert resumed.awaits_validation == awaits
    resumed.after_validation(step, {}, {})
    assert not resumed.awaits_validation


def test_a_kill_while_outcomes_are_written_takes_the_whole_validation(config, monkeypatch):
    first = record(config)
    first.after_step(1, {"sdar/success": 0.5})
    first._step = 2
    monkeypatch.setattr("sdar_verl.observe.record.write_outcomes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.after_validation(2, VALIDATED, {})
    resumed = record(config)
    resumed.load_state_dict(first.state_dict())
    assert resumed.awaits_validation


def test_a_damaged_line_does_not_keep_a_run_from_going_on(config, caplog):
    first = record(config)
    for step in (1, 2):
        first.after_step(step, {"a": step})
    file = first.folder / layout.METRICS_FILE
    file.write_bytes(b'\xff{"step": 1\n' + file.read_bytes())
    record(config).load_state_dict({"step": 2, "every": 0})
    assert [line["step"] for line in layout.read_lines(file)] == [1, 2]
    assert "metrics.jsonl: line 1 is not JSON" in caplog.text


def judged(keys: list[str], infos: list[RowInfo | None], **columns) -> StepTable:
    """A table whose method has been asked."""
    table = make_table(keys, infos, columns)
    table.columns.setdefault("advantages", torch.zeros(table.response.shape))
    judgement = Method(LossConfig(beta=2.0)).judge(table, 0.0, 2.0)
    table.columns |= {"gap": judgement.gap, "gate": judgement.gate}
    return table


def test_the_updates_of_a_step_are_one_step_of_the_record(config):
    part = record(config, every=1)
    tables = [
        judged(
            [f"s1p{number}_0_0", f"s1p{number}_1_0"],
            [RowInfo(0, "t", teacher_prompt_tokens=4), None],
            response_mask=[[1] * length, [0]],
            rm_scores=[[0.0] * (length - 1) + [score], [0.0]],
            old_log_probs=[[-1.0] * length, [0.0]],
            **{TEACHER_LOG_PROBS: [[-0.5] * length, [0.0]]},
        )
        for number, (length, score) in enumerate(((1, 1.0), (2, 0.0)))
    ]
    assert part.after_updates(joined(tables), {}) == {}
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


def test_gaps_and_gates_are_the_losss_own_and_of_tokens_with_a_teacher():
    table = judged(
        ["u_0_0", "u_0_1", "u_1_0"],
        [RowInfo(0, "t", teacher_prompt_tokens=4), RowInfo(1, "t"), None],
        response_mask=[[1, 1, 0], [1, 1], [0]],
        old_log_probs=[[-1.0, -2.0, -0.5], [-1.0, -2.0], [0.0]],
        ref_log_prob=[[-1.5, -2.0, -0.5], [-1.0, -2.0], [0.0]],
        **{TEACHER_LOG_PROBS: [[-0.5, -2.5, -0.5], [-0.5, -2.5], [0.0]]},
    )
    found = distilled_tokens(table)
    assert found.gap.tolist() == [0.5, -0.5]
    np.testing.assert_allclose(found.gate, 1 / (1 + np.exp([-1.0, 1.0])), rtol=1e-6)
    assert (found.turn.tolist(), found.position.tolist()) == ([0, 0], [0, 1])
    np.testing.assert_allclose(found.kl, [np.expm1(-0.5) + 0.5, 0.0], atol=1e-7)
    table.silence([0], "no answer")
    assert distilled_tokens(table) is None
    del table.columns["gap"]  # of a run without a teacher
    assert distilled_tokens(table) is None


def test_tokens_of_a_conversation_are_counted_by_turn():
    notes = (TurnNote(0, 2), TurnNote(3, 5))
    table = judged(
        ["u_0_0"],
        [RowInfo(0, "t", turns=notes, teacher_prompt_tokens=4)],
        response_mask=[[1, 1, 0, 1, 1]],
        old_log_probs=[[-1.0] * 5],
        **{TEACHER_LOG_PROBS: [[-0.5] * 5]},
    )
    found = distilled_tokens(table)
    assert (found.turn.tolist(), found.position.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])


def words(turn: int) -> dict:
    return {"task": "put", "observation": f"you see {turn}", "action": None, "result": "no", "reward": 0.0}


def decode(ids) -> str:
    return " ".join(map(str, ids))


def test_a_trace_shows_the_turns_of_whole_episodes():
    """Two episodes, one of two rows, one a conversation in a single row; the first has no teacher on its last row."""
    notes = (TurnNote(0, 2, text=words(0)), TurnNote(3, 4, inadmissible=True, text=words(1)))
    infos = [
        RowInfo(1, "t", text=words(1)),
        RowInfo(0, "t", teacher_prompt_tokens=4, text=words(0), success=True),
        RowInfo(0, "t", teacher_prompt_tokens=4, turns=notes, text=None),
    ]
    table = judged(
        ["a_0_1", "a_0_0", "b_0_0"],
        infos,
        prompts=[[1, 2], [3], [4]],
        responses=[[5], [6, 7], [8, 9, 10, 11]],
        response_mask=[[1], [1, 1], [1, 1, 0, 1]],
        rm_scores=[[1.0], [0.0, 1.0], [0.0] * 4],
        old_log_probs=[[-1.0], [-1.0, -2.0], [-1.0] * 4],
        advantages=[[0.5], [0.5, 0.5], [-0.5, -0.5, 0.0, -0.5]],
        **{TEACHER_LOG_PROBS: [[0.0], [-0.5, -2.5], [-0.5] * 4]},
    )
    turns = trace_rows(table, 10, SimpleNamespace(decode=decode))
    assert [(turn["episode"], turn["turn"]) for turn in turns] == [("a_0", 0), ("a_0", 1), ("b_0", 0), ("b_0", 1)]
    first, second, third, fourth = turns
    assert first["gap"] == [0.5, -0.5] and first["teacher_log_prob"] == [-0.5, -2.5]
    assert first["advantage"] == [0.5, 0.5] and first["episode_reward"] == 1.0 and first["success"]
    assert (first["prompt"], first["token_ids"], first["group"], first["step"]) == ("3", [6, 7], "a", 1)
    assert second["gap"] == [None] and second["teacher_log_prob"] is None and second["student_log_prob"] == [-1.0]
    assert (fourth["prompt"], fourth["token_ids"]) == ("4 8 9 10", [11]) and fourth["inadmissible"]
    assert third["observation"] == "you see 0" and third["entropy"] is None
    assert trace_rows(make_table(["a_0_0"], [RowInfo(0, "t")]), 10, SimpleNamespace(decode=decode)) == []


def test_a_panel_without_a_hash_is_not_taken_for_one(config, tmp_path):
    import pyarrow as pa

    pq.write_table(pa.table({"a": [1]}), tmp_path / "train.parquet")
    with pytest.raises(PanelError, match="prepare"):
        record(config).after_step(1, {})
