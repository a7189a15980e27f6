"""Arguments of the chat template that it does not read, and flags that arrive as texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from sdar_verl.checks.chat_template import chat_template_faults
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.local import start_policy

TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(start_policy())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def faults(model: Path, *overrides: str) -> list[str]:
    config = compose_config("sdar_ppo", [f"actor_rollout_ref.model.path={model}", *overrides])
    return chat_template_faults(config, load_config(OmegaConf.select(config, "sdar")))


@pytest.mark.parametrize("option", ["data.apply_chat_template_kwargs", "sdar.context.chat_template_kwargs"])
def test_what_the_template_reads_is_taken(model: Path, option: str) -> None:
    assert faults(model, f"+{option}.enable_thinking=False") == []
    assert faults(model, f"+{option}.tokenizer_kwargs={{}}") == []
    assert faults(model) == []


@pytest.mark.parametrize("option", ["data.apply_chat_template_kwargs", "sdar.context.chat_template_kwargs"])
def test_a_misspelt_argument_is_told(model: Path, option: str) -> None:
    (fault,) = faults(model, f"+{option}.enable_thinkin=False")
    assert fault.startswith(f"{option}.enable_thinkin=False has no effect") and "is enable_thinking meant?" in fault
    (fault,) = faults(model, f"+{option}.reasoning_effort=high")
    assert fault.endswith("it reads enable_thinking")


@pytest.mark.parametrize("text", ["'False'", "'true'"])
def test_a_flag_that_is_a_text_is_told(model: Path, text: str) -> None:
    (fault,) = faults(model, f"+data.apply_chat_template_kwargs.enable_thinking={text}")
    assert f"={text} is a text" in fault and f"enable_thinking={text.strip(chr(39)).capitalize()}" in fault


def test_a_level_by_its_name_is_no_flag(model: Path) -> None:
    assert faults(model, "+data.apply_chat_template_kwargs.enable_thinking=off") == []


def test_a_template_of_the_users_own_is_what_counts(model: Path) -> None:
    own = "actor_rollout_ref.model.custom_chat_template='{{ messages[0].content }}{{ mood }}'"
    assert faults(model, own, "+data.apply_chat_template_kwargs.mood=good") == []
    (fault,) = faults(model, own, "+data.apply_chat_template_kwargs.enable_thinking=False")
    assert fault.endswith("it reads mood")


def test_a_model_that_is_not_here_is_not_asked(tmp_path: Path) -> None:
    assert faults(tmp_path / "none", "+data.apply_chat_template_kwargs.enable_thinkin=False") == []
