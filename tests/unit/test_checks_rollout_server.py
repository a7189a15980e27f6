"""What ``sdar.teacher.placement=rollout_server`` cannot be combined with, told before Ray starts."""

from __future__ import annotations

import copy

import pytest
import verl  # noqa: F401  loads the plugin, which puts our configs on the search path
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from sdar_verl.checks.teacher import teacher_faults
from sdar_verl.config import load_config
from sdar_verl.context import builtin  # noqa: F401  registers the contexts
from tests.support.tiny_model import make_tiny_model

ON_SERVER = {"sdar.teacher.source": "actor", "sdar.teacher.placement": "rollout_server"}
LIKELIEST = {"sdar.loss.objective": "forward_kl", "sdar.loss.support": "top_k", "sdar.loss.top_k": 50}
ON_A_GPU = {"actor_rollout_ref.rollout.name": "vllm", "trainer.device": "cuda"}


@pytest.fixture(scope="module")
def recipe():
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("sdar_quickstart")


def faults(recipe, **overrides) -> list[str]:
    config = copy.deepcopy(recipe)
    for option, value in {**ON_SERVER, **overrides}.items():
        OmegaConf.update(config, option, value, force_add=True)
    return teacher_faults(config, load_config(config.sdar))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"actor_rollout_ref.rollout.temperature": 0.7},
        {"sdar.loss.objective": "k3"},
        {"sdar.rollout.rows": "trajectory"},
        LIKELIEST,
        {**LIKELIEST, **ON_A_GPU, "sdar.loss.top_k": 20},
        {**LIKELIEST, **ON_A_GPU, "actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs": 50},
        {**LIKELIEST, **ON_A_GPU, "actor_rollout_ref.rollout.name": "sglang"},
        ON_A_GPU,
        {**ON_A_GPU, "actor_rollout_ref.rollout.name": "sglang"},
        # The trainer never sees a teacher's row: its budget of tokens is the student's.
        {"actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 350},
    ],
)
def test_what_it_can_be_combined_with(recipe, overrides):
    assert faults(recipe, **overrides) == []


CASES = {
    "frozen weights": (
        {"sdar.teacher.source": "reference"},
        ["placement=rollout_server", "source=reference", "possible with source=actor", "placement=colocated"],
    ),
    "an average": ({"sdar.teacher.source": "ema"}, ["placement=rollout_server", "source=ema", "source=actor"]),
    "weights of each update": ({"sdar.teacher.source": "actor_fresh"}, ["placement=rollout_server", "source=actor"]),
    "no teacher": (
        {"sdar.teacher.source": "none", "sdar.loss.coef": 0},
        ["placement=rollout_server has no effect", "source=none", "colocated"],
    ),
    "a pool's devices": (
        {"sdar.teacher.pool_gpus_per_node": 1},
        ["pool_gpus_per_node=1 has no effect with sdar.teacher.placement=rollout_server"],
    ),
    "a distribution": (
        {"sdar.loss.objective": "forward_kl"},
        ["placement=rollout_server", "objective=forward_kl", "placement=colocated", "sampled"],
    ),
    "the student's likeliest tokens": (
        {**LIKELIEST, "sdar.loss.objective": "reverse_kl"},
        ["objective=reverse_kl", "of the student's likeliest tokens", "objective=forward_kl with support=top_k"],
    ),
    "more tokens than vllm gives": (
        {**LIKELIEST, **ON_A_GPU},
        ["top_k=50", "max_logprobs=20", "++actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs=50"],
    ),
    "a late context": (
        {"sdar.context.sources": ["skills", "sibling"]},
        ["placement=rollout_server", "sibling", "placement=colocated"],
    ),
    "a bad context": (
        {"sdar.context.contrast.sources": ["skills"], "sdar.context.contrast.control": "shuffled"},
        ["sdar.context.contrast.sources=['skills'] is known only when a group has ended", "placement=colocated"],
    ),
    "a control that needs another group": ({"sdar.context.control": "wrong"}, ["control=wrong", "placement=colocated"]),
    "an asynchronous trainer": (
        {"trainer.v1.trainer_mode": "sdar_separate_async"},
        ["placement=rollout_server", "trainer_mode=sdar_separate_async", "placement=colocated"],
    ),
    "an engine that cannot": (
        {"actor_rollout_ref.rollout.name": "trtllm"},
        ["prompt_logprobs", "rollout.name=trtllm", "vllm or sglang or transformers", "placement=colocated"],
    ),
    "a temperature that vllm does not apply": (
        {**ON_A_GPU, "actor_rollout_ref.rollout.temperature": 0.7},
        ["vllm", "temperature=0.7", "placement=colocated", "temperature=1.0"],
    ),
    "nor sglang": (
        {"actor_rollout_ref.rollout.name": "sglang", "actor_rollout_ref.rollout.temperature": 0.7},
        ["sglang", "temperature=0.7"],
    ),
    "logits": (
        {**ON_A_GPU, "actor_rollout_ref.rollout.logprobs_mode": "raw_logits"},
        ["logprobs_mode=raw_logits", "processed_logprobs"],
    ),
    "other weights": ({**ON_A_GPU, "actor_rollout_ref.rollout.quantization": "fp8"}, ["quantization=fp8", "colocated"]),
    "two servers": (
        {**ON_A_GPU, "actor_rollout_ref.rollout.disaggregation": {"enabled": True}},
        ["disaggregation.enabled=True", "colocated"],
    ),
    "no room in the engine": (
        {"actor_rollout_ref.rollout.max_model_len": 404},
        ["max_model_len=404", "= 405", "sdar.teacher.max_prompt_length", "placement=colocated"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_it_cannot_is_named_with_both_options(recipe, case):
    overrides, words = CASES[case]
    found = faults(recipe, **overrides)
    assert len(found) == 1, found
    for word in words:
        assert word in found[0], found[0]


def test_room_is_the_models_where_the_engine_names_none(recipe, tmp_path):
    model = make_tiny_model(tmp_path)  # 2048 positions
    fits = {"actor_rollout_ref.model.path": str(model), "sdar.teacher.max_prompt_length": 2048 - 20 - 1}
    assert faults(recipe, **fits) == []
    (fault,) = faults(recipe, **{**fits, "sdar.teacher.max_prompt_length": 2048 - 20})
    assert "max_position_embeddings of actor_rollout_ref.model.path=2048" in fault
