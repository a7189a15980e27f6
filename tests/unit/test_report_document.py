"""The report of whole, partial and foreign run folders."""

from __future__ import annotations

import json
import math
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdar_verl.cli import main
from sdar_verl.report import layout
from sdar_verl.report.charts import charts, success_by_type
from sdar_verl.report.document import render, write_report
from sdar_verl.report.page import embed
from sdar_verl.report.read import episodes, read_run
from sdar_verl.report.stats import area_under_curve, bootstrap, first_reach, wilson
from sdar_verl.report.viewer import summary
from tests.support.recorded_run import write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def record(run):
    return run / "checkpoints" / layout.RECORD


def titles(run) -> list[str]:
    return [chart["title"] for _, listed in charts(read_run(run)) for chart in listed]


def test_the_report_is_one_file_without_anything_from_a_network(run):
    out, notes = write_report(run)
    text = out.read_text()
    assert out == run / "report.html" and notes == []
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", text)
    assert "@import" not in text and "url(http" not in text


def test_text_of_a_run_cannot_become_markup(run):
    text = render(read_run(run))
    assert "<script>alert(1)" not in text and "</script><b>bold" not in text
    assert embed({"a": "</script><!--"}) == '{"a":"\\u003c/script>\\u003c!--"}'


def test_all_charts_of_a_whole_run(run):
    assert titles(run) == [
        "Success",
        "Reward",
        "Success by type of task",
        "Gap over training",
        "Gate over training",
        "Distribution of the gap",
        "Gap by turn",
        "Gap by position in the answer",
        "Skills shown to the teacher",
        "Context, truncation, validity",
        "Time per step",
        "Turns per episode",
    ]


@pytest.mark.parametrize("start", ["", "checkpoints", "checkpoints/record"])
def test_a_run_is_found_from_any_of_its_folders(run, start):
    assert read_run(run / start).name == "sdar"


def test_outcomes_of_somebody_else_are_read_as_far_as_they_go(run):
    (file,) = run.rglob("outcomes/step_00000009.parquet")
    table = pq.read_table(file).drop_columns(["task_type"])
    solved = pa.array([bool(value) for value in table["acc"].to_pylist()])
    before = read_run(shutil.copytree(run, run.parent / "whole")).outcomes[9]
    pq.write_table(table.set_column(table.schema.get_field_index("acc"), "acc", solved), file)
    found = read_run(run)
    assert found.outcomes[9]["acc"] == before["acc"] and set(found.outcomes[9]["task_type"]) == {None}
    by_type = success_by_type(found)
    assert by_type["note"] == "The last validation. No intervals; without outcomes per task there is none."
    assert not any("low" in row or "high" in row for row in by_type["rows"])
    assert (
        success_by_type(read_run(run.parent / "whole"))["note"] == "The last validation. Bars: 95% interval (Wilson)."
    )
    texts = pa.array([None, "1.0", *map(str, before["acc"][2:])])
    pq.write_table(table.set_column(table.schema.get_field_index("acc"), "acc", texts), file)
    found = read_run(run)
    assert found.outcomes[9]["acc"] == [] and any(
        "40 rows have no acc and are left out" in note for note in found.notes
    )


def test_all_timers_of_a_step_are_in_the_chart_of_its_time(run):
    metrics = record(run) / "metrics.jsonl"
    seconds = {"gen": 20, "contexts": 70, "update_actor": 5, "method": 3, "observers": 2}
    data = {f"timing_s/{name}": value for name, value in seconds.items()}
    metrics.write_text(json.dumps({"step": 1, "data": data | {"timing_s/writer": 69, "timing_s/step": 100}}) + "\n")
    chart = next(c for _, listed in charts(read_run(run)) for c in listed if c["title"] == "Time per step")
    assert "contexts 70%, rollout 20%, update 5%, method 3%, record 2%" in chart["note"]


def test_steps_of_a_third_are_pooled(run):
    chart = next(c for _, listed in charts(read_run(run)) for c in listed if c["title"] == "Gap by turn")
    assert [one["name"] for one in chart["series"]] == ["steps 1 to 3", "steps 4 to 6", "steps 7 to 9"]
    assert [point[0] for point in chart["series"][0]["points"]] == [1, 2, 3, 4, 5]


