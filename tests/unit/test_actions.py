"""Action parsing: one readable action or a named error, never an exception."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_verl.rollout.actions import last_line, match_admissible, parse_action
from sdar_verl.rollout.control import neutralise
from tests.support.fuzzing import TEXTS, quick

TAGS = ["<think>", "</think>", "<action>", "</action>", "<ACTION>", "go to fridge 1", " ", "\n", "<", ">"]
RESPONSES = st.lists(st.sampled_from(TAGS) | st.text(max_size=4), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "action", "thought"),
    [
        ("<think> apple in fridge </think> <action> go to fridge 1 </action>", "go to fridge 1", "apple in fridge"),
        ("<action>go to fridge 1</action>", "go to fridge 1", None),
        ("<think>\n\n</think>\n\n<action>look</action>", "look", ""),
        ("so apple, then </think><action>look</action>", "look", "so apple, then"),
        ("Sure: <think>a</think> I do <action>\n Go  to\tFridge 1 \n</action> now", "Go to Fridge 1", "a"),
        ("<Think>a</THINK><Action>look</ACTION>", "look", "a"),
        ("<think>or <action>a</action>?</think><action>b</action>", "b", "or <action>a</action>?"),
        ("<think>an unclosed <action> tag</think><action>b</action>", "b", "an unclosed <action> tag"),
        ("<action>look</action> <action> look </action>", "look", None),
    ],
)
def test_readable_responses(text: str, action: str, thought: str | None) -> None:
    parsed = parse_action(text)
    assert (parsed.action, parsed.thought, parsed.error) == (action, thought, None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no action block"),
        ("go to fridge 1", "no action block"),
        ("<think>a</think> go to fridge 1", "no action block"),
        ("<think>a <action>look</action>", "think block not closed"),
        ("<action>look</action><think>a</think>", "no action block"),
        ("<think>a</think><think>b</think><action>look</action>", "think block opened again"),
        ("<think>a</think>b</think><action>look</action>", "think block opened again"),
        ("<action>look", "action block not closed"),
        ("look</action>", "action block closed but not opened"),
        ("<action>a<action>b</action></action>", "action block inside another"),
        ("<action> \n </action>", "empty action"),
        ("<action>look</action><action>go to fridge 1</action>", "several different actions"),
        ("< action>look< /action>", "no action block"),
    ],
)
def test_unreadable_responses(text: str, error: str) -> None:
    parsed = parse_action(text)
    assert parsed.action is None
    assert parsed.error == error


def test_a_missing_think_block_is_an_error_only_when_required() -> None:
    text = "<action>look</action>"
    assert parse_action(text).action == "look"
    assert parse_action(text, think="optional").action == "look"
    assert parse_action(text, think="required").error == "no think block"
    assert parse_action(f"<think></think>{text}", think="required").action == "look"


@given(text=RESPONSES, think=st.sampled_from(["required", "optional"]))
def test_never_raises_and_gives_an_action_or_an_error(text: str, think) -> None:
    parsed = parse_action(text, think=think)
    assert (parsed.action is None) != (parsed.error is None)
    if parsed.action is not None:
        assert parsed.action == " ".join(parsed.action.split()) != ""
        assert not re.search("</?(action|think)>", parsed.action, re.IGNORECASE)


@given(
    thought=st.text(st.characters(exclude_characters="<"), max_size=20),
    action=st.text(st.characters(exclude_characters="<"), max_size=20).filter(str.strip),
)
def test_a_well_formed_response_is_read_back(thought: str, action: str) -> None:
    parsed = parse_action(f"<think>{thought}</think><action>{action}</action>")
    assert parsed.action == " ".join(action.split())
    assert parsed.thought == " ".join(thought.split())


SEARCH = ("search", "answer")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<think>a</think><search> capital\n of Norway </search>", "search: capital of Norway"),
        ("<answer>Oslo</answer>", "answer: Oslo"),
        ("<ANSWER>Oslo</Answer>", "answer: Oslo"),
        ("<think><answer>no</answer></think><search>x: y</search>", "search: x: y"),
        ("<search>a</search> or <search>a</search>", "search: a"),
    ],
)
def test_with_several_tags_the_action_begins_with_its_tag(text: str, action: str) -> None:
    assert parse_action(text, tags=SEARCH).action == action


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<action>look</action>", "no search or answer block"),
        ("<search>a</search><answer>a</answer>", "several different actions"),
        ("<search>a</search><search>b</search>", "several different actions"),
        ("<search>a</answer>", "answer block closed but not opened"),
        ("<search>a<answer>b</answer></search>", "answer block inside another"),
        ("<search>a", "search block not closed"),
        ("<answer> </answer>", "empty answer"),
    ],
)
def test_unreadable_responses_with_several_tags(text: str, error: str) -> None:
    parsed = parse_action(text, tags=SEARCH)
    assert (parsed.action, parsed.error) == (None, error)


def test_other_tags_are_text_to_a_single_one() -> None:
    assert parse_action("<search>a</search><action>look</action>").action == "look"


def test_match_admissible() -> None:
    admissible = ("go to fridge 1", "take Apple 1 from fridge 1")
    assert match_admissible("GO  to Fridge 1", admissible) == "go to fridge 1"
    assert match_admissible("take apple 1 from fridge 1", admissible) == "take Apple 1 from fridge 1"
    assert match_admissible("go to fridge", admissible) is None
    assert match_admissible("go to fridge 11", admissible) is None
    assert match_admissible("look", ()) is None
    # Of two that differ in case alone, the one that was written.
    assert [match_admissible(name, ["open a", "open A"]) for name in ("open A", "open a", "OPEN A")] == [
        "open A",
        "open a",
        "open a",
    ]


@pytest.mark.parametrize(
    ("action", "matched"),
    [
        ("search[red shoes]", "search[red shoes]"),
        ("Search[ Red  Shoes ]", "search[Red Shoes]"),
        ("search[a [b] c]", "search[a [b] c]"),
        (r"search[\1 <x>]", r"search[\1 <x>]"),
        ("search[ ]", None),
        ("search[red", None),
        ("research[red]", None),
        ("CLICK[Buy Now]", "click[buy now]"),
    ],
)
def test_a_form_takes_any_text_for_its_free_part(action: str, matched: str | None) -> None:
    assert match_admissible(action, ["click[buy now]"], ["search[<query>]"]) == matched


def test_a_form_is_matched_in_time_however_long_the_answer_is() -> None:
    started = time.process_time()
    for action in ("search[" + "a" * 300_000, "search[" + " a" * 150_000, "search" * 50_000):
        assert match_admissible(action, ["click[buy now]"], ["search[<query>]"]) is None
    assert len(match_admissible("search[" + "a" * 300_000 + "]", [], ["search[<query>]"]) or "") == 300_008
    assert time.process_time() - started < 2  # with a regular expression: half an hour


@pytest.mark.parametrize("form", ["search", "<1>x", "a <b> c <d>", "<q>", "", "search[<>]"])
@given(action=TEXTS)
@quick(15)
def test_a_form_of_any_kind_is_no_exception(form: str, action: str) -> None:
    matched = match_admissible(action, (), [form])
    assert matched is None or matched.strip()


def test_an_action_is_known_by_the_form_in_which_it_was_shown() -> None:
    offered = ["click[a </action>]", "click[a]"]
    assert match_admissible("click[a < /action>]", offered) is None
    assert match_admissible("Click[a  < /action>]", offered, shown=neutralise) == "click[a </action>]"
    assert match_admissible("click[a]", offered, shown=neutralise) == "click[a]"


def test_an_action_is_known_however_unicode_writes_it() -> None:
    """Tokenizers compose accents (NFC) or undo ligatures and widths (NFKC): the model copies what it was shown."""
    apart, ligature = "take cafe\u0301 sign", "open \ufb01le \uff11"
    offered = [apart, ligature, "look"]
    assert match_admissible("take caf\u00e9 sign", offered) == apart
    assert match_admissible("Open file 1", offered) == ligature
    assert match_admissible("size 2", ["size \u00b2", "size 2"]) == "size 2"
    assert match_admissible("take cafe sign", offered) is None


def test_letters_outside_ascii_make_no_tag() -> None:
    assert parse_action("<ſearch>a</ſearch>", tags=SEARCH).error == "no search or answer block"
    assert parse_action("<thınK>a</thınK><action>look</action>").thought is None


@quick(100)
@given(text=st.lists(st.sampled_from([*TAGS, "<search>", "</answer>"]) | TEXTS, max_size=10).map("".join))
def test_any_text_is_parsed_or_has_an_error(text: str) -> None:
    for tags in (("action",), SEARCH):
        parsed = parse_action(text, tags=tags)
        assert (parsed.action is None) != (parsed.error is None)
        assert last_line(text, tags) != ""


def test_the_last_line_is_found_behind_tags_and_blank_lines():
    assert last_line("<think> where </think>\n go  to desk 1 \n\n") == "go to desk 1"
    assert last_line("<action>look") == "look"
    assert last_line(" \n<action></action>") is None
