"""What a generated ALFWorld game is: rooms, the household's usual places, the generator's settings, a game's parts.

Rooms, object classes and what fits where are ALFRED's own (read from the ``alfworld`` package); the choice of a small
subset is ours, so that a policy of half a million weights can learn it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
#: What the skill banks of SDAR's released code and of SkillRL call them.
TASK_TYPE_ALIASES = {
    "pick_and_place": ("pick_and_place_simple", "pick_two_obj_and_place"),
    "clean": ("pick_clean_then_place_in_recep",),
    "heat": ("pick_heat_then_place_in_recep",),
    "cool": ("pick_cool_then_place_in_recep",),
    "examine": ("look_at_obj_in_light",),
}
SPLITS = ("train", "valid_seen", "valid_unseen")

#: What a task does to the object on its way, the appliance that does it, ALFRED's name for the property it needs.
PROCESSES: Mapping[str, tuple[str, str]] = {
    "heat": ("Microwave", "Heatable"),
    "cool": ("Fridge", "Coolable"),
    "clean": ("SinkBasin", "Cleanable"),
}

#: The lamp of look_at_obj_in_light. ALFRED lists it in no receptacle's contents, so where it may stand is ours to say.
LAMP = "DeskLamp"
LAMP_RECEPTACLES = ("Desk", "SideTable", "Dresser", "Shelf")

DEFAULT_HOUSEHOLD_SEED = 7


@dataclass(frozen=True)
class Room:
    """A kind of room.

    Attributes:
        objects: object types that lie about in it.
        receptacles: receptacle types that may appear, if the floor plan has them.
        usual: receptacle types that can be an object's usual place: those that most floor plans have.
        scenes: AI2-THOR floor plan numbers.
        task_types: what can be asked in it.
    """

    objects: tuple[str, ...]
    receptacles: tuple[str, ...]
    usual: tuple[str, ...]
    scenes: tuple[int, ...]
    task_types: tuple[str, ...]


_KITCHEN_USUAL = ("Fridge", "Microwave", "CounterTop", "SinkBasin", "GarbageCan", "Cabinet")
_BEDROOM_USUAL = ("Bed", "Desk", "Drawer", "Shelf", "Dresser", "SideTable", "GarbageCan")

ROOMS: Mapping[str, Room] = {
    "kitchen": Room(
        objects=("Apple", "Potato", "Tomato", "Egg", "Mug", "Cup", "Plate", "Bowl"),
        receptacles=(*_KITCHEN_USUAL, "DiningTable", "Shelf"),
        usual=_KITCHEN_USUAL,
        scenes=tuple(range(1, 31)),
        task_types=tuple(t for t in TASK_TYPES if t != "look_at_obj_in_light"),
    ),
    "bedroom": Room(
        objects=("Book", "CD", "CellPhone", "KeyChain", "Pen", "CreditCard", "AlarmClock"),
        receptacles=(*_BEDROOM_USUAL, "Safe"),
        usual=_BEDROOM_USUAL,
        scenes=tuple(range(301, 331)),
        task_types=("pick_and_place_simple", "look_at_obj_in_light", "pick_two_obj_and_place"),
    ),
}


def held_out(scene: int) -> bool:
    """Whether a floor plan belongs to valid_unseen: every fifth one, so both sides have rooms of every make."""
    return scene % 5 == 0


@lru_cache(maxsize=1)
def alfred_constants() -> ModuleType:
    """ALFRED's constants from the ``alfworld`` package; ImportError names the extra when it is missing."""
    try:
        import alfworld.gen.constants as constants
    except ImportError as error:
        raise ImportError(
            "the ALFWorld environment needs the package `alfworld`: pip install 'sdar-verl[alfworld]'"
        ) from error
    return constants


def alfred_folder() -> Path:
    """Where the ``alfworld`` package lies, with its ``data`` and ``gen`` folders."""
    return Path(str(alfred_constants().__file__)).parents[1]


def fits(receptacle_type: str, object_type: str) -> bool:
    """Whether an object type may lie in or on a receptacle type."""
    if object_type == LAMP:
        return receptacle_type in LAMP_RECEPTACLES
    return object_type in alfred_constants().VAL_RECEPTACLE_OBJECTS.get(receptacle_type, ())


def process_of(task_type: str) -> str | None:
    """``heat``, ``cool``, ``clean`` or None: what the task asks to be done to the object."""
    return next((name for name in PROCESSES if f"_{name}_" in task_type), None)


