"""Teacher prompts that the trainer makes after the group has ended, from what the agent loop kept."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sdar_verl.config import load_config
from sdar_verl.context import registry
from sdar_verl.context.base import ContextRequest, PlayedEpisode, PlayedTurn
from sdar_verl.context.builder import ContextBuilder
from sdar_verl.context.builtin import next_observation
from sdar_verl.context.registry import ContextError, register_context
from sdar_verl.envs.base import Task
from sdar_verl.errors import RolloutError
from sdar_verl.fields import TEACHER_PROMPTS
from sdar_verl.local import start_policy
from sdar_verl.rollout.late_context import LateContexts
from sdar_verl.rollout.rows import EpisodeNote, RowInfo, TurnNote
from sdar_verl.verl.late import late_contexts
from tests.support.scripted import GOOD, LOST, MUTE, TASK, WRONG, play_episode, scripted_config
from tests.support.table import make_table, stored

LIMITS = {"teacher__max_prompt_length": 2000}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(start_policy())


@pytest.fixture
def step(tokenizer, monkeypatch):
    """Plays episodes, ``{(uid, session): (task, script)}``, and fills in the teacher's prompts of the whole step."""

    def run(episodes, **settings):
        settings = {**LIMITS, **settings}
        config = scripted_config(**settings)
        keys, infos = [], []
        for (uid, session), (task, script) in episodes.items():
            _, records, _, _ = play_episode(monkeypatch, tokenizer, script, task=task, **settings)
            keys += [f"{uid}_{session}_{i}" for i in range(len(records))]
            infos += records
        late = late_contexts(config, load_config(config.sdar), tokenizer, lambda: None)
        if late is not None:
            table = make_table([*keys, "pad_0_0"], [*infos, None])
            late.fill(table)
            columns = stored(table)[TEACHER_PROMPTS]
            for info, column in zip([*infos, None], columns, strict=True):
                ids = [] if info is None or info.teacher_prompt_ids is None else info.teacher_prompt_ids.tolist()
                assert column.tolist() == ids and column.dtype == torch.int32
        return dict(zip(keys, infos, strict=True))

    return run


def text_of(tokenizer, info: RowInfo) -> str:
    return tokenizer.decode(info.teacher_prompt_ids.tolist())


GROUP = {
    ("u0", 0): (TASK, [LOST, LOST, GOOD]),
    ("u0", 1): (TASK, [LOST, GOOD]),
    ("u0", 2): (TASK, [MUTE, WRONG, LOST]),
}


def test_the_late_path_gives_the_very_tokens_of_the_early_one(step, monkeypatch):
    """Skills, once made in the agent loop and once by the trainer: the same ids on every row, history and all."""
    early = step(GROUP, prompt__history_length=1)
    monkeypatch.setattr(registry, "_contexts", dict(registry._contexts))
    register_context("nothing", late=True)(lambda request: None)
    late = step(GROUP, prompt__history_length=1, context__sources=["skills", "nothing"])
    assert early.keys() == late.keys() and len(early) == 8
    for key, info in early.items():
        assert np.array_equal(info.teacher_prompt_ids, late[key].teacher_prompt_ids), key
        assert info.context_tokens == late[key].context_tokens > 0
        assert info.skills == tuple(late[key].skills)
    assert early["u0_0_0"].episode.context == late["u0_0_0"].episode.context


@pytest.mark.parametrize("late", [False, True])
def test_a_context_can_count_its_tokens(step, tokenizer, monkeypatch, late):
    monkeypatch.setattr(registry, "_contexts", dict(registry._contexts))
    register_context("counted", late=late)(lambda request: f"{request.count_tokens('mug in shelf .')} tokens")
    rows = step({("u0", 0): (TASK, [GOOD])}, context__sources=["counted"])
    expected = len(tokenizer.encode("mug in shelf .", add_special_tokens=False))
    assert rows["u0_0_0"].episode.context == f"{expected} tokens"


def test_dropped_history_is_dropped_for_the_late_teacher_too(step, tokenizer):
    whole = step({("u0", 0): (TASK, [LOST, LOST, GOOD])})
    limit = whole["u0_0_2"].prompt_tokens - 1
    early = step({("u0", 0): (TASK, [LOST, LOST, GOOD])}, max_prompt_length=limit)
    late = step(
        {("u0", 0): (TASK, [LOST, LOST, GOOD])}, max_prompt_length=limit, context__sources=["skills", "feedback"]
    )
    assert late["u0_0_2"].history_dropped == 1
    plain, seen = (text_of(tokenizer, rows["u0_0_2"]) for rows in (early, late))
    assert plain.split("obs")[1:] == seen.split("obs")[1:]


