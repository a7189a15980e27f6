"""Runs of verl's own recipes, whose validations have verl's own names, in reports and comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdar_verl.cli import main
from sdar_verl.observe.record import write_outcomes
from sdar_verl.report import layout
from sdar_verl.report.charts import success
from sdar_verl.report.compare import load
from sdar_verl.report.compare_show import curves, explain
from sdar_verl.report.estimates import difference, estimate, measures, table
from sdar_verl.report.layout import RecordError
from sdar_verl.report.read import read_run
from sdar_verl.report.recipe_metrics import recipe_success
from sdar_verl.report.stats import wilson

FINAL = next(measure for measure in measures(0.5) if measure.key == "final")


def write_recipe_run(folder: Path, seed: int, validations: dict[int, dict[str, float]], **run) -> str:
    """A run of ``sdar_ppo``, with the given validations: ``<data source>/acc`` -> value."""
    record = folder / "checkpoints" / layout.RECORD
    record.mkdir(parents=True)
    content = {
        "schema": layout.SCHEMA,
        "experiment": folder.name,
        "panels": {"val_files": ["a" * 64]},
        "settings": {"data.seed": seed},
        **run,
    }
    (record / layout.RUN_FILE).write_text(json.dumps(content))
    for step, values in validations.items():
        core = {f"val-core/{name}/mean@2": value for name, value in values.items()}
        others = {"val-core/gsm8k/acc/best@2/mean": 1.0, "val-aux/gsm8k/reward/mean@2": 9.0, "timing_s/step": 1.0}
        layout.append_line(record / layout.METRICS_FILE, {"step": step, "data": {**core, **others}})
    return str(folder)


def arms_of(values: dict[str, float], arms=None) -> dict[str, float]:
    success, _ = recipe_success({3: {f"val-core/{name}/mean@1": value for name, value in values.items()}}, arms)
    return {name.split("/")[1]: value for name, value in success.get(3, {}).items()}


@pytest.mark.parametrize(
    ("values", "arms", "found"),
    [
        ({"openai/gsm8k/acc": 0.25}, None, {"student": 0.25}),
        ({"a/acc": 0.25, "b/reward": 0.75}, None, {"student": 0.5}),
        ({"openai/gsm8k/acc": 0.25, "openai/gsm8k/told/acc": 1.0}, None, {"student": 0.25, "told": 1.0}),
        ({"a/acc": 0.0, "a/student/acc": 0.5, "a/told/acc": 1.0}, None, {"verl": 0.0, "student": 0.5, "told": 1.0}),
        # A data source that begins like another one is no arm of it: the record says so, or the third source does.
        ({"math/acc": 0.0, "math/algebra/acc": 1.0}, ["student"], {"student": 0.5}),
        ({"math/acc": 0.0, "math/algebra/acc": 1.0, "b/acc": 0.5}, None, {"student": 0.5}),
        (
            {"m/acc": 0.0, "m/x/acc": 1.0, "m/told/acc": 0.4, "m/x/told/acc": 0.6},
            ["student", "told"],
            {"student": 0.5, "told": 0.5},
        ),
        # Of an arm that is known, no step may have all.
        ({"m/acc": 0.2, "b/acc": 0.4, "m/told/acc": 1.0}, ["told"], {"student": 0.3}),
        ({}, None, {}),
    ],
)
def test_arms_are_told_from_data_sources(values, arms, found):
    assert arms_of(values, arms) == pytest.approx(found)


def test_a_validation_without_a_data_source_is_left_out_and_noted():
    metrics = {1: {"val-core/a/acc/mean@1": 0.2, "val-core/b/reward/mean@1": -1.0}, 2: {"val-core/a/acc/mean@1": 1.0}}
    found, notes = recipe_success(metrics)
    assert found == {1: {"sdar-val/student/success": pytest.approx(-0.4)}}
    assert "acc of a; reward of b" in notes[0] and "At steps 2" in notes[1]


def test_an_arm_that_a_resume_left_out_stays_one():
    told = {"val-core/openai/gsm8k/acc/mean@1": 0.3, "val-core/openai/gsm8k/told/acc/mean@1": 0.9}
    found, notes = recipe_success({5: told, 10: {"val-core/openai/gsm8k/acc/mean@1": 0.4}}, ["told"])
    student, arm = "sdar-val/student/success", "sdar-val/told/success"
    assert found == {5: {student: 0.3, arm: 0.9}, 10: {student: 0.4}} and len(notes) == 1


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Two seeds of two methods; success at the end .5 and .6, .8 and .7."""
    return [
        write_recipe_run(
            tmp_path / f"{method}-{seed}",
            seed,
            {5: {"gsm8k/acc": 0.4, "gsm8k/told/acc": 1.0}, 10: {"gsm8k/acc": end, "gsm8k/told/acc": 1.0}},
            method=method,
        )
        for method, ends in (("grpo", (0.5, 0.6)), ("sdar", (0.8, 0.7)))
        for seed, end in enumerate(ends)
    ]


