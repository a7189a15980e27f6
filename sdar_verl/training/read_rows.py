"""A step's rows as the trainer gets them from the agent loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import transfer_queue as tq
from transfer_queue import KVBatchMeta

from sdar_verl.errors import RolloutError
from sdar_verl.rollout.rows import RowInfo

LOST_LIMIT = 0.5
"""Episodes of a step or a validation that may be lost, as a share; more stop the run."""


def read_infos(batch: KVBatchMeta) -> list[RowInfo | None]:
    """The agent loop's record of each row, None for verl's padding rows.

    Raises:
        RolloutError: a row says that the run must stop.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
    infos = [
        None if tag.get("is_padding", False) else RowInfo.from_extra_fields(extra)
        for tag, extra in zip(batch.tags, list(data["extra_fields"]), strict=True)
    ]
    stop_on_errors([info.error for info in infos if info is not None])
    return infos


def episode_failures(keys: Sequence[str], infos: Sequence[RowInfo | None]) -> list[str | None]:
    """Of each episode of a step, why it was lost; None where it was not.

    Args:
        keys: verl's row keys, ``{uid}_{session}_{row}``.
        infos: one record per row, None for padding.
    """
    rows = {key.rsplit("_", 1)[0]: info for key, info in zip(keys, infos, strict=True) if info is not None}
    return [(info.failure or "for no known reason") if info.failed else None for info in rows.values()]


def stop_on_losses(failures: Sequence[str | None], asked: int) -> None:
    """Stop a run that loses most of its episodes: those that are left are no sample of what the policy does.

    Args:
        failures: of each episode that came back, why it was lost; None where it was not.
        asked: episodes asked for; the agent loop crashed in those that did not come back.

    Raises:
        RolloutError: more than :data:`LOST_LIMIT` of them are lost.
    """
    reasons = [reason for reason in failures if reason is not None]
    crashed = max(0, asked - len(failures))
    lost, asked = len(reasons) + crashed, len(failures) + crashed
    if lost <= LOST_LIMIT * asked:
        return
    told = [f"{count} times: {reason}" for reason, count in Counter(reasons).most_common(3)]
    told += [f"{crashed} times: nothing came back from the agent loop, whose log says why"] if crashed else []
    raise RolloutError(
        f"{lost} of {asked} episodes could not be played; those that are left say little of the policy, so the run "
        "stops before it learns from them. Mend the cause and start again: trainer.resume_mode=auto goes on from the "
        "last checkpoint.\n" + "\n".join(told)
    )


def stop_on_errors(errors: Sequence[str | None]) -> None:
    """Raise the first fault that an agent loop noted: such a fault is the set-up's, not an episode's bad luck."""
    faults = [error for error in errors if error]
    if faults:
        raise RolloutError(f"{faults[0]}\n({len(faults)} of {len(errors)} rows of this step have such a fault)")


def row_order(key: str) -> tuple[str, int, int]:
    """Sort key of verl's row key ``{uid}_{session}_{row}``."""
    uid, session, row = key.rsplit("_", 2)
    return uid, int(session), int(row)
