"""Checks of sdar.context.writer: what cannot apply is told before the start, with the remedy."""

from __future__ import annotations

import pytest

from sdar_verl.checks.run import check_run
from sdar_verl.checks.writer import writer_faults
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.context import builtin  # noqa: F401  registers the contexts
from sdar_verl.envs.base import Task
from sdar_verl.errors import ConfigError
from sdar_verl.panels import write_panel

W = "sdar.context.writer"
THERE = [f"{W}.source=endpoint", f"{W}.url=http://127.0.0.1:9/v1", f"{W}.model=m"]


def faults(*overrides: str) -> list[str]:
    config = compose_config("sdar_quickstart", list(overrides))
    return writer_faults(config, load_config(config.sdar))


LESSON = ["sdar.context.sources=[lesson]"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{W}.budget=5"], "no context of sdar.context.sources=['skills'] is written (guide, hint, lesson are)"),
        ([f"{W}.max_tokens=5"], "writer.max_tokens=5 has no effect"),
        (["method=grpo", f"{W}.temperature=1"], "has no effect"),
        ([*LESSON, f"{W}.url=http://h/v1"], "the policy writes; set source=endpoint"),
        ([*LESSON, f"{W}.in_flight=2"], "writer.in_flight=2 has no effect"),
        ([*LESSON, f"{W}.source=endpoint", f"{W}.model=m"], "needs sdar.context.writer.url="),
        ([*LESSON, f"{W}.source=endpoint", f"{W}.url=http://h/v1"], "needs sdar.context.writer.model=NAME"),
        ([*LESSON, *THERE, f"{W}.url=localhost:80/v1"], "is no address"),
        ([*LESSON, *THERE, f"{W}.url=http://a:b@h/v1"], "user or password"),
        ([*LESSON, *THERE, f"{W}.key_variable=NO_SUCH_KEY"], "NO_SUCH_KEY: that environment variable is not set"),
        ([*LESSON, *THERE, "+sdar.context.writer.body.stream=true"], "body has stream"),
        ([*LESSON, f"{W}.max_prompt_length=400"], "max_prompt_length=400 and an answer of max_tokens=20"),
        ([*LESSON, f"{W}.max_tokens=60"], "rollout.max_model_len=380"),
        ([*LESSON, "reward.reward_model.enable=true"], "enable_resource_pool=True"),
    ],
)
def test_what_cannot_apply_is_told(overrides, words, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    found = faults(*overrides)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        LESSON,
        [*LESSON, f"{W}.retries=1", f"{W}.temperature=0.3", f"{W}.max_tokens=30", f"{W}.max_prompt_length=310"],
        [*LESSON, *THERE, f"{W}.budget=0", f"{W}.max_prompt_length=30000", "+sdar.context.writer.body.seed=null"],
        [*LESSON, *THERE, "reward.reward_model.enable=true"],
        ["sdar.context.sources=[skills]", "sdar.context.contrast.sources=[guide]", *THERE],
        # Presets name a source; another context on the command line needs no more.
        ["method=ahead", "sdar.context.sources=[next_observation,feedback]"],
        ["method=opid", "sdar.context.sources=[feedback]", "~sdar.context.options.hint"],
        ["method=grsd", "sdar.context.sources=[sibling,failed_sibling]"],
    ],
)
def test_what_applies_is_no_fault(overrides):
    assert faults(*overrides) == []


@pytest.fixture
def panels(tmp_path) -> list[str]:
    tasks = [Task("alfworld", f"game-{i:02d}", "pick_and_place_simple", "put a mug on desk") for i in range(16)]
    for name in ("train", "val"):
        write_panel(tasks, tmp_path / f"{name}.parquet", name)
    return [f"data.{name}_files={tmp_path / name}.parquet" for name in ("train", "val")]


def checked(*overrides: str) -> None:
    config = compose_config("sdar_quickstart", list(overrides))
    check_run(config, load_config(config.sdar))


@pytest.mark.parametrize("method", ["opid", "ahead"])
def test_a_preset_whose_writer_is_elsewhere_says_what_it_needs_or_what_to_do_without(method, panels):
    with pytest.raises(ConfigError, match=r"needs sdar.context.writer.url=.*source=policy.*sources=\[feedback\]"):
        checked(f"method={method}", *panels)
    checked(f"method={method}", "sdar.context.writer.source=policy", *panels)


def test_an_option_of_a_replaced_context_says_how_to_leave_it_out(panels):
    with pytest.raises(ConfigError, match=r"~sdar\.context\.options\.hint on the command line"):
        checked("method=opid", "sdar.context.sources=[feedback]", *panels)
    checked("method=opid", "sdar.context.sources=[feedback]", "~sdar.context.options.hint", *panels)


def test_options_of_a_written_context_are_checked_as_others_are(panels):
    with pytest.raises(ConfigError, match=r"lesson.form='xml': input should be 'json' or 'text'"):
        checked(*LESSON, "+sdar.context.options.lesson.form=xml", *panels)
    for value in ("0", "'2'", "True", "1.5"):
        with pytest.raises(ConfigError, match=r"sdar.context.options.hint.most=.*: input should be"):
            checked("sdar.context.sources=[hint]", f"+sdar.context.options.hint.most={value}", *panels)
    with pytest.raises(ConfigError, match=r"context 'hint' has no option 'mots'"):
        checked("sdar.context.sources=[hint]", "+sdar.context.options.hint.mots=1", *panels)


def test_what_is_written_is_late(panels):
    with pytest.raises(ConfigError, match="known only when a group has ended"):
        checked(*LESSON, "sdar.teacher.placement=rollout_server", "sdar.teacher.source=actor", *panels)
    with pytest.raises(ConfigError, match="differ by turn"):
        checked(
            "sdar.context.sources=[hint]",
            "sdar.rollout.rows=trajectory",
            "sdar.rollout.turn_length=16",
            "sdar.prompt.history_length=0",
            *panels,
        )
