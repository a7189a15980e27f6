"""Stock verl on the CPU default: its own ``sync`` trainer, single-turn agent loop and GRPO, nothing of SDAR."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.tiny_model import make_tiny_model
from tests.support.verl_run import Run, run_main_ppo

pytestmark = [pytest.mark.integration, pytest.mark.slow]

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(character.isdigit() for character in solution_str) / 8
"""


def train(folder: Path, *overrides: str, **kwargs) -> Run:
    """Two steps of GRPO on single-turn prompts with a rule reward."""
    # Weights well above the usual scale: a policy that is nearly uniform could not tell wrong weights from right ones.
    model = make_tiny_model(folder / "model", scale=3.0, tie_word_embeddings=False)
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"{'digits ' * (index % 4)}{index}"}],  # of different lengths
            "reward_model": {"style": "rule", "ground_truth": str(index)},
            "extra_info": {"index": index},
        }
        for index in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    (folder / "reward.py").write_text(REWARD)
    return run_main_ppo(
        folder,
        [
            "+hardware=cpu",
            f"actor_rollout_ref.model.path={model}",
            f"data.train_files={folder / 'train.parquet'}",
            f"data.val_files={folder / 'train.parquet'}",
            f"reward.custom_reward_function.path={folder / 'reward.py'}",
            "algorithm.adv_estimator=grpo",
            "data.train_batch_size=4",
            "data.max_prompt_length=96",
            "data.max_response_length=8",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "actor_rollout_ref.actor.use_kl_loss=True",
            "actor_rollout_ref.actor.optim.lr=1e-2",
            "trainer.logger=[console,file]",
            "trainer.total_training_steps=2",
            "trainer.val_before_train=False",
            "trainer.test_freq=-1",
            "trainer.resume_mode=disable",
            *overrides,
        ],
        config="ppo_trainer",
        **kwargs,
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_stock_grpo_trains(tmp_path, world_size):
    """Two processes bring what one does not: gloo collectives, meta-device loading, one server per rank."""
    run = train(tmp_path, f"trainer.n_gpus_per_node={world_size}")
    assert sorted(run.metrics) == [1, 2]
    for step, metrics in run.metrics.items():
        assert metrics["training/global_step"] == step
        assert math.isfinite(metrics["actor/pg_loss"]) and metrics["actor/grad_norm"] > 0
        # The server samples from the weights of the last update, and says with which probability: float32 rounding.
        assert metrics["training/rollout_probs_diff_max"] < 2e-5
        assert metrics["training/rollout_actor_probs_pearson_corr"] > 0.9999
        # The rollouts of a group differ, or no group would have an advantage.
        assert metrics["critic/advantages/max"] > 0 > metrics["critic/advantages/min"]
    # The policy has moved from the reference, so weights that were not sent would have shown above.
    assert run.metrics[1]["actor/kl_loss"] == pytest.approx(0.0, abs=1e-5)
    assert run.metrics[2]["actor/kl_loss"] > 1e-2
