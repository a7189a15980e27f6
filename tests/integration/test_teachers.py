"""Teachers through verl's own main_ppo on the CPU: what each one scored, against plain forward passes.

Behind --all: test_teacher_worker.py has all but a pool's on verl's engines, without Ray, in each run of the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.local import start_policy
from tests.support.plain import padded, plain_log_probs
from tests.support.toy_run import SAME, train
from tests.support.verl_run import Run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

START = Path(start_policy()) / "model.safetensors"


def recorded(run: Run, step: int) -> tuple[dict[str, Any], list[torch.Tensor], list[torch.Tensor]]:
    """A step's record, without padding rows; the teacher's prompts; the responses."""
    record = torch.load(run.folder / f"step_{step}.pt", weights_only=False)
    real = [i for i, tag in enumerate(record["tags"]) if not tag.get("is_padding", False)]
    rows = {name: [values[i] for i in real] for name, values in record.items()}
    prompts = [torch.as_tensor(info.teacher_prompt_ids, dtype=torch.int64) for info in rows["infos"]]
    return rows, prompts, rows["responses"]


def actor_weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    if step == 0:
        return {name: value.float() for name, value in load_file(START).items()}
    folder = run.folder / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"
    weights = load_file(folder / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    return weights


def teacher_file(run: Run, step: int) -> dict[str, Any]:
    folder = run.folder / "checkpoints" / f"global_step_{step}" / "actor"
    return torch.load(folder / "sdar_teacher_world_size_1_rank_0.pt", weights_only=True)


def average(*terms: tuple[float, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: sum(share * state[name] for share, state in terms) for name in terms[0][1]}


def assert_teacher_is(run: Run, step: int, state: dict[str, torch.Tensor] | None, model: str = start_policy()) -> None:
    """Every teacher log-prob of a step, and the logged mean, are those of these weights."""
    rows, prompts, responses = recorded(run, step)
    expected = plain_log_probs(prompts, responses, model, state)
    worst = max((a - b).abs().max().item() for a, b in zip(rows[TEACHER_LOG_PROBS], expected, strict=True))
    assert worst < 2e-4
    mask = padded(rows["response_mask"]).bool()
    logged = run.metrics[step]["sdar/teacher_log_prob"]
    assert logged == pytest.approx(padded(expected)[mask].mean().item(), rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def ema(tmp_path_factory) -> Run:
    overrides = ["sdar.teacher.source=ema", "sdar.teacher.ema_decay=0.5", "trainer.save_freq=1"]
    return train(tmp_path_factory.mktemp("ema"), *overrides, steps=3, record=True)


def test_an_averaged_teacher_scores_with_the_average_of_the_checkpoints(ema):
    weights = [actor_weights(ema, step) for step in range(3)]
    assert any((weights[0][name] - weights[1][name]).abs().max() > 1e-5 for name in weights[0]), "nothing was learned"
    assert_teacher_is(ema, 1, weights[0])
    assert_teacher_is(ema, 2, average((0.5, weights[0]), (0.5, weights[1])))
    assert_teacher_is(ema, 3, average((0.25, weights[0]), (0.25, weights[1]), (0.5, weights[2])))
    assert ema.metrics[1]["sdar/empty_context_gap"] <= 1e-6
    assert ema.column("sdar/teacher_staleness") == {1: 0, 2: 0, 3: 0}


def test_the_average_is_in_the_checkpoint(ema):
    saved = teacher_file(ema, 2)
    weights = [actor_weights(ema, step) for step in range(3)]
    expected = average((0.25, weights[0]), (0.25, weights[1]), (0.5, weights[2]))
    assert saved["record"] == {"source": "ema", "step": 2, "updates": 2}
    assert saved["weights"].keys() <= expected.keys()
    for name, value in saved["weights"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_a_resumed_run_has_its_averaged_teacher_back(ema, tmp_path):
    checkpoint = ema.folder / "checkpoints" / "global_step_2"
    resumed = train(
        tmp_path / "resumed",
        "sdar.teacher.source=ema",
        "sdar.teacher.ema_decay=0.5",
        "trainer.save_freq=1",
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={checkpoint}",
        steps=3,
        record=True,
    )
    for name in ("actor/loss", "sdar/loss", "sdar/gap_mean", "sdar/gap_std", "sdar/teacher_log_prob"):
        assert resumed.metrics[3][name] == pytest.approx(ema.metrics[3][name], **SAME), name
    before, after = (recorded(run, 3)[0][TEACHER_LOG_PROBS] for run in (ema, resumed))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "not bit for bit"
    assert teacher_file(resumed, 3)["record"]["updates"] == 3


def test_a_fresh_teacher_scores_inside_the_update(tmp_path):
    """One update per step: teacher and student have the weights that the step began with."""
    run = train(tmp_path, "sdar.teacher.source=actor_fresh", "trainer.save_freq=1", steps=2, record=True)
    for step in (1, 2):
        rows, prompts, responses = recorded(run, step)
        assert TEACHER_LOG_PROBS not in rows
        state = actor_weights(run, step - 1)
        teacher = padded(plain_log_probs(prompts, responses, start_policy(), state))
        student = padded(plain_log_probs(rows["prompts"], responses, start_policy(), state))
        gap = (teacher - student)[padded(rows["response_mask"]).bool()]
        assert run.metrics[step]["sdar/gap_mean"] == pytest.approx(gap.mean().item(), rel=2e-3, abs=1e-5)
        assert run.metrics[step]["sdar/gap_std"] == pytest.approx(gap.std(unbiased=False).item(), rel=2e-3)
        assert run.metrics[step]["sdar/teacher_staleness"] == 0
    assert run.metrics[1]["sdar/empty_context_gap"] <= 1e-6


def test_other_weights_on_devices_of_their_own(tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(start_policy(), other)
    weights = {name: value.float() * (1.1 if "mlp" in name else 1.0) for name, value in load_file(START).items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    run = train(
        tmp_path / "run",
        "sdar.teacher.source=reference",
        f"sdar.teacher.path={other}",
        "sdar.teacher.placement=pool",
        "sdar.teacher.pool_gpus_per_node=1",
        "ray_kwargs.ray_init.num_gpus=2",
        "actor_rollout_ref.actor.use_kl_loss=False",
        steps=1,
        record=True,
    )
    assert_teacher_is(run, 1, weights)
    rows, prompts, responses = recorded(run, 1)
    start = plain_log_probs(prompts, responses, start_policy())
    assert any((a - b).abs().max() > 0.01 for a, b in zip(start, rows[TEACHER_LOG_PROBS], strict=True))
    assert "sdar/empty_context_gap" not in run.metrics[1], "other weights are not the student's"
    assert "sdar/teacher_staleness" not in run.metrics[1]
    assert run.metrics[1]["timing_s/teacher"] >= 0


def test_the_base_under_an_adapter_stays_the_start_policy(tmp_path):
    run = train(
        tmp_path,
        "sdar.teacher.source=lora_base",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora.merge=True",
        "actor_rollout_ref.actor.use_kl_loss=False",
        "actor_rollout_ref.actor.optim.lr=0.01",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model]",
        steps=2,
        record=True,
    )
    assert_teacher_is(run, 1, None)
    assert_teacher_is(run, 2, None)
    rows, _, responses = recorded(run, 2)
    start = plain_log_probs(rows["prompts"], responses, start_policy())
    assert any((a - b).abs().max() > 0.01 for a, b in zip(start, rows["old_log_probs"], strict=True))
    assert run.column("sdar/teacher_staleness") == {1: 0, 2: 1}
