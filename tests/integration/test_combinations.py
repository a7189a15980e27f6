"""SDAR together with what verl's own loss, model and engine can do, through verl's main_ppo on the CPU.

Not that it runs, but that the numbers are right: what a step logs, from what the step recorded and from plain models.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.local import start_policy
from sdar_verl.verl.scalar_loss import gated_distillation_loss
from tests.integration.test_teachers import actor_weights, recorded
from tests.support.plain import padded, plain_log_probs
from tests.support.toy_run import SAME, train
from tests.support.verl_run import Run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

COEF, KL_LOSS, ENTROPY, KL_REWARD = 0.5, 0.05, 0.02, 0.2
TERMS = [
    "sdar.teacher.source=actor",
    f"sdar.loss.coef={COEF}",
    f"actor_rollout_ref.actor.kl_loss_coef={KL_LOSS}",
    f"actor_rollout_ref.actor.entropy_coeff={ENTROPY}",
    "actor_rollout_ref.actor.clip_ratio_c=1.5",
    "algorithm.use_kl_in_reward=True",
    f"algorithm.kl_ctrl.kl_coef={KL_REWARD}",
    # Far enough in one step for the KL to be felt.
    "actor_rollout_ref.actor.optim.lr=5e-4",
]


@pytest.fixture(scope="module")
def terms(tmp_path_factory) -> Run:
    """Two steps with every term on, packed rows and gradient checkpointing; FSDP2, one rank."""
    return train(
        tmp_path_factory.mktemp("terms"),
        *TERMS,
        "actor_rollout_ref.model.use_remove_padding=True",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "trainer.save_freq=1",
        steps=2,
        record=True,
    )


def test_the_loss_is_the_sum_of_its_terms(terms):
    """At step 2, where the reference is no longer the actor."""
    rows, _, _ = recorded(terms, 2)
    metrics = terms.metrics[2]
    student, teacher, reference, entropy, advantages, mask = (
        padded(rows[name])
        for name in ("old_log_probs", TEACHER_LOG_PROBS, "ref_log_prob", "entropy", "advantages", "response_mask")
    )

    def mean(values: torch.Tensor) -> float:
        return ((values * mask).sum() / mask.sum()).item()

    log_ratio = reference - student
    expected = {
        # At the sampling weights the ratio is 1: no clip acts (tests/integration/test_ranks.py has those that do).
        "actor/pg_loss": -mean(advantages),
        "actor/kl_loss": mean((log_ratio.exp() - log_ratio - 1).clamp(max=10)),  # verl's own limit per token
        "actor/entropy_loss": mean(entropy),
        "sdar/loss": gated_distillation_loss(student, teacher, mask)[0].item(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert expected["actor/kl_loss"] > 1e-4
    total = (
        metrics["actor/pg_loss"]
        + COEF * metrics["sdar/loss"]
        + KL_LOSS * metrics["actor/kl_loss"]
        - ENTROPY * metrics["actor/entropy_loss"]
    )
    assert metrics["actor/loss"] == pytest.approx(total, rel=1e-4, abs=1e-6)


def test_a_kl_in_the_reward_is_the_episodes(terms):
    """Each episode's return is its reward minus the mean KL penalty of its rows; then the group's statistics."""
    rows, _, _ = recorded(terms, 2)
    returns: dict[str, dict[str, list[float]]] = {}
    for i, key in enumerate(rows["keys"]):
        uid, session, _ = key.rsplit("_", 2)
        kl = (rows["old_log_probs"][i] - rows["ref_log_prob"][i]) * rows["response_mask"][i]
        score = rows["rm_scores"][i].sum() - KL_REWARD * kl.sum()
        returns.setdefault(uid, {}).setdefault(session, []).append(score.item())
    moved = 0.0
    for i, key in enumerate(rows["keys"]):
        uid, session, _ = key.rsplit("_", 2)
        episodes = {name: sum(scores) / len(scores) for name, scores in returns[uid].items()}
        scores = torch.tensor(list(episodes.values()))
        assert len(scores) == 4
        expected = (episodes[session] - scores.mean().item()) / (scores.std().item() + 1e-6)
        expected -= 0.1 * rows["infos"][i].invalid
        torch.testing.assert_close(
            rows["advantages"][i].float(), expected * rows["response_mask"][i].float(), rtol=1e-3, atol=1e-3
        )
        moved = max(moved, abs(episodes[session] - rows["rm_scores"][i].sum().item()))
    assert moved > 1e-3, "the penalty is too small to show"


def test_packed_rows_are_scored_as_single_ones(terms):
    rows, prompts, responses = recorded(terms, 2)
    state = actor_weights(terms, 1)
    for name, seen in (("old_log_probs", rows["prompts"]), (TEACHER_LOG_PROBS, prompts)):
        expected = plain_log_probs(seen, responses, start_policy(), state)
        assert max((a - b).abs().max().item() for a, b in zip(rows[name], expected, strict=True)) < 2e-4
    assert terms.metrics[1]["sdar/packing_gap"] < 1e-5
    assert "sdar/packing_gap" not in terms.metrics[2], "once is enough"


def test_fsdp1_on_two_ranks_without_packing_and_checkpointing_takes_the_same_steps(terms, tmp_path):
    other = train(
        tmp_path,
        *TERMS,
        "actor_rollout_ref.actor.strategy=fsdp",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model]",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2048",
        steps=2,
    )
    names = [name for name in terms.metrics[1] if name.startswith("sdar/") and "empty" not in name]
    names = [
        name for name in names if name.rsplit("/", 1)[1] in {"loss", "gap_mean", "gap_std", "gate_mean", "success"}
    ]
    names += ["actor/loss", "actor/pg_loss", "actor/kl_loss", "actor/entropy_loss", "actor/grad_norm"]
    names += ["actor/reward_kl_penalty"]
    for step in (1, 2):
        for name in names:
            assert other.metrics[step][name] == pytest.approx(terms.metrics[step][name], **SAME), (step, name)
    assert "sdar/packing_gap" not in other.metrics[1]


def test_an_adapter_is_trained_and_read_by_student_and_teacher(tmp_path):
    """LoRA under gradient checkpointing: the base stays, the adapter moves, both log-probs are those of the two."""
    run = train(
        tmp_path,
        "sdar.teacher.source=actor",
        "actor_rollout_ref.actor.strategy=fsdp",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora_alpha=8",
        "actor_rollout_ref.model.lora.merge=True",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "actor_rollout_ref.actor.kl_loss_coef=0.05",
        f"actor_rollout_ref.actor.entropy_coeff={ENTROPY}",
        "actor_rollout_ref.actor.optim.lr=0.01",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model]",
        "trainer.save_freq=1",
        steps=2,
        record=True,
    )
    folder = run.folder / "checkpoints" / "global_step_1" / "actor"
    assert json.loads((folder / "lora_train_meta.json").read_text())["r"] == 4
    state = merged(torch.load(folder / "model_world_size_1_rank_0.pt", weights_only=False), scale=8 / 4)
    rows, prompts, responses = recorded(run, 2)
    for name, seen in (("old_log_probs", rows["prompts"]), (TEACHER_LOG_PROBS, prompts)):
        expected = plain_log_probs(seen, responses, start_policy(), state)
        assert max((a - b).abs().max().item() for a, b in zip(rows[name], expected, strict=True)) < 2e-4, name
    reference = plain_log_probs(rows["prompts"], responses, start_policy())
    worst = max((a - b).abs().max().item() for a, b in zip(rows["ref_log_prob"], reference, strict=True))
    assert worst < 2e-4, "the reference is the base without the adapter"
    assert any((a - b).abs().max() > 0.01 for a, b in zip(reference, rows["old_log_probs"], strict=True))
    metrics = run.metrics[2]
    total = metrics["actor/pg_loss"] + COEF * metrics["sdar/loss"] + 0.05 * metrics["actor/kl_loss"]
    assert metrics["actor/loss"] == pytest.approx(total - ENTROPY * metrics["actor/entropy_loss"], rel=1e-4, abs=1e-6)


def merged(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Base weights plus ``scale * B A``, under the base model's names; the base must be the start policy's."""
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.float()
        for name, value in state.items()
        if "lora_" not in name
    }
    for name, value in load_file(Path(start_policy()) / "model.safetensors").items():
        assert torch.equal(base[name], value.float()), f"the base's {name} has moved"
    adapted = 0
    for name, down in state.items():
        if ".lora_A." in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            base[target] = base[target] + scale * state[name.replace(".lora_A.", ".lora_B.")].float() @ down.float()
            adapted += 1
    assert adapted > 0
    return base