def test_recipes_are_compared_over_their_runs(runs, tmp_path, capsys):
    comparison = load(runs)
    grpo, sdar = comparison.groups
    assert comparison.arm == "student" and not comparison.tasks and grpo.steps.tolist() == [5, 10]
    assert estimate(grpo, FINAL).value == pytest.approx(0.55)
    found = difference(sdar, grpo, FINAL)
    # The seeds are the same, so that a draw takes the same ones of both: differences of .3 and .1, no others.
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.1, 0.3))
    notes = explain(comparison, table(comparison, "grpo", 0.5, 200))
    assert any("acc of gsm8k" in note for note in notes) and any("over runs." in note for note in notes)
    assert "over runs." in curves(comparison)[0]["note"]
    assert load(runs, arm="told").groups[0].success.min() == 1.0
    assert main(["compare", *runs, "--baseline", "grpo", "--out", str(tmp_path / "c")]) == 0
    assert "+20.0" in capsys.readouterr().out


def test_runs_of_acc_and_of_reward_are_told_apart(tmp_path):
    one = write_recipe_run(tmp_path / "a-0", 0, {5: {"gsm8k/acc": 0.4}})
    other = write_recipe_run(tmp_path / "b-0", 0, {5: {"gsm8k/reward": -3.0}})
    comparison = load([one, other])
    assert [note for note in comparison.notes if note.startswith(f"{other}: ")] and "percent" not in curves(comparison)[
        0
    ]
    assert any("has no interval" in note for note in explain(comparison, table(comparison, None, 0.5, 200)))


def test_a_report_of_a_recipe_shows_its_validations_without_an_interval(runs):
    data = read_run(runs[0])
    assert "No validation was recorded." not in data.notes and "acc of gsm8k" in " ".join(data.notes)
    curve = next(one for one in success(data)["series"] if one["name"] == "validation, student")
    assert curve["points"] == [[5, 0.4], [10, 0.5]]
    assert main(["report", runs[0]]) == 0
    page = (Path(runs[0]) / "report.html").read_text()
    assert "40.0% → 50.0%" in page and "95% interval 0% to 100%" not in page


def test_verls_file_tracker_alone_is_read_alike(tmp_path):
    line = {"step": 5, "data": {"val-core/openai/gsm8k/acc/mean@1": 0.5}}
    (tmp_path / "a.jsonl").write_text('{"prompt": "one of somebody\'s own"}\n')
    (tmp_path / "run.jsonl").write_text(json.dumps(line) + "\n")
    assert read_run(tmp_path).column("sdar-val/student/success") == [(5, 0.5)]


def test_damaged_names_of_arms_are_an_error(tmp_path):
    run = write_recipe_run(tmp_path / "a-0", 0, {5: {"gsm8k/acc": 0.4}}, arms={"told": 1})
    with pytest.raises(RecordError, match="arms is"):
        read_run(run)


def test_outcomes_by_task_pair_runs_of_one_data_source_and_not_of_several(tmp_path: Path) -> None:
    def runs(sources: list[str]) -> list[str]:
        folders = []
        for name, solved in (("grpo-0", [1, 0, 0, 1]), ("sdar-0", [1, 1, 0, 1])):
            folder = tmp_path / f"{len(sources)}" / name
            folders.append(write_recipe_run(folder, 0, {2: {f"{source}/acc": sum(solved) / 4 for source in sources}}))
            outcomes = {"arm": ["student"] * 4, "task_type": (sources * 4)[:4], "acc": [float(v) for v in solved]}
            ids = [f"{source}/{number}" for number, source in enumerate(outcomes["task_type"])]
            record = folder / "checkpoints" / layout.RECORD
            write_outcomes({**outcomes, "task_id": ids}, layout.step_file(record / layout.OUTCOMES, 2))
        return folders

    comparison = load(runs(["gsm8k"]))
    assert comparison.tasks == [f"gsm8k/{number}" for number in range(4)]
    grpo, sdar = comparison.groups
    found = difference(sdar, grpo, FINAL)
    assert found.value == pytest.approx(0.25) and found.low < 0.25 < found.high
    shown = success(read_run(sdar.runs[0].folder))["series"][-1]["points"]
    assert shown == [[2, 0.75, *wilson(3, 4)]], "right or wrong, so there is an interval over the tasks"
    several = load(runs(["gsm8k", "math"]))
    assert several.tasks == [] and any("of several data sources" in note for note in several.notes)
    assert estimate(several.groups[0], FINAL).value == pytest.approx(0.5)
