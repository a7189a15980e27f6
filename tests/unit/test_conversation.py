"""Whole conversations as one row: token-exact growth, masks, limits, and the penalty on a turn's own tokens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from verl.utils.tokenizer.continuous_token import QwenContinuousTokenBuilder

from sdar_verl.config import load_config
from sdar_verl.context.words import WORDS
from sdar_verl.local import start_policy
from sdar_verl.observe.metrics import row_metrics
from sdar_verl.rollout.prompt_builder import PromptBuilder, TurnView
from sdar_verl.rollout.prompts import PromptTemplate, PromptTemplateError, template_names
from sdar_verl.rollout.rows import RowInfo, TurnNote
from sdar_verl.verl.advantage import AdvantageRows, advantage_rows, compute_sdar_advantage
from sdar_verl.verl.late import late_contexts
from tests.support.chatml import chatml_tokenizer
from tests.support.scripted import GOOD, LOST, MUTE, WRONG, play_episode, scripted_config
from tests.support.table import make_table
from tests.support.verl_version import IS_VERL_090

TURNS = [
    TurnView("put a mug on desk", (), f"sight {i}", ("look", "go to desk 1"), step=i, max_steps=9) for i in (1, 2, 3)
]
ANSWERS = ["<think> where is it </think>\n<action> look </action>", "<action>go to desk 1</action>"]
WHOLE = {"rollout__rows": "trajectory", "rollout__turn_length": 20, "prompt__history_length": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(start_policy())


@pytest.fixture(scope="module")
def chatml():
    return chatml_tokenizer([*ANSWERS, " ".join(WORDS)])


@pytest.fixture
def play(tokenizer, monkeypatch):
    def run(script, max_response_length=200, **settings):
        return play_episode(
            monkeypatch, tokenizer, script, max_response_length=max_response_length, **{**WHOLE, **settings}
        )

    return run


# ---------------------------------------------------------------- tokens between two answers


def grown(builder: PromptBuilder, answers: list[list[int]]) -> list[int]:
    ids = builder.encode(TURNS[0], "", ())
    for answer, turn in zip(answers, TURNS[1:], strict=True):
        ids = [*ids, *answer]
        ids += builder.follow_up(turn, ids[-1])
    return ids


def messages(template: PromptTemplate, answers: list[str]) -> list[dict[str, str]]:
    """The conversation in words."""
    out = []
    for index, turn in enumerate(TURNS):
        text = template.render(
            task=turn.task,
            skills="",
            history=[],
            observation=turn.observation,
            admissible_actions=turn.admissible_actions,
            step=turn.step,
            max_steps=turn.max_steps,
            standalone=index == 0,
        )
        out.append({"role": "user", "content": text})
        if index < len(answers):
            out.append({"role": "assistant", "content": answers[index]})
    return out


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}], ids=["plain", "thinking off"])
def test_a_conversation_grows_as_verls_own_builder_grows_it(chatml, arguments):
    template = PromptTemplate.load("alfworld")
    builder = PromptBuilder(chatml, template, arguments)
    answers = [[*chatml(answer)["input_ids"], chatml.eos_token_id] for answer in ANSWERS]
    talk = messages(template, ANSWERS)

    theirs = QwenContinuousTokenBuilder(chatml, chat_template_kwargs=arguments)
    merge = theirs.merge_non_assistant_tokens if IS_VERL_090 else theirs.merge_context_tokens
    ids = theirs.build_initial_tokens(talk[:1])
    for index, answer in enumerate(answers):
        ids = theirs.merge_assistant_tokens(ids, answer).token_ids
        said = 2 * index + 2
        ids = merge(talk[:said], talk[: said + 1], ids).token_ids
    assert grown(builder, answers) == ids


@pytest.mark.parametrize("kind", ["tokenizer", "chatml"])
def test_where_answers_are_encoded_as_sampled_it_is_the_chat_templates_own_rendering(kind, request):
    tokenizer = request.getfixturevalue(kind)
    template = PromptTemplate.load("alfworld_compact")
    builder = PromptBuilder(tokenizer, template)
    answers = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for answer in ANSWERS]
    talk = messages(template, ANSWERS)
    whole = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert grown(builder, answers) == whole


def test_sampled_tokens_are_never_encoded_again(chatml):
    """An answer in an encoding that no tokenizer would choose stays as it was sampled."""
    answer = [chatml.convert_tokens_to_ids(letter) for letter in "look"] + [chatml.eos_token_id]
    assert answer[:-1] != chatml("look")["input_ids"]
    builder = PromptBuilder(chatml, PromptTemplate.load("alfworld"))
    first = builder.encode(TURNS[0], "", ())
    assert grown(builder, [answer, answer])[len(first) : len(first) + len(answer)] == answer


def test_an_answer_that_was_cut_off_is_ended_by_the_template(chatml):
    builder = PromptBuilder(chatml, PromptTemplate.load("alfworld"))
    ended = builder.follow_up(TURNS[1], chatml.eos_token_id)
    cut = builder.follow_up(TURNS[1], chatml("look")["input_ids"][-1])
    assert cut == [chatml.eos_token_id, *ended]


@pytest.mark.parametrize("name", template_names())
def test_every_shipped_template_can_write_a_conversation(name):
    PromptTemplate.load(name).check_rows("trajectory")


def test_later_messages_say_neither_task_nor_skills_again(chatml):
    builder = PromptBuilder(chatml, PromptTemplate.load("alfworld"))
    text = chatml.decode(builder.follow_up(TURNS[1], chatml.eos_token_id))
    assert "sight 2" in text and "go to desk 1" in text and "turn 2 of at most 9" in text
    assert "put a mug" not in text
    assert "put a mug" in chatml.decode(builder.encode(TURNS[1], "", ()))


def test_a_chat_template_that_rewrites_answers_is_refused(chatml):
    import copy

    other = copy.deepcopy(chatml)
    other.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(PromptTemplateError, match=r"sdar\.rollout\.rows=per_turn"):
        PromptBuilder(other, PromptTemplate.load("alfworld")).follow_up(TURNS[1], 0)


def test_a_template_must_tell_first_and_later_messages_apart(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ task }} {{ skills }} {{ observation }}")
    template = PromptTemplate.load(file)
    template.check_rows("per_turn")
    with pytest.raises(PromptTemplateError, match="standalone"):
        template.check_rows("trajectory")
    file.write_text("{% if standalone %}{{ task }} {{ skills }} {{ observation }}{% endif %}")
    with pytest.raises(PromptTemplateError, match="does not show the observation where standalone is false"):
        PromptTemplate.load(file)


# ---------------------------------------------------------------- rows


def test_a_conversation_is_one_row_of_the_sampled_tokens(play, tokenizer):
    rows, infos, server, _ = play([MUTE, LOST, GOOD])
    assert len(rows) == 1 and len(server.requests) == 3
    row, info = rows[0], infos[0]
    assert row.prompt_ids == server.requests[0][0]
    # What the server was sent last is the row, up to its last answer.
    stream = [*row.prompt_ids, *row.response_ids]
    assert stream[: len(server.requests[2][0])] == server.requests[2][0]
    for turn, script in zip(info.turns, (MUTE, LOST, GOOD), strict=True):
        sampled = [*tokenizer(script, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert row.response_ids[turn.start : turn.stop] == sampled
        assert row.response_mask[turn.start : turn.stop] == [1] * len(sampled)
        assert row.response_logprobs[turn.start : turn.stop] == [-0.5] * len(sampled)
    assert sum(row.response_mask) == sum(turn.stop - turn.start for turn in info.turns)
    assert all(p == 0.0 for p, m in zip(row.response_logprobs, row.response_mask, strict=True) if not m)
    assert [turn.action for turn in info.turns] == [None, "go to desk 1", "go to fridge 1"]
    assert [turn.invalid for turn in info.turns] == [True, False, False]
    assert info.turns[1].observation == "nothing happens ."
    assert (row.reward_score, row.num_turns, info.success, info.cut) == (10.0, 3, True, False)
    assert row.extra_fields["reward_extra_info"]["invalid_actions"] == 1.0
    assert [params["max_tokens"] for _, params in server.requests] == [20] * 3


def test_the_teacher_gets_its_context_once_and_first(play, tokenizer):
    rows, infos, _, _ = play([LOST, GOOD])
    teacher = tokenizer.decode(infos[0].teacher_prompt_ids.tolist())
    assert teacher.count("apple in") == 1
    assert infos[0].context_tokens == len(infos[0].teacher_prompt_ids) - len(rows[0].prompt_ids) > 0
    assert "apple in" not in tokenizer.decode(rows[0].prompt_ids)


def test_an_episode_ends_when_a_whole_answer_has_no_room(play):
    rows, infos, server, _ = play([LOST, LOST, LOST])
    used = len(rows[0].response_ids) - (infos[0].turns[2].stop - infos[0].turns[2].start)
    exact, _, _, _ = play([LOST, LOST, LOST], max_response_length=used + 20)
    assert exact[0].response_ids == rows[0].response_ids
    shorter, infos, server, _ = play([LOST, LOST, LOST], max_response_length=used + 19)
    assert len(server.requests) == 2 == len(infos[0].turns)
    assert infos[0].cut and not infos[0].success
    assert len(shorter[0].response_ids) <= used + 19
    assert shorter[0].response_mask[-1] == 1
    assert row_metrics(make_table(["u_0_0"], infos))["sdar/cut_episodes"] == 1


def test_late_contexts_read_conversations_too(play, tokenizer):
    settings = {**WHOLE, "context__sources": ["sibling"], "teacher__max_prompt_length": 900}
    _, first, _, _ = play([WRONG, GOOD], **settings)
    _, second, _, _ = play([LOST, LOST, LOST], **settings)
    config = scripted_config(max_response_length=200, **settings)
    late = late_contexts(config, load_config(config.sdar), tokenizer, lambda: None)
    assert late is not None
    late.fill(make_table(["u_0_0", "u_1_0"], [*first, *second]))
    assert first[0].teacher_prompt_ids is None and first[0].context_missing
    assert "done: go to bed 1" in second[0].episode.context and "done: go to fridge 1" in second[0].episode.context
    assert len(second[0].teacher_prompt_ids) > second[0].prompt_tokens


def test_metrics_count_turns_not_rows():
    turns = (TurnNote(0, 2), TurnNote(5, 7, unparsed=True), TurnNote(9, 12, inadmissible=True))
    infos = [RowInfo(0, "t", turns=turns), RowInfo(0, "t", turns=turns[:1])]
    metrics = row_metrics(make_table(["u_0_0", "u_1_0"], infos))
    assert metrics["sdar/turns"] == 2.0
    assert metrics["sdar/invalid_share"] == 0.5
    assert metrics["sdar/unparsed_share"] == 0.25
    assert metrics["sdar/rows"] == 2


def test_the_penalty_falls_on_the_tokens_of_its_own_turn():
    turns = (TurnNote(0, 2), TurnNote(4, 6, unparsed=True))
    infos = [RowInfo(0, "t", turns=turns), RowInfo(0, "t", turns=(TurnNote(0, 3),)), None]
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 6])
    rewards = torch.zeros(3, 6)
    rewards[0, 5] = 1.0
    settings = SimpleNamespace(group_stats="episode", invalid_action_penalty=0.25)
    with advantage_rows(AdvantageRows.of(settings, make_table(["u_0_0", "u_1_0", "p_0_0"], infos))):
        advantages, _ = compute_sdar_advantage(rewards, mask, config={}, index=np.array(["u", "u", "p"]))
    outcome = 0.5 / 0.5**0.5  # two episodes with rewards 1 and 0: mean .5, unbiased deviation sqrt(.5)
    expected = torch.tensor([[1, 1, 0, 0, 1, 1], [-1, -1, -1, 0, 0, 0], [0] * 6]) * outcome
    expected[0, 4:6] -= 0.25
    assert torch.allclose(advantages.float(), expected.float(), atol=1e-5)
