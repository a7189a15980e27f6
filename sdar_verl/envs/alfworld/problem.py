"""Writes a game specification as the files ALFWorld reads: a PDDL problem, ``game.tw-pddl`` and ``traj_data.json``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sdar_verl.envs.alfworld.spec import LAMP, PROCESSES, GameSpec, alfred_constants, alfred_folder, fits

_START = "loc|0|0|0|30"


def escape(name: str) -> str:
    """An ALFRED id in the form ALFWorld uses inside PDDL, e.g. ``Fridge_bar__plus_01_dot_01...``."""
    for symbol, word in (("|", "bar"), ("-", "minus"), ("+", "plus"), (".", "dot"), (",", "comma")):
        name = name.replace(symbol, f"_{word}_")
    return name


@lru_cache(maxsize=1)
def domain_and_grammar() -> tuple[str, str]:
    """ALFWorld's own PDDL domain and text grammar."""
    data = alfred_folder() / "data"
    return (data / "alfred.pddl").read_text(), (data / "alfred.twl2").read_text()


def pddl_problem(spec: GameSpec) -> str:
    """The initial state and the goal (ALFWorld's goal library) of a game."""
    import alfworld.gen.goal_library as goals

    constants = alfred_constants()
    location = {r.receptacle_id: escape(f"loc|{i}|{i}|0|30") for i, r in enumerate(spec.receptacles, start=1)}
    object_types = sorted({o.type for o in spec.objects})
    receptacle_types = sorted({r.type for r in spec.receptacles})

    declared = ["agent1 - agent"]
    declared += [f"{t}Type - otype" for t in object_types] + [f"{t}Type - rtype" for t in receptacle_types]
    declared += [f"{escape(o.object_id)} - object" for o in spec.objects]
    declared += [f"{escape(r.receptacle_id)} - receptacle" for r in spec.receptacles]
    declared += [f"{place} - location" for place in (*location.values(), escape(_START))]

    facts = ["(= (total-cost) 0)", f"(atLocation agent1 {escape(_START)})"]
    for receptacle in spec.receptacles:
        name = escape(receptacle.receptacle_id)
        facts.append(f"(receptacleType {name} {receptacle.type}Type)")
        facts.append(f"(receptacleAtLocation {name} {location[receptacle.receptacle_id]})")
        if receptacle.type in constants.OPENABLE_CLASS_SET:
            facts.append(f"(openable {name})")
    for placed in spec.objects:
        name, where = escape(placed.object_id), escape(placed.receptacle_id)
        facts.append(f"(objectType {name} {placed.type}Type)")
        facts.append(f"(inReceptacle {name} {where})")
        facts.append(f"(wasInReceptacle {name} {where})")
        facts.append(f"(objectAtLocation {name} {location[placed.receptacle_id]})")
        # ALFRED's lamps are used where they stand; everything else of ours can be carried
        facts.append(f"({'toggleable' if placed.type == LAMP else 'pickupable'} {name})")
        for _, ability in PROCESSES.values():
            if placed.type in constants.VAL_ACTION_OBJECTS[ability]:
                facts.append(f"({ability.lower()} {name})")
    for receptacle_type in receptacle_types:
        for object_type in object_types:
            if object_type != LAMP and fits(receptacle_type, object_type):
                facts.append(f"(canContain {receptacle_type}Type {object_type}Type)")

    goal = goals.gdict[spec.task_type]["pddl"]
    goal = goal.format(obj=spec.target, recep=spec.destination, toggle=spec.toggle).replace("#", "-")
    # the goal library closes the parenthesis of the problem itself
    return "\n".join(
        ["(define (problem plan)", "(:domain alfred)", "(:objects", *declared, ")", "(:init", *facts, ")", goal]
    )


def game_data(spec: GameSpec, walkthrough: list[str] | None) -> dict[str, Any]:
    """Content of ``game.tw-pddl``: what ``textworld``'s PddlEnv loads; ``walkthrough`` None lets it plan one."""
    domain, grammar = domain_and_grammar()
    return {
        "pddl_domain": domain,
        "grammar": grammar.replace("UNKNOWN GOAL", spec.description),
        "pddl_problem": pddl_problem(spec),
        "solvable": True,
        "walkthrough": walkthrough,
    }


def trajectory_data(spec: GameSpec) -> dict[str, Any]:
    """Content of ``traj_data.json``: the fields of ALFRED's that ALFWorld's users read, and ours under ``sdar``."""
    return {
        "task_type": spec.task_type,
        "task_id": spec.relative_path.rsplit("/", 1)[1],
        "pddl_params": {
            "object_target": spec.target,
            "mrecep_target": "",
            "parent_target": spec.destination,
            "toggle_target": spec.toggle,
            "object_sliced": False,
        },
        "scene": {"floor_plan": f"FloorPlan{spec.scene}", "scene_num": spec.scene},
        "turk_annotations": {"anns": [{"task_desc": spec.description, "high_descs": []}]},
        "sdar": {"room": spec.room, "split": spec.split, "index": spec.index, "usual_place": spec.usual_place},
    }
