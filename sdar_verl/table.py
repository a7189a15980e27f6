"""The table of a local update: who its rows are, what the agent loop noted of them, and their tokens' numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from tensordict import TensorDict

from sdar_verl.algorithm.mixture import mixture_log_probs
from sdar_verl.errors import RolloutError
from sdar_verl.fields import contrast_pass, log_probs_of
from sdar_verl.rollout.rows import RowId, RowInfo

LOST_LIMIT = 0.5
"""Episodes of a step or a validation that may be lost, as a share; more stop the run."""


class Rows(Protocol):
    """Where the rows lie: verl's queue (:class:`sdar_verl.verl.queue.QueueRows`)."""

    batch: Any
    """verl's."""

    @property
    def keys(self) -> Sequence[str]:
        """verl's name of each row, for messages."""

    def read(self, names: Sequence[str]) -> TensorDict:
        """Columns as they are stored, nested over tokens; those that no row has are left out."""

    def write(self, columns: dict[str, torch.Tensor]) -> None:
        """Write nested columns of all rows; the workers get them with the rest of the batch."""

    def tag(self, numbers: Sequence[int], **tags: Any) -> None:
        """Add verl's tags to some rows."""

    def lean(self, *prompts: str, teacher: bool = True) -> Any:
        """verl's batch for a pass of verl's, whose workers get what they read."""


@dataclass
class StepTable:
    """All rows of a training step; where a step makes several updates, of one of them.

    Attributes:
        step: verl's global step, from 1.
        rows: where the rows lie.
        ids: which rollout of which prompt each row belongs to.
        infos: the agent loop's record of each row; None for rows that fill the batch up, which count nowhere.
        columns: name -> (rows, response_length), 0 behind the end of a response: what was read or written, and what was
            made for the observers alone (gap, gate).
        lengths: (rows,) response tokens; there after the first :meth:`read`.
        taken_out: how many rows were taken out.
    """

    step: int
    rows: Rows
    ids: list[RowId]
    infos: list[RowInfo | None]
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    taken_out: int = 0

    @property
    def batch(self) -> Any:
        """verl's: names of the rows, their tags, and what its workers are sent; a phase of verl's may put a new one in
        its place."""
        return self.rows.batch

    @batch.setter
    def batch(self, batch: Any) -> None:
        self.rows.batch = batch

    def read(self, names: Sequence[str]) -> None:
        """Fetch columns of all rows, in one call; those that this run does not have are left out.

        The first call names ``response_mask``.
        """
        stored = self.rows.read(names)
        if not self.lengths:
            self.lengths = [len(row) for row in stored["response_mask"].unbind()]
        self.columns.update(stored.to_padded_tensor().items())
        self._forget()

    def write(self, columns: dict[str, torch.Tensor]) -> None:
        """Store columns (rows, response_length) beside the rows; the workers get them with the rest of the batch."""
        self.columns.update(columns)
        self.rows.write({name: nested_rows(values, self.lengths) for name, values in columns.items()})

    def take_out(self, numbers: Sequence[int]) -> None:
        """Let these rows count nowhere, as if they filled the batch up."""
        self.taken_out += len(numbers)
        for i in numbers:
            self.infos[i] = None
            for values in self.columns.values():
                values[i] = 0
        self._forget()

    def silence(self, numbers: Sequence[int], why: str) -> None:
        """Let the teacher have no say on these rows."""
        for i in numbers:
            info = self.infos[i]
            if info is not None:
                info.teacher_failure = why
        self._forget()

    def forget_teacher(self, numbers: Sequence[int]) -> None:
        """The teacher does not look at these rows; before it has scored any."""
        for i in numbers:
            info = self.infos[i]
            if info is not None:
                info.teacher_prompt_tokens = info.teacher_prompt_ids = None
                info.teachers = info.other_prompt_ids = info.contrast_prompt_ids = ()
        self._forget()

    def _forget(self) -> None:
        for name in ("mask", "response"):
            self.__dict__.pop(name, None)

    # ---------------------------------------------------------------- who the rows are

    @property
    def episode_ids(self) -> list[str]:
        """(rows,) which rollout, unique over the step."""
        return [row.episode for row in self.ids]

    @property
    def group_ids(self) -> list[str]:
        """(rows,) which prompt."""
        return [row.uid for row in self.ids]

    @property
    def turns(self) -> list[int]:
        """(rows,) index of the row's first turn in its episode."""
        return [0 if info is None else info.turn for info in self.infos]

    def episodes(self) -> dict[str, list[tuple[int, RowInfo]]]:
        """Rollout -> its rows that count, with their numbers, in the table's order."""
        found: dict[str, list[tuple[int, RowInfo]]] = {}
        for number, (row, info) in enumerate(zip(self.ids, self.infos, strict=True)):
            if info is not None:
                found.setdefault(row.episode, []).append((number, info))
        return found

    @property
    def further_passes(self) -> list[str]:
        """Names of the teacher passes beyond the first that some row has a prompt for."""
        return list(dict.fromkeys(name for info in self.infos if info is not None for name in info.further_prompts))

    def failures(self) -> list[str | None]:
        """Of each episode, why it was lost; None where it was not."""
        last = [rows[-1][1] for rows in self.episodes().values()]
        return [(info.failure or "for no known reason") if info.failed else None for info in last]

    # ---------------------------------------------------------------- their tokens

    @cached_property
    def response(self) -> torch.Tensor:
        """(rows, response_length) bool, sampled tokens."""
        return self.columns["response_mask"].bool()

    @cached_property
    def mask(self) -> torch.Tensor:
        """(rows, response_length) bool, sampled tokens that have a teacher by the agent loops' records: what workers
        stored as ``TEACHER_MASK``, but for rows that were taken out since."""
        seen = torch.tensor([info is not None and info.has_teacher for info in self.infos])
        return self.response & seen.unsqueeze(-1)

    @property
    def contrast(self) -> torch.Tensor | None:
        """(rows, response_length) log-probs of the sampled tokens with the bad context, nats: of the mean of its texts'
        probabilities where a row has several. None where no row has any."""
        texts = torch.tensor([0 if info is None else len(info.contrast_prompt_ids) for info in self.infos])
        if not texts.any():
            return None
        columns = [self.columns[log_probs_of(contrast_pass(number))] for number in range(int(texts.max()))]
        return mixture_log_probs(torch.stack(columns), torch.arange(len(columns)).unsqueeze(-1) < texts)


