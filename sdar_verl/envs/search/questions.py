"""Questions about the invented world: of one, two and three hops, and comparisons; each proven to be answerable."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdar_verl.envs.base import Task
from sdar_verl.envs.search.bm25 import Bm25Retriever
from sdar_verl.envs.search.relations import BY_KIND, COMPARISONS, Relation
from sdar_verl.envs.search.world import Entity, World
from sdar_verl.panels import PanelError, choose

TASK_TYPES = ("one_hop", "two_hop", "three_hop", "comparison")
PANELS = ("train", "validation", "test")
#: Share of the things that questions of a panel start from. No thing is a starting point in two panels.
_SHARES = (("train", 0.6), ("validation", 0.8), ("test", 1.0))


@dataclass(frozen=True)
class Question:
    """A question of the world.

    Attributes:
        text: what is asked.
        task_type: one of :data:`TASK_TYPES`.
        answers: golden answers; the first is the world's own form.
        searches: queries that lead to the answer, one after the other: each finds the passage that names the next.
        answer_passages: ids of the passages that these searches must find.
    """

    text: str
    task_type: str
    answers: tuple[str, ...]
    searches: tuple[str, ...]
    answer_passages: tuple[str, ...]


def make_questions(world: World, retriever: Bm25Retriever, seed: int = 0, topk: int = 3) -> dict[str, list[Question]]:
    """All questions of the world by panel.

    A question is kept when each of its searches finds, among the ``topk`` best passages, the one that says what the
    next step needs. Training, validation and test start from different things, so a test question names nothing that a
    training question has named.

    Args:
        world: see :func:`make_world`.
        retriever: over the world's passages.
        seed: of the split, and of the pairs that are compared.
        topk: passages that a search shows.
    """
    panel_of = _split(list(world.entities), seed)
    passage_of = {passage.title: passage.passage_id for passage in world.passages}
    findable = {
        name
        for name in world.entities
        if passage_of[name] in [hit.passage.passage_id for hit in retriever.search(name, topk)]
    }
    questions: dict[str, list[Question]] = {panel: [] for panel in PANELS}
    for entity in world.entities.values():
        for chain in _chains(world, entity, 3):
            if all(step.name in findable for step, _ in chain):
                questions[panel_of[entity.name]].append(_chain_question(chain, passage_of))
    for panel in PANELS:
        members = [entity for entity in world.entities.values() if panel_of[entity.name] == panel]
        pairs = _comparisons([entity for entity in members if entity.name in findable], seed, panel)
        questions[panel] += [_comparison_question(*pair, passage_of) for pair in pairs]
    return questions


def make_tasks(
    questions: Mapping[str, Sequence[Question]], counts: Mapping[str, int], corpus: str, seed: int = 0
) -> dict[str, list[Task]]:
    """Panels with as many questions of each type, as far as they go.

    Args:
        questions: see :func:`make_questions`.
        counts: panel -> number of tasks.
        corpus: digest of the corpus that holds the answers.
        seed: of the choice.

    Raises:
        PanelError: there are not as many questions.
    """
    panels = {}
    for panel, count in counts.items():
        tasks = []
        for index, task_type in enumerate(TASK_TYPES):
            share = count // len(TASK_TYPES) + (index < count % len(TASK_TYPES))
            of_type = [_task(question, corpus) for question in questions[panel] if question.task_type == task_type]
            if share > len(of_type):
                raise PanelError(
                    f"--{panel} {count} needs {share} questions of the type {task_type}, but this world has "
                    f"{len(of_type)}; ask for fewer, or for a larger world (--scale)"
                )
            tasks += choose(of_type, share, seed) if share else []
        panels[panel] = tasks
    return panels


def _task(question: Question, corpus: str) -> Task:
    name = hashlib.sha256(question.text.encode()).hexdigest()[:12]
    data = {"answers": list(question.answers), "searches": list(question.searches), "corpus": corpus}
    return Task("search", f"{question.task_type}/{name}", question.task_type, question.text, data)


def _split(names: Sequence[str], seed: int) -> dict[str, str]:
    shuffled = random.Random(f"search-split/{seed}").sample(sorted(names), len(names))
    return {
        name: next(panel for panel, share in _SHARES if (index + 0.5) / len(names) < share)
        for index, name in enumerate(shuffled)
    }


Chain = list[tuple[Entity, Relation]]


def _chains(world: World, start: Entity, longest: int) -> Iterator[Chain]:
    """Walks along facts from ``start``, one to ``longest`` of them; no thing is met twice."""
    open_chains: list[tuple[Chain, Entity]] = [([], start)]
    for length in range(1, longest + 1):
        longer: list[tuple[Chain, Entity]] = []
        for chain, end in open_chains:
            met = {entity.name for entity, _ in chain} | {end.name}
            for relation in BY_KIND[end.kind]:
                value = end.facts.get(relation.name)
                if value is None or value in met:
                    continue
                longer.append(([*chain, (end, relation)], end))
        yield from (chain for chain, _ in longer)
        open_chains = [
            (chain, world.entities[end.facts[chain[-1][1].name]]) for chain, end in longer if chain[-1][1].target
        ]
        if length == longest:
            return


def _chain_question(chain: Chain, passage_of: Mapping[str, str]) -> Question:
    phrase = chain[0][0].mention
    for _, relation in chain[:-1]:
        phrase = relation.phrase.format(phrase)
    last, relation = chain[-1]
    value = last.facts[relation.name]
    answers = [value, *(f"{value} {unit}" for unit in relation.unit)]
    if relation.target == "river":
        answers.append(value.removesuffix(" River"))
    entities = [entity.name for entity, _ in chain]
    return Question(
        text=relation.question.format(phrase),
        task_type=TASK_TYPES[len(chain) - 1],
        answers=tuple(answers),
        searches=tuple(entities),
        answer_passages=tuple(passage_of[name] for name in entities),
    )


Pair = tuple[str, Entity, Entity, Entity]


def _comparisons(members: Sequence[Entity], seed: int, panel: str) -> Iterator[Pair]:
    """(question, first, second, the one that wins): each thing is compared with a few others of its kind."""
    for kind, fact, question, smaller in COMPARISONS:
        rng = random.Random(f"search-pairs/{seed}/{panel}/{kind}")
        things = [entity for entity in members if entity.kind == kind]
        seen = set()
        for first in things:
            for second in rng.sample(things, min(4, len(things))):
                values = int(first.facts[fact]), int(second.facts[fact])
                pair = frozenset((first.name, second.name))
                if values[0] == values[1] or pair in seen:
                    continue
                seen.add(pair)
                yield question, first, second, first if (values[0] < values[1]) == smaller else second


def _comparison_question(
    question: str, first: Entity, second: Entity, winner: Entity, passage_of: Mapping[str, str]
) -> Question:
    answers = [winner.name]
    if winner.kind == "river":
        answers.append(winner.name.removesuffix(" River"))
    return Question(
        text=question.format(first.mention, second.mention),
        task_type="comparison",
        answers=tuple(answers),
        searches=(first.name, second.name),
        answer_passages=(passage_of[first.name], passage_of[second.name]),
    )
