"""Privileged contexts: the functions, their registry, placebos, and how they are combined."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sdar_verl.config.context import ContextConfig
from sdar_verl.context import builtin, registry
from sdar_verl.context.base import ContextRequest, Passage, PlayedEpisode, PlayedTurn
from sdar_verl.context.builder import ContextBuilder, is_late, join
from sdar_verl.context.controls import CONTROLS, fit_text, placebo, shuffle_words
from sdar_verl.context.registry import ContextError, check_contexts, context_names, get_context, register_context
from sdar_verl.context.words import WORDS
from sdar_verl.envs.base import Task, TextEnv
from sdar_verl.envs.registry import demonstration_of
from sdar_verl.local import start_policy
from tests.support.chatml import chatml_tokenizer

TASK = Task("toy", "task-1", "pick", "put a mug on desk", {"answers": ["Paris", "the city of Paris"], "year": 1789})
SKILL = "mugs live in the cabinet .\ncabinets must be opened first .\n\nthen go to the desk ."


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_contexts", dict(registry._contexts))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(start_policy())


@pytest.fixture(scope="module")
def bpe():
    text = [" ".join(WORDS[i : i + 9]) for i in range(0, len(WORDS), 9)]
    return chatml_tokenizer([*text, *[SKILL] * 5])


def episode(name: str, success: bool, actions: list[str | None], valid: bool = True) -> PlayedEpisode:
    turns = tuple(PlayedTurn(f"sight {i}", action, valid) for i, action in enumerate(actions))
    return PlayedEpisode(name, turns, success, 10.0 * success, "the end")


# ---------------------------------------------------------------- the functions


def test_answer_is_the_tasks_ground_truth():
    answer = get_context("answer")
    text = answer.make(ContextRequest(TASK), {}).text
    assert "1. Paris" in text and "2. the city of Paris" in text
    assert answer.make(ContextRequest(TASK), {"field": "year"}).text.endswith("1789")
    assert answer.make(ContextRequest(TASK), {"field": "goal"}).text == ""
    # A recipe's row may have a column of that name, such as the choices of a question.
    row = replace(TASK, data={"answers": ["7", "9"], "reward_model": {"ground_truth": "13"}})
    assert answer.make(ContextRequest(row), {}).text == "The right answer is: 13"
    assert "9" in answer.make(ContextRequest(row), {"field": "answers"}).text
    assert answer.make(ContextRequest(row), {"field": "reward_model.ground_truth"}).text.endswith(" 13")
    assert answer.make(ContextRequest(replace(row, data={**row.data, "reward_model": {}})), {}).text == ""


@pytest.mark.parametrize("held", [{"solution": "13", "kind": "int"}, [["13"]], b"13"])
def test_what_says_nothing_to_a_reader_is_no_answer_and_no_column(held):
    request = ContextRequest(replace(TASK, data={"reward_model": {"ground_truth": held}}))
    with pytest.raises(ContextError, match=r"the ground truth holds (dict with solution, kind|list|bytes), not a text"):
        get_context("answer").make(request, {})
    with pytest.raises(ContextError, match=r"reward_model\.ground_truth holds .* sdar\.context\.options\.column\.path"):
        get_context("column").make(request, {"path": "reward_model.ground_truth"})


@pytest.mark.parametrize("gap", [None, float("nan"), "", " \n", [], [None, ""], {"target": []}])
def test_a_gap_of_a_table_is_no_answer_and_no_column(gap):
    """A teacher would be told that the right answer is nan."""
    request = ContextRequest(replace(TASK, data={"answers": gap, "extra_info": {"solution": gap}}))
    assert get_context("answer").make(request, {}).text == ""
    assert get_context("column").make(request, {"path": "extra_info.solution", "intro": "Solution:"}).text == ""


def test_search_r1s_ground_truth_is_its_target():
    truth = {"target": ["Paris", "the city of Paris", None]}
    request = ContextRequest(replace(TASK, data={"answers": truth, "reward_model": {"ground_truth": truth}}))
    assert get_context("answer").make(request, {}).text.splitlines()[1:] == ["1. Paris", "2. the city of Paris"]
    assert get_context("column").make(request, {"path": "reward_model.ground_truth"}).text == "Paris\nthe city of Paris"


def test_demonstration_comes_from_the_task_or_from_the_environment(tmp_path):
    stored = Task("alfworld", "t", "pick", "d", {"demonstration": ["look", "go to desk 1"]})
    text = get_context("demonstration").make(ContextRequest(stored), {}).text
    assert text.splitlines()[1:] == ["1. look", "2. go to desk 1"]
    assert demonstration_of(Task("recipe", "t", "gsm8k", "d", {"demonstration": None})) == []
    game = tmp_path / "game.tw-pddl"
    game.write_text(json.dumps({"walkthrough": ["go to  desk 1", "take mug 1 from desk 1"]}))
    assert demonstration_of(Task("alfworld", "t", "pick", "d", {"game_file": str(game)})) == [
        "go to desk 1",
        "take mug 1 from desk 1",
    ]
    game.write_text(json.dumps({"walkthrough": None}))
    unknown = ContextRequest(Task("alfworld", "t", "", "", {"game_file": str(game)}))
    assert get_context("demonstration").make(unknown, {}).text == ""
    game.write_text("{")
    with pytest.raises(ContextError, match="not a whole ALFWorld game"):
        get_context("demonstration").make(ContextRequest(Task("alfworld", "t", "", "", {"game_file": str(game)})), {})


def test_a_generated_questions_searches_demonstrate_it():
    data = {"answers": ["Oslo", "the city of Oslo"], "searches": ["who built it", "where was she born"]}
    assert demonstration_of(Task("search", "t", "two_hop", "where?", data)) == [
        "search: who built it",
        "search: where was she born",
        "answer: Oslo",
    ]
    assert demonstration_of(Task("search", "t", "nq", "where?", {"answers": ["Oslo"]})) == []


def test_an_environment_knows_no_solution_unless_it_says_so():
    assert TextEnv.demonstration(TASK) == ()


def test_sibling_shows_the_shortest_success_or_the_first():
    siblings = (
        episode("u_0", False, ["lost"]),
        episode("u_1", True, ["a", "b", "c"]),
        episode("u_2", True, ["d", None]),
        episode("u_3", True, ["e", "f"]),
    )
    request = ContextRequest(TASK, episode=episode("u_4", False, ["x"]), siblings=siblings)
    sibling = get_context("sibling")
    assert sibling.late
    shortest = sibling.make(request, {}).text
    assert "seen: sight 0\n   done: d" in shortest and "nothing that could be read" in shortest
    assert sibling.make(request, {"choice": "first", "observations": False}).text.splitlines()[1:] == [
        "1. a",
        "2. b",
        "3. c",
    ]
    assert sibling.make(ContextRequest(TASK, siblings=siblings[:1]), {}).text == ""
    with pytest.raises(ContextError, match=r"sibling has choice='best'; use one of shortest, first"):
        sibling.make(request, {"choice": "best"})


def test_of_equal_siblings_one_is_shown():
    siblings = tuple(episode(f"u_{number}", False, [action]) for number, action in enumerate("aab"))
    shown = [
        get_context("failed_sibling").make(ContextRequest(TASK, siblings=siblings, number=number), {}).text
        for number in range(3)
    ]
    assert [text[-1:] for text in shown] == ["a", "b", ""]


def test_feedback_tells_outcome_invalid_actions_and_the_last_answer():
    feedback = get_context("feedback")
    assert feedback.late
    lost = feedback.make(ContextRequest(TASK, episode=episode("u_0", False, ["fly", None], valid=False)), {}).text
    assert "did not solve" in lost and "2 turns" in lost and "turn 1: fly; turn 2: no action" in lost
    assert lost.endswith("the end")
    won = feedback.make(ContextRequest(TASK, episode=episode("u_0", True, ["go"])), {}).text
    assert "solved the task" in won and "1 turn " in won and "did not accept" not in won


def test_feedback_of_a_reward_function_is_what_it_says_of_the_row():
    feedback, options = get_context("feedback"), {"field": "judge"}
    told, silent = (
        replace(episode(f"u_{n}", False, ["x"]), said=said) for n, said in enumerate(({"judge": " No. "}, {}))
    )
    assert feedback.make(ContextRequest(TASK, episode=told), options).text.splitlines()[1:] == ["No."]
    for said in (0.0, False, 1):
        scored = replace(silent, said={"judge": said})
        assert feedback.make(ContextRequest(TASK, episode=scored), options).text.splitlines()[1:] == [str(said)]
    for nothing in (
        {},
        {"judge": None},
        {"judge": " "},
        {"judge": float("nan")},
        {"judge": []},
    ):  # a judge who speaks of some rows alone
        one = replace(silent, said=nothing)
        assert feedback.make(ContextRequest(TASK, episode=one, siblings=(told,)), options).text == ""
    with pytest.raises(ContextError, match=r"reads 'judge' from .* which says: score; name the right key"):
        feedback.make(ContextRequest(TASK, episode=replace(silent, said={"score": 1})), options)


def test_thoughts_of_a_sibling_may_be_left_out():
    """Also those that the prompt began, and those that were cut off."""
    for name, solved in (("sibling", True), ("failed_sibling", False)):
        said = ["<think>so</think> go", "so</think>go", "<think>so", "go"]
        request = ContextRequest(TASK, siblings=(episode("u_1", solved, said),))
        options = {"thinking": False, "observations": False}
        assert get_context(name).make(request, options).text.splitlines()[1:] == [
            "1. go",
            "2. go",
            "3. (nothing that could be read)",
            "4. go",
        ]
        assert "3. <think>so" in get_context(name).make(request, {"observations": False}).text


def test_what_counts_as_success_has_a_threshold():
    siblings = (episode("u_1", True, ["a"]), replace(episode("u_2", False, ["b"]), reward=0.6))
    request = ContextRequest(TASK, siblings=siblings)
    for threshold, solved, failed in ((0.5, "a", ""), (11.0, "", "a"), (None, "a", "b")):
        for name, expected in (("sibling", solved), ("failed_sibling", failed)):
            options = {"threshold": threshold, "observations": False, "choice": "first"}
            text = get_context(name).make(request, options).text
            assert text.splitlines()[1:] == ([f"1. {expected}"] if expected else []), (threshold, name)


def test_the_rows_own_failure_is_shown_and_its_success_not():
    own = get_context("own_failure")
    assert own.late and not own.of_group
    lost, won = episode("u_0", False, ["x"]), episode("u_1", True, ["y"])
    assert own.make(ContextRequest(TASK, episode=lost, siblings=(won,)), {"observations": False}).text.endswith("1. x")
    assert own.make(ContextRequest(TASK, episode=won, siblings=(lost,)), {}).text == ""
    assert own.make(ContextRequest(TASK, episode=won), {"threshold": 11.0}).text != ""


# ---------------------------------------------------------------- the registry


def test_unknown_doubled_and_idle_settings_are_named():
    with pytest.raises(ContextError, match=r"unknown context 'skill'; known: answer, .*sdar\.modules"):
        check_contexts(["skill"], {})
    with pytest.raises(ContextError, match="skills named twice"):
        check_contexts(["skills", "skills"], {})
    with pytest.raises(ContextError, match=r"options\.sibling has no effect.*\['skills'\]"):
        check_contexts(["skills"], {"sibling": {"choice": "first"}})
    with pytest.raises(ContextError, match=r"'sibling' has no option 'pick'; known: choice, observations"):
        check_contexts(["sibling"], {"sibling": {"pick": "first"}})
    with pytest.raises(ContextError, match=r"sibling\.choice='last': input should be 'shortest', 'first'"):
        check_contexts(["sibling"], {"sibling": {"choice": "last"}})
    check_contexts(["skills", "sibling"], {"sibling": {"choice": "first"}})


def test_a_name_belongs_to_one_function(own_registry):
    @register_context("mine")
    def mine(request: ContextRequest) -> str:
        return "text"

    assert "mine" in context_names()
    register_context("mine")(mine)
    with pytest.raises(ContextError, match="'mine' is already registered"):
        register_context("mine")(lambda request: "other")


def test_a_context_that_fails_or_gives_no_text_is_named(own_registry):
    register_context("broken")(lambda request: 1 / 0)
    register_context("number")(lambda request: 7)
    with pytest.raises(ContextError, match="'broken': ZeroDivisionError"):
        get_context("broken").make(ContextRequest(TASK), {})
    with pytest.raises(ContextError, match="'number': TypeError: it gave int"):
        get_context("number").make(ContextRequest(TASK), {})


PACKAGE = """
from sdar_verl.context.registry import register_context

