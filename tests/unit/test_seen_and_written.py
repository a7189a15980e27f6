"""What the model wrote is read, and what it was to be shown is in its prompt, for every tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from sdar_verl.envs.search.dataset import QuestionFile, read_questions
from sdar_verl.envs.search.passages import Passage, read_corpus
from sdar_verl.envs.webshop.catalogue import stream_array
from sdar_verl.planner.families import find_architecture
from sdar_verl.rollout.actions import leaves_thought_open, parse_action
from sdar_verl.rollout.answers import AnswerReader
from sdar_verl.rollout.prompt_builder import PromptBuilder
from sdar_verl.rollout.prompts import PromptTemplate, PromptTemplateError
from sdar_verl.skills.bank import SkillBank
from sdar_verl.text_files import TextFileError, read_text
from tests.support.chatml import TEMPLATE, qwen_like_tokenizer
from tests.support.scripted import GOOD, play_episode

LONG = {"max_prompt_length": 4000, "max_response_length": 200, "teacher__max_prompt_length": 9000}
OPENS = TEMPLATE.replace("<|im_start|>assistant\n{% if", "<|im_start|>assistant\n<think>\n{% if")


def tokenizer_with(tokens: list[str], special: bool = True, template: str = TEMPLATE) -> Any:
    tokenizer = qwen_like_tokenizer(template=template)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    return tokenizer


# ---------------------------------------------------------------- tags that are special tokens


@pytest.mark.parametrize(
    "tokens",
    [
        ["<action>", "</action>"],
        ["<think>", "</think>"],
        ["<think>", "</think>", "<action>", "</action>"],
        ["</think>\n", " <action>", "</ACTION>"],
        ["<search>", "</search>", "<answer>", "</answer>"],
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_tags_are_read_whatever_the_tokenizer_holds_them_for(
    monkeypatch: pytest.MonkeyPatch, tokens: list[str], special: bool
) -> None:
    rows, infos, _, pool = play_episode(monkeypatch, tokenizer_with(tokens, special), [GOOD], **LONG)
    assert infos[0].error is None
    assert pool.actions == ["go to fridge 1"]
    assert not infos[0].invalid and infos[0].parse_error is None and len(rows) == 1


def test_other_special_tokens_are_no_words_of_the_model() -> None:
    tokenizer = tokenizer_with(["<search>", "</search>", "<tool>"])
    reader = AnswerReader(tokenizer, ["search"])
    ids = tokenizer("<search>a<|im_start|> b<tool></search><|im_end|>", add_special_tokens=False)["input_ids"]
    assert reader.text(ids) == "<search>a b</search>"
    assert reader.lost_tags() == []


def test_a_tokenizer_that_cannot_write_the_tags_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = qwen_like_tokenizer()
    plain = tokenizer.decode
    tokenizer.decode = lambda ids, **kwargs: plain(ids, **kwargs).replace("<action>", "")
    _, infos, server, _ = play_episode(monkeypatch, tokenizer, [GOOD], **LONG)
    assert "cannot write the tags <action>: encoded and" in infos[0].error
    assert not server.requests


# ---------------------------------------------------------------- thoughts that the chat template opens


def test_a_thought_that_the_prompt_opened_ends_with_its_tag_alone() -> None:
    said = "I could <action>look</action> first"
    assert parse_action(said).action == "look"
    for think in ("required", "optional"):
        cut_off = parse_action(said, think=think, opened=True)
        assert (cut_off.action, cut_off.error) == (None, "think block not closed")
        whole = parse_action(f"{said} </think> <action> go </action>", think=think, opened=True)
        assert (whole.action, whole.thought) == ("go", said)
    assert parse_action("<think> a </think> <action>go</action>", opened=True).thought == "a"


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("[THINK]", "[/THINK]"),
        ("<thinking>", "</thinking>"),
        ("<seed:think>", "</seed:think>"),
        ("◁think▷", "◁/think▷"),
    ],
)
def test_other_models_marks_of_a_thought(begin: str, end: str) -> None:
    """They may be special tokens, as Magistral's are."""
    tokenizer = tokenizer_with([begin, end])
    reader = AnswerReader(tokenizer, ["action"])
    for said, action, thought in (
        (f"{begin}maybe <action>look</action> would", None, None),
        (f"{begin}maybe <action>look</action>{end}<action>go</action>", "go", "maybe <action>look</action>"),
    ):
        parsed = parse_action(reader.text(tokenizer(said, add_special_tokens=False)["input_ids"]))
        assert (parsed.action, parsed.thought) == (action, thought)


@pytest.mark.parametrize(
    ("end", "opened"),
    [
        ("<|assistant|>", False),
        ("<|assistant|><think>\n", True),
        ("<|assistant|><THINK>Okay, ", True),
        ("<think>\n\n</think>\n\n", False),
        ("<think></think><think>", True),
        ("[THINK]", True),
        ("[THINK]a[/THINK]", False),
        ("<reasoning>\n", True),
        ("<seed:think>a</seed:think>", False),
    ],
)
def test_how_a_prompt_ends(end: str, opened: bool) -> None:
    assert leaves_thought_open(end) is opened


@pytest.mark.parametrize("rows", [{}, {"rollout__rows": "trajectory", "rollout__turn_length": 80}])
@pytest.mark.parametrize("tokens", [[], ["<think>", "</think>"]])
def test_a_cut_off_thought_is_not_executed(
    monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any], tokens: list[str]
) -> None:
    script = ["maybe <action> go to desk 1 </action>", "so </think> <action> go to fridge 1 </action>"]
    long = {**LONG, "max_response_length": 3000 if rows else 200}
    tokenizer = tokenizer_with(tokens, template=OPENS)
    _, infos, _, pool = play_episode(monkeypatch, tokenizer, script, **long, **rows)
    assert pool.actions == ["none", "go to fridge 1"]
    steps = [step for info in infos for step in info.steps]
    assert [(step.unparsed, step.parse_error) for step in steps] == [(True, "think block not closed"), (False, None)]