def test_an_empty_folder_says_what_was_looked_for(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "record/run.json" in capsys.readouterr().err


def test_a_folder_that_does_not_exist(tmp_path, capsys):
    assert main(["report", str(tmp_path / "no")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_another_schema_is_refused_with_the_version_that_wrote_it(run, capsys):
    path = record(run) / layout.RUN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 7}))
    assert main(["report", str(run)]) == 2
    assert "schema 7, this version reads 1" in (message := capsys.readouterr().err) and "0.1.0" in message


@pytest.mark.parametrize(
    ("file", "gone"),
    [(layout.DISTRIBUTIONS_FILE, "Gap by turn"), (layout.METRICS_FILE, "Success")],
)
def test_a_missing_file_is_noted_and_the_rest_is_reported(run, file, gone):
    (record(run) / file).unlink()
    out, notes = write_report(run)
    assert any(file in note for note in notes) and file in out.read_text()
    assert gone not in titles(run) and len(titles(run)) >= 4


def test_a_damaged_trace_is_noted_and_the_others_are_shown(run):
    layout.step_file(record(run) / layout.TRACES, 2).write_bytes(b"no parquet")
    data = read_run(run)
    shown = {turns[0]["step"] for turns in episodes(data, 100)}
    assert shown == {1, 3, 4, 5, 6, 7, 8, 9}
    assert any("step_00000002" in note for note in data.notes)


def test_a_run_of_verls_file_tracker_alone(tmp_path, capsys):
    lines = [{"step": step, "data": {"sdar/success": 0.5, "sdar/episodes": 8, "timing_s/gen": 2.0}} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "da')
    assert main(["report", str(tmp_path)]) == 0
    assert "file tracker" in capsys.readouterr().out
    assert titles(tmp_path) == ["Success", "Time per step"]


def test_a_run_that_has_not_finished_a_step(tmp_path):
    write_run(tmp_path, steps=0)
    (record(tmp_path) / layout.METRICS_FILE).write_text("")
    out, notes = write_report(tmp_path)
    assert any("not finished a step" in note for note in notes) and "nothing to draw" in out.read_text()


@pytest.mark.parametrize("limit", [1, 5, 9, 20, 1000])
def test_episodes_are_taken_evenly_from_all_traced_steps(run, limit):
    steps = [turns[0]["step"] for turns in episodes(read_run(run), limit)]
    assert len(steps) <= max(limit, 9) and steps == sorted(steps)
    assert steps[0] == 1 and (limit == 1 or steps[-1] == 9)


def test_the_summary_of_an_episode(run):
    turns = next(iter(episodes(read_run(run), 100)))
    line = summary(turns)
    gaps = [gap for turn in turns for gap in turn["gap"]]
    assert (line["turns"], line["invalid"], line["success"], line["session"]) == (3, 1, False, 0)
    assert line["gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-3)


def test_a_warning_is_shown_with_its_count(run):
    layout.append_line(record(run) / layout.WARNINGS_FILE, {"step": 3, "name": "zero_gap", "text": "look at <this>"})
    layout.append_line(record(run) / layout.METRICS_FILE, {"step": 9, "data": {"sdar/warnings/zero_gap": 7}})
    text = render(read_run(run))
    assert "look at &lt;this&gt;" in text and "on 7 steps so far" in text


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_of_a_mean_has_its_standard_error():
    import numpy as np

    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(lambda _, tasks: float(values[tasks].mean()), 1, 400)
    spread = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.02)


def test_area_and_first_reach():
    assert area_under_curve([0, 1, 3], [0, 1, 1]) == pytest.approx(2.5 / 3)
    assert area_under_curve([5], [0.3]) == 0.3
    assert first_reach([0, 10, 20], [0.2, 0.4, 0.6], 0.5) == 15
    assert first_reach([0, 10], [0.7, 0.4], 0.5) == 0
    assert first_reach([0, 10], [0.1, 0.2], 0.5) == math.inf


def test_draws_that_never_end_count_as_late_and_unknown_ones_as_either():
    draws = iter([*range(90), *[math.inf] * 10])
    assert bootstrap(lambda *_: next(draws), 1, 1, draws=100) == (2, math.inf)
    draws = iter([*range(90), *[math.nan] * 10])
    assert bootstrap(lambda *_: next(draws), 1, 1, draws=100) == (-math.inf, math.inf)
    draws = iter([*range(98), math.nan, math.inf])
    assert bootstrap(lambda *_: next(draws), 1, 1, draws=100) == (1, 97)
