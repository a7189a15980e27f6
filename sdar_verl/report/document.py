"""``sdar-verl report``: one run as one HTML file."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from sdar_verl.recipe import AGENT_LOOP
from sdar_verl.report.charts import charts
from sdar_verl.report.checked import is_number
from sdar_verl.report.cost import cards as cost_cards
from sdar_verl.report.page import page, write_page
from sdar_verl.report.read import RunData, episodes, read_run
from sdar_verl.report.stats import wilson
from sdar_verl.report.viewer import viewer_data

REPORT_FILE = "report.html"


def write_report(run: Path, out: Path | None = None, limit: int = 200) -> tuple[Path, list[str]]:
    """Write the report of ``run``.

    Args:
        run: see :func:`sdar_verl.report.read.read_run`.
        out: the file; None: ``report.html`` in the run's folder.
        limit: traced episodes to show, evenly from all traced steps.

    Returns:
        The file, and what was missing or could not be read.

    Raises:
        RecordError: there is nothing to report on.
    """
    data = read_run(run)
    out = out or data.folder / REPORT_FILE
    write_page(out, render(data, limit))
    return out, data.notes


def render(data: RunData, limit: int = 200) -> str:
    """The report as one document."""
    viewer = viewer_data(episodes(data, limit))
    sections = charts(data)
    drawn: list[dict[str, Any]] = [chart for _, listed in sections for chart in listed]
    parts = [_header(data, bool(viewer["index"])), '<main id="main">', _cards(data), _warnings(data), _notes(data)]
    number = 0
    for title, listed in sections:
        parts.append(f'<section class="charts"><h2>{html.escape(title)}</h2><div class="grid">')
        for chart in listed:
            parts.append(f'<figure class="chart {chart["kind"]}" data-chart="{number}"></figure>')
            number += 1
        parts.append("</div></section>")
    parts.append(_learned(data))
    if viewer["index"]:
        parts.append(VIEWER)
    parts += [_settings(data), "</main>"]
    settings = data.run.get("settings", {})
    loop = settings.get("actor_rollout_ref.rollout.agent.default_agent_loop", AGENT_LOOP)
    # Of a recipe of verl's: messages, whose roles the viewer names.
    viewer["conversation"] = loop != AGENT_LOOP
    payload = {"charts": drawn, "viewer": viewer, "beta": settings.get("sdar.loss.beta")}
    scripts = ["ui.js", "charts.js", *(["tokens.js", "viewer.js"] if viewer["index"] else [])]
    return page(f"{data.name} · report", "\n".join(parts), payload, scripts, ["report.css", "viewer.css"])


VIEWER = """<section id="episodes"><h2>Episodes, token by token</h2>
<p class="lead">Each token of an answer is coloured by what the teacher, who sees the context, makes of it.
<span class="keys">Keys: <kbd>←</kbd> <kbd>→</kbd> episode, <kbd>j</kbd> <kbd>k</kbd> turn, <kbd>g</kbd> gap or gate,
<kbd>t</kbd> teacher's context, <kbd>p</kbd> prompts, <kbd>s</kbd> side by side, <kbd>/</kbd> filter.</span></p>
<div id="viewer"></div></section>"""


def _header(data: RunData, traced: bool) -> str:
    run = data.run
    facts = [f"{len(data.training_steps)} training steps"]
    if run:
        facts.append(f"started {run.get('started', '?')[:16].replace('T', ' ')}")
        facts += [f"{name} {version}" for name, version in run.get("versions", {}).items() if name in _SHOWN_VERSIONS]
    link = '<a href="#episodes">Episodes</a>' if traced else ""
    return (
        f'<header class="top"><div><h1>{html.escape(data.name)}</h1>'
        f'<p class="facts">{html.escape(" · ".join(facts))}</p></div>'
        f'<nav><a href="#main">Charts</a>{link}<a href="#settings">Settings</a>'
        '<button id="theme" type="button" aria-label="Switch between light and dark">◐</button></nav></header>'
    )


_SHOWN_VERSIONS = ("sdar-verl", "verl")


def _cards(data: RunData) -> str:
    cards = []
    for arm in data.arms():
        shares = data.column(f"sdar-val/{arm}/success")
        counts = dict(data.column(f"sdar-val/{arm}/episodes"))
        (_, first), (step, last) = shares[0], shares[-1]
        change = f"{first:.1%} → {last:.1%}" if len(shares) > 1 else f"{last:.1%}"
        where = f"at step {step}"
        if counts.get(step):  # verl's own metrics do not say over how many episodes they are
            low, high = wilson(last * counts[step], counts[step])
            where = f"95% interval {low:.0%} to {high:.0%} {where}"
        cards.append((f"success, {arm}", change, where))
    for key, name, form in (("sdar/gate_mean", "gate, mean", "{:.3f}"), ("sdar/gap_mean", "gap, mean", "{:+.3f} nats")):
        column = data.column(key)
        if column:
            cards.append((name, form.format(column[-1][1]), f"last step; first {form.format(column[0][1])}"))
    seconds = [value for _, value in data.column("timing_s/step")]
    if seconds:
        total = sum(seconds) / 3600
        spent = f"{total:.1f} h" if total >= 1 else f"{total * 60:.1f} min"
        cards.append(("time per step", f"{sorted(seconds)[len(seconds) // 2]:.1f} s", f"median; all steps {spent}"))
    cards += cost_cards(data.attempts)
    return '<div class="cards">' + "".join(_card(*card) for card in cards) + "</div>"


def _card(*texts: str) -> str:
    parts = zip(("name", "value", "sub"), texts, strict=True)
    inside = "".join(f'<div class="{part}">{html.escape(text)}</div>' for part, text in parts)
    return f'<div class="card">{inside}</div>'


def _warnings(data: RunData) -> str:
    if not data.warnings:
        return ""
    last = next(reversed(data.metrics.values()), {})
    items = []
    for warning in data.warnings:
        count = last.get(f"sdar/warnings/{warning.get('name')}")
        times = f", on {count:.0f} steps so far" if isinstance(count, (int, float)) else ""
        items.append(
            f"<li><b>{html.escape(str(warning.get('name')))}</b> (first at step {html.escape(str(warning.get('step')))}"
            f"{times}): {html.escape(str(warning.get('text')))}</li>"
        )
    return f'<section class="warnings" role="note"><h2>Warnings</h2><ul>{"".join(items)}</ul></section>'


def _learned(data: RunData) -> str:
    """Skills that the run wrote, and what became of them."""
    if not data.skills:
        return ""
    rows = []
    for line in data.skills:
        gain, low, high = (line.get(key) for key in ("gain", "low", "high"))
        measured = (
            f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]" if all(map(is_number, (gain, low, high))) else "not measured"
        )
        verdict = f"taken, version {line.get('version')}" if line.get("taken") is True else "left"
        what = "revised" if line.get("revised") is True else "new"
        cells = (line.get("step"), verdict, measured, line.get("tasks"))
        rows.append(
            "<tr>"
            + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
            + f"<td><details><summary>{html.escape(str(line.get('skill')))} ({what})</summary>"
            f"{html.escape(str(line.get('text')))}</details></td></tr>"
        )
    head = "".join(
        f"<th>{name}</th>" for name in ("step", "verdict", "success with it, less without", "tasks", "skill")
    )
    return (
        '<section id="skills"><h2>Which skills did it learn?</h2><p class="lead">Written from episodes of the step, '
        "and taken where success with the skill in the prompt rose outside its 95% interval on a panel of its own.</p>"
        f'<div class="scroll"><table class="settings"><tr>{head}</tr>{"".join(rows)}</table></div></section>'
    )


def _notes(data: RunData) -> str:
    if not data.notes:
        return ""
    items = "".join(f"<li>{html.escape(note)}</li>" for note in data.notes)
    return f'<section class="notes"><h2>What this report lacks</h2><ul>{items}</ul></section>'


def _settings(data: RunData) -> str:
    run = data.run
    rows = list(run.get("settings", {}).items())
    rows += [(f"{option} panel", ", ".join(h[:16] for h in hashes)) for option, hashes in run.get("panels", {}).items()]
    rows += list(run.get("versions", {}).items())
    if not rows:
        return ""
    table = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows)
    return (
        '<section id="settings"><h2>Settings</h2><details><summary>What makes this run the experiment it is'
        f'</summary><div class="scroll"><table class="settings">{table}</table></div></details></section>'
    )