@register_context("weather", late=True)
def weather(request, *, city="Paris"):
    return f"It rains in {city}; the reward was {request.episode.reward:g}."
"""


def test_another_package_brings_its_own_context(tmp_path):
    """In a process of its own, with nothing but sdar.modules naming the package."""
    (tmp_path / "their_package.py").write_text(PACKAGE)
    program = """
from sdar_verl.config import load_config
from sdar_verl.context.base import ContextRequest, PlayedEpisode
from sdar_verl.context.builder import ContextBuilder
from sdar_verl.envs.base import Task
from sdar_verl.modules import import_modules
node = {"modules": ["their_package"], "context": {"sources": ["weather"], "options": {"weather": {"city": "Rome"}}}}
sdar = load_config(node)
import_modules(sdar.modules)
contexts = ContextBuilder(sdar.context, tokenizer=None)
request = ContextRequest(Task("e", "t", "y", "d"), episode=PlayedEpisode("u_0", (), True, 3.0, ""))
print(contexts.late, contexts.passage(request, {}).text)
"""
    root = Path(__file__).parents[2]
    path = {"PYTHONPATH": f"{root}:{tmp_path}"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=path, cwd=tmp_path)
    assert run.stdout.strip() == "True It rains in Rome; the reward was 3.", run.stderr


# ---------------------------------------------------------------- placebos


def length(tokenizer):
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", ["tokenizer", "bpe"])
@pytest.mark.parametrize("control", ["shuffled", "wrong", "random_text"])
def test_a_placebo_is_as_long_as_the_real_text(control, kind, request):
    """``wrong`` and ``random_text`` miss by less than one word; ``shuffled`` by what a moved line break costs."""
    tokenizer = request.getfixturevalue(kind)
    count = length(tokenizer)
    other = Passage("eggs live in the fridge .\nheat them in the microwave .")
    made = placebo(control, Passage(SKILL, ("mug",)), seed="0:t", count_tokens=count, other=other)
    assert made.text != SKILL
    assert made.skills == ("mug",)
    longest_word = max(count(" " + word) for word in [*WORDS, *SKILL.split(), *other.text.split()])
    slack = longest_word if control != "shuffled" else SKILL.count("\n") * 2
    assert abs(count(made.text) - count(SKILL)) <= slack


def test_placebos_repeat_per_task_and_differ_between_tasks(tokenizer):
    for control in ("shuffled", "random_text"):
        made = [placebo(control, Passage(SKILL), seed=seed, count_tokens=length(tokenizer)).text for seed in "aab"]
        assert made[0] == made[1] != made[2]


def test_the_other_controls(tokenizer):
    real = Passage(SKILL, ("mug",), True)
    assert placebo("none", real, seed="0", count_tokens=len) is real
    assert placebo("empty", real, seed="0", count_tokens=len) == Passage("", ("mug",), True)
    assert placebo("wrong", real, seed="0", count_tokens=len, other=None) is None
    with pytest.raises(ContextError, match=r"sdar\.context\.control='blank'.*" + ", ".join(CONTROLS)):
        placebo("blank", real, seed="0", count_tokens=len)


@given(st.text(alphabet="ab \n\t", max_size=60), st.integers(0, 5))
def test_shuffling_keeps_words_and_white_space(text, seed):
    mixed = shuffle_words(text, random.Random(seed))
    assert Counter(mixed.split()) == Counter(text.split())
    assert re.findall(r"\s+", mixed) == re.findall(r"\s+", text)
    assert len(mixed) == len(text)


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=1, max_size=20), st.integers(1, 60))
def test_a_text_is_fitted_to_the_last_word_that_fits(words, tokens):
    count = lambda text: len(text.replace(" ", "").replace("\n", ""))  # noqa: E731  a character a token
    fitted = fit_text(" ".join(words), tokens, count)
    kept = fitted.split()
    endless = words * (tokens + 1)
    assert kept == endless[: len(kept)]
    assert len(kept) == 1 or count(fitted) <= tokens
    assert count(" ".join(endless[: len(kept) + 1])) > tokens


UNSPACED = "\u6253\u5f00\u51b0\u7bb1,\u62ff\u51fa\u82f9\u679c,\u653e\u8fdb\u6c34\u69fd\u91cc\u6d17\u5e72\u51c0\u3002"


@pytest.mark.parametrize("icu", [True, False])
def test_placebos_in_a_script_without_spaces(icu, monkeypatch):
    if not icu:
        monkeypatch.setattr("sdar_verl.words._breaker", lambda: None)
    mixed = placebo("shuffled", Passage(UNSPACED), seed="0:t", count_tokens=len).text
    assert mixed != UNSPACED and sorted(mixed) == sorted(UNSPACED)
    other = Passage(UNSPACED[::-1] * 20)
    wrong = placebo("wrong", Passage(UNSPACED), seed="0:t", count_tokens=len, other=other).text
    assert len(UNSPACED) - 4 <= len(wrong) <= len(UNSPACED) and other.text.startswith(wrong)


def test_a_text_that_no_order_changes_has_no_shuffled_placebo():
    for text in ("72", "no no no"):
        assert placebo("shuffled", Passage(text), seed="0:t", count_tokens=len) is None
    for seed in range(8):
        assert placebo("shuffled", Passage("go there"), seed=str(seed), count_tokens=len).text == "there go"


def test_random_text_takes_words_that_the_tokenizer_knows(tokenizer):
    contexts = ContextBuilder(ContextConfig(control="random_text"), tokenizer)
    made = contexts.controlled(Passage(SKILL), "task-1")
    assert tokenizer.unk_token_id not in tokenizer(made.text)["input_ids"]
    assert len(set(made.text.split())) > 5


# ---------------------------------------------------------------- together


def test_passages_are_joined_in_the_order_of_the_sources(tokenizer):
    contexts = ContextBuilder(ContextConfig(sources=["answer", "skills"]), tokenizer)
    request = ContextRequest(TASK, skills=lambda: Passage("know this", ("a",), True))
    whole = contexts.passage(request, contexts.early_passages(request))
    assert whole.text.endswith("2. the city of Paris\n\nknow this")
    assert (whole.skills, whole.no_match) == (("a",), True)
    assert join([Passage(""), Passage("x"), Passage("")]).text == "x"


def test_no_context_gives_the_teacher_no_say_but_the_control_empty_does(tokenizer):
    real = ContextBuilder(ContextConfig(), tokenizer)
    assert real.controlled(Passage("", no_match=True), "t") is None
    empty = ContextBuilder(ContextConfig(control="empty"), tokenizer)
    assert empty.controlled(Passage("text"), "t") == Passage("")


def test_late_is_what_must_wait_for_the_group():
    assert not is_late(ContextConfig(sources=["skills", "demonstration"], control="shuffled"))
    assert is_late(ContextConfig(sources=["skills", "sibling"]))
    assert is_late(ContextConfig(control="wrong"))


def test_every_builtin_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "contexts.md").read_text()
    names = [name for name in context_names() if get_context(name).function.__module__ == builtin.__name__]
    assert len(names) == 9
    assert all(f"`{name}`" in text for name in [*names, *CONTROLS])


def test_the_documented_context_of_ones_own_works(own_registry):
    text = (Path(__file__).parents[2] / "docs" / "contexts.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    context = get_context("last_words")
    own = ContextRequest(TASK, episode=episode("u_0", False, ["x"]), siblings=(episode("u_1", True, ["y"]),))
    assert context.late
    assert context.make(own, {}).text == "This was seen in the end: the end"
    assert context.make(own, {"of": "sibling"}).text.startswith("This was seen in the end: ")
    assert context.make(ContextRequest(TASK, episode=own.episode), {"of": "sibling"}).text == ""
