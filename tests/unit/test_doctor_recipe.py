"""The doctor of a recipe of verl's: prompts on its own data, rows without a context, what verl's loops cannot make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdar_verl.doctor.findings import as_text
from sdar_verl.doctor.prompts import _white_space
from sdar_verl.doctor.run_checks import check_config
from sdar_verl.local import start_policy
from tests.support.calculator import CONFIG
from tests.support.chatml import qwen_like_tokenizer
from tests.support.recipe_run import recipe_arguments, word_problems
from tests.support.verl_version import IS_VERL_090
from tests.unit.test_doctor import LAPTOP

ANSWER = "sdar.context.sources=[answer]"
COLUMN = ("sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.answer")


def diagnose(folder: Path, *overrides: str, rows: Any = None) -> str:
    return as_text(check_config("sdar_ppo", recipe_arguments(folder, *overrides, rows=rows), LAPTOP, 0))


def tokens(text: str) -> int:
    """Of a user's message: a token a byte, and three control tokens."""
    return len(f"user\n{text}\nassistant\n".encode()) + 3


def test_the_longest_prompts_of_the_data_are_measured(tmp_path: Path) -> None:
    rows = word_problems(16)
    said = [row["prompt"][0]["content"] for row in rows]
    shown = [f"{text}\n\n{row['extra_info']['answer']}" for text, row in zip(said, rows, strict=True)]
    text = diagnose(tmp_path, *COLUMN, rows=rows)
    assert f"16 rows of data.train_files: up to {max(map(tokens, said))} of 256 tokens" in text
    assert "16 of 16 rows (100%) have a context" in text
    found = int(text.split("teacher's prompt")[1].split("up to ")[1].split()[0])
    assert found >= max(map(tokens, shown)), "the column's own words stand before it"
    assert "FAIL" not in text


def test_rows_without_a_context_are_counted(tmp_path: Path) -> None:
    rows = word_problems(16)
    for row in rows[:4]:
        row["extra_info"]["answer"] = ""
    rows.reverse()
    text = diagnose(tmp_path, *COLUMN, rows=rows)
    assert "warn  context" in text and "12 of 16 rows (75%) have a context by sdar.context.sources=[column]" in text


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("sdar.teacher.max_prompt_length=90",), ("FAIL  teacher's prompt", "stops the run", "on_long_prompt=mask")),
        (
            ("sdar.teacher.max_prompt_length=90", "sdar.teacher.on_long_prompt=mask"),
            ("warn  teacher's prompt", "these rows have no teacher"),
        ),
        (("data.max_prompt_length=60",), ("FAIL  student's prompt", "verl cuts them", "filter_overlong_prompts=True")),
        (("data.max_prompt_length=60", "data.filter_overlong_prompts=True"), ("warn  student's prompt", "leaves them")),
        (
            ("data.max_prompt_length=60", "sdar.context.on_foreign_prompt=mask"),
            ("warn  student's prompt", "verl cuts them"),
        ),
    ],
)
def test_prompts_above_a_limit_are_told_with_the_row(tmp_path: Path, overrides: Any, told: Any) -> None:
    text = diagnose(tmp_path, ANSWER, *overrides)
    assert all(word in text for word in (*told, "of train.parquet")), text


def test_a_late_context_is_bounded_by_an_answer(tmp_path: Path) -> None:
    sibling = ("sdar.context.sources=[sibling]", "data.max_response_length=400")
    assert "known only when a group has ended" in diagnose(tmp_path, "sdar.context.sources=[sibling]")
    assert "above sdar.teacher.max_prompt_length=300" in diagnose(
        tmp_path, *sibling, "sdar.teacher.max_prompt_length=300"
    )


def test_tools_stand_in_the_prompts_of_the_loop_that_shows_them(tmp_path: Path) -> None:
    tools = tmp_path / "tools.yaml"
    tools.write_text(CONFIG)
    flags = [ANSWER, "actor_rollout_ref.rollout.multi_turn.enable=True", "data.max_prompt_length=1500"]
    flags += [f"actor_rollout_ref.rollout.multi_turn.tool_config_path={tools}", "sdar.teacher.max_prompt_length=1700"]
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    loops = ("single_turn_agent", "tool_agent")
    longest = []
    for loop in loops:
        arguments = recipe_arguments(tmp_path, *flags, f"actor_rollout_ref.rollout.agent.default_agent_loop={loop}")
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        text = as_text(check_config("sdar_ppo", arguments, LAPTOP, 0))
        longest.append([int(part.split()[0]) for part in text.split("up to ")[1:3]])
    assert longest[1][0] > longest[0][0] + 100 and longest[1][1] > longest[0][1] + 100


@pytest.mark.skipif(IS_VERL_090, reason="verl 0.9.0 does not continue prompts unless it is told to")
def test_a_tokenizer_that_verl_cannot_continue_is_told_before_ray(tmp_path: Path) -> None:
    text = diagnose(tmp_path, ANSWER, f"actor_rollout_ref.model.path={start_policy()}")
    assert "cannot be used (ValueError" in text and "newline" in text


def test_messages_that_the_chat_template_refuses_are_told_before_ray(tmp_path: Path) -> None:
    arguments = recipe_arguments(tmp_path, ANSWER)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    text = as_text(check_config("sdar_ppo", arguments, LAPTOP, 0))
    assert "cannot make the prompt of row 0 of" in text and "no such role" in text


def test_a_tokenizer_that_drops_white_space_is_told() -> None:
    from tokenizers import normalizers

    tokenizer = qwen_like_tokenizer()
    assert _white_space(tokenizer).level == "ok"
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    told = _white_space(tokenizer)
    assert told.level == "warn" and "'onetwo\\n\\nthree'" in told.text and "config.json" in str(told.remedy)
