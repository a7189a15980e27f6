"""The asynchronous modes through verl's own main_ppo on the CPU: a small policy, a toy environment, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.local import start_policy
from sdar_verl.report import layout
from sdar_verl.verl.scalar_loss import gated_distillation_loss
from tests.support.plain import padded, plain_log_probs
from tests.support.toy_run import train
from tests.support.verl_run import Run

pytestmark = pytest.mark.integration

COLOCATE = "sdar_colocate_async"
SEPARATE = "sdar_separate_async"
OPTIONS = {
    COLOCATE: [],
    SEPARATE: [
        "trainer.v1.separate_async.parameter_sync_step=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        # Half of a step's rows in one update.
        "sdar.update.mini_batch_rows=24",
    ],
}
STALENESS = "training/off_policy/trajectory_staleness"


def run_mode(folder: Path, mode: str, *overrides: str, **kwargs: Any) -> Run:
    return train(folder, "sdar.teacher.source=actor", *OPTIONS[mode], *overrides, mode=mode, **kwargs)


def real_rows(record: dict[str, Any], name: str) -> list[torch.Tensor]:
    padding = [tag.get("is_padding", False) for tag in record["tags"]]
    return [row for row, padded_row in zip(record[name], padding, strict=True) if not padded_row]


def assert_both_sides_are_the_start_policys(record: dict[str, Any]) -> None:
    """Old and teacher log-probs: those of a plain forward pass with the weights of step 1."""
    responses, infos = real_rows(record, "responses"), [info for info in record["infos"] if info is not None]
    prompts = [torch.as_tensor(info.teacher_prompt_ids, dtype=torch.int64) for info in infos]
    student = plain_log_probs(real_rows(record, "prompts"), responses, start_policy())
    teacher = plain_log_probs(prompts, responses, start_policy())
    for name, plain in (("old_log_probs", student), (TEACHER_LOG_PROBS, teacher)):
        worst = max((a - b).abs().max().item() for a, b in zip(real_rows(record, name), plain, strict=True))
        assert worst < 2e-4, name


def assert_fresh_rows_carry_the_servers_log_probs(record: dict[str, Any], version: int) -> None:
    """What the server says of tokens that it sampled with the weights of ``version`` is what the trainer computes."""
    fresh = [tag.get("min_global_steps") == version and not tag.get("is_padding", False) for tag in record["tags"]]
    assert any(fresh)
    for rollout, old, is_fresh in zip(record["rollout_log_probs"], record["old_log_probs"], fresh, strict=True):
        if is_fresh:
            assert (rollout - old).abs().max().item() < 2e-4


def load(run: Run, name: str) -> dict[str, Any]:
    return torch.load(run.folder / name, weights_only=False)


@pytest.mark.slow
def test_colocated_rollout_runs_ahead_of_the_training(tmp_path):
    run = run_mode(tmp_path, COLOCATE, "sdar.trace.every=2", steps=3, record=True)
    metrics = run.metrics[1]
    record = load(run, "step_1.pt")
    assert_both_sides_are_the_start_policys(record)
    assert_fresh_rows_carry_the_servers_log_probs(record, version=0)
    student, teacher, mask = (
        padded(real_rows(record, name)) for name in ("old_log_probs", TEACHER_LOG_PROBS, "response_mask")
    )
    loss, _ = gated_distillation_loss(student, teacher, mask, gate="gap", beta=5.0)
    assert metrics["sdar/loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    expected = metrics["actor/pg_loss"] + 0.5 * metrics["sdar/loss"] + 0.001 * metrics["actor/kl_loss"]
    assert metrics["actor/loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert metrics["sdar/empty_context_gap"] <= 1e-6

    # verl's staleness: a batch is in flight from before the first step, so later steps train on older rows.
    assert run.metrics[1][f"{STALENESS}/max"] == 0
    assert max(data[f"{STALENESS}_worst/max"] for data in run.metrics.values()) >= 1
    assert all(f"training/off_policy/trajectory_spans/{end}" in metrics for end in ("min", "mean", "max"))
    for data in run.metrics.values():
        assert data["sdar/episodes"] == 16
        assert data["sdar/crashed_episodes"] == 0
        assert data["timing_s/adv"] >= 0
    keys = [key for step in (1, 2, 3) for key in load(run, f"step_{step}.pt")["keys"]]
    groups = {key.rsplit("_", 2)[0] for key in keys if key.startswith("s0")}
    assert len(groups) == 12, "no group is trained on twice, none is lost"
    record_folder = run.folder / "checkpoints" / layout.RECORD
    assert list(layout.step_files(record_folder / layout.TRACES)) == [2]
    assert [line["step"] for line in layout.read_lines(record_folder / layout.DISTRIBUTIONS_FILE)] == [1, 2, 3]


def test_separate_rollout_with_two_updates_per_weight_sync(tmp_path):
    # The training devices are lent to the rollout for a validation and taken back in the middle of answers.
    run = run_mode(tmp_path, SEPARATE, "trainer.test_freq=1", steps=2, record=True)
    parts = [load(run, name) for name in ("step_1.pt", "step_1_1.pt")]
    for record in parts:
        # The second update starts from weights that have moved; verl and the teacher go back to those of the step.
        assert_both_sides_are_the_start_policys(record)
        assert_fresh_rows_carry_the_servers_log_probs(record, version=0)
    for step, data in run.metrics.items():
        records = [load(run, f"step_{step}{part}.pt") for part in ("", "_1")]
        rows = sum(info is not None for record in records for info in record["infos"])
        assert data["sdar/rows"] == rows
        assert (data["sdar/episodes"], data["sdar/groups"]) == (16, 4)
        assert data["sdar/crashed_episodes"] == 0
        assert 0 < data["sdar/gate_mean"] < 1
        assert f"{STALENESS}/mean" in data
        assert 0 <= data["sdar-val/student/success"] <= 1
    assert max(data[f"{STALENESS}_worst/max"] for data in run.metrics.values()) >= 1
    groups = {key.rsplit("_", 2)[0] for record in parts for key in record["keys"] if key.startswith("s0")}
    assert len(groups) == 4
    record_folder = run.folder / "checkpoints" / layout.RECORD
    assert [line["step"] for line in layout.read_lines(record_folder / layout.DISTRIBUTIONS_FILE)] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [COLOCATE, SEPARATE])
def test_a_resumed_run_goes_on_with_what_was_in_flight(mode, tmp_path):
    """Stopped after a checkpoint at step 2, resumed to step 4 with lambda 0: the gate is logged all the same."""
    first = run_mode(tmp_path / "first", mode, "sdar.loss.coef=0", steps=2, record=True)
    checkpoint = first.folder / "checkpoints" / "global_step_2"
    assert (checkpoint / "transfer_queue").is_dir()
    resumed = run_mode(
        tmp_path / "resumed",
        mode,
        "sdar.loss.coef=0",
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={checkpoint}",
        steps=4,
        record=True,
    )
    assert sorted(resumed.metrics) == [3, 4]
    for data in resumed.metrics.values():
        assert data["sdar/lambda"] == 0
        assert 0 < data["sdar/gate_mean"] < 1
        assert data["sdar/episodes"] == 16
    seen = [
        {key.rsplit("_", 2)[0] for path in run.folder.glob("step_*.pt") for key in load(run, path.name)["keys"]}
        for run in (first, resumed)
    ]
    before, after = ({name for name in names if name.startswith("s0")} for names in seen)
    assert not before & after, "a group is trained on twice"
    assert any(name < "s00000003" for name in after), "what was in flight at the checkpoint is lost"


@pytest.mark.slow
def test_a_separate_rollout_alone_with_a_teacher_elsewhere(tmp_path):
    """No rollout on the training devices, a frozen teacher on its own, importance weights for old tokens."""
    run = train(
        tmp_path,
        "sdar.teacher.source=reference",
        "sdar.teacher.placement=pool",
        "sdar.teacher.pool_gpus_per_node=1",
        "actor_rollout_ref.hybrid_engine=False",
        "algorithm.rollout_correction.rollout_is=token",
        *OPTIONS[SEPARATE],
        mode=SEPARATE,
        steps=2,
    )
    for data in run.metrics.values():
        assert 0 < data["sdar/gate_mean"] < 1
        assert "rollout_corr/rollout_is_mean" in data
    assert run.metrics[2]["sdar/teacher_staleness"] == 1
