"""Parts of the trainer: what takes part in every step beside the algorithm itself (schedules, statistics, traces).

A part sees the step's rows as they come into being and may keep a state, which is saved with every checkpoint and
comes back on resume. The trainer calls all parts in the order of
:func:`sdar_verl.observe.assemble.make_parts`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdar_verl.atomic import write_text_atomically
from sdar_verl.config import SdarConfig
from sdar_verl.errors import ConfigError
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.untrusted import parse_json, shorten

if TYPE_CHECKING:
    from tensordict import TensorDict
    from transfer_queue import KVBatchMeta

    from sdar_verl.verl.validation import ArmDataset

STATE_FILE = "sdar_state.json"


@dataclass
class StepRows:
    """The rows of one training step, as parts see them; in mode ``sdar_separate_async``, of one of its updates.

    Attributes:
        step: verl's global step, from 1.
        batch: keys, tags and partition of the step's rows in verl's TransferQueue; fields are read from there.
        infos: the agent loop's record of each row, in the order of ``batch.keys``; None for verl's padding rows.
        metrics: the step's metrics; a part adds its own under ``sdar/``.
        settings: the whole ``sdar`` node.
        trainer: verl's trainer, for its worker groups and config.
        part: which part of the step these rows are, from 0.
        parts: parts of a step; each has prompts, a teacher pass and updates of its own.
    """

    step: int
    batch: KVBatchMeta
    infos: list[RowInfo | None]
    metrics: dict[str, Any]
    settings: SdarConfig
    trainer: Any = field(repr=False)
    part: int = 0
    parts: int = 1

    def get(self, names: Sequence[str]) -> TensorDict:
        """Fields of all rows, as they are stored (nested over tokens); those that no row has are left out."""
        import transfer_queue as tq

        return tq.kv_batch_get(keys=self.batch.keys, partition_id=self.batch.partition_id, select_fields=list(names))

    def put(self, fields: TensorDict) -> None:
        """Write fields of all rows, so that the workers get them with the rest of the batch."""
        import transfer_queue as tq

        written = tq.kv_batch_put(keys=self.batch.keys, partition_id=self.batch.partition_id, fields=fields)
        if self.batch.fields is not None:  # what the workers are sent; None is everything
            self.batch.fields = written.fields

    def tag(self, numbers: Sequence[int], **tags: Any) -> None:
        """Add tags to some rows; verl's ``is_padding`` keeps a row out of its metrics."""
        import transfer_queue as tq

        for i in numbers:
            self.batch.tags[i] = {**self.batch.tags[i], **tags}
        keys, changed = [self.batch.keys[i] for i in numbers], [self.batch.tags[i] for i in numbers]
        tq.kv_batch_put(keys=keys, partition_id=self.batch.partition_id, tags=changed)


def joined_rows(parts: Sequence[StepRows]) -> StepRows:
    """The rows of all ``parts`` of a step, one after the other; with several, their metrics are left out."""
    if len(parts) == 1:
        return parts[0]
    from transfer_queue import KVBatchMeta

    batch = KVBatchMeta(
        partition_id=parts[0].batch.partition_id,
        keys=[key for part in parts for key in part.batch.keys],
        tags=[tag for part in parts for tag in part.batch.tags],
    )
    return replace(parts[0], batch=batch, infos=[info for part in parts for info in part.infos], metrics={}, parts=1)


class TrainerPart:
    """Base class of a part; override what is needed."""

    name: ClassVar[str]
    """Key of the part's state in a checkpoint; unique among parts."""

    def on_prompts(self, step: int, prompts: TensorDict) -> None:
        """Called with prompts before their episodes begin; may add columns, which the agent loop gets.

        In asynchronous modes not all of them end in the step in which they begin, and a step may call several times.
        """

    def on_validation(self, panel: ArmDataset) -> None:
        """Called before a validation; may set ``panel.columns``, which the agent loop gets."""

    def on_rows(self, rows: StepRows) -> None:
        """Called when the step's episodes are played, before any log-prob is computed; may change ``rows.infos``."""

    def on_advantages(self, rows: StepRows) -> None:
        """Called when log-probs, teacher log-probs and advantages are in the batch, before the update."""

    def on_trained(self, step: int, metrics: dict[str, Any]) -> None:
        """Called after the last update of the step with its metrics, the workers' reduced; may add its own."""

    def on_validated(self, step: int, metrics: dict[str, float], outcomes: dict[str, list[Any]]) -> None:
        """Called after a validation with its metrics and, per episode, the agent loop's outcome columns."""

    def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
        """Called when all of the step's metrics are there, timings and validation included, before they are logged."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume, as plain JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


def save_parts(parts: Sequence[TrainerPart], folder: str | Path) -> None:
    """Write all states into a checkpoint ``folder``, atomically."""
    states = {part.name: part.state_dict() for part in parts}
    write_text_atomically(Path(folder) / STATE_FILE, json.dumps(states, indent=1) + "\n")


def load_parts(parts: Sequence[TrainerPart], folder: str | Path) -> None:
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
