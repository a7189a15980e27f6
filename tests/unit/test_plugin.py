"""The plugin: registers lazily, fails loudly, leaves the rest of verl alone."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.support.verl_run import forked_python

PROGRAM = """
import json, sys, verl

ours = ("sdar_verl.plugin", "sdar_verl.verl.trainer", "sdar_verl.rollout.agent_loop")
told = {"loaded": [name for name in ours if name in sys.modules]}

from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.workers.rollout.base import get_rollout_class

told["trainer"] = get_trainer_cls("sdar").__name__
told["estimator"] = get_adv_estimator_fn("sdar").__name__
told["agent loop"] = _agent_loop_registry["sdar_agent"]["_target_"]
told["modes"] = sorted(TRAINER_REGISTRY)
told["rollout"] = get_rollout_class("transformers", "async").__module__
told["verl's"] = [get_trainer_cls("sync").__module__, get_adv_estimator_fn("grpo").__module__]

import numpy, torch

from tests.support.verl_run import forked_python

try:
    ones = torch.ones(2, 3)
    get_adv_estimator_fn("sdar")(token_level_rewards=ones, response_mask=ones, index=numpy.array(["a", "a"]))
except Exception as error:
    told["refused"] = str(error)
print(json.dumps(told))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*forked_python(), "-c", program], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What a fresh process finds that imports verl and nothing of ours, and then looks into verl's registries."""
    done = run(PROGRAM)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_verl_loads_the_plugin_but_not_the_trainers(told):
    assert told["loaded"] == ["sdar_verl.plugin"]


def test_everything_is_registered_when_verl_looks(told):
    assert told["trainer"] == "SdarTrainer"
    assert told["estimator"] == "compute_sdar_advantage"
    assert told["agent loop"] == "sdar_verl.rollout.agent_loop.SdarAgentLoop"
    ours = ["sdar", "sdar_colocate_async", "sdar_separate_async"]
    assert told["modes"] == sorted([*ours, "sync", "colocate_async", "separate_async"])
    assert told["rollout"] == "sdar_verl.local.rollout"


def test_verls_own_modes_are_still_verls(told):
    assert told["verl's"] == ["verl.trainer.ppo.v1.trainer_sync", "verl.trainer.ppo.core_algos"]


def test_a_module_of_ours_may_be_the_first_that_is_imported():
    """It loads the registry that registers it."""
    done = run(
        "import sdar_verl.verl.trainer\n"
        "from verl.trainer.ppo.v1 import get_trainer_cls\n"
        "print(get_trainer_cls('sdar').__name__, get_trainer_cls('sdar_separate_async').__name__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SdarTrainer", "SdarSeparateAsync"]
    assert "could not" not in done.stderr


def test_an_error_of_ours_is_shown_although_verl_swallows_it():
    """verl drops a plugin's exception at debug level; the user must still see it, with the remedy."""
    done = run(
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '0.7.0' if name == 'verl' else real(name)\n"
        "import verl\n"
        "print('verl goes on')"
    )
    assert "verl goes on" in done.stdout
    assert "verl 0.7.0 is installed, sdar_verl needs >=0.9.0,<0.10" in done.stderr
    assert "the sdar_verl plugin could not be loaded into verl" in done.stderr


def test_the_estimator_refuses_a_trainer_that_names_no_episodes(told):
    assert "trainer.v1.trainer_mode=sdar" in told["refused"]
