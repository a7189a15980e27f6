"""The plugin: registers lazily, fails loudly, leaves the rest of verl alone."""

from __future__ import annotations

import os
import subprocess
import sys


def run(program: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_import_verl_loads_the_plugin_but_not_the_trainers():
    done = run(
        "import sys, verl\n"
        "print('sdar_verl.plugin' in sys.modules, 'sdar_verl.verl.trainer' in sys.modules,\n"
        "      'sdar_verl.rollout.agent_loop' in sys.modules)"
    )
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


def test_everything_is_registered_when_verl_looks():
    done = run(
        "import verl\n"
        "from verl.trainer.ppo.v1 import get_trainer_cls\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn\n"
        "from verl.experimental.agent_loop.agent_loop import _agent_loop_registry\n"
        "from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY\n"
        "from verl.workers.rollout.base import get_rollout_class\n"
        "print(get_trainer_cls('sdar').__name__, get_adv_estimator_fn('sdar').__name__,\n"
        "      _agent_loop_registry['sdar_agent']['_target_'], sorted(TRAINER_REGISTRY),\n"
        "      get_rollout_class('transformers', 'async').__module__)"
    )
    assert done.returncode == 0, done.stderr
    assert "SdarTrainer compute_sdar_advantage sdar_verl.rollout.agent_loop.SdarAgentLoop" in done.stdout
    assert (
        "['colocate_async', 'sdar', 'sdar_colocate_async', 'sdar_separate_async', 'separate_async', 'sync']"
        in done.stdout
    )
    assert "sdar_verl.local.rollout" in done.stdout


def test_verls_own_modes_are_still_verls():
    done = run(
        "import verl\n"
        "from verl.trainer.ppo.v1 import get_trainer_cls\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn\n"
        "print(get_trainer_cls('sync').__module__, get_adv_estimator_fn('grpo').__module__)"
    )
    assert done.stdout.split() == ["verl.trainer.ppo.v1.trainer_sync", "verl.trainer.ppo.core_algos"], done.stderr


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


def test_the_estimator_refuses_a_trainer_that_names_no_episodes():
    done = run(
        "import torch, numpy, verl\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn\n"
        "get_adv_estimator_fn('sdar')(token_level_rewards=torch.ones(2, 3), response_mask=torch.ones(2, 3),\n"
        "                             index=numpy.array(['a', 'a']))"
    )
    assert done.returncode == 1
    assert "trainer.v1.trainer_mode=sdar" in done.stderr
