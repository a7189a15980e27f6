"""The teacher asked from the rollout server against the trainer's pass, through verl's own main_ppo on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.local import start_policy
from tests.support.plain import plain_logits
from tests.support.toy_run import train
from tests.support.verl_run import Run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NATS = 1e-4
"""Stated in docs/teachers.md: what two float32 implementations of one model may differ by, per token."""

TEMPERATURE = 0.7
TEMPERED = ["sdar.teacher.source=actor", f"actor_rollout_ref.rollout.temperature={TEMPERATURE}"]


def rows_by_key(run: Run, step: int) -> dict[str, dict[str, Any]]:
    record = torch.load(run.folder / f"step_{step}.pt", weights_only=False)
    real = [i for i, tag in enumerate(record["tags"]) if not tag.get("is_padding", False)]
    return {record["keys"][i]: {name: values[i] for name, values in record.items()} for i in real}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """Two steps each, the same seeds, at a temperature that is not 1."""
    return {
        placement: train(
            tmp_path_factory.mktemp(placement),
            *TEMPERED,
            f"sdar.teacher.placement={placement}",
            "trainer.save_freq=1",
            steps=2,
            record=True,
            timeout=600,
        )
        for placement in ("colocated", "rollout_server")
    }


def test_both_placements_give_the_same_log_probs(runs):
    colocated, server = (rows_by_key(runs[name], 1) for name in ("colocated", "rollout_server"))
    assert colocated.keys() == server.keys()
    for key, row in colocated.items():
        other = server[key]
        assert torch.equal(row["responses"], other["responses"]), "not the same episodes"
        assert torch.equal(row[TEACHER_MASK], other[TEACHER_MASK]) and row[TEACHER_MASK].any()
        mask = row[TEACHER_MASK].bool()
        difference = (row[TEACHER_LOG_PROBS] - other[TEACHER_LOG_PROBS])[mask].abs().max().item()
        assert difference < NATS, (key, difference)
    gaps = [row[TEACHER_LOG_PROBS] - row["old_log_probs"] for row in colocated.values()]
    assert max(gap.abs().max().item() for gap in gaps) > 0.05, "the teacher says nothing of its own"


@pytest.mark.parametrize("name", ["actor/loss", "sdar/loss", "sdar/gap_mean", "sdar/gap_std", "sdar/gate_mean"])
def test_both_placements_give_the_same_loss(runs, name):
    colocated, server = (runs[placement].metrics[1][name] for placement in ("colocated", "rollout_server"))
    assert server == pytest.approx(colocated, rel=1e-3, abs=NATS)


def test_the_server_scores_with_the_weights_that_the_step_began_with(runs):
    """The second step's, against plain forward passes of the first step's checkpoint and of the start policy."""
    run = runs["rollout_server"]
    weights = load_file(run.folder / "checkpoints/global_step_1/actor/huggingface/model.safetensors")
    rows = list(rows_by_key(run, 2).values())
    prompts = [torch.as_tensor(row["infos"].teacher_prompt_ids, dtype=torch.int64) for row in rows]
    responses = [row["responses"] for row in rows]
    apart = {}
    for name, state in (("now", weights), ("before", None)):
        logits = plain_logits(prompts, responses, start_policy(), state)
        apart[name] = max(
            ((one / TEMPERATURE).log_softmax(-1).gather(1, row["responses"][:, None])[:, 0] - row[TEACHER_LOG_PROBS])
            .abs()
            .max()
            .item()
            for one, row in zip(logits, rows, strict=True)
        )
    assert apart["now"] < 2e-4
    assert apart["before"] > 10 * apart["now"], "nothing was learned in between"


def test_what_the_server_reports(runs):
    for metrics in runs["rollout_server"].metrics.values():
        if "sdar/gap_mean" not in metrics:
            continue
        assert metrics["sdar/teacher_failed_share"] == 0.0
        assert 0.0 <= metrics["sdar/server_check/trainer"] < NATS
        assert abs(metrics["sdar/server_check/bias"]) < NATS
        assert metrics["sdar/server_check/rollout"] < NATS
        assert metrics["sdar/teacher_wait_s/max"] >= metrics["sdar/teacher_wait_s/mean"] >= 0.0
        assert "sdar/empty_context_gap" not in metrics
        assert metrics["timing_s/teacher"] < 5.0, "the trainer made a pass of its own"
    assert "sdar/empty_context_gap" in runs["colocated"].metrics[1]
    assert "sdar/server_check/trainer" not in runs["colocated"].metrics[1]


def test_both_placements_give_the_same_divergence_over_the_teachers_likeliest_tokens(tmp_path):
    forward = [f"sdar.loss.{option}" for option in ("objective=forward_kl", "support=top_k", "top_k=8", "gate=none")]
    one, other = (
        train(
            tmp_path / placement,
            *TEMPERED,
            *forward,
            f"sdar.teacher.placement={placement}",
            "trainer.save_freq=-1",
            steps=2,
        )
        for placement in ("colocated", "rollout_server")
    )
    names = ("actor/loss", "actor/grad_norm", "sdar/divergence", "sdar/tail_mass/student", "sdar/tail_mass/teacher")
    for step in (1, 2):
        for name in (*names, "sdar/gap_mean"):
            assert other.metrics[step][name] == pytest.approx(one.metrics[step][name], rel=2e-3, abs=NATS), (step, name)
    assert one.metrics[1]["sdar/divergence"] > 0.01