def usual_places(seed: int = DEFAULT_HOUSEHOLD_SEED) -> dict[str, str]:
    """The household's map, object type -> receptacle type; one household per seed, the same on every machine.

    Usual places are drawn at random among those that fit rather than by common sense, so that only the household itself
    (through reward) or its privileged skills can tell them.
    """
    rng = random.Random(f"household/{seed}")
    places = {
        object_type: rng.choice([r for r in room.usual if fits(r, object_type)])
        for room in ROOMS.values()
        for object_type in room.objects
    }
    places[LAMP] = rng.choice(LAMP_RECEPTACLES)
    return places


@dataclass(frozen=True)
class GeneratorConfig:
    """How games are drawn; every value is checked when the object is made (ValueError names field, value and remedy).

    Attributes:
        seed: games are a function of (seed, split, index) and of the other fields, on any machine.
        household_seed: which map of usual places the objects follow.
        task_types: games cycle through these, so a panel holds the same number of each.
        rooms: kinds of room to draw from.
        n_receptacles: receptacles in a room (fewer when the floor plan has no more, three of one type at most).
        n_distractors: objects besides the target.
        p_home: probability that an object lies at its usual place; otherwise anywhere else that fits.
        scenes: floor plans to draw from; empty for all of the rooms' own.
    """

    seed: int = 0
    household_seed: int = DEFAULT_HOUSEHOLD_SEED
    task_types: tuple[str, ...] = TASK_TYPES
    rooms: tuple[str, ...] = tuple(ROOMS)
    n_receptacles: int = 7
    n_distractors: int = 3
    p_home: float = 0.85
    scenes: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ValueError(f"GeneratorConfig.{name} = {getattr(self, name)!r}: {remedy}")

        require(len(self.task_types) > 0, "task_types", f"name at least one of {', '.join(TASK_TYPES)}")
        for task_type in self.task_types:
            require(task_type in TASK_TYPES, "task_types", f"{task_type!r} is not one of {', '.join(TASK_TYPES)}")
        require(len(set(self.task_types)) == len(self.task_types), "task_types", "name each type once")
        require(len(self.rooms) > 0, "rooms", f"name at least one of {', '.join(ROOMS)}")
        for room in self.rooms:
            require(room in ROOMS, "rooms", f"{room!r} is not one of {', '.join(ROOMS)}")
        for task_type in self.task_types:
            fitting = [name for name, room in ROOMS.items() if task_type in room.task_types]
            require(any(r in self.rooms for r in fitting), "rooms", f"{task_type} needs one of {', '.join(fitting)}")
        require(4 <= self.n_receptacles <= 16, "n_receptacles", "choose 4 to 16; a task needs up to 4 of them")
        require(0 <= self.n_distractors <= 6, "n_distractors", "choose 0 to 6")
        require(0.0 <= self.p_home <= 1.0, "p_home", "a probability lies between 0 and 1")
        known = {scene for name in self.rooms for scene in ROOMS[name].scenes}
        unknown = [scene for scene in self.scenes if scene not in known]
        require(not unknown, "scenes", f"{unknown} are no floor plans of {', '.join(self.rooms)}")


@dataclass(frozen=True)
class Receptacle:
    """``receptacle_id`` in ALFRED's form, e.g. ``Fridge|+01.01|+00.23|+01.92``."""

    receptacle_id: str
    type: str


@dataclass(frozen=True)
class PlacedObject:
    """An object and the receptacle it lies in at the start."""

    object_id: str
    type: str
    receptacle_id: str


@dataclass(frozen=True)
class GameSpec:
    """Everything that makes one game.

    Attributes:
        split: ``train``, ``valid_seen`` or ``valid_unseen``.
        index: position within the split.
        scene: floor plan number.
        target: type of the object asked for.
        destination: receptacle type it shall be put in; empty for look_at_obj_in_light.
        toggle: lamp type to use; empty for the other tasks.
        usual_place: where the household keeps the target (receptacle type), whether or not it lies there now.
        description: the task in ALFWorld's words, without the final full stop.
        receptacles: in random order.
        objects: targets first, then the lamp if any, then distractors.
    """

    split: str
    index: int
    room: str
    scene: int
    task_type: str
    target: str
    destination: str
    toggle: str
    usual_place: str
    description: str
    receptacles: tuple[Receptacle, ...]
    objects: tuple[PlacedObject, ...]

    @property
    def relative_path(self) -> str:
        """``<task_type>-<Obj>-<Mrecep>-<Recep>-<scene>/trial_<index>``, as in ALFWorld's own data."""
        goal = self.destination or self.toggle
        return f"{self.task_type}-{self.target}-None-{goal}-{self.scene}/trial_{self.index:06d}"
