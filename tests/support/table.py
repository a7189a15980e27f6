"""A step's table whose rows lie in this process instead of verl's queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict

from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.step import TABLE_COLUMNS
from sdar_verl.table import StepTable, nested
from sdar_verl.verl.queue import row_id

COLUMNS = (*TABLE_COLUMNS, TEACHER_LOG_PROBS, "advantages")
"""What the trainer reads of every row."""

Values = Mapping[str, Sequence[Any]]
"""Name -> one tensor, or list of numbers, per row."""


class StoredRows:
    """:class:`sdar_verl.table.Rows` over lists.

    Attributes:
        stored: name -> one tensor per row.
        tags: row -> the tags that it was given.
        batch: verl's, as far as trainer and teacher look at it.
    """

    def __init__(self, keys: Sequence[str], columns: Values | None = None, **batch: Any) -> None:
        self.keys = list(keys)
        self.stored = {name: [torch.as_tensor(row) for row in rows] for name, rows in (columns or {}).items()}
        self.tags: dict[int, dict[str, Any]] = {}
        fields = {"keys": self.keys, "extra_info": {}, "fields": None, "partition_id": "train", **batch}
        self.batch = SimpleNamespace(**fields)

    def read(self, names: Sequence[str]) -> TensorDict:
        found = {name: nested(self.stored[name]) for name in names if name in self.stored}
        return TensorDict(found, batch_size=len(self.keys))

    def write(self, columns: Mapping[str, torch.Tensor]) -> None:
        self.stored |= {name: list(values.unbind()) for name, values in columns.items()}

    def lean(self, *prompts: str, taught: bool = True) -> Any:
        return self.batch

    def tag(self, numbers: Sequence[int], **tags: Any) -> None:
        self.tags |= dict.fromkeys(numbers, tags)


def make_table(
    keys: Sequence[str],
    infos: Sequence[RowInfo | None],
    columns: Values | None = None,
    *,
    step: int = 1,
    **batch: Any,
) -> StepTable:
    """A table as the trainer has it; with a ``response_mask`` among the columns, its tokens have been read."""
    table = StepTable(step, StoredRows(keys, columns, **batch), [row_id(key) for key in keys], list(infos))
    if columns and "response_mask" in columns:
        table.read(COLUMNS)
    return table


def stored(table: StepTable) -> dict[str, list[torch.Tensor]]:
    """What lies in a table's :class:`StoredRows`."""
    assert isinstance(table.rows, StoredRows)
    return table.rows.stored
