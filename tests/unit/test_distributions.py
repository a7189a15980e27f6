"""Objectives over distributions: what passes are asked for, what is refused before the start, what is logged."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import verl  # noqa: F401  loads the plugin, which puts our configs on the search path
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from sdar_verl.algorithm.divergences import COLUMNS
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.checks.loss import loss_faults
from sdar_verl.config import load_config
from sdar_verl.config.loss import LossConfig
from sdar_verl.errors import ConfigError
from sdar_verl.fields import SUPPORT_IDS
from sdar_verl.observe.metrics import column_means
from sdar_verl.requests import HEAD_REQUEST, HeadRequest, ScoringPass, StepRequests, requested


def settings(**options) -> LossConfig:
    return LossConfig(**options)


def test_other_objectives_ask_for_nothing():
    for objective in ("sampled", "k1", "k2", "k3"):
        assert StepRequests.of(settings(objective=objective)) == StepRequests()


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd"])
def test_the_whole_vocabulary_asks_the_teacher_for_hidden_states(objective):
    requests = StepRequests.of(settings(objective=objective))
    assert requests.student is None
    assert requests.teacher == ScoringPass(HeadRequest("hidden", teacher=True))
    assert requests.update == HeadRequest("divergence", kind=objective)
    assert requests.update.k == 0 and requests.update.chunk == 128 and not requests.update.teacher


@pytest.mark.parametrize("objective", ["reverse_kl", "jsd"])
def test_the_students_support_is_found_before_the_teacher_pass(objective):
    requests = StepRequests.of(settings(objective=objective, support="top_k", top_k=7, chunk_tokens=9))
    assert requests.student == HeadRequest("top_k_ids", chunk=9, k=7)
    on_support = HeadRequest("on_support", teacher=True, chunk=9, k=7)
    assert requests.teacher == ScoringPass(on_support, reads=(SUPPORT_IDS,))
    assert requests.update is not None
    assert (requests.update.k, requests.update.tail) == (7, "bucket")


def test_an_anchored_target_asks_the_reference_and_the_update_knows_the_weights():
    anchor = {"reference": 0.1, "student": 0.05}
    full = StepRequests.of(settings(objective="forward_kl", anchor=anchor, chunk_tokens=9))
    assert full.anchor == ScoringPass.anchor(HeadRequest("hidden", teacher=True, chunk=9)) and full.update is not None
    assert (full.update.reference, full.update.student) == (0.1, 0.05)
    some = StepRequests.of(settings(objective="reverse_kl", support="top_k", top_k=7, anchor=anchor))
    assert some.anchor == ScoringPass.anchor(HeadRequest("on_support", teacher=True, k=7), (SUPPORT_IDS,))
    own = StepRequests.of(settings(objective="reverse_kl", anchor={"student": 0.5}))
    assert own.anchor is None and own.update is not None and own.update.student == 0.5
    with pytest.raises(
        ConfigError, match=r"sdar.loss.anchor: reference=0.6 and student=0.4 leave the teacher no weight"
    ):
        load_config({"loss": {"anchor": {"reference": 0.6, "student": 0.4}}})


def test_forward_kl_takes_the_teachers_support():
    requests = StepRequests.of(settings(objective="forward_kl", support="top_k", tail="renormalise"))
    assert requests.student is None
    assert requests.teacher == ScoringPass(HeadRequest("top_k", teacher=True, chunk=128, k=100))
    assert requests.update is not None
    assert requests.update.tail == "renormalise"


def test_a_request_travels_as_text_and_only_as_long_as_it_is_asked():
    request = HeadRequest("divergence", chunk=4, k=3, kind="jsd", tail="renormalise")
    assert HeadRequest.from_json(request.to_json()) == request
    extra = {"temperature": 1.0}
    with requested(extra, request):
        assert HeadRequest.from_json(extra[HEAD_REQUEST]) == request
    with requested(extra, None):
        assert extra == {"temperature": 1.0}
    assert extra == {"temperature": 1.0}


def test_the_objective_is_the_gated_divergence():
    divergence = torch.rand(2, 3, requires_grad=True)
    student, teacher = -torch.rand(2, 3), -torch.rand(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for objective in ("forward_kl", "reverse_kl", "jsd"):
        terms = distillation_terms(
            student, teacher, mask, gate="gap", beta=2.0, objective=objective, divergence=divergence
        )
        gate = torch.sigmoid(2.0 * (teacher - student)) * mask
        torch.testing.assert_close(terms.loss, gate * divergence)
        (slope,) = torch.autograd.grad(terms.loss.sum(), divergence)
        torch.testing.assert_close(slope, gate)


def test_a_divergence_that_is_missing_or_broken_is_named():
    ones = -torch.ones(2, 3)
    with pytest.raises(ValueError, match="'jsd' reads the divergence of two distributions"):
        distillation_terms(ones, ones, torch.ones(2, 3), objective="jsd")
    broken = torch.full((2, 3), float("inf"))
    with pytest.raises(ValueError, match="divergence holds NaN or infinity"):
        distillation_terms(ones, ones, torch.ones(2, 3), objective="jsd", divergence=broken)


def test_columns_are_means_over_all_distilled_tokens():
    sums = {"tokens": 8.0, **{f"distribution_{name}": 4.0 * i for i, name in enumerate(COLUMNS)}}
    assert column_means(sums) == {
        "sdar/divergence": 0.0,
        "sdar/support_entropy/student": 0.5,
        "sdar/support_entropy/teacher": 1.0,
        "sdar/tail_mass/student": 1.5,
        "sdar/tail_mass/teacher": 2.0,
    }
    assert column_means({"tokens": 8.0}) == {}


# checks before the start


@pytest.fixture(scope="module")
def recipe():
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("sdar_quickstart")


def faults(recipe, **overrides) -> str:
    config = copy.deepcopy(recipe)
    for option, value in overrides.items():
        OmegaConf.update(config, option, value, force_add=True)
    return "\n".join(loss_faults(config, load_config(config.sdar)))


SUPPORT = {"sdar.loss.objective": "reverse_kl", "sdar.loss.support": "top_k", "sdar.loss.top_k": 8}

REFUSED = {
    "a support for the sampled token": (
        {"sdar.loss.support": "top_k"},
        ["sdar.loss.support=top_k has no effect", "objective=sampled"],
    ),
    "a chunk for the sampled token": ({"sdar.loss.chunk_tokens": 8}, ["sdar.loss.chunk_tokens=8 has no effect"]),
    "k over the whole vocabulary": (
        {"sdar.loss.objective": "jsd", "sdar.loss.top_k": 8},
        ["sdar.loss.top_k=8 has no effect over the whole vocabulary", "support=top_k"],
    ),
    "a tail of the whole vocabulary": (
        {"sdar.loss.objective": "jsd", "sdar.loss.support": "full", "sdar.loss.tail": "bucket"},
        ["sdar.loss.tail=bucket has no effect"],
    ),
    "k beyond the vocabulary": (
        {**SUPPORT, "sdar.loss.top_k": 5000},
        ["sdar.loss.top_k=5000 is more than the model's vocabulary of 102 tokens", "support=full"],
    ),
    "a default k within the vocabulary": ({**SUPPORT, "sdar.loss.top_k": None}, []),
    "one token, renormalised": (
        {**SUPPORT, "sdar.loss.top_k": 1, "sdar.loss.tail": "renormalise"},
        ["sdar.loss.tail=renormalise", "nothing would be learned"],
    ),
    "the whole vocabulary from other devices": (
        {"sdar.loss.objective": "jsd", "sdar.teacher.placement": "pool"},
        ["sdar.loss.support=full", "sdar.teacher.placement=pool", "support=top_k"],
    ),
    "fused kernels": (
        {**SUPPORT, "actor_rollout_ref.model.use_fused_kernels": True},
        ["sdar.loss.objective=reverse_kl", "use_fused_kernels=False"],
    ),
    "sequence parallelism": (
        {**SUPPORT, "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2},
        ["ulysses_sequence_parallel_size=2", "objective=sampled"],
    ),
    "sequence parallelism, by the engine's option": (
        {**SUPPORT, "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2},
        ["actor.fsdp_config.ulysses_sequence_parallel_size=2", "objective=sampled"],
    ),
    "sequence parallelism of the reference": (
        {**SUPPORT, "actor_rollout_ref.ref.ulysses_sequence_parallel_size": 2},
        ["actor_rollout_ref.ref.ulysses_sequence_parallel_size=2", "objective=sampled"],
    ),
    "static padding": (
        {**SUPPORT, "actor_rollout_ref.actor.fsdp_config.pad_to_length": True},
        ["static padding", "actor.fsdp_config.pad_to_length=False"],
    ),
    "a schedule on the sampled tokens' gradient": (
        {**SUPPORT, "sdar.loss.coef_schedule": {"name": "grad_share", "options": {"share": 0.1}}},
        ["coef_schedule.name=grad_share", "of=weights, or another schedule"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_the_start(recipe, case):
    overrides, words = REFUSED[case]
    said = faults(recipe, **overrides)
    assert bool(said) == bool(words)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("tokens", "options", "refused"),
    [
        (102, {"sdar.loss.objective": "jsd"}, ""),
        (110, {"sdar.loss.objective": "jsd"}, "support=full"),
        (90, {"sdar.loss.objective": "forward_kl"}, "support=full"),
        (110, SUPPORT, ""),
        (90, SUPPORT, "sdar.loss.objective=reverse_kl"),
        (
            110,
            {"sdar.loss.objective": "k1", "sdar.loss.anchor.student": 0.5},
            "by token; use sdar.loss.objective=sampled",
        ),
        (90, {**SUPPORT, "sdar.loss.objective": "forward_kl"}, ""),
        (110, {**SUPPORT, "sdar.loss.objective": "forward_kl"}, ""),
    ],
)
def test_a_teacher_with_a_head_of_another_size_is_refused_where_heads_are_compared(
    recipe, tmp_path, tokens, options, refused
):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": tokens}))
    told = faults(recipe, **options, **{"sdar.teacher.source": "reference", "sdar.teacher.path": str(tmp_path)})
    assert bool(told) == bool(refused)
    if refused:
        assert refused in told and f"a head of {tokens} tokens" in told and "one of 102" in told


def test_qwens_larger_models_have_a_larger_head(recipe):
    models = {
        "actor_rollout_ref.model.path": "Qwen/Qwen2.5-3B-Instruct",
        "sdar.teacher.source": "reference",
        "sdar.teacher.path": "Qwen/Qwen2.5-7B-Instruct",
    }
    told = faults(recipe, **models, **{"sdar.loss.objective": "reverse_kl"})
    assert "a head of 152064 tokens" in told and "one of 151936" in told
    assert faults(recipe, **models, **SUPPORT) == ""


def test_a_sound_choice_passes(recipe):
    for tail in ("bucket", "renormalise"):
        assert faults(recipe, **SUPPORT, **{"sdar.loss.tail": tail, "sdar.loss.chunk_tokens": 16}) == ""
    assert faults(recipe, **{"sdar.loss.objective": "forward_kl", "sdar.loss.support": "full"}) == ""


def test_a_baseline_may_keep_the_options_of_its_recipe(recipe):
    assert faults(recipe, **{"sdar.loss.coef": 0, "sdar.loss.top_k": 8}) == ""