def test_a_sibling_is_a_success_of_another_episode_of_the_group(step, tokenizer):
    other = replace(TASK, task_id="task-2")
    rows = step(
        {**GROUP, ("u1", 0): (other, [LOST, LOST, LOST]), ("u1", 1): (other, [GOOD])}, context__sources=["sibling"]
    )
    assert rows["u0_0_0"].context_missing is False
    # The shortest success is the second episode; its own sibling is the first, which took one turn more.
    assert [rows[f"u0_{i}_0"].episode.context.count("seen:") for i in range(3)] == [2, 3, 2]
    # It is on every row of the episode, as the template puts it.
    for key in ("u0_0_0", "u0_0_1", "u0_0_2"):
        assert "go to desk 1 2 ." in text_of(tokenizer, rows[key])
    # In the other group, the only success has no sibling to learn from.
    assert rows["u1_0_0"].teacher_prompt_ids is not None
    assert rows["u1_1_0"].teacher_prompt_ids is None and rows["u1_1_0"].context_missing
    assert rows["u1_1_0"].episode.context is None


def test_feedback_is_the_rows_own_episodes(step, tokenizer):
    rows = step(GROUP, context__sources=["feedback"])
    assert "go to bed 1" in text_of(tokenizer, rows["u0_2_0"])
    assert "go to bed 1" not in text_of(tokenizer, rows["u0_1_0"])
    assert rows["u0_2_0"].episode.last_observation == "nothing happens ."
    assert rows["u0_1_0"].episode.reward == 10.0


def test_wrong_is_the_context_of_another_type_at_the_real_length(step, tokenizer):
    egg = Task("scripted", "task-2", "heat", "heat some egg", {})
    pen = replace(TASK, task_id="task-3", description="put some pen on desk")
    rows = step(
        {("u0", 0): (TASK, [GOOD]), ("u1", 0): (egg, [GOOD]), ("u2", 0): (pen, [GOOD])}, context__control="wrong"
    )
    plain = step({("u0", 0): (TASK, [GOOD])})
    assert "apple" in plain["u0_0_0"].episode.context and "apple" not in rows["u0_0_0"].episode.context
    assert "egg" in rows["u0_0_0"].episode.context
    assert abs(rows["u0_0_0"].context_tokens - plain["u0_0_0"].context_tokens) <= 2
    one_type = step({("u0", 0): (TASK, [GOOD]), ("u2", 0): (pen, [GOOD])}, context__control="wrong")
    assert "pen" in one_type["u0_0_0"].episode.context and "apple" not in one_type["u0_0_0"].episode.context
    alone = step({("u0", 0): (TASK, [GOOD]), ("u1", 0): (TASK, [GOOD])}, context__control="wrong")
    assert alone["u0_0_0"].context_missing and alone["u0_0_0"].teacher_prompt_ids is None


@pytest.mark.parametrize("control", ["shuffled", "random_text"])
def test_a_placebo_stands_where_the_skills_stood(step, tokenizer, control):
    real, made = step(GROUP)["u0_0_0"], step(GROUP, context__control=control)["u0_0_0"]
    assert made.skills == real.skills
    assert made.teacher_prompt_ids.tolist() != real.teacher_prompt_ids.tolist()
    assert abs(made.context_tokens - real.context_tokens) <= 2


def test_empty_gives_the_teacher_the_students_prompt_and_a_say(step):
    info = step(GROUP, context__control="empty")["u0_0_0"]
    assert info.teacher_prompt_ids is not None and info.context_tokens == 0
    assert not info.context_missing


def test_a_late_teacher_prompt_that_is_too_long_is_an_error(step):
    with pytest.raises(RolloutError, match=r"sdar\.teacher\.max_prompt_length=40 is too small"):
        step(GROUP, context__sources=["sibling"], teacher__max_prompt_length=40)


BAD = {"sources": ["failed_sibling"], "options": {"failed_sibling": {"intro": "An attempt:"}}}
PAIR = {
    "context__sources": ["sibling"],
    "context__options": {"sibling": {"intro": "An attempt:"}},
    "context__contrast": {**BAD, "texts": 2},
}
MANY = {
    **GROUP,
    ("u0", 3): (TASK, [LOST, LOST, WRONG]),
    ("u0", 4): (TASK, [LOST, LOST, WRONG]),
    ("u1", 0): (replace(TASK, task_id="task-2"), [GOOD]),
    ("u1", 1): (replace(TASK, task_id="task-2"), [LOST, GOOD]),
}


def test_a_bad_context_is_the_same_prompt_with_another_text(step, tokenizer):
    rows = step(MANY, **PAIR)
    info = rows["u0_0_1"]
    good, bad = info.teacher_prompt_ids.tolist(), [ids.tolist() for ids in info.contrast_prompt_ids]
    # Sessions 2 to 4 failed, the last two alike: two different texts, and not three.
    assert len(bad) == 2 and bad[0] != bad[1]
    for ids in bad:
        head = next(i for i, pair in enumerate(zip(good, ids, strict=False)) if pair[0] != pair[1])
        tail = next(i for i, pair in enumerate(zip(reversed(good), reversed(ids), strict=False)) if pair[0] != pair[1])
        assert head + tail >= info.prompt_tokens, "all but the text in the slot is one prompt"
    assert "go to bed 1" in tokenizer.decode(bad[0]) and "go to bed 1" not in tokenizer.decode(good)
    # A failed row is shown others' failures, never its own.
    assert len(rows["u0_2_0"].contrast_prompt_ids) == 1


