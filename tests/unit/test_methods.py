"""The method presets: what each sets is its paper's, and each passes every check on the recipes."""

from __future__ import annotations

import pytest

from sdar_verl.checks.run import RELEASED_METHODS, check_run
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.envs.base import Task
from sdar_verl.errors import ConfigError
from sdar_verl.panels import write_panel

# Method -> lambda, signal, gate, objective, policy gradient, teacher: facts of the papers, see docs/methods.md.
PAPER = {
    "grpo": (0.0, "loss", "gap", "sampled", True, "none"),
    "skill_grpo": (0.0, "loss", "gap", "sampled", True, "none"),
    "skill_prompt": (0.0, "loss", "gap", "sampled", True, "none"),
    "opsd": (1.0, "loss", "none", "k1", False, "actor"),
    "grpo_opsd": (0.01, "loss", "none", "k1", True, "actor"),
    "skill_sd": (0.001, "loss", "none", "k3", True, "actor"),
    "rlsd": (0.5, "advantage_weight", "gap", "sampled", True, "actor"),
    "sdar": (0.01, "loss", "gap", "sampled", True, "actor"),
    "sdar_frozen": (1.0, "loss", "gap", "sampled", True, "reference"),
    "revkl_frozen": (1.0, "loss", "none", "reverse_kl", True, "reference"),
    "agent_opsd": (0.5, "advantage_factor", "gap", "sampled", True, "actor"),
    "adrs": (0.02, "advantage_shaping", "gap", "sampled", True, "actor"),
    "sdpo": (1.0, "loss", "none", "jsd", False, "ema"),
    "retire_opd": (0.01, "loss", "none", "k1", True, "reference"),
    "grsd": (0.5, "advantage_turn_weight", "gap", "sampled", True, "actor"),
    "opid": (0.001, "advantage_shaping", "gap", "sampled", True, "actor"),
    "ahead": (0.5, "advantage_weight", "gap", "sampled", True, "actor"),
    "ocsd": (0.5, "advantage_tilt", "gap", "sampled", True, "actor"),
    "sr_opsd": (1.0, "loss", "none", "forward_kl", False, "ema"),
    "beta_opsd": (1.0, "loss", "none", "k1", False, "reference"),
    "rlcsd": (0.5, "advantage_nudge", "gap", "sampled", True, "snapshot"),
    "sipo": (0.15, "advantage_nudge", "gap", "sampled", True, "snapshot"),
    "tide": (1.0, "advantage_distance", "gap", "sampled", True, "reference"),
    "icsd": (0.01, "loss", "calibrated", "sampled", True, "actor"),
    "seed": (0.01, "loss", "gap", "sampled", True, "actor"),
    "hero": (1.0, "loss", "none", "jsd", False, "actor"),
}
# What is written elsewhere needs to know where.
ENDPOINT = ["sdar.context.writer.url=http://127.0.0.1:9/v1", "sdar.context.writer.model=m"]
FURTHER = {"opid": ENDPOINT, "ahead": ENDPOINT}
# What the released code does otherwise, by method.
RELEASED = {
    "opsd": (0.01, "loss", "half", "sampled", False, "actor"),
    "grpo_opsd": (0.01, "loss", "half", "sampled", True, "actor"),
}


@pytest.fixture(scope="module")
def panels(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("panels")
    tasks = [Task("alfworld", f"game-{i:02d}", "pick_and_place_simple", "put a mug on desk") for i in range(16)]
    overrides = []
    for name in ("train", "val"):
        write_panel(tasks, folder / f"{name}.parquet", name)
        overrides.append(f"data.{name}_files={folder / name}.parquet")
    return overrides


def essence(config) -> tuple:
    sdar = load_config(config.sdar)
    loss = sdar.loss
    return (loss.coef, loss.signal, loss.gate, loss.objective, loss.policy_gradient, sdar.teacher.source)


@pytest.mark.parametrize("method", PAPER)
def test_a_preset_is_its_papers_method_and_passes_all_checks(method, panels):
    config = compose_config("sdar_quickstart", [f"method={method}", *FURTHER.get(method, []), *panels])
    assert config.sdar.method == method
    assert config.sdar.variant == "paper"
    assert essence(config) == PAPER[method]
    check_run(config, load_config(config.sdar))


@pytest.mark.parametrize("method", PAPER)
def test_the_released_variant_is_the_released_codes_or_an_error(method, panels):
    further = FURTHER.get(method, [])
    config = compose_config("sdar_quickstart", [f"method={method}", "variant=released", *further, *panels])
    sdar = load_config(config.sdar)
    if method not in RELEASED_METHODS:
        with pytest.raises(ConfigError, match=rf"sdar.variant=released has no effect with sdar.method={method}"):
            check_run(config, sdar)
        return
    check_run(config, sdar)
    assert essence(config) == RELEASED.get(method, PAPER[method])
    assert sdar.prompt.skill_position == "front"
    assert sdar.advantage.group_stats == "turn"
    assert config.actor_rollout_ref.actor.entropy_coeff == 0.001


def test_rlsds_lambda_decays_only_in_the_released_code():
    schedules = [
        load_config(compose_config("sdar_quickstart", ["method=rlsd", f"variant={variant}"]).sdar).loss.coef_schedule
        for variant in ("paper", "released")
    ]
    assert schedules[0].name == "constant"
    assert (schedules[1].name, schedules[1].options) == ("linear_decay", {"steps": 100})


def test_opsd_trains_its_term_alone():
    actor = compose_config("sdar_alfworld", ["method=opsd"]).actor_rollout_ref.actor
    assert (actor.kl_loss_coef, actor.entropy_coeff) == (0.0, 0.0)
    assert compose_config("sdar_alfworld", ["method=sdar"]).actor_rollout_ref.actor.kl_loss_coef == 0.01


def test_skill_grpo_is_validated_with_the_skills_and_without():
    arms = load_config(compose_config("sdar_alfworld", ["method=skill_grpo"]).sdar).validation.arms
    assert {name: (arm.context, arm.temperature) for name, arm in arms.items()} == {
        "student": ("none", 0.4),
        "with_skills": ("skills", 0.4),
    }


def test_an_override_wins_over_the_preset():
    config = compose_config("sdar_quickstart", ["method=sdar", "sdar.loss.coef=0.3"])
    assert config.sdar.loss.coef == 0.3


@pytest.mark.parametrize("group", ["method", "variant"])
def test_an_unknown_preset_lists_the_known_ones(group):
    with pytest.raises(ConfigError, match=r"sdar|paper"):
        compose_config("sdar_quickstart", [f"{group}=sdra"])
