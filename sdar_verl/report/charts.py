"""The report's charts as data: what is drawn, with its units; assets/charts.js draws it.

A chart is a dict: ``kind`` (lines, fan, bars, stack, dots), ``title``, ``note`` (how to read it), axis labels with
units, and its data. A chart without data is None and left out.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sdar_verl.report.distributions import GAP_EDGES, MAX_TURNS, QUANTILES, pool
from sdar_verl.report.read import RunData
from sdar_verl.report.stats import mean_interval, wilson

Chart = dict[str, Any]

PHASES = {
    "gen": "rollout",
    "contexts": "contexts",
    "reward": "reward",
    "old_log_prob": "old log-probs",
    "ref": "reference",
    "teacher": "teacher",
    "values": "critic",
    "adv": "advantages",
    "method": "method",
    "update_critic": "critic update",
    "update_actor": "update",
    "update_weights": "weight sync",
    "observers": "record",
    "save_checkpoint": "checkpoint",
    "testing": "validation",
}
"""verl's timers that do not overlap -> what a reader calls them."""


def charts(data: RunData) -> list[tuple[str, list[Chart]]]:
    """All charts of a run in their sections; sections without charts are left out."""
    sections: list[tuple[str, Iterable[Chart | None]]] = [
        ("Does it learn?", (success(data), reward(data), success_by_type(data))),
        (
            "What does the teacher say?",
            (fan(data, "gap"), fan(data, "gate"), gap_histogram(data), by_turn(data), by_position(data), kl(data)),
        ),
        ("What does the teacher see?", (skills(data), context(data))),
        ("Where does the time go?", (timing(data), lengths(data))),
    ]
    found = [(title, [chart for chart in listed if chart is not None]) for title, listed in sections]
    return [(title, listed) for title, listed in found if listed]


def lines(title: str, note: str, y: str, series: Sequence[dict[str, Any]], **more: Any) -> Chart | None:
    """Curves over steps. A series has ``name`` and ``points``: ``[x, y]`` or ``[x, y, low, high]``."""
    drawn = [one for one in series if one["points"]]
    if not drawn:
        return None
    return {"kind": "lines", "title": title, "note": note, "x": "training step", "y": y, "series": drawn, **more}


