"""What a loop of a third party has tokenised by itself is noted, so that the teacher's prompt can be made of it."""

from __future__ import annotations

from typing import Any

import pytest

from sdar_verl.verl.recipe_prompts import Built
from sdar_verl.verl.taught_loop import _recording
from tests.support.chatml import qwen_like_tokenizer

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def noted() -> tuple[Any, list[Built], Any]:
    tokenizer, built = qwen_like_tokenizer(), []
    return _recording(tokenizer, built), built, tokenizer


@pytest.mark.parametrize("form", [{"return_dict": False}, {}], ids=["list", "dict"])
def test_messages_tools_and_ids_are_noted(noted: Any, form: dict[str, bool]) -> None:
    own, built, tokenizer = noted
    messages = [dict(message) for message in ASKED]
    own.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, tokenize=True, **form)
    messages[1]["content"] = "changed afterwards"
    (note,) = built
    assert (note.messages, note.tools) == (ASKED, TOOLS)
    assert note.ids == tokenizer.apply_chat_template(ASKED, tools=TOOLS, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("said", [[{}], [{"role": "tool", "content": "2"}], [ASKED, ASKED]])
def test_what_is_no_prompt_is_not(noted: Any, said: Any) -> None:
    """A tool's answer, a system prompt measured by an empty message, a batch."""
    own, built, _ = noted
    own.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    own.apply_chat_template(said, tokenize=True)
    assert built == []


def test_text_is_not_and_the_tokenizer_stays_as_it_was(noted: Any) -> None:
    own, built, tokenizer = noted
    own.apply_chat_template(ASKED, tokenize=False)
    tokenizer.apply_chat_template(ASKED)
    assert built == [] and type(own) is type(tokenizer)
    assert own("a b")["input_ids"] == tokenizer("a b")["input_ids"]
