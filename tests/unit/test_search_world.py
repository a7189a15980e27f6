"""The invented world: reproducible, consistent, and every question can be answered by its searches."""

from __future__ import annotations

import json
from collections import Counter

import pytest

pytest.importorskip("bm25s")

from sdar_verl.envs.search.bm25 import Bm25Retriever
from sdar_verl.envs.search.passages import corpus_digest
from sdar_verl.envs.search.questions import PANELS, TASK_TYPES, make_questions, make_tasks
from sdar_verl.envs.search.relations import BY_KIND
from sdar_verl.envs.search.world import COUNTS, make_world
from sdar_verl.panels import PanelError, panel_hash


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def retriever(world):
    return Bm25Retriever(world.passages)


@pytest.fixture(scope="module")
def questions(world, retriever):
    return make_questions(world, retriever)


def test_a_world_is_a_function_of_seed_and_scale(world):
    assert corpus_digest(make_world(0).passages) == corpus_digest(world.passages)
    assert make_world(1).passages[0] != world.passages[0]
    assert len(world.passages) == sum(COUNTS.values()) == len(world.entities)
    assert len(make_world(0, scale=2).passages) == 2 * len(world.passages)
    for scale in (0, 11):
        with pytest.raises(ValueError, match=f"scale={scale}"):
            make_world(0, scale=scale)


def test_every_fact_stands_in_its_passage_and_links_lead_somewhere(world):
    text_of = {passage.title: passage.text for passage in world.passages}
    assert list(text_of) == list(world.entities)
    for entity in world.entities.values():
        relations = {relation.name: relation for relation in BY_KIND[entity.kind]}
        for name, value in entity.facts.items():
            assert value in text_of[entity.name]
            if relations[name].target:
                assert world.entities[value].kind == relations[name].target


@pytest.mark.parametrize("scale", [1, 3])
def test_years_fit_together(scale):
    things = make_world(5, scale).entities

    def year(name: str, fact: str) -> int:
        return int(things[name].facts[fact])

    for thing in things.values():
        facts = thing.facts
        if "birthplace" in facts:
            assert int(facts["born"]) > year(facts["birthplace"], "founded")
        if "teacher" in facts:
            assert 20 <= int(facts["born"]) - year(facts["teacher"], "born") <= 50
        if thing.kind == "city":
            assert 25 <= int(facts["founded"]) - year(facts["founder"], "born") < 50
        for person, made, place in (("author", "published", "setting"), ("architect", "finished", "place")):
            if person in facts:
                assert 25 <= int(facts[made]) - year(facts[person], "born") < 65
                assert int(facts[made]) > year(facts[place], "founded")


def follow(question, retriever, topk=3):
    """An agent that knows which names to search for, and reads only what the search shows."""
    texts = []
    for query, wanted in zip(question.searches, question.answer_passages, strict=True):
        shown = {hit.passage.passage_id: hit.passage.text for hit in retriever.search(query, topk)}
        assert wanted in shown, question
        texts.append(shown[wanted])
    return texts


def test_every_question_is_answered_by_its_searches(questions, retriever):
    for question in (question for panel in PANELS for question in questions[panel]):
        texts = follow(question, retriever)
        if question.task_type == "comparison":
            assert question.answers[0] in question.searches
            continue
        assert len(texts) == TASK_TYPES.index(question.task_type) + 1
        for text, needed in zip(texts, [*question.searches[1:], question.answers[0]], strict=True):
            assert needed in text
        # Nothing but the start is given away, and the answer has to be found.
        assert question.searches[0] in question.text
        assert not any(name in question.text for name in [*question.searches[1:], *question.answers])


def test_comparisons_are_decided_by_the_facts(world, questions):
    facts = {"born earlier": ("born", min), "founded earlier": ("founded", min), "longer": ("length", max)}
    facts |= {"published first": ("published", min), "finished later": ("finished", max)}
    asked = Counter()
    for question in (q for panel in PANELS for q in questions[panel] if q.task_type == "comparison"):
        [(name, (fact, best))] = [item for item in facts.items() if item[0] in question.text]
        values = {thing: int(world.entities[thing].facts[fact]) for thing in question.searches}
        assert question.answers[0] == best(values, key=values.__getitem__)
        assert len(set(values.values())) == 2
        asked[name] += question.answers[0] == question.searches[0]
    assert set(asked) == set(facts)
    total = sum(q.task_type == "comparison" for panel in PANELS for q in questions[panel])
    assert 0.4 < sum(asked.values()) / total < 0.6, "the first name should win about half of the time"


def test_a_panel_names_nothing_that_another_panel_starts_from(questions):
    starts = {
        panel: {name for q in questions[panel] for name in q.searches[: 2 if q.task_type == "comparison" else 1]}
        for panel in PANELS
    }
    assert not starts["train"] & starts["validation"]
    assert not starts["train"] & starts["test"]
    assert not starts["validation"] & starts["test"]
    assert {question.task_type for question in questions["test"]} == set(TASK_TYPES)


def test_questions_are_unique(questions):
    texts = [question.text for panel in PANELS for question in questions[panel]]
    assert len(texts) == len(set(texts)) > 5000


def test_panels_hold_the_types_in_equal_parts(questions):
    counts = {"train": 64, "validation": 18, "test": 16}
    panels = make_tasks(questions, counts, "digest")
    types = {panel: Counter(task.task_type for task in tasks) for panel, tasks in panels.items()}
    assert types["train"] == dict.fromkeys(TASK_TYPES, 16)
    assert sorted(types["validation"].values()) == [4, 4, 5, 5]
    task = panels["train"][0]
    assert task.description.endswith("?")
    assert task.data["corpus"] == "digest" and task.data["answers"] and task.data["searches"]
    json.dumps(dict(task.data))
    again = make_tasks(questions, counts, "digest")
    assert all(panel_hash(panels[panel]) == panel_hash(again[panel]) for panel in counts)
    smaller = make_tasks(questions, {"train": 32}, "digest")["train"]
    assert {task.task_id for task in smaller} <= {task.task_id for task in panels["train"]}


def test_more_questions_than_there_are_is_an_error_with_the_remedy(questions):
    with pytest.raises(PanelError, match=r"--validation 4000 needs 1000 .*--scale"):
        make_tasks(questions, {"validation": 4000}, "digest")
