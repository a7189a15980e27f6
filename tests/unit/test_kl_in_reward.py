"""``algorithm.use_kl_in_reward`` with the estimator ``sdar``, through the functions that verl's trainer calls."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import FixedKLController
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

from sdar_verl.rollout.rows import RowInfo
from sdar_verl.verl.advantage import AdvantageRows, advantage_rows
from tests.support.table import make_table

COEF, PENALTY, TOKENS = 0.2, 0.1, 5
# Episode -> turns; two groups of three rollouts.
TURNS = {"a_0": 1, "a_1": 3, "a_2": 2, "b_0": 2, "b_1": 2, "b_2": 4}
REWARDS = {"a_0": 1.0, "a_1": 0.0, "a_2": 0.0, "b_0": 0.0, "b_1": 0.0, "b_2": 0.0}


def test_an_episodes_return_is_its_reward_minus_the_mean_penalty_of_its_rows():
    generator = torch.Generator().manual_seed(0)
    keys = [f"{episode}_{turn}" for episode, turns in TURNS.items() for turn in range(turns)]
    episodes = [key.rsplit("_", 1)[0] for key in keys]
    mask = torch.ones(len(keys), TOKENS)
    mask[::2, 3:] = 0
    old, reference = (-torch.rand(len(keys), TOKENS, generator=generator) for _ in range(2))
    scores = torch.zeros(len(keys), TOKENS)
    scores[:, 0] = torch.tensor([REWARDS[episode] for episode in episodes])  # the episode's reward is on each row
    data = DataProto.from_single_dict(
        {
            "old_log_probs": old,
            "ref_log_prob": reference,
            "response_mask": mask,
            "token_level_scores": scores,
            "uid": np.array([key[0] for key in keys], dtype=object),
        }
    )
    invalid = [index % 5 == 0 for index in range(len(keys))]
    infos = [RowInfo(turn=int(key[-1]), task_type="t", unparsed=bad) for key, bad in zip(keys, invalid, strict=True)]
    settings = SimpleNamespace(group_stats="episode", invalid_action_penalty=PENALTY)
    algorithm = OmegaConf.create({"use_kl_in_reward": True, "norm_adv_by_std_in_grpo": True})

    data, metrics = apply_kl_penalty(data, FixedKLController(COEF), kl_penalty="kl")
    with advantage_rows(AdvantageRows.of(settings, make_table(keys, infos))) as rows:
        data = compute_advantage_for_multi_trajectories(data, keys, "sdar", num_repeat=3, config=algorithm)

    assert metrics["actor/reward_kl_penalty_coeff"] == COEF
    kl = ((old - reference) * mask).sum(1)
    returns = {
        episode: REWARDS[episode] - COEF * np.mean([kl[i].item() for i, name in enumerate(episodes) if name == episode])
        for episode in TURNS
    }
    for i, episode in enumerate(episodes):
        group = np.array([value for name, value in returns.items() if name[0] == episode[0]])
        expected = (returns[episode] - group.mean()) / (group.std(ddof=1) + 1e-6) - PENALTY * invalid[i]
        found = data.batch["advantages"][i]
        assert found.tolist() == pytest.approx((expected * mask[i]).tolist(), rel=1e-4, abs=1e-5)
    # Group b has no reward at all: the penalty is what tells its episodes apart.
    assert rows.counts.groups_without_variance == 0
