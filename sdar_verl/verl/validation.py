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

    def task_types(self) -> dict[str, Counter[str]]:
        """Arm -> task type -> tasks of its panel."""
        if self._agent_loop is not None:
            return {}
        return {
            arm: Counter(extra["task_type"] for extra in panel.dataframe["extra_info"])
            for arm, panel in self._parts
            if arm is not None
        }

    def asked(self, rollouts: int) -> dict[str, int]:
        """Arm -> episodes of one validation, with ``rollouts`` of each task."""
        return {arm: len(panel) * rollouts for arm, panel in self._parts if arm is not None}

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
        self, sources: Sequence[str], uids: Sequence[str], told: Mapping[str, Sequence[Any]]
    ) -> dict[str, list[Any]]:
        """What became of each episode of a recipe of verl's, in the columns of the text environments' outcomes.

        Args:
            sources, uids: per episode, verl's.
            told: column -> one value per episode, verl's: the reward, and what the reward function says beside it.

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
        accurate = told.get("acc") or [None] * len(uids)
        return {
            "arm": [places[uid][0] or own for uid in uids],
            "task_id": [f"{source}/{places[uid][1]}" for source, uid in zip(sources, uids, strict=True)],
            "task_type": list(sources),
            "acc": [float(r if a is None else a) for a, r in zip(accurate, told["reward"], strict=True)],
            "reward": list(told["reward"]),
        }

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


def expected_episodes(counts: Mapping[tuple[str, str], int]) -> dict[str, int]:
    """Arm -> episodes that validation asked for.

    Args:
        counts: verl's ``(data source, uid) -> rollouts``; the data sources are those of :class:`ArmDataset`.
    """
    expected: dict[str, int] = defaultdict(int)
    for (source, _), number in counts.items():
        expected[source.rsplit("/", 1)[-1]] += number
    return dict(expected)


def arm_metrics(
    outcomes: Mapping[str, Sequence[Any]],
    expected: Mapping[str, int],
    task_types: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, float]:
    """Means per arm over episodes, and per task type: never means of batch means.

    Args:
        outcomes: column name -> one value per episode; the agent loop's ``reward_extra_info``, as verl collects it.
        expected: arm -> episodes asked for; one that crashed and left no outcome is a failed one.
        task_types: arm -> task type -> tasks of its panel; each was asked for equally often.

    Returns:
        ``sdar-val/<arm>/...``: ``success``, ``success/<task type>``, ``success_mean_of_types`` (each type weighs the
        same, as Search-QA's data sets do in the paper), ``score`` (graded, 0 to 1), ``turns``, ``invalid_share`` (of
        the turns), ``failed`` (episodes that crashed or whose environment failed; they count as not solved) and
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
    for arm in sorted({*episodes, *expected}):
        rows = episodes[arm]
        prefix = f"sdar-val/{arm}"
        turns = sum(row["turns"] for row in rows)
        asked = max(expected.get(arm, 0), len(rows))
        metrics[f"{prefix}/success"] = sum(row["acc"] for row in rows) / asked
        metrics[f"{prefix}/score"] = sum(row["task_score"] for row in rows) / asked
        played = sum(not row["failed"] for row in rows)
        metrics[f"{prefix}/turns"] = turns / played if played else 0.0
        metrics[f"{prefix}/invalid_share"] = sum(row["invalid_actions"] for row in rows) / turns if turns else 0.0
        metrics[f"{prefix}/failed"] = sum(row["failed"] for row in rows) + asked - len(rows)
        metrics[f"{prefix}/episodes"] = asked
        solved, came_back = Counter[str](), Counter(row["task_type"] for row in rows)
        for row in rows:
            solved[row["task_type"]] += row["acc"]
        # An episode that crashed left no type behind; the panel says how many of each there were.
        panel = Counter((task_types or {}).get(arm, {}))
        per_type: dict[str, float] = {}
        for task_type in sorted({*came_back, *panel}):
            asked_of_type = max(came_back[task_type], panel[task_type] * asked // max(1, panel.total()))
            per_type[task_type] = solved[task_type] / asked_of_type
        metrics |= {f"{prefix}/success/{task_type}": value for task_type, value in per_type.items()}
        if per_type:
            metrics[f"{prefix}/success_mean_of_types"] = sum(per_type.values()) / len(per_type)
    return metrics