# ---------------------------------------------------------------- what the model is shown

DROPS_SYSTEM = TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
CUTS = TEMPLATE.replace("message['content']", "message['content'][:400]")
FIRST_LINE = TEMPLATE.replace("message['content']", "message['content'].split('\n')[0]")
CUTS_SYSTEM = TEMPLATE.replace(
    "message['content']", "(message['content'][:200] if message['role'] == 'system' else message['content'])"
)


def builder(template: str, position: str = "user") -> PromptBuilder:
    return PromptBuilder(qwen_like_tokenizer(template=template), PromptTemplate.load("alfworld"), {}, position)


def test_an_action_is_read_as_it_was_written() -> None:
    tokenizer = qwen_like_tokenizer()
    reader, text = AnswerReader(tokenizer, ["action"]), "<action>click[2 , 3 . do n't]</action>"
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (tokenizer.decode(ids), reader.text(ids)) == ("<action>click[2, 3. don't]</action>", text)


def test_a_chat_template_that_takes_words_out_is_named() -> None:
    """As one of Nemotron's, whose switch is also in a tag."""
    changes = TEMPLATE.replace("message['content']", "message['content'].replace('/think', '')")
    with pytest.raises(PromptTemplateError, match=r"does not show the line '.*</think>.* of sdar\.prompt\.template"):
        builder(changes).check()


@pytest.mark.parametrize("position", ["user", "system", "front"])
@pytest.mark.parametrize("template", [TEMPLATE, OPENS])
def test_a_sound_chat_template_passes(template: str, position: str) -> None:
    builder(template, position).check(conversation=True)


@pytest.mark.parametrize(
    ("template", "position", "message"),
    [
        (DROPS_SYSTEM, "system", r"whole context at turn 1; sdar\.prompt\.skill_position=system.*skill_position=user"),
        (CUTS_SYSTEM, "system", "whole context at turn 1"),
        (CUTS, "user", r"whole task and observation and context.*chat template of actor_rollout_ref\.model\.path"),
        (CUTS, "front", "whole task and observation at turn"),
        (FIRST_LINE, "user", "whole task and observation and context"),
    ],
)
def test_a_chat_template_that_hides_what_it_is_given_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, template: str, position: str, message: str
) -> None:
    with pytest.raises(PromptTemplateError, match=message):
        builder(template, position).check()
    tokenizer = qwen_like_tokenizer(template=template)
    _, infos, server, _ = play_episode(monkeypatch, tokenizer, [GOOD], prompt__skill_position=position, **LONG)
    assert "does not show the whole" in infos[0].error and not server.requests


# ---------------------------------------------------------------- files of the user's

MARK = b"\xef\xbb\xbf"


def with_mark(path: Path, text: str, times: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MARK * times + text.replace("\n", "\r\n").encode())
    return path


@pytest.mark.parametrize("times", [1, 2])
def test_a_byte_order_mark_is_in_no_prompt(tmp_path: Path, times: int) -> None:
    source = "{{ task }}\n{{ skills }}\n{{ observation }}\n<action>"
    path = with_mark(tmp_path / "mine.jinja", source, times)
    slots = {"task": "t", "skills": "s", "observation": "o", "history": [], "admissible_actions": []}
    assert PromptTemplate.load(path).render(**slots, step=1, max_steps=1) == "t\ns\no\n<action>"


def test_whatever_file_a_user_brings_may_have_one(tmp_path: Path) -> None:
    with_mark(tmp_path / "bank" / "a" / "SKILL.md", "---\nname: a\ndescription: d\n---\ntext\nmore\n")
    assert [skill.text for skill in SkillBank.load(tmp_path / "bank")] == ["text\nmore"]
    principles = {"general_skills": [{"skill_id": "g", "title": "T", "principle": "P"}]}
    assert len(SkillBank.load(with_mark(tmp_path / "bank.json", json.dumps(principles)))) == 1

    lines = "".join(json.dumps({"id": str(i), "contents": f"text {i}"}) + "\n" for i in range(3))
    corpus = with_mark(tmp_path / "corpus.jsonl", lines)
    assert read_corpus(corpus) == [Passage(str(i), "", f"text {i}") for i in range(3)]
    corpus.write_bytes(corpus.read_bytes() + MARK + b'{"id": "3", "contents": "of another file"}\n')
    assert len(read_corpus(corpus)) == 4

    question = json.dumps({"question": "who?", "golden_answers": ["me"], "data_source": "nq"})
    found = read_questions([QuestionFile("train", with_mark(tmp_path / "train.jsonl", question + "\n"))])
    assert [task.description for task in found.tasks.values()] == ["who?"]

    assert list(stream_array(with_mark(tmp_path / "items.json", '[{"a": 1},\n{"b": 2}]\n'))) == [{"a": 1}, {"b": 2}]
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 10, "hidden_size": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 4}
    with_mark(tmp_path / "model" / "config.json", json.dumps(config))
    assert find_architecture(str(tmp_path / "model")).vocabulary == 10


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_bytes("{{ task }}".encode("utf-16"))
    with pytest.raises(TextFileError, match=r"mine\.jinja is not UTF-8 .*save it as UTF-8"):
        read_text(tmp_path / "mine.jinja")
    with pytest.raises(PromptTemplateError, match="is not UTF-8"):
        PromptTemplate.load(tmp_path / "mine.jinja")
