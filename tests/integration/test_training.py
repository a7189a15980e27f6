"""SDAR through verl's own main_ppo on the CPU: real Ray, real workers, a small policy, a toy environment."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.local import start_policy
from sdar_verl.verl.scalar_loss import gated_distillation_loss
from tests.support.golden import OTHER_PROCESSORS, golden
from tests.support.plain import padded, plain_log_probs
from tests.support.toy_run import SAME, train
from tests.support.verl_run import Run
from tests.support.verl_version import IS_VERL_090

pytestmark = pytest.mark.integration

LEARNING = ("actor/loss", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "sdar/success")
DISTILLING = ("sdar/loss", "sdar/gate_mean", "sdar/gap_mean", "sdar/gap_std")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """Four steps, with the paper's teacher (current weights)."""
    return train(tmp_path_factory.mktemp("whole"), "sdar.teacher.source=actor", record=True)


@pytest.mark.skipif(IS_VERL_090, reason="tests/golden holds the numbers of 0.9.1, which fills batches up otherwise")
def test_its_numbers_are_the_golden_ones(whole):
    old = json.loads(golden.golden_file("source-actor").read_text())
    new = {step: numbers for step, numbers in golden.golden_metrics(whole).items() if step in old}
    assert list(golden.differences(old, new, OTHER_PROCESSORS)) == []