def test_a_row_without_a_pair_has_no_teacher_and_costs_no_pass(step):
    rows = step(MANY, **PAIR)
    for key in ("u1_0_0", "u1_1_0", "u1_1_1"):  # nobody failed there
        info = rows[key]
        assert info.teacher_prompt_ids is None and info.contrast_prompt_ids == () and info.context_missing
        assert not info.has_teacher
    alone = step({("u0", 0): (TASK, [GOOD]), ("u0", 1): (TASK, [LOST, LOST, LOST])}, **PAIR)
    assert all(info.context_missing for info in alone.values()), "no row has both a success and a failure beside it"


def test_skills_against_their_own_placebo_and_against_nothing(step, tokenizer):
    """Early contexts in both slots, with the bad one's own options."""
    for control in ("shuffled", "empty"):
        contrast = {"sources": ["skills"], "options": {}, "control": control, "texts": 1}
        rows, plain = step(GROUP, context__contrast=contrast), step(GROUP)
        info = rows["u0_0_0"]
        assert np.array_equal(info.teacher_prompt_ids, plain["u0_0_0"].teacher_prompt_ids)
        (bad,) = info.contrast_prompt_ids
        if control == "empty":
            assert len(bad) == info.prompt_tokens
        else:
            assert (
                abs(len(bad) - len(info.teacher_prompt_ids)) <= 2 and bad.tolist() != info.teacher_prompt_ids.tolist()
            )


def test_a_random_sibling_is_drawn_per_row_and_repeats(step):
    chosen = {"context__sources": ["sibling"], "context__options": {"sibling": {"choice": "random"}}}
    episodes = {("u0", i): (TASK, [LOST] * (i % 3) + [GOOD]) for i in range(8)}
    first, again = (step(episodes, **chosen) for _ in range(2))
    seen = [first[f"u0_{i}_0"].episode.context for i in range(8)]
    assert len(set(seen)) > 1
    assert seen == [again[f"u0_{i}_0"].episode.context for i in range(8)]


def test_a_bad_context_that_is_too_long_leaves_the_row_without_a_teacher(step):
    fits = max(
        len(info.teacher_prompt_ids) for info in step(MANY, **PAIR).values() if info.teacher_prompt_ids is not None
    )
    rows = step(MANY, **PAIR, teacher__max_prompt_length=fits, teacher__on_long_prompt="mask")
    short = [info for info in rows.values() if info.truncated and not info.contrast_prompt_ids]
    assert all(not info.has_teacher for info in short)
    with pytest.raises(RolloutError, match=r"sdar\.teacher\.max_prompt_length=40 is too small"):
        step(MANY, **PAIR, teacher__max_prompt_length=40)


def test_the_next_observation_differs_by_turn_and_its_placeholder_has_the_same_words(step, tokenizer):
    contrast = {"sources": ["next_observation"], "options": {"next_observation": {"hidden": True}}}
    rows = step(GROUP, context__sources=["next_observation"], context__contrast=contrast)
    first, last = rows["u0_0_0"], rows["u0_0_2"]
    (hidden,) = first.contrast_prompt_ids
    assert "nothing happens ." in text_of(tokenizer, first), "what the first turn led to, in its own prompt"
    assert "nothing happens ." not in tokenizer.decode(hidden.tolist())
    turns = (PlayedTurn("a", "x", True), PlayedTurn("b", "y", True))
    request = ContextRequest(TASK, episode=PlayedEpisode("e", turns, True, 1.0, "you win ."))
    shown = [next_observation(replace(request, turn=turn)) for turn in range(3)]
    assert shown[0].endswith("\nb") and shown[1].endswith("\nyou win .") and shown[2] is None
    assert next_observation(request, hidden=True).endswith("\n(not shown)")
    assert last.teacher_prompt_ids.tolist() != last.contrast_prompt_ids[0].tolist()
    assert all(len(info.contrast_prompt_ids) == 1 for info in rows.values())


@pytest.mark.parametrize(("wanted", "taught"), [("failed", {2}), ("solved", {0, 1})])
def test_only_the_episodes_that_ended_so_have_a_teacher(step, wanted, taught):
    rows = step(GROUP, context__episodes=wanted)
    for key, info in rows.items():
        assert info.has_teacher == (int(key.split("_")[1]) in taught), key
        assert info.context_missing != info.has_teacher


def test_a_context_by_turn_cannot_stand_in_a_row_of_many_turns(tokenizer):
    sdar = load_config(scripted_config(context__sources=["next_observation"]).sdar)
    late = LateContexts(sdar, ContextBuilder(sdar.context, tokenizer), SimpleNamespace())
    note = EpisodeNote({"env": "x", "task_id": "t", "task_type": "t", "description": "", "data": {}})
    info = RowInfo(0, "t", task_id="t", episode=note, turns=(TurnNote(0, 1), TurnNote(2, 3)))
    with pytest.raises(ContextError, match=r"\['next_observation'\] differ by turn.*holds 2 turns of a conversation"):
        late.fill(make_table(["u0_0_0"], [info]))