def success(data: RunData) -> Chart | None:
    """Training and validation success with Wilson's intervals."""
    window = max(1, len(data.training_steps) // 30)
    points: list[list[float]] = []
    seen: list[tuple[float, float]] = []
    for step, share in data.column("sdar/success"):
        count = float(data.metrics[step].get("sdar/episodes", 0))
        seen = [*seen, (share * count, count)][-window:]
        solved, played = sum(s for s, _ in seen), sum(n for _, n in seen)
        if played:
            points.append([step, solved / played, *wilson(solved, played)])
    series: list[dict[str, Any]] = [{"name": "training tasks", "points": points, "faint": True}]
    for arm in data.arms():
        shares = data.column(f"sdar-val/{arm}/success")
        counts = dict(data.column(f"sdar-val/{arm}/episodes"))
        validated = [[s, y, *(wilson(y * counts[s], counts[s]) if counts.get(s) else ())] for s, y in shares]
        series.append({"name": f"validation, {arm}", "points": validated, "dots": True})
    # A recipe's success may be a reward, of any size.
    are_shares = all(0 <= point[1] <= 1 for one in series for point in one["points"])
    smoothed = f", mean of the last {window} steps" if window > 1 else ""
    return lines(
        "Success",
        f"Share of episodes that solve their task{smoothed}. Bands: 95% interval (Wilson), episodes taken as "
        "independent; rollouts of one task are not, so the training band is somewhat too narrow.",
        "success, share of episodes" if are_shares else "success",
        series,
        **({"domain": [0, 1], "percent": True} if are_shares else {}),
    )


def reward(data: RunData) -> Chart | None:
    """Mean reward per episode with its interval."""
    points = []
    for line in data.distributions:
        if "reward" in line:
            stats = line["reward"]
            low, high = mean_interval(stats["mean"], stats["std"], stats["episodes"])
            points.append([line["step"], stats["mean"], low, high])
    if not points:
        points = [[step, value] for step, value in data.column("critic/score/mean")]
    return lines(
        "Reward",
        "Mean reward of the training episodes, each counted once. Band: 95% interval of the mean.",
        "reward per episode",
        [{"name": "training tasks", "points": points}],
    )


def success_by_type(data: RunData) -> Chart | None:
    """The last validation, by type of task."""
    rows = []
    for arm in data.arms():
        prefix = f"sdar-val/{arm}/success/"
        last = next((d for d in reversed(data.metrics.values()) if f"sdar-val/{arm}/success" in d), {})
        step = next((s for s in reversed(data.metrics) if data.metrics[s] is last), None)
        counts = _types(data, step, arm)
        for key in sorted(key for key in last if key.startswith(prefix)):
            kind = key.removeprefix(prefix)
            n = counts.get(kind, 0)
            interval = dict(zip(("low", "high"), wilson(last[key] * n, n), strict=True)) if n else {}
            rows.append({"category": kind.replace("_", " "), "name": arm, "value": last[key], **interval})
    if not rows:
        return None
    return {
        "kind": "dots",
        "title": "Success by type of task",
        "note": "The last validation. "
        + ("Bars: 95% interval (Wilson)" if any("low" in row for row in rows) else "No intervals")
        + ("." if all("low" in row for row in rows) else "; without outcomes per task there is none."),
        "x": "success, share of episodes",
        "percent": True,
        "domain": [0, 1],
        "rows": rows,
    }


def _types(data: RunData, step: int | None, arm: str) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    columns = data.outcomes.get(step, {}) if step is not None else {}
    for name, kind in zip(columns.get("arm", []), columns.get("task_type", []), strict=True):
        if name == arm and kind is not None:
            counts[kind] += 1
    return counts


def fan(data: RunData, name: str) -> Chart | None:
    """Quantiles of gap or gate over training."""
    key = f"{name}_quantiles"
    rows = [[line["step"], *line[key]] for line in data.distributions if key in line]
    mean = [list(point) for point in data.column(f"sdar/{name}_mean")]
    if not rows:
        unit = "nats per token" if name == "gap" else "gate"
        return lines(f"{name.capitalize()}, mean", "Mean over tokens.", unit, [{"name": "mean", "points": mean}])
    levels = {level: 1 + index for index, level in enumerate(QUANTILES)}
    texts = {
        "gap": (
            "Gap over training",
            "Teacher minus student log-probability of the sampled token. Above 0 the teacher, which sees the context, "
            "likes the token better. Bands hold the middle 50% and 90% of all tokens; a mean outside of them "
            "comes from few tokens with large gaps.",
            "gap, nats",
            0.0,
        ),
        "gate": (
            "Gate over training",
            "Weight of a token in the distillation term. 1/2 is indifferent. Bands hold the middle 50% and 90% of "
            "all tokens.",
            "gate",
            0.5,
        ),
    }
    title, note, y, rule = texts[name]
    return {
        "kind": "fan",
        "title": title,
        "note": note,
        "x": "training step",
        "y": y,
        "rule": rule,
        "bands": [
            {"name": "90% of tokens", "points": [[r[0], r[levels[0.05]], r[levels[0.95]]] for r in rows]},
            {"name": "50% of tokens", "points": [[r[0], r[levels[0.25]], r[levels[0.75]]] for r in rows]},
        ],
        "series": [
            {"name": "median", "points": [[r[0], r[levels[0.5]]] for r in rows]},
            {"name": "mean", "points": mean},
        ],
    }


def thirds(rows: Sequence[Any]) -> list[tuple[str, Sequence[Any]]]:
    """First, middle and last third of a run; fewer steps than six are not split."""
    if len(rows) < 6:
        return [("all steps", rows)] if rows else []
    cuts = [0, len(rows) // 3, 2 * len(rows) // 3, len(rows)]
    parts = [rows[a:b] for a, b in itertools.pairwise(cuts)]
    return [(f"steps {part[0]['step']} to {part[-1]['step']}", part) for part in parts]


def gap_histogram(data: RunData) -> Chart | None:
    """Shares of tokens per bin of the gap, early and late."""
    rows = [line for line in data.distributions if "gap_histogram" in line]
    series = []
    for name, part in thirds(rows):
        counts = [sum(column) for column in zip(*(line["gap_histogram"] for line in part), strict=True)]
        total = sum(counts)
        edges = GAP_EDGES[1:-1]
        centres = [edges[0] - 0.0625, *((edges[1:] + edges[:-1]) / 2), edges[-1] + 0.0625]
        series.append({"name": name, "points": [[float(c), n / total] for c, n in zip(centres, counts, strict=True)]})
    return lines(
        "Distribution of the gap",
        "Share of tokens per 1/8 nat, on a logarithmic scale: most tokens have a gap near 0, what is taught sits in "
        "the tails. The outermost points hold everything beyond 4 nats.",
        "share of tokens",
        series,
        log=True,
        x="gap, nats",
        ordered=True,
    )


def _binned(
    data: RunData, key: str, column: str, place: Callable[[dict[str, Any], int], float]
) -> list[dict[str, Any]]:
    rows = [line for line in data.distributions if key in line]
    series = []
    for name, part in thirds(rows):
        pooled = pool([line[key] for line in part])
        if column in pooled:
            points = [
                [place(part[0][key], int(i)), value]
                for i, value, n in zip(pooled["index"], pooled[column], pooled["tokens"], strict=True)
                if n >= 20
            ]
            series.append({"name": name, "points": points, "dots": True})
    return series


def by_turn(data: RunData) -> Chart | None:
    """Mean absolute gap by turn."""
    return lines(
        "Gap by turn",
        "Mean absolute gap of the tokens of a turn. Growth from turn to turn means that late turns weigh most. Turns "
        f"with fewer than 20 tokens are left out; turn {MAX_TURNS} stands for all later ones, too.",
        "mean |gap|, nats",
        _binned(data, "by_turn", "abs_gap", lambda _, i: i + 1),
        x="turn",
        ordered=True,
        zero=True,
    )


def by_position(data: RunData) -> Chart | None:
    """Mean absolute gap by position in the answer."""
    return lines(
        "Gap by position in the answer",
        "Mean absolute gap of the tokens at this place of their turn's answer: where in an answer teacher and student "
        "disagree.",
        "mean |gap|, nats",
        _binned(data, "by_position", "abs_gap", lambda bins, i: i * bins["width"] + (bins["width"] + 1) / 2),
        x="token of the answer",
        ordered=True,
        zero=True,
    )


def kl(data: RunData) -> Chart | None:
    """KL to the reference by turn."""
    return lines(
        "KL to the reference by turn",
        "k3 estimate per token.",
        "KL, nats per token",
        _binned(data, "by_turn", "kl", lambda _, i: i + 1),
        x="turn",
        ordered=True,
        zero=True,
    )


def skills(data: RunData) -> Chart | None:
    """Episodes per skill."""
    prefix = "sdar/skill_episodes/"
    totals: dict[str, float] = defaultdict(float)
    for values in data.metrics.values():
        for key, value in values.items():
            if key.startswith(prefix) and isinstance(value, (int, float)):
                totals[key.removeprefix(prefix)] += value
    if not totals:
        return None
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    shown = ranked[:30]
    rest = f" The {len(ranked) - 30} least used of {len(ranked)} are left out." if len(ranked) > 30 else ""
    return {
        "kind": "bars",
        "title": "Skills shown to the teacher",
        "note": f"Training episodes whose teacher saw this skill.{rest}",
        "x": "episodes",
        "rows": [{"category": name, "value": count} for name, count in shown],
    }


def context(data: RunData) -> Chart | None:
    """What is cut, missing or invalid."""
    names = {
        "sdar/context_share": "teacher has a context",
        "sdar/truncated_share": "teacher's prompt too long",
        "sdar/no_match_share": "no skill of the task's own",
        "sdar/history_dropped_share": "history dropped",
        "sdar/invalid_share": "invalid action",
        "response_length/clip_ratio": "answer at its length limit",
    }
    columns = {name: data.column(key) for key, name in names.items()}
    flat = [f"{name} {column[0][1]:.0%}" for name, column in columns.items() if len({y for _, y in column}) == 1]
    series = [
        {"name": name, "points": [list(point) for point in column]}
        for name, column in columns.items()
        if len({y for _, y in column}) > 1
    ]
    note = "Share of the turns."
    if flat:
        note += " The same on every step, and not drawn: " + ", ".join(flat) + "."
    if not series and flat:
        series = [{"name": name, "points": [list(point) for point in column]} for name, column in columns.items()]
    return lines("Context, truncation, validity", note, "share of turns", series, percent=True, zero=True)


def timing(data: RunData) -> Chart | None:
    """Seconds per step and phase."""
    rows: list[tuple[int, str, float]] = []
    for step, values in data.metrics.items():
        for key, name in PHASES.items():
            seconds = values.get(f"timing_s/{key}")
            if isinstance(seconds, (int, float)) and seconds > 0:
                rows.append((step, name, float(seconds)))
    if not rows:
        return None
    totals: dict[str, float] = defaultdict(float)
    for _, name, seconds in rows:
        totals[name] += seconds
    everything = sum(totals.values())
    # Phases below 1% of the time are one.
    small = {name for name, total in totals.items() if total < 0.01 * everything}
    merged: dict[tuple[int, str], float] = defaultdict(float)
    for step, name, seconds in rows:
        merged[step, "other" if name in small else name] += seconds
    shares = ", ".join(
        f"{name} {total / everything:.0%}"
        for name, total in sorted(totals.items(), key=lambda item: -item[1])
        if name not in small
    )
    return {
        "kind": "stack",
        "title": "Time per step",
        "note": f"Wall time by phase. Over the whole run: {shares}.",
        "x": "training step",
        "y": "seconds",
        "names": [n for n in PHASES.values() if n in totals and n not in small] + (["other"] if small else []),
        "rows": [{"x": step, "name": name, "value": value} for (step, name), value in merged.items()],
    }


def lengths(data: RunData) -> Chart | None:
    """Turns per episode, training and validation."""
    series = [{"name": "training tasks", "points": [list(p) for p in data.column("sdar/turns")], "faint": True}]
    for arm in data.arms():
        points = [list(point) for point in data.column(f"sdar-val/{arm}/turns")]
        series.append({"name": f"validation, {arm}", "points": points, "dots": True})
    return lines("Turns per episode", "Mean over episodes.", "turns", series, zero=True)
