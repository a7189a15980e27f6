"""Devices that do not divide among rollout servers, and requests that these do not obey, before Ray starts."""

from __future__ import annotations

import re

import pytest
import verl  # noqa: F401  loads the plugin, which puts our configs on the search path

from sdar_verl.checks.servers import device_faults as servers
from sdar_verl.checks.servers import server_faults
from sdar_verl.config import load_config
from sdar_verl.errors import ConfigError
from tests.support.checked_recipe import changed, checked_recipe, run_checks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return checked_recipe(tmp_path_factory.mktemp("panels"))


SEPARATE = {
    "trainer.v1.trainer_mode": "sdar_separate_async",
    "trainer.v1.separate_async.parameter_sync_step": 1,
    "actor_rollout_ref.rollout.checkpoint_engine.backend": "gloo",
    "sdar.teacher.source": "actor",
}


@pytest.mark.parametrize("hybrid", [True, False])
@pytest.mark.parametrize(
    ("size", "training", "per_node", "nodes", "pools"),
    [
        (1, 1, 1, 1, []),
        (2, 2, 8, 1, []),
        (16, 16, 8, 2, []),
        (16, 16, 8, 1, ["rollout"]),
        (16, 8, 8, 1, ["training", "rollout"]),
        (2, 1, 8, 1, ["training"]),
        (3, 3, 8, 1, ["rollout"]),
        (3, 3, 8, 3, ["rollout"]),
        (12, 12, 8, 3, ["rollout"]),
    ],
)
def test_servers_of_a_separate_rollout_fill_its_devices(recipe, hybrid, size, training, per_node, nodes, pools):
    config = changed(
        recipe,
        **SEPARATE,
        **{
            "actor_rollout_ref.hybrid_engine": hybrid,
            "actor_rollout_ref.rollout.tensor_model_parallel_size": size,
            "actor_rollout_ref.rollout.n_gpus_per_node": per_node,
            "actor_rollout_ref.rollout.nnodes": nodes,
        },
    )
    config.trainer.n_gpus_per_node = training
    told = [*servers(config)]
    expected = {
        "training": f"tensor_model_parallel_size={size} does not divide the {training} devices (trainer.",
        "rollout": f"rollout.n_gpus_per_node={per_node} on each of nnodes={nodes}",
    }
    pools = [pool for pool in pools if hybrid or pool == "rollout"]
    assert len(told) == len(pools), told
    for pool, fault in zip(pools, told, strict=True):
        assert fault.startswith("actor_rollout_ref.rollout.") and expected[pool] in fault


def test_a_rollout_without_a_server_is_told_by_the_whole_check(recipe):
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=16 does not divide the devices of the rollout"):
        run_checks(
            recipe,
            **SEPARATE,
            **{
                "data.train_batch_size": recipe.actor_rollout_ref.actor.ppo_mini_batch_size,
                "actor_rollout_ref.hybrid_engine": False,
                "actor_rollout_ref.rollout.tensor_model_parallel_size": 16,
                "actor_rollout_ref.rollout.n_gpus_per_node": 8,
                "actor_rollout_ref.rollout.nnodes": 1,
            },
        )


NAME, SEED = "actor_rollout_ref.rollout.name", "sdar.rollout.seed"
DETERMINISTIC = "actor_rollout_ref.rollout.engine_kwargs.sglang.enable_deterministic_inference"
FULL = "actor_rollout_ref.rollout.full_determinism"
WHOLE = {"sdar.rollout.rows": "trajectory", "sdar.rollout.turn_length": 16}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({NAME: "sglang", SEED: 3}, f"sdar.rollout.seed=3: SGLang .* only with [+][+]{DETERMINISTIC}=True"),
        ({NAME: "sglang", SEED: 3, DETERMINISTIC: True}, None),
        ({NAME: "sglang", SEED: None}, None),
        (
            {NAME: "vllm", SEED: None, FULL: True},
            "full_determinism=True .* copies of each other; set sdar.rollout.seed",
        ),
        ({NAME: "vllm", SEED: 3, FULL: True}, None),
        ({NAME: "trtllm", SEED: 3, **WHOLE}, "sdar.rollout.turn_length=16: .*TensorRT-LLM"),
        ({NAME: "trtllm", SEED: 3}, None),
        ({NAME: "sglang", SEED: None, **WHOLE}, None),
    ],
)
def test_requests_that_a_server_does_not_obey(recipe, options, said):
    config = changed(recipe, **options)
    told = server_faults(config, load_config(config.sdar))
    assert len(told) == (said is not None) and all(re.search(said, fault) for fault in told), told
