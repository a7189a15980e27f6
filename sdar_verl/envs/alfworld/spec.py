"""What a generated ALFWorld game is: rooms, the household's usual places, the generator's settings, one game's specification.

The rooms, object classes and what fits where are ALFRED's own (read from the ``alfworld`` package); the choice of a small
subset is ours, so that a policy of half a million weights can learn it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
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