def test_the_first_steps_loss_is_the_equation(whole):
    """Everything logged at step 1, recomputed from the recorded tensors and from plain forward passes."""
    record = torch.load(whole.folder / "step_1.pt", weights_only=False)
    metrics = whole.metrics[1]
    real = [not tag.get("is_padding", False) for tag in record["tags"]]
    assert sum(real) == metrics["sdar/rows"]
    infos = [info for info in record["infos"] if info is not None]

    def rows(name: str) -> list[torch.Tensor]:
        return [row for row, is_real in zip(record[name], real, strict=True) if is_real]

    # Student and teacher: the very log-probs that a plain forward pass gives, at the right positions.
    student = plain_log_probs(rows("prompts"), rows("responses"), start_policy())
    prompts = [torch.as_tensor(info.teacher_prompt_ids, dtype=torch.int64) for info in infos]
    teacher = plain_log_probs(prompts, rows("responses"), start_policy())
    for recorded, plain in ((rows("old_log_probs"), student), (rows(TEACHER_LOG_PROBS), teacher)):
        worst = max((a - b).abs().max().item() for a, b in zip(recorded, plain, strict=True))
        assert worst < 2e-4
    assert any((a - b).abs().max() > 0.05 for a, b in zip(student, teacher, strict=True)), "the teacher saw nothing"

    mask = padded(rows("response_mask"))
    assert torch.equal(mask, padded(rows(TEACHER_MASK)))
    loss, _ = gated_distillation_loss(padded(student), padded(teacher), mask, gate="gap", beta=5.0)
    assert metrics["sdar/loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    gap = (padded(teacher) - padded(student))[mask.bool()]
    gate = torch.sigmoid(5.0 * gap)
    assert metrics["sdar/gap_mean"] == pytest.approx(gap.mean().item(), rel=1e-3, abs=1e-5)
    assert metrics["sdar/gap_std"] == pytest.approx(gap.std(unbiased=False).item(), rel=1e-3)
    assert metrics["sdar/gate_mean"] == pytest.approx(gate.mean().item(), rel=1e-4)
    # Many tokens are as good as certain for both, with a gap of rounding size and any sign.
    shares = [(gap > threshold).float().mean().item() for threshold in (1e-4, -1e-4)]
    assert shares[0] <= metrics["sdar/gap_positive_share"] <= shares[1]

    # At the sampling weights the ratio is 1: the policy-gradient loss is minus the mean advantage, the KL is 0.
    advantages = padded(rows("advantages"))
    assert metrics["actor/pg_loss"] == pytest.approx(-(advantages * mask).sum().item() / mask.sum().item(), abs=1e-5)
    assert metrics["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    expected = metrics["actor/pg_loss"] + 0.5 * metrics["sdar/loss"] + 0.001 * metrics["actor/kl_loss"]
    assert metrics["actor/loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert metrics["sdar/lambda"] == 0.5
    assert metrics["sdar/beta"] == 5.0
    assert metrics["sdar/empty_context_gap"] <= 1e-6


def test_advantages_are_over_episodes_with_the_penalty_on_its_turn(whole):
    record = torch.load(whole.folder / "step_1.pt", weights_only=False)
    episodes: dict[str, dict[str, float]] = {}
    for key, info, scores in zip(record["keys"], record["infos"], record["rm_scores"], strict=True):
        if info is not None:
            uid, session, _ = key.rsplit("_", 2)
            episodes.setdefault(uid, {})[session] = scores.sum().item()
    for key, info, advantages, mask in zip(
        record["keys"], record["infos"], record["advantages"], record["response_mask"], strict=True
    ):
        if info is None:
            assert advantages.abs().max() == 0
            continue
        uid, session, _ = key.rsplit("_", 2)
        scores = torch.tensor(list(episodes[uid].values()))
        assert len(scores) == 4
        flat = bool((scores == scores[0]).all())
        expected = 0.0 if flat else (episodes[uid][session] - scores.mean().item()) / (scores.std().item() + 1e-6)
        expected -= 0.1 * info.invalid
        assert torch.allclose(advantages, expected * mask.float(), atol=1e-5)


def test_turns_end_with_success_and_are_logged(whole):
    record = torch.load(whole.folder / "step_1.pt", weights_only=False)
    by_episode: dict[str, list] = {}
    for key, info in zip(record["keys"], record["infos"], strict=True):
        if info is not None:
            by_episode.setdefault(key.rsplit("_", 1)[0], []).append(info)
    assert len(by_episode) == 16
    for infos in by_episode.values():
        turns = sorted(info.turn for info in infos)
        assert turns == list(range(len(turns)))
        assert len(turns) <= 3
        assert len(turns) == 3 or infos[0].success
        assert {"recipe-place"} < set(infos[0].skills)
    success = sum(infos[0].success for infos in by_episode.values()) / 16
    assert whole.metrics[1]["sdar/success"] == pytest.approx(success)


def test_a_resumed_run_goes_on_as_if_never_stopped(whole, tmp_path):
    """Steps 3 and 4 again, from the checkpoint of step 2."""
    checkpoint = whole.folder / "checkpoints" / "global_step_2"
    resumed = train(
        tmp_path / "resumed",
        "sdar.teacher.source=actor",
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={checkpoint}",
    )
    assert sorted(resumed.metrics) == [3, 4]
    for step in (3, 4):
        for name in (*LEARNING, *DISTILLING):
            assert resumed.metrics[step][name] == pytest.approx(whole.metrics[step][name], **SAME), (step, name)


def test_two_ranks_equal_one(whole, tmp_path):
    sampled = "actor_rollout_ref.rollout.calculate_log_probs=True"
    two = train(tmp_path / "two", "sdar.teacher.source=actor", "trainer.n_gpus_per_node=2", sampled, steps=2)
    for step in (1, 2):
        # Each rank's server samples from the weights of the last update, and says with which probability.
        assert two.metrics[step]["training/rollout_probs_diff_max"] < 2e-5
        for name in (*LEARNING, *DISTILLING):
            assert two.metrics[step][name] == pytest.approx(whole.metrics[step][name], **SAME), (step, name)


ROWS_PER_UPDATE = 16


@pytest.fixture(scope="module")
def one_step(tmp_path_factory) -> Run:
    """Three updates and more in a step, at a learning rate of 0 so that one forward pass serves them all; the reference
    is the teacher, and one environment process kills itself in mid-episode."""
    folder = tmp_path_factory.mktemp("one_step")
    return train(
        folder,
        "sdar.teacher.source=reference",
        "actor_rollout_ref.actor.kl_loss_coef=0",
        f"sdar.update.mini_batch_rows={ROWS_PER_UPDATE}",
        "actor_rollout_ref.actor.shuffle=False",
        "actor_rollout_ref.actor.optim.lr=0",
        "~sdar.env.options",
        f"+sdar.env.options={{die_once: {folder / 'died'}}}",
        steps=1,
        record=True,
    )


def test_every_update_of_a_step_is_normalised_by_its_own_rows(one_step):
    record = torch.load(one_step.folder / "step_1.pt", weights_only=False)
    columns = [padded(record[name]) for name in ("old_log_probs", TEACHER_LOG_PROBS, "response_mask", TEACHER_MASK)]
    advantages = padded(record["advantages"])
    updates = range(0, len(record["keys"]), ROWS_PER_UPDATE)
    assert len(updates) >= 2
    distillation, policy = [], []
    for start in updates:
        student, teacher, mask, seen = (column[start : start + ROWS_PER_UPDATE] for column in columns)
        loss, _ = gated_distillation_loss(student, teacher, mask, distill_mask=seen.bool())
        distillation.append(loss.item())
        signal = advantages[start : start + ROWS_PER_UPDATE] * mask
        policy.append(-signal.sum().item() / max(mask.sum().item(), 1.0))
    metrics = one_step.metrics[1]
    assert len({round(value, 6) for value in distillation}) > 1, "the updates are alike: this test would show nothing"
    assert metrics["sdar/loss"] == pytest.approx(sum(distillation) / len(updates), rel=1e-3, abs=1e-6)
    assert metrics["actor/pg_loss"] == pytest.approx(sum(policy) / len(updates), rel=1e-3, abs=1e-5)
    # Means over tokens do not care how the rows were split.
    gap = (columns[1] - columns[0])[columns[3].bool()]
    assert metrics["sdar/gap_mean"] == pytest.approx(gap.mean().item(), rel=1e-3, abs=1e-5)
    assert metrics["sdar/gate_mean"] == pytest.approx(torch.sigmoid(5 * gap).mean().item(), rel=1e-4)


def test_a_dead_environment_process_costs_nothing_but_a_retry(one_step):
    assert (one_step.folder / "died").exists()
    assert one_step.metrics[1]["sdar/episodes"] == 16
    assert one_step.metrics[1]["sdar/failed_episodes"] == 0
    assert math.isfinite(one_step.metrics[1]["actor/loss"])


def test_a_reference_that_is_the_teacher_alone_makes_no_pass_for_verl(one_step):
    """With a KL coefficient of 0."""
    assert "timing_s/teacher" in one_step.metrics[1]
    assert "timing_s/ref" not in one_step.metrics[1]


def test_lambda_zero_is_grpo_bit_for_bit(tmp_path):
    """A watched run (teacher on, lambda 0) and one without a teacher take the same steps, to the last bit."""
    watched = train(tmp_path / "watched", "sdar.teacher.source=reference", "sdar.loss.coef=0", steps=2)
    plain = train(tmp_path / "plain", "sdar.teacher.source=none", "sdar.loss.coef=0", steps=2)
    for step in (1, 2):
        for name in LEARNING:
            assert watched.metrics[step][name] == plain.metrics[step][name], (step, name)
    assert "sdar/gate_mean" not in plain.metrics[1]
    assert 0 < watched.metrics[1]["sdar/gate_mean"] < 1
    assert watched.metrics[1]["sdar/loss"] != 0
    weights = [run.folder / "checkpoints/global_step_2/actor/huggingface/model.safetensors" for run in (watched, plain)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
