"""Observers of a run: they look at each step's table and give metrics; some keep a state.

An observer sees a step when its updates are made. What it keeps is saved with every checkpoint and comes back on
resume (:class:`Stateful`). Which observers a run has is :func:`sdar_verl.observe.observers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sdar_verl.atomic import write_text_atomically
from sdar_verl.errors import ConfigError
from sdar_verl.untrusted import parse_json, shorten

if TYPE_CHECKING:
    from tensordict import TensorDict

    from sdar_verl.table import StepTable
    from sdar_verl.verl.validation import ArmDataset

STATE_FILE = "sdar_state.json"


class Stateful(Protocol):
    """What has a state for checkpoints."""

    name: ClassVar[str]
    """Key of the state in a checkpoint; unique in a run."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume, as plain JSON values; empty where there is nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


class Observer:
    """Base class of an observer; override what is needed."""

    name: ClassVar[str]

    def before_rollout(self, prompts: TensorDict) -> None:
        """Called with prompts before their episodes begin; may add columns, which the agent loop gets.

        In asynchronous modes not all of them end in the step in which they begin, and a step may call several times.
        """

    def before_validation(self, panel: ArmDataset) -> None:
        """Called before a validation; may add to ``panel.columns``, which the agent loop gets."""

    @property
    def awaits_validation(self) -> bool:
        """Whether a resumed run must validate before it trains."""
        return False

    def wants_rollout(self, step: int) -> bool:
        """Whether :meth:`after_rollout` is to be called in a step; it costs a reading of the rows' records."""
        return False

    def after_rollout(self, table: StepTable) -> None:
        """Called with finished episodes while the rollout servers are awake, so that the policy can be asked."""

    def after_updates(self, table: StepTable, metrics: Mapping[str, Any]) -> Mapping[str, float]:
        """Called after the last update of a step with all its rows and its metrics; returns its own."""
        return {}

    def after_validation(self, step: int, metrics: Mapping[str, float], outcomes: dict[str, list[Any]]) -> None:
        """Called after a validation with its metrics and, per episode, the agent loop's outcome columns."""

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Called when all of the step's metrics are there, timings and validation included, before they are logged."""

    def state_dict(self) -> dict[str, Any]:
        """Of :class:`Stateful`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of :class:`Stateful`."""


def save_states(parts: Sequence[Stateful], folder: str | Path) -> None:
    """Write all states into a checkpoint ``folder``, atomically."""
    states = {part.name: part.state_dict() for part in parts}
    write_text_atomically(Path(folder) / STATE_FILE, json.dumps(states, indent=1) + "\n")


def load_states(parts: Sequence[Stateful], folder: str | Path) -> None:
    """Give every part the state that a checkpoint ``folder`` holds for it.

    Raises:
        ConfigError: a part that keeps a state finds none: the checkpoint was made without it. Or the file is damaged.
    """
    path = Path(folder) / STATE_FILE
    try:
        states = parse_json(path.read_bytes()) if path.is_file() else {}
        if not isinstance(states, dict):
            raise ValueError(f"it holds {shorten(states)}, not an object")
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); {_EARLIER}") from error
    missing = [part.name for part in parts if part.state_dict() and part.name not in states]
    if missing:
        raise ConfigError(
            f"{path} holds no state of {', '.join(missing)}: the checkpoint was made without it. Resume with the "
            "settings it was made with, or start over with trainer.resume_mode=disable"
        )
    for part in parts:
        if part.name in states:
            try:
                part.load_state_dict(states[part.name])
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{path}: the state of {part.name} is damaged ({type(error).__name__}: {error}); {_EARLIER}"
                ) from error


_EARLIER = (
    "resume from an earlier checkpoint (trainer.resume_mode=resume_path with trainer.resume_from_path=...), or start "
    "over with trainer.resume_mode=disable"
)
