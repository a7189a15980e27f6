"""Anchored targets, contrasts and contexts by turn that cannot work, told before Ray starts."""

from __future__ import annotations

import pytest

from sdar_verl.errors import ConfigError
from tests.support.checked_recipe import checked_recipe, run_checks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return checked_recipe(tmp_path_factory.mktemp("panels"))


CASES = {
    "an anchor of no distribution": (
        {"sdar.loss.anchor.student": 0.5},
        ["sdar.loss.anchor has no effect with sdar.loss.objective=sampled", "k1, k2, k3, forward_kl"],
    ),
    "an anchor of shaped advantages": (
        {"sdar.loss.anchor.student": 0.5, "sdar.loss.objective": "k1"}
        | {"sdar.loss.signal": "advantage_weight", "sdar.loss.coef": 0.5},
        ["sdar.loss.anchor has no effect with sdar.loss.signal=advantage_weight"],
    ),
    "k tokens for the sampled one": (
        {"sdar.loss.anchor.student": 0.5, "sdar.loss.objective": "k1", "sdar.loss.support": "top_k"},
        ["sdar.loss.support=top_k", "sdar.loss.objective=k1", "may lie outside of the k"],
    ),
    "an anchored token beside a pool": (
        {
            "sdar.loss.anchor.student": 0.5,
            "sdar.loss.objective": "k1",
            "sdar.teacher.placement": "pool",
            "sdar.teacher.pool_gpus_per_node": 1,
        },
        ["support=full needs the teacher's head", "on other devices; set sdar.teacher.placement=colocated"],
    ),
    "an anchored token of a rollout server": (
        {
            "sdar.loss.anchor.student": 0.5,
            "sdar.loss.objective": "k1",
            "sdar.teacher.source": "actor",
            "sdar.teacher.placement": "rollout_server",
            "actor_rollout_ref.rollout.calculate_log_probs": True,
        },
        ["placement=rollout_server", "sdar.loss.objective=k1 with sdar.loss.anchor", "without an anchor"],
    ),
    "a schedule of no anchor": (
        {"sdar.loss.anchor.student_schedule.name": "linear_decay"}
        | {"sdar.loss.anchor.student_schedule.options": {"steps": 20}},
        ["anchor.student_schedule.name=linear_decay has no effect", "sdar.loss.anchor.student=0"],
    ),
    "a schedule that follows gradients": (
        {"sdar.loss.anchor.student": 0.5, "sdar.loss.objective": "k1"}
        | {"sdar.loss.anchor.student_schedule.name": "grad_share"}
        | {"sdar.loss.anchor.student_schedule.options": {"share": 0.1}},
        ["anchor.student_schedule.name=grad_share follows", "sdar.loss.coef_schedule"],
    ),
    "a schedule that follows the gap of a teacher within the update": (
        {"sdar.loss.anchor.student": 0.5, "sdar.loss.objective": "k1", "sdar.teacher.source": "actor_fresh"}
        | {"sdar.loss.anchor.student_schedule.name": "hand_off"},
        ["sdar.loss.anchor.student_schedule.name=hand_off", "sdar.teacher.source=actor_fresh"],
    ),
    "an anchored token on a sequence-parallel engine": (
        {"sdar.loss.anchor.student": 0.5, "sdar.loss.objective": "k1", "trainer.n_gpus_per_node": 2}
        | {"actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2},
        ["sdar.loss.objective=k1 with sdar.loss.anchor is not available", "objective=sampled without an anchor"],
    ),
    "an unknown schedule of an anchor": (
        {"sdar.loss.anchor.student": 0.5, "sdar.loss.objective": "k1"}
        | {"sdar.loss.anchor.student_schedule.name": "sawtooth"},
        ["sdar.loss.anchor.student_schedule", "sawtooth"],
    ),
    "a discount above one": (
        {"sdar.loss.objective": "k1", "sdar.loss.objective_options": {"discount": 1.5}},
        ["sdar.loss.objective_options: k1 has discount=1.5", "[0, 1]"],
    ),
    "an anchor without the start policy": (
        {
            "sdar.loss.anchor.reference": 0.1,
            "sdar.loss.objective": "forward_kl",
            "actor_rollout_ref.actor.use_kl_loss": False,
            "sdar.teacher.source": "actor",
        },
        ["sdar.loss.anchor.reference=0.1", "does not start", "use_kl_loss=True"],
    ),
    "an anchor of an adapter": (
        {
            "sdar.loss.anchor.reference": 0.1,
            "sdar.loss.objective": "forward_kl",
            "actor_rollout_ref.model.lora_rank": 4,
            "sdar.teacher.source": "actor",
        },
        ["sdar.loss.anchor.reference=0.1", "adapter", "anchor.student"],
    ),
    "an anchor within the update": (
        {
            "sdar.loss.anchor.reference": 0.1,
            "sdar.loss.objective": "forward_kl",
            "sdar.teacher.source": "actor_fresh",
        },
        ["sdar.loss.anchor.reference=0.1 is a pass before the update", "sdar.teacher.source=actor_fresh"],
    ),
    "contexts by turn in one row": (
        {
            "sdar.context.sources": ["next_observation"],
            "sdar.rollout.rows": "trajectory",
            "sdar.rollout.turn_length": 20,
            "sdar.prompt.history_length": 0,
        },
        ["next_observation differ by turn", "sdar.rollout.rows=trajectory", "rows=per_turn"],
    ),
    "episodes without a teacher": (
        {"sdar.context.episodes": "failed", "sdar.teacher.source": "none", "sdar.loss.coef": 0},
        ["sdar.context.episodes=failed has no effect", "sdar.teacher.source=none"],
    ),
    "a contrast of nothing": (
        {"sdar.context.contrast.texts": 3},
        ["sdar.context.contrast.texts=3 has no effect", "sdar.context.contrast.sources=[]"],
    ),
    "a contrast with itself": (
        {"sdar.context.contrast.sources": ["skills"]},
        ["sdar.context.contrast.sources=['skills']", "gap between them is 0", "control=shuffled"],
    ),
    "a contrast without a teacher": (
        {"sdar.context.contrast.sources": ["failed_sibling"], "sdar.teacher.source": "none", "sdar.loss.coef": 0},
        ["sdar.context.contrast.sources=['failed_sibling'] has no effect", "sdar.teacher.source=none"],
    ),
    "a contrast that is not read": (
        {"sdar.context.contrast.sources": ["failed_sibling"], "sdar.loss.gate": "none", "sdar.loss.objective": "k1"},
        ["sdar.context.contrast.sources=['failed_sibling'] changes the gap", "sdar.loss.gate=none does not read"],
    ),
    "a contrast within the update": (
        {"sdar.context.contrast.sources": ["failed_sibling"], "sdar.teacher.source": "actor_fresh"},
        ["sdar.context.contrast.sources=['failed_sibling'] needs the teacher's", "sdar.teacher.source=actor_fresh"],
    ),
    "a contrast of prompts with other histories": (
        {"sdar.context.contrast.sources": ["failed_sibling"], "sdar.teacher.on_long_prompt": "drop_history"},
        ["sdar.context.contrast.sources=['failed_sibling']", "sdar.teacher.on_long_prompt=drop_history", "mask"],
    ),
    "an unknown bad context": (
        {"sdar.context.contrast.sources": ["failing"]},
        ["sdar.context.contrast: unknown context 'failing'", "failed_sibling"],
    ),
    "an option of no bad context": (
        {
            "sdar.context.contrast.sources": ["failed_sibling"],
            "sdar.context.contrast.options": {"sibling": {"choice": "first"}},
        },
        ["sdar.context.contrast.options.sibling has no effect: sdar.context.contrast.sources=['failed_sibling']"],
    ),
    "the bad context of another task type": (
        {"sdar.context.contrast.sources": ["skills"], "sdar.context.contrast.control": "wrong"},
        ["sdar.context.contrast.control=wrong shows", "pick_and_place_simple"],
    ),
    "two means of another mean": (
        {
            "sdar.loss.signal": "advantage_nudge",
            "sdar.loss.signal_options": {"means": "two"},
            "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean",
        },
        ["'means': 'two'", "re-weighs a token mean", "loss_agg_mode=seq-mean-token-mean"],
    ),
}


def test_a_baseline_without_lambda_keeps_the_anchor_of_its_recipe(recipe):
    for objective in ("sampled", "k1"):
        run_checks(recipe, **{"sdar.loss.anchor.student": 0.5, "sdar.loss.objective": objective, "sdar.loss.coef": 0})


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_named(recipe, case):
    overrides, words = CASES[case]
    with pytest.raises(ConfigError) as error:
        run_checks(recipe, **overrides)
    for word in words:
        assert word in str(error.value), str(error.value)
