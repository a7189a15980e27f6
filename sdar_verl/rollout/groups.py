"""The finished episodes of a step by their groups, as contexts read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdar_verl.context.base import PlayedEpisode, PlayedTurn
from sdar_verl.envs.base import Task
from sdar_verl.rollout.rows import EpisodeNote, RowId, RowInfo
from sdar_verl.table import StepTable


@dataclass
class Episode:
    """Rows of one finished episode, in order of their turns."""

    name: str
    note: EpisodeNote
    infos: list[RowInfo]

    @property
    def played(self) -> PlayedEpisode:
        steps = [step for info in self.infos for step in info.steps]
        turns = [PlayedTurn(step.observation, step.action, not step.invalid) for step in steps]
        first = self.infos[0]
        note = self.note
        return PlayedEpisode(self.name, tuple(turns), first.success, note.reward, note.last_observation, note.said)


@dataclass
class Group:
    """Finished episodes of one prompt, in order of their names."""

    task: Task
    episodes: list[Episode] = field(default_factory=list)


def groups_of(table: StepTable) -> dict[str, Group]:
    """uid -> group, in order of uid; rows that do not count and failed episodes are left out."""
    rows: dict[RowId, list[RowInfo]] = {}
    for row, info in zip(table.ids, table.infos, strict=True):
        if info is not None and not info.failed:
            rows.setdefault(row._replace(number=0), []).append(info)
    groups: dict[str, Group] = {}
    for row, members in sorted(rows.items(), key=lambda item: item[0]):
        members = sorted(members, key=lambda info: info.turn)
        note = members[0].episode
        assert note is not None, "the first row of an episode carries its note"
        group = groups.setdefault(row.uid, Group(Task(**note.task)))
        group.episodes.append(Episode(row.episode, note, members))
    return groups
