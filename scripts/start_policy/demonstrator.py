"""Scripted players of the simulator; they decide by what the policy sees in its prompt, so it can learn from them."""

from __future__ import annotations

import random
from collections.abc import Mapping

from simulator import Simulator

from sdar_verl.envs.alfworld.spec import LAMP, PROCESSES, fits, process_of

_REMEMBERED = 3  # receptacles: where it stands now and in the two turns of history


class Demonstrator:
    """Plays one game.

    Args:
        game: the running game.
        rng: every choice comes from here.
        places: usual place of every object type, looked at first; None: search at random, as without a skill.
        random_share: probability of executing a random action instead of the one thought of.
        forgets: skip heating, cooling or cleaning, as one who was not told the recipe.
    """

    def __init__(
        self,
        game: Simulator,
        rng: random.Random,
        places: Mapping[str, str] | None,
        *,
        random_share: float,
        forgets: bool,
    ) -> None:
        self._game = game
        self._rng = rng
        self._places = places
        self._random_share = random_share
        self._forgets = forgets
        self._stood_at: list[str | None] = []

    def act(self) -> tuple[str, str]:
        """(thought, action) for the current state; the thought names the object and the place or the deed."""
        self._stood_at.append(self._game.at)
        thought, action = self._decide()
        if self._rng.random() < self._random_share:
            action = self._rng.choice(self._game.actions())
        return thought, action

    def _decide(self) -> tuple[str, str]:
        game, spec = self._game, self._game.spec
        held, here = game.carried, game.at
        target = spec.target.lower()
        if held is None:
            wanted = [o for o in game.visible() if game.kind[o] == spec.target]
            if wanted and here is not None and self._may_take_here():
                if game.place[here] == spec.destination:  # it was put there without the process: do it now
                    self._forgets = False
                return f"{target} take", f"take {wanted[0]} from {here}"
            return self._search(spec.target)
        if game.kind[held] != spec.target:
            return f"{target} drop", self._drop()
        process = process_of(spec.task_type)
        if process and not self._forgets and held not in game.done_to[process]:
            appliance = PROCESSES[process][0]
            if here is not None and game.place[here] == appliance:
                return f"{target} {process}", f"{process} {held} with {here}"
            return f"{target} {process}", f"go to {self._first(appliance)}"
        if spec.toggle:
            lamps = [o for o in game.visible() if game.kind[o] == LAMP]
            return (f"{LAMP.lower()} use", f"use {lamps[0]}") if lamps else self._search(LAMP)
        thought = f"{target} place {spec.destination.lower()}"
        if here != self._first(spec.destination) or here is None:
            return thought, f"go to {self._first(spec.destination)}"
        return thought, f"open {here}" if game.closed(here) else f"move {held} to {here}"

    def _may_take_here(self) -> bool:
        """What lies at the destination stays there, unless the process was forgotten."""
        game, spec = self._game, self._game.spec
        assert game.at is not None
        return game.place[game.at] != spec.destination or process_of(spec.task_type) is not None

    def _first(self, receptacle_type: str) -> str:
        """The receptacle number 1 of a type: the two things of pick two must meet in the same one."""
        return min(r for r, place in self._game.place.items() if place == receptacle_type)

    def _drop(self) -> str:
        """Put a wrong object down, here if possible."""
        actions = self._game.actions()
        for verb in ("move ", "open ", "go "):
            fitting = [a for a in actions if a.startswith(verb)]
            if fitting:
                return self._rng.choice(fitting)
        raise AssertionError("there is always somewhere to go")

    def _search(self, wanted: str) -> tuple[str, str]:
        """Look into what is closed here, else go to the usual place, else to any place not just visited."""
        game, here = self._game, self._game.at
        name = wanted.lower()
        if here is not None and game.closed(here) and fits(game.place[here], wanted):
            return f"{name} in {game.place[here].lower()}", f"open {here}"
        elsewhere = [r for r in game.place if r != here]
        recent = self._stood_at[-_REMEMBERED:]
        choices = [r for r in elsewhere if r not in recent] or elsewhere
        if self._places is not None:
            choices = [r for r in choices if game.place[r] == self._places[wanted]] or choices
        choice = self._rng.choice(choices)
        return f"{name} in {game.place[choice].lower()}", f"go to {choice}"
