"""On a cluster the rollout is verl's own vLLM: the package adds a backend of its own and changes none of verl's."""

from __future__ import annotations

from pathlib import Path

import pytest
import verl  # noqa: F401  loads the plugin
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.workers.rollout import base, replica

import sdar_verl
from tests.vllm.settings import VLLM_ON_CPU, WORKER

RECIPES = ("sdar_alfworld", "sdar_webshop", "sdar_search")


def test_verls_rollout_registries_hold_verls_own_classes():
    ours = {name for name, loader in replica.RolloutReplicaRegistry._registry.items() if "sdar" in loader.__module__}
    assert ours == {"transformers"}
    assert replica.RolloutReplicaRegistry._registry["vllm"] is replica._load_vllm
    assert {name for (name, _), path in base._ROLLOUT_REGISTRY.items() if not path.startswith("verl.")} == ours
    assert base._ROLLOUT_REGISTRY["vllm", "async"] == "verl.workers.rollout.vllm_rollout.ServerAdapter"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_give_vllm_no_worker_of_their_own(recipe):
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(recipe)
    assert config.actor_rollout_ref.rollout.name == "vllm"
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm == {}
    assert not config.sdar.modules
    assert WORKER not in OmegaConf.to_yaml(config)


def test_the_cpu_worker_is_not_a_part_of_the_package():
    """It is named by the tests' own overrides only, and lies outside what is installed."""
    assert any(WORKER in override for override in VLLM_ON_CPU)
    package = Path(sdar_verl.__file__).parent
    sources = [*package.rglob("*.py"), *(package.parent / "hydra_configs").rglob("*.yaml")]
    assert len(sources) > 100
    naming = [path for path in sources if "_supports_onednn" in path.read_text() or WORKER in path.read_text()]
    assert naming == []
