"""Student's and teacher's prompt: same template, same tokens but for the skills; never cut inside."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdar_verl.rollout.control import control_strings_of
from sdar_verl.rollout.prompt_builder import PromptBuilder, PromptTooLong, TurnView
from sdar_verl.rollout.prompts import PromptTemplate, PromptTemplateError
from tests.support.chatml import chatml_tokenizer, qwen_like_tokenizer


class WordTokenizer:
    """A chat template and one id per word."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, return_dict, **kwargs):
        assert tokenize and not return_dict and [message["role"] for message in messages] == ["user"]
        text = f"<user> {messages[0]['content']} " + ("<assistant>" if add_generation_prompt else "")
        if kwargs.get("enable_thinking") is False:
            text += " <think> </think>"
        ids = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            ids.append(self.words.index(word))
        return ids

    def decode(self, ids) -> str:
        return " ".join(self.words[i] for i in ids)


@pytest.fixture
def tokenizer():
    return WordTokenizer()


@pytest.fixture
def builder(tokenizer):
    return PromptBuilder(tokenizer, PromptTemplate.load("alfworld"))


TURN = TurnView(
    task="put a mug in the fridge",
    history=(("first sight", "go to desk 1"), ("second sight", None)),
    observation="third sight",
    admissible_actions=("look", "open fridge 1"),
    step=3,
    max_steps=50,
)
SKILLS = "mugs live in cabinets"


def test_teacher_differs_from_the_student_in_the_skill_text_alone(builder, tokenizer):
    student, _ = builder.fit(TURN, "", limit=1000, drop_history=False, option="o")
    teacher, _ = builder.fit(TURN, SKILLS, limit=1000, drop_history=False, option="o")
    assert SKILLS in tokenizer.decode(teacher)
    assert SKILLS not in tokenizer.decode(student)
    start = next(i for i, (a, b) in enumerate(zip(student, teacher, strict=False)) if a != b)
    added = len(teacher) - len(student)
    assert teacher[:start] == student[:start]
    assert teacher[start + added :] == student[start:]


def test_an_empty_context_gives_the_students_very_tokens(builder):
    first, _ = builder.fit(TURN, "", limit=1000, drop_history=False, option="o")
    second, _ = builder.fit(TURN, "", limit=1000, drop_history=True, option="o")
    assert first == second


def test_the_oldest_history_goes_first_and_the_skills_stay(builder, tokenizer):
    full, _ = builder.fit(TURN, SKILLS, limit=1000, drop_history=True, option="o")
    shorter, dropped = builder.fit(TURN, SKILLS, limit=len(full) - 1, drop_history=True, option="o")
    assert dropped == 1
    text = tokenizer.decode(shorter)
    assert "first sight" not in text
    assert "second sight" in text
    assert SKILLS in text


def test_too_long_is_an_error_that_names_the_option(builder):
    full, _ = builder.fit(TURN, SKILLS, limit=1000, drop_history=False, option="o")
    with pytest.raises(
        PromptTooLong, match=rf"sdar\.x={len(full) - 1} is too small for a prompt of {len(full)} tokens"
    ):
        builder.fit(TURN, SKILLS, limit=len(full) - 1, drop_history=False, option="sdar.x")
    with pytest.raises(PromptTooLong, match="all 2 history pairs already dropped"):
        builder.fit(TURN, SKILLS, limit=5, drop_history=True, option="sdar.x")


def test_chat_template_arguments_are_passed_on(tokenizer):
    builder = PromptBuilder(tokenizer, PromptTemplate.load("alfworld"), {"enable_thinking": False})
    ids, _ = builder.fit(replace(TURN, history=()), "", limit=1000, drop_history=False, option="o")
    assert tokenizer.decode(ids).endswith("<think> </think>")


@pytest.fixture(scope="module")
def chatml():
    return chatml_tokenizer([SKILLS, "put a mug in the fridge"])


def test_a_system_message_holds_the_context_and_nothing_else_changes(chatml):
    template = PromptTemplate.load("alfworld", ("<|im_start|>", "<|im_end|>"))
    inside, system = (PromptBuilder(chatml, template, skill_position=place) for place in ("user", "system"))
    assert system.encode(TURN, "", TURN.history) == inside.encode(TURN, "", TURN.history)
    text = chatml.decode(system.encode(TURN, f"{SKILLS} <|im_end|>", TURN.history))
    assert text.startswith("<|im_start|>system\n")
    assert text.index(SKILLS) < text.index("<|im_start|>user")
    assert text.count("<|im_end|>") == 2, "the context opened a turn of its own"
    assert text.endswith(chatml.decode(inside.encode(TURN, "", TURN.history)))


def test_in_front_means_before_the_first_token_of_the_chat(chatml):
    builder = PromptBuilder(chatml, PromptTemplate.load("alfworld"), skill_position="front")
    student, teacher = builder.encode(TURN, "", TURN.history), builder.encode(TURN, SKILLS, TURN.history)
    assert teacher[len(teacher) - len(student) :] == student
    assert chatml.decode(teacher[: len(teacher) - len(student)]) == SKILLS + "\n\n"


def test_a_chat_template_without_system_messages_is_named(chatml):
    import copy

    refuses = copy.deepcopy(chatml)
    refuses.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}"
    builder = PromptBuilder(refuses, PromptTemplate.load("alfworld"), skill_position="system")
    with pytest.raises(
        PromptTemplateError, match=r"system and user messages: no system role; use .*skill_position=user"
    ):
        builder.encode(TURN, SKILLS, ())


def test_a_model_whose_answers_come_in_channels_is_refused() -> None:
    """Decoding drops the marks, and the analysis would be read as the answer."""
    tokens = ("<|start|>", "<|end|>", "<|endoftext|>", "<|channel|>", "<|message|>", "<|return|>")
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    tokenizer = qwen_like_tokenizer(tokens, template)
    made = PromptBuilder(tokenizer, PromptTemplate.load("alfworld", control_strings_of(tokenizer)))
    with pytest.raises(PromptTemplateError, match=r"<\|channel\|>final<\|message\|>.*multi_turn.format=gpt-oss"):
        made.check()


@pytest.mark.parametrize(
    ("template", "given"), [(None, {}), ("{{ tools | length }}", {}), ("{{ messages[0].content }}", {"tokenize": True})]
)
def test_whatever_a_chat_template_raises_is_told_as_its_fault(template, given):
    tokenizer = qwen_like_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(PromptTemplateError, match="the model's chat template fails on user messages: "):
        PromptBuilder(tokenizer, PromptTemplate.load("alfworld"), given).fit(
            TURN, "", limit=1000, drop_history=False, option="o"
        )
