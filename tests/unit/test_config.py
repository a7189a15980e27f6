"""The sdar node: defaults, ranges, unknown keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sdar_verl.config import SdarConfig, load_config
from sdar_verl.errors import ConfigError

BASE = Path(__file__).parents[2] / "hydra_configs" / "sdar_node.yaml"


def test_the_yaml_lists_every_option_with_the_typed_default():
    node = OmegaConf.to_container(OmegaConf.load(BASE).sdar)
    assert node == SdarConfig().model_dump()


def test_defaults_are_the_papers():
    config = load_config({})
    assert (config.loss.coef, config.loss.beta, config.loss.gate, config.loss.objective) == (
        0.01,
        5.0,
        "gap",
        "sampled",
    )
    assert config.teacher.source == "actor"
    assert config.prompt.history_length == 2
    assert config.env.max_steps == 50


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"loss": {"beta": -1}}, ["sdar.loss.beta=-1", "greater than or equal to 0"]),
        ({"loss": {"coef": -0.1}}, ["sdar.loss.coef=-0.1"]),
        ({"loss": {"gat": "gap"}}, ["sdar.loss.gat: no such option", "known: coef, coef_schedule, signal"]),
        ({"los": {}}, ["sdar.los: no such option", "loss"]),
        ({"teacher": {"placement": "cloud"}}, ["sdar.teacher.placement='cloud'", "colocated"]),
        ({"teacher": {"max_prompt_length": 0}}, ["sdar.teacher.max_prompt_length=0"]),
        ({"env": {"max_steps": "many"}}, ["sdar.env.max_steps='many'"]),
        ({"skills": {"retrieval": []}}, ["sdar.skills.retrieval=[]"]),
        ({"validation": {"arms": {"a": {"context": "none"}}}}, ["sdar.validation.arms.a.temperature"]),
        ({"loss": {"coef": float("nan")}}, ["sdar.loss.coef=nan must be a finite number"]),
        ({"loss": {"gate_options": {"beta": float("inf")}}}, ["sdar.loss.gate_options.beta=inf must be a finite"]),
        ({"env": {"options": {"rewards": [1.0, float("nan")]}}}, ["sdar.env.options.rewards[1]=nan must be a finite"]),
        ({"teacher": {"source": "none"}}, ["sdar.loss.coef=0.01 needs a teacher", "sdar.loss.coef=0"]),
    ],
)
def test_a_bad_option_is_named_with_its_value(node, words):
    with pytest.raises(ConfigError) as error:
        load_config(node)
    for word in words:
        assert word in str(error.value)


def test_every_fault_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        load_config({"loss": {"beta": -1, "coef": -2}, "nope": 1})
    assert str(error.value).count("sdar.") == 3


def test_no_node_says_where_to_get_one():
    with pytest.raises(ConfigError, match="sdar_alfworld"):
        load_config(None)


def test_omegaconf_interpolations_are_resolved():
    root = OmegaConf.create({"x": 2.5, "sdar": {"loss": {"beta": "${x}"}}})
    assert load_config(root.sdar).loss.beta == 2.5
