"""verl's estimators: those that the checks let pass are those that its v1 trainer can call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

from sdar_verl.checks.run import _ESTIMATORS, check_run
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.errors import ConfigError
from tests.support.recipe_run import recipe_arguments

NAMES = sorted({str(getattr(name, "value", name)) for name in ADV_ESTIMATOR_REGISTRY} - {"sdar"})


def advantages(name: str) -> torch.Tensor:
    """As verl's v1 trainer calls it, with the columns that this one reads."""
    rows, tokens = 4, 3
    columns = {"response_mask": torch.ones(rows, tokens), "token_level_rewards": torch.zeros(rows, tokens)}
    columns["token_level_rewards"][:, -1] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    columns |= {"token_level_scores": columns["token_level_rewards"], "rm_scores": columns["token_level_rewards"]}
    columns |= {name: torch.zeros(rows, tokens) for name in ("old_log_probs", "rollout_log_probs", "ref_log_prob")}
    data = DataProto.from_dict(columns, non_tensors={"uid": np.array(["a", "a", "b", "b"], dtype=object)})
    algorithm: Any = compose_config("sdar_ppo").algorithm
    OmegaConf.set_struct(algorithm, False)
    algorithm.gdpo_reward_keys = ["acc"]
    found = compute_advantage_for_multi_trajectories(
        data, batch_keys=["a_0_0", "a_1_0", "b_0_0", "b_1_0"], adv_estimator=name, num_repeat=2, config=algorithm
    )
    return found.batch["advantages"]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_checks_let_pass_can_be_called_and_the_rest_not(name, tmp_path):
    arguments = recipe_arguments(tmp_path, "sdar.context.sources=[answer]", f"algorithm.adv_estimator={name}")
    config = compose_config("sdar_ppo", arguments)
    try:
        check_run(config, load_config(config.sdar))
    except ConfigError as error:
        assert str(error).startswith(f"algorithm.adv_estimator={name} needs ")
        with pytest.raises((AssertionError, KeyError, TypeError, ValueError)):
            advantages(name)
    else:
        assert torch.isfinite(advantages(name)).all()


def test_most_of_them_pass():
    passed = {*NAMES} - {*_ESTIMATORS}
    assert {"grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo", "gpg"} <= passed
