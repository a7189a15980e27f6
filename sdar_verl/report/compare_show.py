"""A comparison as a terminal table, Markdown, JSON and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdar_verl.report.charts import Chart, lines
from sdar_verl.report.compare import Comparison, Group
from sdar_verl.report.cost import UNKNOWN, rows_of_cost
from sdar_verl.report.cost import as_json as cost_as_json
from sdar_verl.report.estimates import Estimate, Measure, Row, measures
from sdar_verl.report.page import page
from sdar_verl.report.stats import bootstrap

NOISE = "within noise"
NEVER = "∞"


def cell(estimate: Estimate, measure: Measure, *, runs: int, difference: bool = False) -> str:
    """One number with its interval, in the units of its measure."""
    if not math.isfinite(estimate.value):
        if difference or measure.share:
            return "–"
        return UNKNOWN if estimate.reached is None else f"{estimate.reached} of {runs} runs get there"
    if measure.share:
        number = f"{estimate.value * 100:+.1f}" if difference else f"{estimate.value * 100:.1f}%"
        bounds = [
            f"{bound * 100:+.1f}" if difference else f"{bound * 100:.1f}" for bound in (estimate.low, estimate.high)
        ]
    else:
        number = _count(estimate.value, difference)
        bounds = [_count(bound, difference) for bound in (estimate.low, estimate.high)]
    has_interval = not math.isnan(estimate.low)
    interval = f" [{bounds[0]}, {bounds[1]}]" if has_interval else ""
    verdict = f" {NOISE}" if difference and has_interval and estimate.within_noise else ""
    return f"{number}{interval}{verdict}"


def _count(value: float, signed: bool) -> str:
    sign = "+" if signed else ""
    if math.isinf(value):
        return NEVER if value > 0 else f"-{NEVER}"
    if abs(value) >= 1e5:
        return f"{value / 1e6:{sign}.2f} M"
    return f"{value:{sign}.0f}" if abs(value) >= 100 else f"{value:{sign}.1f}"


def rows_of_text(rows: Sequence[Row], threshold: float, baseline: str | None) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table: a block of lines per measure, a line per method."""
    head = ["measure", "method", "runs", "mean over runs", *([f"minus {baseline}"] if baseline else [])]
    cells = []
    for measure in measures(threshold):
        for number, row in enumerate(rows):
            line = ["" if number else measure.title, row.method, str(row.runs)]
            line.append(cell(row.values[measure.key], measure, runs=row.runs))
            if baseline:
                found = row.differences.get(measure.key)
                line.append("" if found is None else cell(found, measure, runs=row.runs, difference=True))
            cells.append(line)
    return head, cells + rows_of_cost([(row.method, row.runs, row.cost) for row in rows], len(head))


def explain(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """What the numbers rest on, and what they do not say."""
    tasks = len(comparison.tasks)
    texts = [
        f"Validation arm {comparison.arm}"
        + (f", {tasks} tasks" if tasks else "")
        + f", at steps {', '.join(f'{step:g}' for step in comparison.groups[0].steps)}.",
        "Brackets: 95% bootstrap interval"
        + (" over runs and tasks; differences are paired task by task, in points." if tasks else " over runs."),
    ]
    if any(row.runs == 1 for row in rows) and not tasks:
        texts.append("One run says nothing about another seed, and without outcomes per task it has no interval.")
    elif any(row.runs == 1 for row in rows):
        texts.append("One run says nothing about another seed: its interval holds the chance of the tasks only.")
    elif any(row.runs < 5 for row in rows):
        texts.append("With fewer than five runs of a method the intervals are too narrow: few seeds cannot vary much.")
    found = [estimate for row in rows for estimate in (*row.values.values(), *row.differences.values())]
    if any(math.isinf(bound) for estimate in found for bound in (estimate.low, estimate.high)):
        texts.append(f"{NEVER}: in more than 2.5% of the draws a curve never gets there.")
    texts.append("The best of several validations is higher than any one of them would be on new tasks.")
    return [*texts, *comparison.notes]


def markdown(comparison: Comparison, rows: Sequence[Row], threshold: float, baseline: str | None) -> str:
    """The table and its notes."""
    head, cells = rows_of_text(rows, threshold, baseline)
    drawn = [head, ["---"] * len(head), *cells]
    table = "\n".join("| " + " | ".join(text.replace("|", "\\|").strip() for text in line) + " |" for line in drawn)
    return f"{table}\n\n" + "\n".join(f"- {text}" for text in explain(comparison, rows)) + "\n"


def as_json(comparison: Comparison, rows: Sequence[Row], threshold: float, baseline: str | None) -> dict[str, Any]:
    """Everything, as numbers; what does not exist, is unknown, or is never reached, is null."""
    times = {measure.key for measure in measures(threshold) if not measure.share}

    def plain(estimate: Estimate) -> dict[str, Any]:
        numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    return {
        "arm": comparison.arm,
        "tasks": len(comparison.tasks),
        "steps": [int(step) for step in comparison.groups[0].steps],
        "threshold": threshold,
        "baseline": baseline,
        "methods": [
            {
                "method": row.method,
                "runs": [str(run.folder) for run in group.runs],
                "cost": cost_as_json(row.cost),
                "values": {
                    key: {**plain(estimate), **({"reached": estimate.reached} if key in times else {})}
                    for key, estimate in row.values.items()
                },
                "differences": {
                    key: {**plain(estimate), "within_noise": estimate.within_noise}
                    for key, estimate in row.differences.items()
                },
            }
            for row, group in zip(rows, comparison.groups, strict=True)
        ],
        "notes": explain(comparison, rows),
    }


def as_html(comparison: Comparison, rows: Sequence[Row], threshold: float, baseline: str | None) -> str:
    """Table and curves in one file that opens from disk."""
    head, cells = rows_of_text(rows, threshold, baseline)
    drawn = [chart for chart in curves(comparison) if chart is not None]
    header = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join(
        f'<tr class="{"first" if line[0] else ""}">' + "".join(f"<td>{_noise(text)}</td>" for text in line) + "</tr>"
        for line in cells
    )
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in explain(comparison, rows))
    figures = "".join(f'<figure class="chart lines" data-chart="{i}"></figure>' for i in range(len(drawn)))
    names = ", ".join(group.name for group in comparison.groups)
    document = (
        f'<header class="top"><div><h1>Comparison</h1><p class="facts">{html.escape(names)}</p></div>'
        '<nav><button id="theme" type="button" aria-label="Switch between light and dark">◐</button></nav></header>'
        f'<main id="main"><div class="scroll"><table class="comparison"><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f'<section class="notes"><h2>How to read this</h2><ul>{notes}</ul></section>'
        f'<section class="charts"><h2>Curves</h2><div class="grid">{figures}</div></section></main>'
    )
    return page(f"Comparison: {names}", document, {"charts": drawn}, ["ui.js", "charts.js"], ["report.css"])


