"""A text environment for tests: the agent has to go where the object is. Milliseconds per episode."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from sdar_verl.envs.base import Step, Task, TextEnv
from sdar_verl.envs.registry import register_env
from tests.support.toy_panel import PLACES


@register_env("toy_search")
class ToySearch(TextEnv):
    """Every place but one is empty; the episode ends when the agent goes there.

    Args:
        die_once: a file; the first process to find it missing writes it and kills itself in a step.
        hold: a file; a step waits while it is there.
    """

    def __init__(self, die_once: str | None = None, hold: str | None = None):
        self._die_once = Path(die_once) if die_once else None
        self._hold = Path(hold) if hold else None
        self._target = ""

    def reset(self, task: Task) -> Step:
        self._target = str(task.data["place"])
        return self._answer("you are in a room . you see a fridge 1 , a cabinet 1 , and a desk 1 .")

    def step(self, action: str) -> Step:
        if self._die_once is not None and not self._die_once.exists():
            self._die_once.write_text("died once")
            os.kill(os.getpid(), signal.SIGKILL)
        while self._hold is not None and self._hold.exists():
            time.sleep(0.05)
        if action == f"go to {self._target}":
            return self._answer("you see it .", success=True)
        return self._answer("nothing happens .")

    def _answer(self, text: str, success: bool = False) -> Step:
        actions = tuple(f"go to {place}" for place in PLACES)
        return Step(text, reward=float(success), done=success, success=success, admissible_actions=actions)
