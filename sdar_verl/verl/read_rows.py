"""A step's rows as the trainer gets them from the agent loops."""

from __future__ import annotations

from collections.abc import Sequence

import transfer_queue as tq
from transfer_queue import KVBatchMeta

from sdar_verl.errors import RolloutError
from sdar_verl.rollout.rows import RowInfo


def read_infos(batch: KVBatchMeta) -> list[RowInfo | None]:
    """The agent loop's record of each row, None for verl's padding rows.

    Raises:
        RolloutError: a row says that the run must stop, or no episode could be played.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
    infos = [
        None if tag.get("is_padding", False) else RowInfo.from_extra_fields(extra)
        for tag, extra in zip(batch.tags, list(data["extra_fields"]), strict=True)
    ]
    rows = [info for info in infos if info is not None]
    stop_on_errors([info.error for info in rows])
    if all(info.failed for info in rows):
        raise RolloutError(f"not one episode of this step could be played; the last reason: {rows[-1].failure}")
    return infos


def stop_on_errors(errors: Sequence[str | None]) -> None:
    """Raise the first fault that an agent loop noted: such a fault is the set-up's, not an episode's bad luck."""
    faults = [error for error in errors if error]
    if faults:
        raise RolloutError(f"{faults[0]}\n({len(faults)} of {len(errors)} rows of this step have such a fault)")


def row_order(key: str) -> tuple[str, int, int]:
    """Sort key of verl's row key ``{uid}_{session}_{row}``."""
    uid, session, row = key.rsplit("_", 2)
    return uid, int(session), int(row)
