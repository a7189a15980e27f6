"""A text environment whose episodes last as many turns as their task says."""

from __future__ import annotations

from sdar_verl.envs.base import Step, Task, TextEnv
from sdar_verl.envs.registry import register_env

PLACES = ("fridge 1", "cabinet 1", "desk 1")


@register_env("counted")
class Counted(TextEnv):
    """``task.data["turns"]`` turns, whatever is done in them; the last one succeeds in every second rollout or so."""

    def __init__(self) -> None:
        self._left = 0

    def reset(self, task: Task) -> Step:
        """Start counting."""
        self._left = int(task.data["turns"])
        return self._answer("you are in a room . you see a fridge 1 , a cabinet 1 , and a desk 1 .")

    def step(self, action: str) -> Step:
        """One less; going to the fridge in the last turn is success, so that advantages are not all 0."""
        self._left -= 1
        done = self._left == 0
        return self._answer("nothing happens .", done, done and action == "go to fridge 1")

    def _answer(self, text: str, done: bool = False, success: bool = False) -> Step:
        actions = tuple(f"go to {place}" for place in PLACES)
        return Step(text, reward=float(success), done=done, success=success, admissible_actions=actions)
