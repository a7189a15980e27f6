"""ALFWorld's text games on the stock engine: TextWorld's PddlEnv behind alfworld's name demangler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from sdar_verl.envs.alfworld.games import game_digest, read_walkthrough
from sdar_verl.envs.alfworld.spec import TASK_TYPE_ALIASES, TASK_TYPES
from sdar_verl.envs.base import Step, Task, TextEnv
from sdar_verl.envs.fields import success_reward_of
from sdar_verl.envs.registry import register_env
from sdar_verl.errors import SdarError

_BANNER = "-= Welcome to TextWorld, ALFRED! =-"


@register_env("alfworld")
class AlfworldEnv(TextEnv):
    """One ALFWorld game at a time, from a ``game.tw-pddl`` file (``task.data["game_file"]``).

    Observations are the engine's words without TextWorld's banner. The engine is loaded at the first reset; it is not
    thread-safe, so all environments of a process must be used from one thread. Expressions in a game's grammar are
    evaluated by ``expressions.py``, so that a game file cannot run code.

    Args:
        hide_actions: actions left out of ``admissible_actions`` by their first words, so ``examine`` hides ``examine
            fridge 1``. The engine still carries them out. The paper's prompt leaves out ``help`` alone.
        success_reward: reward of the step that solves the task; every other step gets 0 (paper: 10).
        speedups: remember what the engine would compute again (same words, a tenth of the time); False leaves the
            installed TextWorld as it is. Holds for all environments of the process.

    Raises:
        ValueError: an option has a wrong type.
    """

    task_types: ClassVar[tuple[str, ...]] = TASK_TYPES
    task_type_aliases: ClassVar[Mapping[str, tuple[str, ...]]] = TASK_TYPE_ALIASES

    def __init__(
        self, hide_actions: Sequence[str] = ("help",), success_reward: float = 10.0, speedups: bool = True
    ) -> None:
        if isinstance(hide_actions, str) or not all(isinstance(a, str) and a.strip() for a in hide_actions):
            raise ValueError(
                f"alfworld option hide_actions={hide_actions!r}: give a list of words, such as [help, look]"
            )
        if not isinstance(speedups, bool):
            raise ValueError(f"alfworld option speedups={speedups!r}: give true or false")
        self._hidden = tuple(_words(action) for action in hide_actions)
        self._success_reward = success_reward_of("alfworld", success_reward)
        self._speedups = speedups
        self._engine: Any = None
        self._last: Step | None = None

    def reset(self, task: Task) -> Step:
        """Load the game of ``task`` and start it.

        Raises:
            ValueError: the task is not one of ALFWorld's, its game is another one than it was made with, or the engine
                cannot load it.
            FileNotFoundError: its game file is not there.
        """
        self._last = None
        game_file = task.data.get("game_file")
        if not game_file:
            raise ValueError(
                f"task {task.task_id!r} of environment {task.env!r} has no game_file, so it is not an ALFWorld task; "
                "make ALFWorld panels with `sdar-verl prepare alfworld --out DIR`"
            )
        if not Path(game_file).is_file():
            raise FileNotFoundError(
                f"game file {game_file} of task {task.task_id!r} is not there (moved or deleted since the panel was "
                "made, or not visible on this node); make the panel again with `sdar-verl prepare alfworld --out DIR`"
            )
        made_with = task.data.get("sha256")
        if made_with is not None and made_with != game_digest(game_file):
            raise ValueError(
                f"game file {game_file} of task {task.task_id!r} is not the one that the panel was made with (another "
                "SHA-256); make the panel again with `sdar-verl prepare alfworld --out DIR --force`"
            )
        if self._engine is None:
            self._engine = self._load_engine()
        try:
            self._engine.load(str(game_file))
            state = self._engine.reset()
        except SdarError as error:
            raise ValueError(f"{game_file}: {error}") from error
        # The translator exits the process on bad PDDL, and calls a goal that cannot hold KeyError: 'val1'.
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{game_file} cannot be played, it is cut off or has no solution ({type(error).__name__}: {error}); "
                "download or generate it again"
            ) from error
        self._last = self._step(state, reward=0.0, text=state["feedback"].replace(_BANNER, "").strip())
        return self._last

    def step(self, action: str) -> Step:
        """Carry out ``action``, whatever its letter case and spacing; what the engine does not accept does nothing.

        Raises:
            RuntimeError: no game was started.
        """
        if self._last is None:
            raise RuntimeError("step before reset: no game was started")
        if self._last.done:
            self._last = replace(self._last, reward=0.0)
            return self._last
        state, _, _ = self._engine.step(_words(action))
        reward = self._success_reward if state["won"] else 0.0
        self._last = self._step(state, reward=reward, text=state["feedback"].strip())
        return self._last

    @classmethod
    def demonstration(cls, task: Task) -> Sequence[str]:
        """The walkthrough in the task's game file."""
        game_file = task.data.get("game_file")
        return read_walkthrough(game_file) if game_file else ()

    def _step(self, state: Mapping[str, Any], *, reward: float, text: str) -> Step:
        won = bool(state["won"])
        actions = (a for a in state["admissible_commands"] if not self._is_hidden(a))
        return Step(text, reward=reward, done=won, success=won, admissible_actions=tuple(sorted(actions)))

    def _is_hidden(self, action: str) -> bool:
        return any(action == hidden or action.startswith(hidden + " ") for hidden in self._hidden)

    def _load_engine(self) -> Any:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        from sdar_verl.envs.alfworld import expressions

        expressions.install()  # a game file must not run Python
        if self._speedups:
            from sdar_verl.envs.alfworld import speedups

            speedups.install()
        return AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)), shuffle=False)


def _words(action: str) -> str:
    return " ".join(action.lower().split())
