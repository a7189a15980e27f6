"""The shipped corpus: a small invented world, drawn from a seed, with one passage about each thing in it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from sdar_verl.envs.search.names import Names
from sdar_verl.envs.search.passages import Passage
from sdar_verl.envs.search.relations import BY_KIND, CLOSINGS, OPENINGS

#: Things of each kind in a world of scale 1.
COUNTS: Mapping[str, int] = {
    "country": 8,
    "city": 48,
    "river": 18,
    "person": 120,
    "book": 60,
    "workshop": 30,
    "bridge": 30,
    "festival": 24,
}
MAX_SCALE = 10

_PROFESSIONS = (
    *("astronomer", "bookbinder", "botanist", "cartographer", "composer", "engraver", "geometer", "glassblower"),
    *("historian", "jurist", "mason", "navigator", "physician", "potter", "shipwright", "weaver"),
)
_PRODUCTS = (
    *("anchors", "barometers", "bells", "buttons", "compasses", "door locks", "fishing nets", "lenses"),
    *("mirrors", "paper", "pigments", "ropes", "sails", "scales", "sundials", "violins"),
)
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


@dataclass
class Entity:
    """A thing of the world.

    Attributes:
        kind: one of :data:`relations.KINDS`.
        name: unlike every other name.
        facts: relation -> value; a relation's target kind says whether that is another entity's name.
    """

    kind: str
    name: str
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def mention(self) -> str:
        """The name as it stands in a sentence."""
        return f"the {self.name}" if self.kind in ("river", "bridge", "festival") else self.name


@dataclass(frozen=True)
class World:
    """Entities by name, in a fixed order, and a passage about each, in the same order."""

    entities: Mapping[str, Entity]
    passages: tuple[Passage, ...]


def make_world(seed: int = 0, scale: int = 1) -> World:
    """A world that is a function of its arguments, on any machine.

    Years fit together: nobody is born in a city before it was founded, teaches before being grown up, or writes as a
    child. The earliest people therefore have no known birthplace, some no teacher.

    Args:
        seed: of everything.
        scale: multiplies the number of things of each kind.

    Raises:
        ValueError: ``scale`` is not within 1 to 10.
    """
    if not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"scale={scale}: choose 1 to {MAX_SCALE}")
    rng = random.Random(f"search-world/{seed}/{scale}")
    names = Names(rng)
    counts = {kind: number * scale for kind, number in COUNTS.items()}
    countries = [Entity("country", names.word(), {"currency": names.word().lower()}) for _ in range(counts["country"])]
    rivers = [_river(rng, names) for _ in range(counts["river"])]
    cities, founders = _cities(rng, names, counts["city"], countries, rivers)
    people = founders + _people(rng, names, counts["person"] - len(founders), cities)
    # Whoever was born when the first city stood finds a city for a work of later years.
    makers = [person for person in people if int(person.facts["born"]) > int(cities[0].facts["founded"])]
    works = [
        *(_book(rng, names, makers, cities) for _ in range(counts["book"])),
        *(_workshop(rng, names, makers, cities) for _ in range(counts["workshop"])),
        *(_bridge(rng, names, makers, cities) for _ in range(counts["bridge"])),
        *(_festival(rng, names, people, cities) for _ in range(counts["festival"])),
    ]
    everything = [*countries, *cities, *rivers, *people, *works]
    passages = tuple(
        Passage(f"{entity.kind}-{index:05d}", entity.name, _text(rng, entity))
        for index, entity in enumerate(everything)
    )
    return World({entity.name: entity for entity in everything}, passages)


def _text(rng: random.Random, entity: Entity) -> str:
    facts = [
        rng.choice(relation.sentences).format(s=entity.name, v=entity.facts[relation.name])
        for relation in BY_KIND[entity.kind]
        if relation.name in entity.facts
    ]
    rng.shuffle(facts)
    return " ".join(
        [rng.choice(OPENINGS[entity.kind]).format(s=entity.name), *facts, rng.choice(CLOSINGS[entity.kind])]
    )


def _river(rng: random.Random, names: Names) -> Entity:
    facts = {"source": f"Mount {names.word()}", "length": str(rng.randrange(60, 990))}
    return Entity("river", f"{names.word()} River", facts)


def _cities(
    rng: random.Random, names: Names, count: int, countries: list[Entity], rivers: list[Entity]
) -> tuple[list[Entity], list[Entity]]:
    """Cities, oldest first, and the founder of each."""
    cities: list[Entity] = []
    founders: list[Entity] = []
    for year in sorted(rng.sample(range(300, 300 + 10 * count), count)):
        born = year - rng.randrange(25, 50)
        founder = Entity("person", names.person(), {"born": str(born), "profession": rng.choice(_PROFESSIONS)})
        older = _founded_before(cities, born)
        if older:
            founder.facts["birthplace"] = rng.choice(older).name
        founders.append(founder)
        facts = {"founder": founder.name, "founded": str(year), "river": rng.choice(rivers).name}
        cities.append(Entity("city", names.word(), facts))
    shuffled = rng.sample(cities, count)
    for index, city in enumerate(shuffled):
        country = countries[index % len(countries)]
        city.facts["country"] = country.name
        country.facts.setdefault("capital", city.name)
    return cities, founders


def _people(rng: random.Random, names: Names, count: int, cities: list[Entity]) -> list[Entity]:
    start = max(int(city.facts["founded"]) for city in cities) + 20
    people: list[Entity] = []
    for year in sorted(start + rng.randrange(300) for _ in range(count)):
        facts = {"born": str(year), "birthplace": rng.choice(cities).name, "profession": rng.choice(_PROFESSIONS)}
        teachers = [person for person in people if 20 <= year - int(person.facts["born"]) <= 50]
        if teachers:
            facts["teacher"] = rng.choice(teachers).name
        people.append(Entity("person", names.person(), facts))
    return people


def _book(rng: random.Random, names: Names, people: list[Entity], cities: list[Entity]) -> Entity:
    author = rng.choice(people)
    year = int(author.facts["born"]) + rng.randrange(25, 65)
    setting = rng.choice(_founded_before(cities, year))
    return Entity("book", names.title(), {"author": author.name, "published": str(year), "setting": setting.name})


def _workshop(rng: random.Random, names: Names, people: list[Entity], cities: list[Entity]) -> Entity:
    owner = rng.choice(people)
    seat = rng.choice(_founded_before(cities, int(owner.facts["born"]) + 25))
    facts = {"owner": owner.name, "seat": seat.name, "product": rng.choice(_PRODUCTS)}
    return Entity("workshop", f"{names.word()} Works", facts)


def _bridge(rng: random.Random, names: Names, people: list[Entity], cities: list[Entity]) -> Entity:
    architect = rng.choice(people)
    year = int(architect.facts["born"]) + rng.randrange(25, 65)
    place = rng.choice(_founded_before(cities, year))
    facts = {"architect": architect.name, "place": place.name, "finished": str(year)}
    return Entity("bridge", f"{names.word()} Bridge", facts)


def _festival(rng: random.Random, names: Names, people: list[Entity], cities: list[Entity]) -> Entity:
    facts = {"place": rng.choice(cities).name, "honours": rng.choice(people).name, "month": rng.choice(_MONTHS)}
    return Entity("festival", f"{names.word()} Festival", facts)


def _founded_before(cities: list[Entity], year: int) -> list[Entity]:
    return [city for city in cities if int(city.facts["founded"]) < year]
