"""Statistics over the step, schedules and signals through verl's own main_ppo: real Ray, real workers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from sdar_verl.algorithm.advantages import rlsd_advantages
from sdar_verl.algorithm.gap import step_statistics
from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.verl.scalar_loss import gated_distillation_loss
from tests.support.toy_run import train
from tests.support.verl_run import Run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# Everything that spans rows, and a lambda that depends on what was measured.
SPANNING = [
    "sdar.loss.gate=soft_or",
    "+sdar.loss.gate_options.norm=batch_minmax",
    "sdar.loss.granularity=trajectory",
    "sdar.loss.centre=batch",
    "sdar.loss.divide_by=weights",
    "sdar.loss.objective=k3",
    "sdar.loss.coef_schedule.name=grad_share",
    "+sdar.loss.coef_schedule.options.share=0.3",
    "+sdar.loss.coef_schedule.options.smoothing=0.5",
]
NAMES = (
    "actor/loss",
    "actor/grad_norm",
    "sdar/loss",
    "sdar/lambda",
    "sdar/grad_share",
    "sdar/gate_mean",
    "sdar/distill_loss",
    "sdar/gap_centred_std",
    "sdar/student_entropy",
    "sdar/success",
)
SAME = {"rel": 5e-4, "abs": 5e-5}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Run:
    return train(tmp_path_factory.mktemp("one"), *SPANNING, steps=3, record=True)


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return pad_sequence([row.float() for row in rows], batch_first=True)


def test_lambda_follows_the_measured_share(one):
    lambdas, shares = one.column("sdar/lambda"), one.column("sdar/grad_share")
    assert lambdas[1] == 0.5
    for step in (1, 2):
        expected = lambdas[step] * (0.3 / shares[step]) ** 0.5
        assert lambdas[step + 1] == pytest.approx(expected, rel=1e-6)


def test_the_logged_loss_is_the_equation_over_the_whole_step(one):
    record = torch.load(one.folder / "step_1.pt", weights_only=False)
    student, teacher = padded(record["old_log_probs"]), padded(record[TEACHER_LOG_PROBS])
    mask, entropy = padded(record["response_mask"]), padded(record["entropy"])
    options = {
        "gate": "soft_or",
        "gate_options": {"norm": "batch_minmax"},
        "granularity": "trajectory",
        "centre": "batch",
        "distill_mask": padded(record[TEACHER_MASK]).bool(),
        "entropy": entropy,
    }
    episodes = [key.rsplit("_", 1)[0] for key in record["keys"]]
    statistics = step_statistics(student, teacher, mask, episodes, divide_by="weights", **options)
    loss, _ = gated_distillation_loss(
        student, teacher, mask, objective="k3", old_log_probs=student, statistics=statistics, **options
    )
    metrics = one.metrics[1]
    assert metrics["sdar/loss"] == pytest.approx(loss.item(), rel=1e-3)
    expected = metrics["actor/pg_loss"] + 0.5 * metrics["sdar/loss"] + 0.001 * metrics["actor/kl_loss"]
    assert metrics["actor/loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_two_ranks_and_smaller_micro_batches_equal_one(one, tmp_path):
    two = train(
        tmp_path,
        *SPANNING,
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=1024",
        steps=2,
    )
    for step in (1, 2):
        for name in NAMES:
            assert two.metrics[step][name] == pytest.approx(one.metrics[step][name], **SAME), (step, name)


def test_a_resumed_run_knows_what_its_schedule_learned(one, tmp_path):
    checkpoint = one.folder / "checkpoints" / "global_step_2"
    resumed = train(
        tmp_path, *SPANNING, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}", steps=3
    )
    assert sorted(resumed.metrics) == [3]
    for name in NAMES:
        assert resumed.metrics[3][name] == pytest.approx(one.metrics[3][name], **SAME), name


def test_rlsd_changes_the_advantages_and_adds_no_loss(tmp_path):
    options = ["sdar.loss.signal=advantage_weight", "sdar.loss.coef=0.5"]
    decay = ["sdar.loss.coef_schedule.name=linear_decay", "+sdar.loss.coef_schedule.options.steps=10"]
    run = train(tmp_path, *options, *decay, steps=1, record=True)
    record = torch.load(tmp_path / "step_1.pt", weights_only=False)
    advantages, mask = padded(record["advantages"]), padded(record["response_mask"])
    old, teacher = padded(record["old_log_probs"]), padded(record[TEACHER_LOG_PROBS])
    metrics = run.metrics[1]
    assert metrics["sdar/lambda"] == pytest.approx(0.45)
    # The weight is undone by dividing: what is left is one number per row, the estimator's.
    factor = rlsd_advantages(torch.ones_like(mask), old, teacher, mask, mix=0.45)
    against = -rlsd_advantages(-torch.ones_like(mask), old, teacher, mask, mix=0.45)
    base = torch.where(advantages > 0, advantages / factor, advantages / against)
    for row, inside in zip(base, mask.bool(), strict=True):
        if inside.any():
            assert torch.allclose(row[inside], row[inside][0].expand(int(inside.sum())), rtol=1e-4, atol=1e-6)
    spread = (advantages.abs() * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    assert ((advantages.abs() - spread.unsqueeze(-1)).abs() * mask).max() > 1e-3, "no token was re-weighted"
    assert metrics["sdar/advantage_change"] > 0
    assert "sdar/grad_share" not in metrics
    expected = metrics["actor/pg_loss"] + 0.001 * metrics["actor/kl_loss"]
    assert metrics["actor/loss"] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_without_the_policy_gradient_only_the_teacher_trains(tmp_path):
    run = train(tmp_path, "sdar.loss.policy_gradient=False", "sdar.loss.gate=none", "sdar.loss.objective=k1", steps=1)
    metrics = run.metrics[1]
    assert metrics["actor/pg_loss"] == 0.0
    expected = 0.5 * metrics["sdar/loss"] + 0.001 * metrics["actor/kl_loss"]
    assert metrics["actor/loss"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert metrics["actor/grad_norm"] > 0


@pytest.mark.parametrize("objective", ["sampled", "reverse_kl"])
def test_a_measurement_in_the_weights_leaves_the_update_as_it_is(objective, tmp_path):
    options = [f"sdar.loss.objective={objective}", "actor_rollout_ref.actor.optim.clip_grad=1e9"]
    plain = train(tmp_path / "plain", *options, steps=1)
    follow = ["sdar.loss.coef_schedule.name=grad_share", "+sdar.loss.coef_schedule.options.share=0.3"]
    follow += ["+sdar.loss.coef_schedule.options.of=weights", "+sdar.loss.coef_schedule.options.smoothing=0"]
    measured = train(tmp_path / "measured", *options, *follow, "sdar.loss.measure_every=1", steps=2)
    first, second = measured.metrics[1], measured.metrics[2]
    for name in ("actor/loss", "actor/grad_norm", "sdar/loss"):
        assert first[name] == pytest.approx(plain.metrics[1][name], rel=1e-6), name
    share = first["sdar/grad_share_weights"]
    assert 0.0 < share < float("inf")
    assert second["sdar/lambda"] == pytest.approx(0.5 * 0.3 / share, rel=1e-5)
    assert "sdar/grad_share_weights" not in plain.metrics[1]
