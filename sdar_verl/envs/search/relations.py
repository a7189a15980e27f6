"""What can be said and asked about the invented world, one line per kind of fact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("country", "city", "river", "person", "book", "workshop", "bridge", "festival")


@dataclass(frozen=True)
class Relation:
    """A kind of fact about entities of one kind.

    Attributes:
        subject: kind of the entity that it is about.
        name: unique for that kind.
        target: kind of the entity that is its value; empty for a plain value (a year, a word).
        phrase: the value as a noun phrase, ``{}`` for the entity: what a question of several hops is nested from.
        question: the question for it; ``{}`` takes a name or such a phrase.
        sentences: ways to say it; ``{s}`` is the entity, ``{v}`` the value.
        unit: what may follow the value in an answer.
    """

    subject: str
    name: str
    target: str
    phrase: str
    question: str
    sentences: tuple[str, ...]
    unit: tuple[str, ...] = ()


RELATIONS = (
    Relation(
        *("country", "capital", "city", "the capital of {}", "What is the capital of {}?"),
        ("Its capital is {v}.", "The seat of its government is the capital, {v}."),
    ),
    Relation(
        *("country", "currency", "", "the currency of {}", "What is the currency of {}?"),
        ("People pay in {v}, its currency.", "Its currency is called the {v}."),
    ),
    Relation(
        *("city", "country", "country", "the country of {}", "In which country does {} lie?"),
        ("It is a city in {v}.", "The city lies in {v}."),
    ),
    Relation(
        *("city", "founder", "person", "the founder of {}", "Who founded {}?"),
        ("It was founded by {v}.", "The city honours {v} as its founder."),
    ),
    Relation(
        *("city", "founded", "", "the founding year of {}", "In which year was {} founded?"),
        ("Its foundation is dated to the year {v}.", "It received its charter as a city when it was founded in {v}."),
    ),
    Relation(
        *("city", "river", "river", "the river that flows through {}", "Which river flows through {}?"),
        ("The {v} flows through it.", "It stands on both banks of the {v}."),
    ),
    Relation(
        *("river", "source", "", "the mountain on which {} rises", "On which mountain does {} rise?"),
        ("It rises on {v}.", "Its springs lie on the slopes of {v}."),
    ),
    Relation(
        *("river", "length", "", "the length of {}", "How many kilometres long is {}?"),
        ("From source to mouth it measures {v} kilometres.", "It is {v} kilometres long."),
        ("km", "kilometres", "kilometers"),
    ),
    Relation(
        *("person", "birthplace", "city", "the birthplace of {}", "In which city was {} born?"),
        ("{s} was born in {v}.", "The family of {s} came from {v}, the place of birth recorded in the town rolls."),
    ),
    Relation(
        *("person", "born", "", "the year in which {} was born", "In which year was {} born?"),
        ("The year of birth was {v}.", "The birth was entered in the register in {v}."),
    ),
    Relation(
        *("person", "profession", "", "the profession of {}", "What was the profession of {}?"),
        ("By profession {s} was a {v}.", "{s} worked as a {v}."),
    ),
    Relation(
        *("person", "teacher", "person", "the teacher of {}", "Who taught {}?"),
        ("{s} was a pupil of {v}.", "The teacher of {s} was {v}."),
    ),
    Relation(
        *("book", "author", "person", "the author of {}", "Who wrote {}?"),
        ("It was written by {v}.", "Its author is {v}."),
    ),
    Relation(
        *("book", "published", "", "the year in which {} was published", "In which year was {} published?"),
        ("It was first published in {v}.", "The first printing appeared in {v}."),
    ),
    Relation(
        *("book", "setting", "city", "the city that {} is set in", "In which city is {} set?"),
        ("The story is set in {v}.", "Most of it takes place in the streets of {v}."),
    ),
    Relation(
        *("workshop", "owner", "person", "the person who opened {}", "Who opened {}?"),
        ("It was opened by {v}.", "{v} opened it with borrowed money."),
    ),
    Relation(
        *("workshop", "seat", "city", "the home city of {}", "In which city is {} based?"),
        ("It is based in {v}.", "Its halls stand in {v}."),
    ),
    Relation(
        *("workshop", "product", "", "the product of {}", "What does {} make?"),
        ("It makes {v}.", "It became known for making {v}."),
    ),
    Relation(
        *("bridge", "architect", "person", "the architect of {}", "Who designed {}?"),
        ("It was designed by {v}.", "The plans were drawn by its architect, {v}."),
    ),
    Relation(
        *("bridge", "place", "city", "the city that {} stands in", "In which city does {} stand?"),
        ("It stands in {v}.", "It joins the two halves of {v}."),
    ),
    Relation(
        *("bridge", "finished", "", "the year in which {} was finished", "In which year was {} finished?"),
        ("It was finished in {v}.", "The last stone was laid in {v}, when it was finished."),
    ),
    Relation(
        *("festival", "place", "city", "the city that holds {}", "Which city holds {}?"),
        ("It is held in {v}.", "The city of {v} holds it."),
    ),
    Relation(
        *("festival", "honours", "person", "the person whom {} honours", "Whom does {} honour?"),
        ("It honours {v}.", "It was begun in memory of {v}, whom it honours."),
    ),
    Relation(
        *("festival", "month", "", "the month of {}", "In which month does {} take place?"),
        ("It takes place in {v}.", "Every year in {v} it fills the squares."),
    ),
)

BY_KIND: Mapping[str, tuple[Relation, ...]] = {
    kind: tuple(relation for relation in RELATIONS if relation.subject == kind) for kind in KINDS
}

#: Questions that compare two entities of a kind: (kind, relation, question, whether the smaller value wins).
COMPARISONS = (
    ("person", "born", "Who was born earlier, {} or {}?", True),
    ("city", "founded", "Which city was founded earlier, {} or {}?", True),
    ("river", "length", "Which river is longer, {} or {}?", False),
    ("book", "published", "Which book was published first, {} or {}?", True),
    ("bridge", "finished", "Which bridge was finished later, {} or {}?", False),
)

#: A first sentence, by kind; ``{s}`` is the entity.
OPENINGS: Mapping[str, tuple[str, ...]] = {
    "country": ("{s} is a country of hills and grain.", "{s} is a country on the inner coast."),
    "city": ("{s} is known for its covered markets.", "{s} has grown around an old harbour."),
    "river": ("The {s} floods its meadows every spring.", "The {s} is deep enough for barges."),
    "person": ("{s} left many letters.", "Little of the life of {s} is disputed."),
    "book": ("{s} is a book that was copied by hand for generations.", "{s} is a book read in most schools."),
    "workshop": ("{s} is a firm that trains its own apprentices.", "{s} is a firm that never moved."),
    "bridge": ("{s} carries carts and walkers.", "{s} is built of pale stone."),
    "festival": ("{s} lasts three days.", "{s} ends with a procession of boats."),
}
#: A last sentence about nothing that is asked for.
CLOSINGS: Mapping[str, tuple[str, ...]] = {
    "country": ("Its laws are read aloud once a year.", "Its roads are kept by the villages."),
    "city": ("Its town hall has a clock with one hand.", "Its bakers close on the ninth day."),
    "river": ("Herons nest along its lower course.", "Its water drives many mills."),
    "person": ("A portrait hangs in a town hall.", "The grave is no longer known."),
    "book": ("Two translations exist.", "The first page is often quoted."),
    "workshop": ("Its mark is a small star.", "It has never borrowed again."),
    "bridge": ("A toll is still taken on market days.", "Lamps were added later."),
    "festival": ("Children carry lanterns.", "Visitors sleep in the barns."),
}
