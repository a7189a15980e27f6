"""What each trainer mode asks for, and what it does not have: told before Ray starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import verl  # loads the plugin, which puts our configs on the search path
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from sdar_verl.checks.modes import _BACKENDS, mode_faults, parts_of_a_step, verl_mode
from sdar_verl.config import load_config

COLOCATE = "trainer.v1.trainer_mode=sdar_colocate_async"
BACKEND = "actor_rollout_ref.rollout.checkpoint_engine"
SEPARATE = [
    "trainer.v1.trainer_mode=sdar_separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
]


def faults_of(*overrides: str) -> list[str]:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("sdar_quickstart", overrides=[*overrides])
    return mode_faults(config, load_config(config.sdar))


@pytest.mark.parametrize("overrides", [[], [COLOCATE], SEPARATE], ids=["sync", "colocate", "separate"])
def test_the_quick_starts_recipe_runs_in_each_mode(overrides):
    assert faults_of(*overrides) == []


CASES = {
    "verl's mode": (["trainer.v1.trainer_mode=separate_async"], ["separate_async ignores", "=sdar_separate_async"]),
    "fetched together": ([COLOCATE, "data.gen_batch_size=4"], ["data.gen_batch_size=4", COLOCATE, "null"]),
    "refilled anyway": (
        [COLOCATE, "trainer.v1.sampler.sync_refill_failed_groups=True"],
        ["sync_refill_failed_groups=True has no effect", COLOCATE],
    ),
    "a correction without log-probs": (
        ["algorithm.rollout_correction.rollout_is=token", "actor_rollout_ref.rollout.calculate_log_probs=False"],
        ["algorithm.rollout_correction.rollout_is=token has no effect", "calculate_log_probs=False"],
    ),
    "batch": (
        [*SEPARATE, "actor_rollout_ref.actor.ppo_mini_batch_size=4"],
        ["data.train_batch_size=4", "parameter_sync_step=2", "ppo_mini_batch_size=4, which is 8"],
    ),
    "no devices": ([*SEPARATE, "actor_rollout_ref.rollout.nnodes=0"], ["rollout.nnodes=0", "at least 1"]),
    "no way to the rollout": (
        [*SEPARATE, "actor_rollout_ref.rollout.checkpoint_engine.backend=naive"],
        ["checkpoint_engine.backend=naive", "sdar_separate_async", "gloo"],
    ),
    "an adapter that never arrives": (
        [*SEPARATE, "actor_rollout_ref.model.lora_rank=8", "sdar.teacher.source=actor"],
        ["actor_rollout_ref.model.lora_rank=8", "sdar_separate_async", "actor_rollout_ref.model.lora.merge=True"],
    ),
    "an anchor elsewhere": (
        [*SEPARATE, "actor_rollout_ref.hybrid_engine=False", "method=sr_opsd"],
        ["sdar.loss.anchor.reference=0.095", "actor_rollout_ref.hybrid_engine=False", "or sdar.loss.anchor.reference"],
    ),
    "a reference elsewhere": (
        [*SEPARATE, "actor_rollout_ref.hybrid_engine=False"],
        ["sdar.teacher.source=reference", "actor_rollout_ref.hybrid_engine=False", "sdar.teacher.path"],
    ),
}


CORRECTION = "algorithm.rollout_correction"
LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs=True"
CASES |= {
    "a correction of no kind": (
        [LOG_PROBS, f"{CORRECTION}.rollout_is=tokn"],
        [f"{CORRECTION}.rollout_is=tokn", "verl cannot correct", "token", "sequence"],
    ),
    "a rejection without a threshold": (
        [LOG_PROBS, f"{CORRECTION}.rollout_rs=token_k1"],
        [f"{CORRECTION}.rollout_rs=token_k1: verl cannot", "rollout_rs_threshold"],
    ),
    "a threshold of no number": (
        [LOG_PROBS, f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=two"],
        [f"{CORRECTION}.rollout_is=token, {CORRECTION}.rollout_is_threshold=two: verl cannot"],
    ),
    "a way to the rollout that nobody knows": (
        [*SEPARATE, f"{BACKEND}.backend=ncll"],
        [f"{BACKEND}.backend=ncll: verl knows naive, nccl", "gloo", f"{BACKEND}.custom_backend_module"],
    ),
    "one that verl does not know in a mode that needs none": (
        [f"{BACKEND}.backend=gloo", f"{BACKEND}.custom_backend_module=null"],
        [f"{BACKEND}.backend=gloo: verl knows naive, nccl"],
    ),
}
PASSES = {
    "a correction": [LOG_PROBS, f"{CORRECTION}.rollout_is=sequence"],
    "chained rejections": [
        LOG_PROBS,
        f"{CORRECTION}.rollout_rs='token_k1,seq_mean_k3'",
        f"{CORRECTION}.rollout_rs_threshold='0.5_2.0,3'",
    ],
    "another engine of verl's": [*SEPARATE, f"{BACKEND}.backend=nixl"],
    "an engine of somebody's": [*SEPARATE, f"{BACKEND}.backend=mine", f"{BACKEND}.custom_backend_module=my.engine"],
}


@pytest.mark.parametrize("case", PASSES)
def test_what_verl_takes_passes(case):
    assert faults_of(*PASSES[case]) == []


def test_the_checkpoint_engines_are_those_of_verls_sources():
    named: set[str] = set()
    for file in (Path(verl.__file__).parent / "checkpoint_engine").glob("*.py"):
        named.update(re.findall(r'@CheckpointEngineRegistry\.register\("(\w+)"\)', file.read_text()))
    assert named == {*_BACKENDS}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_names_the_option_and_the_mode(case):
    overrides, words = CASES[case]
    faults = faults_of(*overrides)
    assert len(faults) == 1, faults
    for word in words:
        assert word in faults[0]


def test_a_mode_of_somebody_elses_is_known_once_its_trainer_is():
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from sdar_verl.verl.async_modes import SdarSeparateAsync

    assert verl_mode("mine") is None
    TRAINER_REGISTRY["mine"] = type("Mine", (SdarSeparateAsync,), {})
    try:
        config = OmegaConf.create(
            {"trainer": {"v1": {"trainer_mode": "mine", "separate_async": {"parameter_sync_step": 3}}}}
        )
        assert (verl_mode("mine"), parts_of_a_step(config)) == ("separate_async", 3)
    finally:
        del TRAINER_REGISTRY["mine"]


def test_each_mode_answers_verls_name_for_it():
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from sdar_verl.checks.modes import MODES
    from sdar_verl.verl import async_modes  # noqa: F401  registers

    for ours, verls in MODES.items():
        trainer = TRAINER_REGISTRY[ours]
        blank = object.__new__(trainer)
        blank.trainer_mode = ours  # what verl's constructor does
        assert blank.trainer_mode == verls
        assert issubclass(trainer, TRAINER_REGISTRY[verls])
