"""A Python equivalent of ALFWorld's text engine for generated games, a thousand times quicker.

It knows the actions that the policy is shown: go to, open, close, take, move, heat, cool, clean, use. Others (help,
inventory, look, examine) it answers like unknown ones. ``tests/unit/test_start_policy.py`` plays games on both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from sdar_verl.envs.alfworld.problem import escape
from sdar_verl.envs.alfworld.spec import LAMP, PROCESSES, GameSpec, alfred_constants, fits, process_of

INTRODUCTION = "You are in the middle of a room. Looking quickly around you, you see {}."
NOTHING = "Nothing happens."


def display_names(spec: GameSpec) -> dict[str, str]:
    """ALFRED id -> name in the text (``fridge 1``), numbered as alfworld's Demangler numbers them."""
    by_escaped = {escape(name).lower(): name for name in _all_ids(spec)}
    groups: dict[str, list[str]] = defaultdict(list)
    for escaped in sorted(by_escaped):
        groups[escaped.split("_bar_", 1)[0] + ("basin" if "basin" in escaped else "")].append(escaped)
    return {
        by_escaped[escaped]: f"{name} {len(members) - position}"
        for name, members in groups.items()
        for position, escaped in enumerate(members)
    }


def _all_ids(spec: GameSpec) -> Iterable[str]:
    yield from (r.receptacle_id for r in spec.receptacles)
    yield from (o.object_id for o in spec.objects)


class Simulator:
    """One game; objects and receptacles go by their display names.

    Attributes:
        place: receptacle type by receptacle.
        kind: object type by object.
        lies_in: receptacle by object; None while carried.
        at: the receptacle the agent stands at, None at the start.
        carried: the object in hand.
        opened: receptacles that are open.
        done_to: objects heated, cooled, cleaned.
    """

    def __init__(self, spec: GameSpec) -> None:
        names = display_names(spec)
        self.spec = spec
        self.place = {names[r.receptacle_id]: r.type for r in spec.receptacles}
        self.kind = {names[o.object_id]: o.type for o in spec.objects}
        self.lies_in: dict[str, str | None] = {names[o.object_id]: names[o.receptacle_id] for o in spec.objects}
        self.at: str | None = None
        self.carried: str | None = None
        self.opened: set[str] = set()
        self.done_to: dict[str, set[str]] = {process: set() for process in PROCESSES}
        self.lamp_on = False

    def introduction(self) -> str:
        """The first observation, without the task."""
        return INTRODUCTION.format(_listing(self.place))

    def openable(self, receptacle: str) -> bool:
        """Whether the receptacle has a door or lid."""
        return self.place[receptacle] in alfred_constants().OPENABLE_CLASS_SET

    def closed(self, receptacle: str) -> bool:
        """Whether one would have to open it to see what is inside."""
        return self.openable(receptacle) and receptacle not in self.opened

    def contents(self, receptacle: str) -> list[str]:
        """Objects in or on a receptacle."""
        return [o for o, where in self.lies_in.items() if where == receptacle]

    def visible(self) -> list[str]:
        """Objects the agent sees where it stands."""
        return [] if self.at is None or self.closed(self.at) else self.contents(self.at)

    def actions(self) -> list[str]:
        """Admissible actions of those that the policy is shown, sorted as the engine sorts them."""
        found = [f"go to {r}" for r in self.place if r != self.at]
        here, held = self.at, self.carried
        if here is not None:
            if self.openable(here):
                found.append(f"{'close' if here in self.opened else 'open'} {here}")
            for seen in self.visible():
                if self.kind[seen] == LAMP:
                    found.append(f"use {seen}")
                elif held is None:
                    found.append(f"take {seen} from {here}")
            if held is not None:
                if not self.closed(here) and fits(self.place[here], self.kind[held]):
                    found.append(f"move {held} to {here}")
                for process, (appliance, ability) in PROCESSES.items():
                    able = alfred_constants().VAL_ACTION_OBJECTS[ability]
                    if self.place[here] == appliance and self.kind[held] in able:
                        found.append(f"{process} {held} with {here}")
        return sorted(found)

    def step(self, action: str) -> str:
        """Do what an action says; returns the engine's answer."""
        if action not in self.actions():
            return NOTHING
        verb = action.split(" ", 1)[0]
        if verb == "go":
            self.at = action.removeprefix("go to ")
            return f"You arrive at {self.at}. {self._look(self.at)}"
        if verb == "use":
            self.lamp_on = True
            return f"You turn on the {action.removeprefix('use ')}."
        assert self.at is not None  # every other action needs a receptacle
        if verb == "open":
            self.opened.add(self.at)
            return f"You open the {self.at}. {self._look(self.at)}"
        if verb == "close":
            self.opened.discard(self.at)
            return f"You close the {self.at}."
        if verb == "take":
            self.carried = action.removeprefix("take ").split(" from ")[0]
            self.lies_in[self.carried] = None
            return f"You pick up the {self.carried} from the {self.at}."
        held = self.carried
        assert held is not None
        if verb == "move":
            self.lies_in[held], self.carried = self.at, None
            return f"You move the {held} to the {self.at}."
        if verb in ("heat", "cool"):  # hot things cool down, cold ones warm up
            self.done_to["cool" if verb == "heat" else "heat"].discard(held)
        self.done_to[verb].add(held)
        return f"You {verb} the {held} using the {self.at}."

    def won(self) -> bool:
        """Whether the goal holds."""
        spec = self.spec
        if spec.toggle:
            lamp_here = self.at is not None and any(self.kind[o] == LAMP for o in self.contents(self.at))
            return self.lamp_on and lamp_here and self.carried is not None and self.kind[self.carried] == spec.target
        process = process_of(spec.task_type)
        wanted = 2 if spec.task_type == "pick_two_obj_and_place" else 1
        for receptacle, place in self.place.items():
            if place == spec.destination:
                placed = [o for o in self.contents(receptacle) if self.kind[o] == spec.target]
                if len([o for o in placed if process is None or o in self.done_to[process]]) >= wanted:
                    return True
        return False

    def _look(self, receptacle: str) -> str:
        if self.closed(receptacle):
            return f"The {receptacle} is closed."
        seen = _listing(self.contents(receptacle))
        if self.openable(receptacle):
            return f"The {receptacle} is open. In it, you see {seen}."
        return f"On the {receptacle}, you see {seen}."


def _listing(names: Iterable[str]) -> str:
    items = [f"a {name}" for name in names]
    if len(items) < 2:
        return items[0] if items else "nothing"
    return f"{', '.join(items[:-1])}, and {items[-1]}"
