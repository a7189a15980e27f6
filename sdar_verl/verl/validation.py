"""Validation arms: the same panel, run once per arm (say, without and with the teacher's context)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from sdar_verl.config import ValidationArm, played_arms
from sdar_verl.recipe import INNER_COLUMN, TAUGHT
from sdar_verl.rollout.rows import AFTER, BEFORE

Asked = tuple[str, str, str]
"""Arm, task id and task type of an episode that a validation asked for."""


class ArmDataset(Dataset):
    """The panel, repeated for every arm; a row's ``data_source`` and ``sdar_arm`` say which.

    Args:
        panel: verl's validation data set.
        arms: the ``sdar.validation.arms`` node.
        agent_loop: of a recipe of verl's: its rows stay as they are, for verl's own metrics, and each arm comes beside
            them, under a data source of its own; the default one, ``student``, is verl's own validation there.

    Attributes:
        columns: row -> further columns of it; observers add to them before a validation.
        judging: a panel that the next validation plays as well, in two arms with and without what was learned; an
            observer sets it.
    """

    def __init__(self, panel: Dataset, arms: Mapping[str, ValidationArm], agent_loop: str | None = None):
        self._panel = panel
        self._agent_loop = agent_loop
        self._arms = played_arms(arms, environments=agent_loop is None)
        self.begin()

    def begin(self) -> None:
        """Forget what observers asked for in the validation before."""
        self.columns: list[Callable[[Mapping[str, Any]], dict[str, Any]]] = []
        self.judging: Any = None

    @property
    def _parts(self) -> list[tuple[str | None, Any]]:
        """(arm, its panel) in the order in which they are played."""
        judging = [] if self.judging is None else [(BEFORE, self.judging), (AFTER, self.judging)]
        return [*((arm, self._panel) for arm in self._arms), *judging]

    def __len__(self) -> int:
        return sum(len(panel) for _, panel in self._parts)

    def asked(self, rollouts: int) -> Counter[Asked]:
        """Episodes of one validation of the text environments, with ``rollouts`` of each task."""
        tasks = Counter(
            (arm, str(extra["task_id"]), str(extra["task_type"]))
            for arm, panel in self._parts
            if arm is not None
            for extra in panel.dataframe["extra_info"]
        )
        return Counter({task: number * rollouts for task, number in tasks.items()})

    def __getitem__(self, item: int) -> dict[str, Any]:
        parts = iter(self._parts)
        arm, panel = next(parts)
        while item >= len(panel):
            item -= len(panel)
            arm, panel = next(parts)
        row = dict(panel[item])
        if self._agent_loop is not None:
            inner = row.get("agent_name", self._agent_loop)
            routed = {} if arm is None else {INNER_COLUMN: inner, "sdar_arm": arm}
            row |= {INNER_COLUMN: "", "sdar_arm": "", "agent_name": TAUGHT if arm else inner, **routed}
        else:
            row |= {"data_source": f"{row['data_source']}/{arm}", "sdar_arm": arm}
        for columns in self.columns:
            row |= columns(row)
        return row


class ArmLoader(StatefulDataLoader):
    """Loads an :class:`ArmDataset`, and remembers which prompt of the last validation belongs to which arm.

    A row of a recipe of verl's keeps its data source, by which verl's reward functions choose; the arm's name is put
    behind it (:meth:`named`) for the metrics alone.
    """

    _batches: list[dict[str, Any]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._batches = []
        for batch in super().__iter__():
            self._batches.append(batch)
            yield batch

    def outcomes(
        self,
        sources: Sequence[str],
        uids: Sequence[str],
        told: Mapping[str, Sequence[Any]],
        counts: Mapping[tuple[str, str], int] | None,
    ) -> dict[str, list[Any]]:
        """What became of each episode of a recipe of verl's, in the columns of the text environments' outcomes.

        Args:
            sources, uids: per episode, verl's.
            told: column -> one value per episode, verl's: the reward, and what the reward function says beside it.
            counts: verl's ``(data source, uid) -> rollouts``, which has those that left nothing behind, too: where the
                reward function says ``acc``, they are not solved, as in verl's own metrics; a reward is nobody's to
                invent. None from verl 0.9.0, whose metrics leave them out.

        Returns:
            ``arm`` (verl's own validation is ``student``, or ``verl`` where an arm is called so), ``task_id`` (data
            source and place in the panel), ``task_type`` (data source), ``acc`` (the reward where there is none) and
            ``reward``.
        """
        places: dict[str, tuple[str, int]] = {}
        seen: Counter[str] = Counter()
        for batch in self._batches:
            for uid, arm in zip(batch["uid"], batch["sdar_arm"], strict=True):
                places[uid] = (arm, seen[arm])
                seen[arm] += 1
        own = "verl" if "student" in seen else "student"

        def episode_of(source: str, uid: str) -> Asked:
            arm, place = places[uid]
            return arm or own, f"{source}/{place}", source

        accurate = told.get("acc") or [None] * len(uids)
        episodes = [episode_of(source, uid) for source, uid in zip(sources, uids, strict=True)]
        found: dict[str, list[Any]] = {
            **_columns(episodes),
            "acc": [float(r if a is None else a) for a, r in zip(accurate, told["reward"], strict=True)],
            "reward": list(told["reward"]),
        }
        judged = {source for source, acc in zip(sources, accurate, strict=True) if acc is not None}
        asked = {episode_of(*key): number for key, number in (counts or {}).items() if key[0] in judged}
        return with_lost(found, Counter(asked))

    def named(
        self, sources: Sequence[str], uids: Sequence[str], counts: Mapping[tuple[str, str], int] | None
    ) -> tuple[list[str], dict[tuple[str, str], int] | None]:
        """verl's data sources and its ``(data source, uid) -> rollouts``, with the arm's name behind those of an arm.

        Args:
            sources: per episode.
            uids: per episode; verl gives them to the batches that it has got from here.
            counts: None from verl 0.9.0.
        """
        arms = {uid: arm for batch in self._batches for uid, arm in zip(batch["uid"], batch["sdar_arm"], strict=True)}

        def name(source: str, uid: str) -> str:
            return f"{source}/{arms[uid]}" if arms.get(uid) else source

        named = [name(source, uid) for source, uid in zip(sources, uids, strict=True)]
        if counts is None:
            return named, None
        return named, {(name(source, uid), uid): count for (source, uid), count in counts.items()}


def with_lost(outcomes: Mapping[str, Sequence[Any]], asked: Counter[Asked]) -> dict[str, list[Any]]:
    """The outcomes, with a failed episode for each that was asked for and left none behind.

    Args:
        outcomes: column name -> one value per episode; unchanged where there are no arms among them.
        asked: how many episodes of each task.
    """
    found = {name: list(values) for name, values in outcomes.items()}
    if "arm" not in found:
        return found
    came_back = Counter(zip(found["arm"], map(str, found["task_id"]), strict=True))
    lost = []
    for (arm, task_id, task_type), number in asked.items():
        here = min(number, came_back[arm, task_id])
        came_back[arm, task_id] -= here
        lost += [(arm, task_id, task_type)] * (number - here)
    told = _columns(lost)
    for name, values in found.items():
        values += told.get(name) or [_LOST.get(name)] * len(lost)
    return found


_LOST = {"acc": 0.0, "task_score": 0.0, "reward": 0.0, "turns": 0.0, "invalid_actions": 0.0, "failed": 1.0}


def _columns(episodes: Sequence[Asked]) -> dict[str, list[str]]:
    return {name: [episode[at] for episode in episodes] for at, name in enumerate(("arm", "task_id", "task_type"))}


def arm_metrics(outcomes: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Means per arm over episodes, and per task type: never means of batch means.

    Args:
        outcomes: column name -> one value per episode that was asked for (:func:`with_lost`); the agent loop's
            ``reward_extra_info``, as verl collects it.

    Returns:
        ``sdar-val/<arm>/...``: ``success``, ``success/<task type>``, ``success_mean_of_types`` (each type weighs the
        same, as Search-QA's data sets do in the paper), ``score`` (graded, 0 to 1), ``turns``, ``invalid_share`` (of
        the turns), ``failed`` (episodes that could not be played; they count as not solved) and
        ``episodes``.
    """
    if "arm" not in outcomes:
        return {}
    episodes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    names = ("acc", "task_score", "turns", "invalid_actions", "failed", "task_type", "arm")
    for values in zip(*(outcomes[name] for name in names), strict=True):
        episode = dict(zip(names, values, strict=True))
        episodes[episode["arm"]].append(episode)

    metrics: dict[str, float] = {}
    for arm, rows in sorted(episodes.items()):
        prefix = f"sdar-val/{arm}"
        turns = sum(row["turns"] for row in rows)
        metrics[f"{prefix}/success"] = sum(row["acc"] for row in rows) / len(rows)
        metrics[f"{prefix}/score"] = sum(row["task_score"] for row in rows) / len(rows)
        played = sum(not row["failed"] for row in rows)
        metrics[f"{prefix}/turns"] = turns / played if played else 0.0
        metrics[f"{prefix}/invalid_share"] = sum(row["invalid_actions"] for row in rows) / turns if turns else 0.0
        metrics[f"{prefix}/failed"] = sum(row["failed"] for row in rows)
        metrics[f"{prefix}/episodes"] = len(rows)
        by_type: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            by_type[row["task_type"]].append(row["acc"])
        per_type = {task_type: sum(solved) / len(solved) for task_type, solved in sorted(by_type.items())}
        metrics |= {f"{prefix}/success/{task_type}": value for task_type, value in per_type.items()}
        metrics[f"{prefix}/success_mean_of_types"] = sum(per_type.values()) / len(per_type)
    return metrics