def joined(tables: Sequence[StepTable]) -> StepTable:
    """The rows of all updates of a step, one after the other, with the columns that all of them have."""
    if len(tables) == 1:
        return tables[0]
    names = set.intersection(*(set(table.columns) for table in tables))
    width = max(table.response.shape[1] for table in tables)
    return replace(
        tables[0],
        rows=_Several([table.rows for table in tables]),
        ids=[row for table in tables for row in table.ids],
        infos=[info for table in tables for info in table.infos],
        columns={
            name: torch.cat([_widened(table.columns[name], width) for table in tables])
            for name in tables[0].columns
            if name in names
        },
        lengths=[length for table in tables for length in table.lengths],
        taken_out=sum(table.taken_out for table in tables),
    )


def nested_rows(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(rows, response_length) as a column is stored: nested over the tokens of each response."""
    return nested([row[:length] for row, length in zip(values, lengths, strict=True)])


def nested(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of different length as one jagged tensor, the form that columns are stored in."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def stop_on_errors(errors: Sequence[str | None]) -> None:
    """Raise the first fault that an agent loop noted: such a fault is the set-up's, not an episode's bad luck."""
    faults = [error for error in errors if error]
    if faults:
        raise RolloutError(f"{faults[0]}\n({len(faults)} of {len(errors)} rows of this step have such a fault)")


def stop_on_lost_episodes(failures: Sequence[str | None], asked: int) -> None:
    """Stop a run that loses most of its episodes: those that are left are no sample of what the policy does.

    Args:
        failures: of each episode that came back, why it was lost; None where it was not.
        asked: episodes asked for; of the others not even a masked row came back.

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


def _widened(values: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


class _Several:
    """The rows of several tables, for reading."""

    batch = None

    def __init__(self, parts: Sequence[Rows]):
        self._parts = parts

    @property
    def keys(self) -> list[str]:
        return [key for part in self._parts for key in part.keys]

    def read(self, names: Sequence[str]) -> TensorDict:
        from verl.utils.tensordict_utils import concat_tensordict

        return concat_tensordict([part.read(names) for part in self._parts])

    def write(self, columns: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError("the rows of one update are written")

    def tag(self, numbers: Sequence[int], **tags: Any) -> None:
        raise NotImplementedError("the rows of one update are tagged")

    def lean(self, *prompts: str, teacher: bool = True) -> Any:
        raise NotImplementedError("the rows of one update are sent")
