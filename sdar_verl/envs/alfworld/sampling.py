"""Draws game specifications; a game is a function of (configuration, split, index) alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from sdar_verl.envs.alfworld.spec import (
    LAMP,
    PROCESSES,
    ROOMS,
    SPLITS,
    GameSpec,
    GeneratorConfig,
    PlacedObject,
    Receptacle,
    Room,
    alfred_constants,
    alfred_folder,
    fits,
    held_out,
    process_of,
    usual_places,
)

_ATTEMPTS = 2000
_MAX_PER_TYPE = 3


@lru_cache(maxsize=64)
def floor_plan(scene: int) -> dict[str, tuple[str, ...]]:
    """Receptacle ids of an AI2-THOR floor plan by type, as ALFRED recorded them."""
    folder = alfred_folder() / "gen" / "layouts"
    by_type: dict[str, list[str]] = {}
    for receptacle_id in sorted(json.loads((folder / f"FloorPlan{scene}-openable.json").read_text())):
        receptacle_type = receptacle_id.split("|")[0]
        # a sink's basin is recorded as Sink|x|y|z|SinkBasin, and it is the basin that holds things
        by_type.setdefault("SinkBasin" if receptacle_type == "Sink" else receptacle_type, []).append(receptacle_id)
    # FloorPlan*-objects.json lists a garbage can in every room of ours, but most recordings miss where it stands
    by_type.setdefault("GarbageCan", [f"GarbageCan|+00.{scene % 90 + 10}|+00.00|-01.23"])
    return {receptacle_type: tuple(ids) for receptacle_type, ids in by_type.items()}


def sample_spec(config: GeneratorConfig, split: str, index: int, places: Mapping[str, str] | None = None) -> GameSpec:
    """Draw game ``index`` of a split.

    Args:
        config: what to draw.
        split: ``train`` and ``valid_seen`` use the training floor plans, ``valid_unseen`` the held-out ones.
        index: 0-based; picks the task type (``index`` modulo their number) and seeds the rest.
        places: usual place of every object type; default: the household of ``config.household_seed``.

    Raises:
        ValueError: unknown split, negative index, or no floor plan holds what the task needs.
    """
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index = {index}: games are counted from 0")
    places = usual_places(config.household_seed) if places is None else places
    task_type = config.task_types[index % len(config.task_types)]
    rng = random.Random(f"{config.seed}/{split}/{index}")  # str seeds are hashed by sha512: the same everywhere
    for _ in range(_ATTEMPTS):
        spec = _draw(rng, config, split, index, task_type, places)
        if spec is not None:
            return spec
    raise ValueError(
        f"no {task_type} game for split {split!r} in {_ATTEMPTS} draws: no floor plan of "
        f"{config.scenes or 'the rooms'} belongs to this split and has the receptacles; allow more in "
        "GeneratorConfig.scenes or raise n_receptacles"
    )


def _draw(
    rng: random.Random,
    config: GeneratorConfig,
    split: str,
    index: int,
    task_type: str,
    places: Mapping[str, str],
) -> GameSpec | None:
    """One attempt; None when the floor plan drawn lacks something the task needs."""
    name = rng.choice([n for n in config.rooms if task_type in ROOMS[n].task_types])
    room = ROOMS[name]
    scenes = [
        s for s in room.scenes if held_out(s) == (split == "valid_unseen") and (not config.scenes or s in config.scenes)
    ]
    if not scenes:
        return None
    scene = rng.choice(scenes)
    plan = floor_plan(scene)
    available = [t for t in room.receptacles if t in plan]
    process = process_of(task_type)
    appliance = PROCESSES[process][0] if process else None
    target = rng.choice(_targets(room, process))
    looking = task_type == "look_at_obj_in_light"
    # the usual places stand in every room, also when the object is elsewhere: the policy can always look there
    needed = [places[target], *([appliance] if appliance else []), *([places[LAMP]] if looking else [])]
    if any(t not in available for t in needed):
        return None

    def place_of(object_type: str, choices: list[str]) -> str | None:
        if places[object_type] in choices and rng.random() < config.p_home:
            return places[object_type]
        others = [t for t in choices if fits(t, object_type) and t != places[object_type]]
        return rng.choice(others) if others else None

    source = place_of(target, available)
    lamp_place = place_of(LAMP, available) if looking else None
    if source is None or (looking and lamp_place is None):
        return None
    destination = ""
    if not looking:
        free = [t for t in available if fits(t, target) and t not in (source, places[target], appliance)]
        if not free:
            return None
        destination = rng.choice(free)
    needed += [source, *([destination] if destination else []), *([lamp_place] if lamp_place else [])]
    receptacles = _furnish(rng, config.n_receptacles, needed, available, plan)
    if receptacles is None:
        return None

    objects: list[PlacedObject] = []

    def put(object_type: str, receptacle_type: str) -> str:
        object_id = _object_id(rng, object_type, {o.object_id for o in objects})
        where = rng.choice([r.receptacle_id for r in receptacles if r.type == receptacle_type])
        objects.append(PlacedObject(object_id, object_type, where))
        return where

    where = put(target, source)
    if task_type == "pick_two_obj_and_place":  # the pair lies together
        object_id = _object_id(rng, target, {o.object_id for o in objects})
        objects.append(PlacedObject(object_id, target, where))
    if lamp_place:
        put(LAMP, lamp_place)
    present = sorted({r.type for r in receptacles})
    for object_type in rng.sample([o for o in room.objects if o != target], config.n_distractors):
        place = place_of(object_type, present)
        if place is not None:
            put(object_type, place)
    return GameSpec(
        split=split,
        index=index,
        room=name,
        scene=scene,
        task_type=task_type,
        target=target,
        destination=destination,
        toggle=LAMP if looking else "",
        usual_place=places[target],
        description=_describe(rng, task_type, target, destination, LAMP if looking else ""),
        receptacles=tuple(receptacles),
        objects=tuple(objects),
    )


def _targets(room: Room, process: str | None) -> list[str]:
    if process is None:
        return list(room.objects)
    able = alfred_constants().VAL_ACTION_OBJECTS[PROCESSES[process][1]]
    return [o for o in room.objects if o in able]


def _furnish(
    rng: random.Random, count: int, needed: list[str], available: list[str], plan: Mapping[str, tuple[str, ...]]
) -> list[Receptacle] | None:
    """``count`` receptacles in random order, the needed types among them; None when there is no room for those.

    Other types come first, then second and third receptacles of a type; a poor floor plan gives fewer than ``count``.
    """
    chosen = sorted(set(needed))
    if len(chosen) > count:
        return None
    others = [t for t in available if t not in chosen]
    rng.shuffle(others)
    chosen += others
    for copies in range(2, _MAX_PER_TYPE + 1):
        more = [t for t in available if len(plan[t]) >= copies]
        rng.shuffle(more)
        chosen += more
    numbers = Counter(chosen[:count])
    receptacles = [Receptacle(r, t) for t, n in numbers.items() for r in rng.sample(plan[t], n)]
    rng.shuffle(receptacles)
    return receptacles


def _object_id(rng: random.Random, object_type: str, taken: set[str]) -> str:
    while True:
        x, z = rng.uniform(-9, 9), rng.uniform(-9, 9)
        object_id = f"{object_type}|{x:+06.2f}|+00.95|{z:+06.2f}"
        if object_id not in taken:
            return object_id


def _describe(rng: random.Random, task_type: str, target: str, destination: str, toggle: str) -> str:
    import alfworld.gen.goal_library as goals

    template = rng.choice(goals.gdict[task_type]["templates"])
    return template.format(obj=target.lower(), recep=destination.lower(), toggle=toggle.lower(), mrecep="")
