"""SDAR through verl's own vllm rollout: validation, training steps with weight syncs between them, validation again.

What vLLM sampled, and with which log-probs, is compared with plain forward passes of each step's checkpoint.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.local import start_policy
from tests.support.plain import plain_log_probs
from tests.support.toy_run import train
from tests.support.verl_run import Run
from tests.vllm.settings import ENVIRONMENT, VLLM_ON_CPU, needs_vllm_on_cpu

pytestmark = needs_vllm_on_cpu()

STEPS = 3
# Log-probs of float32 on the CPU, vLLM's attention and norms against torch's; nats.
TOLERANCE = 2e-4


def train_on_vllm(folder: Path, *overrides: str, steps: int) -> Run:
    """SDAR with the current weights as teacher; a learning rate that moves the policy far at every step."""
    return train(
        folder,
        *VLLM_ON_CPU,
        "method=sdar",
        "sdar.teacher.source=actor",
        "actor_rollout_ref.actor.optim.lr=2e-3",
        "trainer.save_freq=1",
        *overrides,
        steps=steps,
        record=True,
        timeout=480,  # a weight sync that fails is waited for without an end
        **ENVIRONMENT,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """The teacher's pass in the training workers, validation before and after."""
    validation = ["trainer.val_before_train=True", f"trainer.test_freq={STEPS}"]
    return train_on_vllm(tmp_path_factory.mktemp("vllm"), *validation, steps=STEPS)


def record(run: Run, step: int) -> dict[str, list]:
    """The rows of a step, padding left out."""
    rows = torch.load(run.folder / f"step_{step}.pt", weights_only=False)
    real = [i for i, tag in enumerate(rows["tags"]) if not tag.get("is_padding", False)]
    return {name: [values[i] for i in real] for name, values in rows.items()}


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    """The policy after ``step`` updates, as the checkpoint has it."""
    folder = run.folder / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"
    file = folder / "model.safetensors" if step else Path(start_policy()) / "model.safetensors"
    return {name: value.float() for name, value in load_file(file).items()}


def assert_the_teacher_is(run: Run, step: int, weights: dict[str, torch.Tensor]) -> None:
    """Every teacher log-prob of a step is that of these weights, for the tokens that vLLM sampled."""
    rows = record(run, step)
    prompts = [torch.as_tensor(info.teacher_prompt_ids, dtype=torch.int64) for info in rows["infos"]]
    expected = plain_log_probs(prompts, rows["responses"], start_policy(), weights)
    assert worst(rows[TEACHER_LOG_PROBS], expected) < TOLERANCE


def worst(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def test_it_is_verls_own_vllm_server(run):
    assert "vLLMHttpServer" in run.output
    assert "TransformersServer" not in run.output


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_vllm_samples_from_the_weights_of_the_last_update(run, step):
    rows = record(run, step)
    sampled = rows["rollout_log_probs"]
    current = plain_log_probs(rows["prompts"], rows["responses"], start_policy(), weights(run, step - 1))
    assert worst(sampled, current) < TOLERANCE
    assert run.metrics[step]["training/rollout_probs_diff_max"] < TOLERANCE
    assert run.metrics[step]["training/rollout_actor_probs_pearson_corr"] > 0.9999
    if step > 1:
        stale = plain_log_probs(rows["prompts"], rows["responses"], start_policy(), weights(run, step - 2))
        assert worst(sampled, stale) > 100 * TOLERANCE, "weights that were not sent would go unnoticed"


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_the_teacher_scores_what_vllm_sampled(run, step):
    assert_the_teacher_is(run, step, weights(run, step - 1))
    metrics = run.metrics[step]
    assert 0 < metrics["sdar/gate_mean"] < 1
    assert metrics["sdar/gap_std"] > 0.01, "the teacher saw nothing"
    assert metrics["sdar/loss"] != 0 and math.isfinite(metrics["actor/loss"])
    assert metrics["actor/grad_norm"] > 0
    assert metrics["sdar/episodes"] == 16 and metrics["sdar/failed_episodes"] == 0
    if step == 1:
        assert metrics["sdar/empty_context_gap"] <= 1e-6


def test_the_rollouts_of_a_group_differ(run):
    """Each request carries a seed of its own; one seed for all would sample the same answer for a whole group."""
    rows = record(run, 1)
    first_answers: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for key, info, response in zip(rows["keys"], rows["infos"], rows["responses"], strict=True):
        if info.turn == 0:
            first_answers[key.rsplit("_", 2)[0]].append(tuple(response.tolist()))
    assert [len(answers) for answers in first_answers.values()] == [4] * 4
    assert sum(len(set(answers)) > 1 for answers in first_answers.values()) >= 2


def test_it_validates_before_and_after(run):
    arms = {key.split("/")[1] for key in run.metrics[0] if key.startswith("sdar-val/")}
    assert {"student", "student_t04", "teacher", "teacher_t04"} <= arms
    for step in (0, STEPS):
        assert run.metrics[step]["sdar-val/student/episodes"] == 4
        assert 0 <= run.metrics[step]["sdar-val/student/success"] <= 1


def test_vllm_itself_scores_for_the_teacher(tmp_path):
    """``sdar.teacher.placement=rollout_server``: the numbers of the trainer's pass, from vLLM's prompt_logprobs."""
    run = train_on_vllm(tmp_path, "sdar.teacher.placement=rollout_server", steps=2)
    assert "vLLMHttpServer" in run.output
    for step in (1, 2):
        assert_the_teacher_is(run, step, weights(run, step - 1))
        metrics = run.metrics[step]
        assert metrics["sdar/teacher_failed_share"] == 0
        assert metrics["sdar/server_check/trainer"] < TOLERANCE
        assert metrics["sdar/server_check/rollout"] < TOLERANCE
        assert metrics["sdar/gap_std"] > 0.01
