"""verl's TransferQueue, as this package uses it: the rows of a batch, their names, and what the agent loop noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from sdar_verl.fields import (
    SUPPORT_IDS,
    SUPPORT_LOG_PROBS,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    TEACHER_PROMPTS,
    prompts_of,
)
from sdar_verl.rollout.rows import RowId, RowInfo
from sdar_verl.table import StepTable, stop_on_errors


def row_id(key: str) -> RowId:
    """From verl's name of a row, ``{uid}_{session}_{index}``."""
    uid, session, index = key.rsplit("_", 2)
    return RowId(uid, int(session), int(index))


def in_order(batch: KVBatchMeta) -> KVBatchMeta:
    """The batch with its rows in one order, whichever episode ended first."""
    batch.reorder(sorted(range(len(batch.keys)), key=lambda i: row_id(batch.keys[i])))
    return batch


def is_padding(tag: Mapping[str, Any]) -> bool:
    """verl added the row to fill up its ranks; it has columns of numbers alone."""
    return bool(tag.get("is_padding", False))


_READ_BY_WORKERS = frozenset({"multi_modal_inputs", "uid", "session_id"})
"""Columns of objects that workers look at: verl's engines at the first, our loss at the others, to name a row."""


class RowColumns:
    """The columns of a run's rows, and those of them that hold objects; the first of them says it, once."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.objects: frozenset[str] = frozenset()

    def learn(self, batch: KVBatchMeta) -> None:
        """Read one row, if none was read before."""
        if not self.names:
            rows = zip(batch.keys, batch.tags, strict=True)
            key = next((key for key, tag in rows if not is_padding(tag)), batch.keys[0])
            row = tq.kv_batch_get(keys=[key], partition_id=batch.partition_id)
            self.names = sorted(row.keys())
            self.objects = frozenset(name for name, value in row.items() if not isinstance(value, torch.Tensor))


class QueueRows:
    """The rows of a batch in verl's queue.

    Args:
        batch: of verl's trainer, which puts a new one in its place after some of its phases.
        columns: of the run; without, they are learnt from this batch.
    """

    def __init__(self, batch: KVBatchMeta, columns: RowColumns | None = None):
        self.batch = batch
        self.columns = columns or RowColumns()

    @property
    def keys(self) -> list[str]:
        """verl's names of the rows."""
        return self.batch.keys

    def read(self, names: Sequence[str]) -> TensorDict:
        """Columns of all rows, as they are stored (nested over tokens); those that no row has are left out."""
        return tq.kv_batch_get(keys=self.keys, partition_id=self.batch.partition_id, select_fields=list(names))

    def write(self, columns: dict[str, torch.Tensor]) -> None:
        """Write nested columns of all rows; the workers get them with the rest of the batch."""
        if columns:
            fields = TensorDict(columns, batch_size=len(self.keys))
            written = tq.kv_batch_put(keys=self.keys, partition_id=self.batch.partition_id, fields=fields)
            if self.batch.fields is not None:  # what the workers are sent; None is everything
                self.batch.fields = written.fields

    def lean(self, *prompts: str, teacher: bool = True) -> KVBatchMeta:
        """The batch for a pass of verl's, whose workers are sent the columns of numbers.

        Otherwise they are sent all there are: messages, records of the agent loop, the teacher's prompts. They read
        none of these, and a column of objects costs more than the tokens. After the advantages verl's batch names every
        column that its rows have by then, the teacher's among them.

        Args:
            *prompts: columns of the teacher's prompts that this pass reads.
            teacher: send the teacher's log-probs along; agent loops store such where the rollout server is the teacher,
                also when it has retired.
        """
        self.columns.learn(self.batch)
        names = self.columns.names if self.batch.fields is None else self.batch.fields
        ours = {name for name in names if name.startswith((TEACHER_PROMPTS, prompts_of("")))}
        left_out = (self.columns.objects - _READ_BY_WORKERS) | (ours - {*prompts})
        left_out |= set() if teacher else {TEACHER_LOG_PROBS, TEACHER_MASK, SUPPORT_IDS, SUPPORT_LOG_PROBS}
        self.batch.fields = [name for name in names if name not in left_out]
        return self.batch

    def tag(self, numbers: Sequence[int], **tags: Any) -> None:
        """Add tags to some rows; verl's ``is_padding`` keeps a row out of its metrics."""
        for i in numbers:
            self.batch.tags[i] = {**self.batch.tags[i], **tags}
        keys, changed = [self.keys[i] for i in numbers], [self.batch.tags[i] for i in numbers]
        tq.kv_batch_put(keys=keys, partition_id=self.batch.partition_id, tags=changed)


def read_table(batch: KVBatchMeta, step: int, columns: RowColumns) -> StepTable:
    """The table of a batch with the agent loop's records; tokens are read later.

    Raises:
        RolloutError: a row says that the run must stop.
    """
    rows = QueueRows(batch, columns)
    stored = rows.read(["extra_fields", "rm_scores"])
    extras = list(stored["extra_fields"])
    infos = [
        None if is_padding(tag) else RowInfo.from_extra_fields(extra)
        for tag, extra in zip(batch.tags, extras, strict=True)
    ]
    for info, extra, scores in zip(infos, extras, stored["rm_scores"].unbind(), strict=True):
        if info is not None and info.rewarded:
            _reward(info, float(scores.sum()), extra.get("reward_extra_info") or {})
    stop_on_errors([info.error for info in infos if info is not None])
    return StepTable(step, rows, [row_id(key) for key in batch.keys], infos)


def _reward(info: RowInfo, reward: float, said: dict[str, Any]) -> None:
    """What verl's reward function says of a row's episode: ``acc`` is verl's name for success."""
    info.score, info.success = reward, bool(said.get("acc", reward > 0))
    if info.episode is not None:
        info.episode.reward, info.episode.said = reward, dict(said)
