"""The ALFWorld recipe through verl's main_ppo on the CPU: real Ray, real workers, a tiny policy, generated games.

Skills are retrieved by UCB, whose statistics the trainer keeps and the agent loop's process reads.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sdar_verl.cli import main
from sdar_verl.panels import read_panel
from sdar_verl.report.read import read_run
from tests.support.tiny_model import make_talkative_model
from tests.support.verl_run import run_main_ppo

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOMS = [f"{kind} {number}" for kind in ("cabinet", "drawer", "countertop", "shelf", "fridge") for number in (1, 2)]


def test_the_recipe_trains_and_validates_on_the_cpu(tmp_path: Path) -> None:
    data = tmp_path / "data" / "alfworld"
    made = ["--train", "12", "--validation", "6", "--test", "6"]
    assert main(["prepare", "alfworld", "--generate", *made, "--out", str(data)]) == 0
    actions = ["look", "inventory", *(f"go to {room}" for room in ROOMS)]
    # Told apart by blanks behind them: as many tokens, so that actions are often sampled.
    phrases = [f"<action>{action}</action>{' ' * blanks}" for action in actions for blanks in range(60)]
    model = make_talkative_model(tmp_path / "model", phrases)

    run = run_main_ppo(
        tmp_path,
        [
            "hardware=cpu",
            f"actor_rollout_ref.model.path={model}",
            "data.train_batch_size=2",
            "data.max_prompt_length=8192",  # of bytes, here
            "data.max_response_length=2",
            "sdar.teacher.max_prompt_length=20480",
            "sdar.skills.retrieval=[ucb]",
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=65536",
            "actor_rollout_ref.rollout.n=2",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "sdar.update.mini_batch_rows=16",
            "sdar.env.max_steps=4",
            "sdar.rollout.seed=0",
            "trainer.total_training_steps=2",
            "trainer.test_freq=2",
            "trainer.save_freq=2",
            "trainer.val_before_train=False",
            "trainer.logger=[console,file]",
        ],
        config="sdar_alfworld",
        timeout=1200,
    )
    queries = 0.0
    for step in (1, 2):
        metrics = run.metrics[step]
        assert (metrics["sdar/episodes"], metrics["sdar/failed_episodes"]) == (4, 0)
        assert metrics["sdar/turns"] == 4
        assert 0 < metrics["sdar/invalid_share"] < 1
        assert metrics["sdar/context_share"] == 1
        assert metrics["sdar/lambda"] == 0.01
        assert all(
            math.isfinite(metrics[name])
            for name in ("actor/loss", "actor/grad_norm", "actor/kl_loss", "sdar/loss", "sdar/gap_mean")
        )
        counted = sum(value for name, value in metrics.items() if name.startswith("sdar/skill_queries/"))
        assert counted == queries + 2  # one per task of the step
        queries = counted
    panel = read_panel(data / "validation.parquet")
    validation = run.metrics[2]
    assert validation["sdar-val/student/episodes"] == len(panel) == 6
    types = {task.task_type for task in panel}
    assert all(f"sdar-val/student/success/{kind}" in validation for kind in types) and len(types) == 6
    assert sorted(read_run(run.folder).outcomes[2]["task_id"]) == sorted(task.task_id for task in panel)