def _noise(text: str) -> str:
    return html.escape(text).replace(NOISE, f'<span class="noise">{NOISE}</span>')


def curves(comparison: Comparison) -> list[Chart | None]:
    """Validation success over steps, tokens and seconds; training success, gate, gap."""
    band = f"Mean over runs; band: 95% bootstrap interval over runs{' and tasks' if comparison.tasks else ''}."
    style: dict[str, Any] = {"domain": [0, 1], "percent": True}
    # A recipe's success may be a reward, of any size.
    are_shares = all(((group.success >= 0) & (group.success <= 1)).all() for group in comparison.groups)
    charts: list[Chart | None] = []
    for axis, label in (("steps", "training step"), ("tokens", "tokens, millions"), ("seconds", "seconds of training")):
        series = [{"name": group.name, "points": _validated(group, axis)} for group in comparison.groups]
        if axis == "steps" or all(one["points"] for one in series):
            charts.append(
                lines(
                    f"Validation success by {axis}",
                    band,
                    "success, share of tasks" if are_shares else "success",
                    series,
                    x=label,
                    **(style if are_shares else {}),
                )
            )
    for key, title, unit in (
        ("sdar/success", "Training success", "success, share of episodes"),
        ("sdar/gate_mean", "Gate, mean", "gate"),
        ("sdar/gap_mean", "Gap, mean", "gap, nats"),
        ("sdar/turns", "Turns per episode", "turns"),
    ):
        series = [{"name": group.name, "points": _trained(group, key)} for group in comparison.groups]
        extra = style if key == "sdar/success" else {}
        charts.append(lines(title, "Mean over runs; band: from the lowest to the highest run.", unit, series, **extra))
    return charts


def _validated(group: Group, axis: str) -> list[list[float]]:
    places = {
        "steps": np.broadcast_to(group.steps, group.tokens.shape),
        "tokens": group.tokens / 1e6,
        "seconds": group.seconds,
    }
    points = []
    for i in range(len(group.steps)):
        place, shares = float(places[axis][:, i].mean()), group.success[:, i]
        if not math.isfinite(place):
            return []

        def statistic(runs: np.ndarray, tasks: np.ndarray, shares: np.ndarray = shares) -> float:
            return float(shares[np.ix_(runs, tasks)].mean())

        low, high = bootstrap(statistic, *shares.shape, draws=500)
        points.append([int(place) if axis == "steps" else round(place, 4), float(shares.mean()), low, high])
    return points


def _trained(group: Group, key: str) -> list[list[float]]:
    columns = [dict(run.column(key)) for run in group.runs]
    if not all(columns):
        return []
    steps = sorted(set.intersection(*map(set, columns)))
    values = {step: [column[step] for column in columns] for step in steps}
    return [[step, *(float(f"{x:.6g}") for x in (sum(v) / len(v), min(v), max(v)))] for step, v in values.items()]
