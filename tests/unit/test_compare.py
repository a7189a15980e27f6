"""Comparing runs: what is refused, what is paired, what is called noise."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdar_verl.cli import main
from sdar_verl.report.compare import ComparisonError, load, method_of
from sdar_verl.report.compare_show import as_html, as_json, cell, markdown
from sdar_verl.report.estimates import Estimate, default_threshold, difference, estimate, measures, table
from sdar_verl.report.read import RunData
from tests.support.recorded_run import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds of a method that learns and of one that hardly does."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        str(write_run(folder / f"{name}-{seed}", experiment=f"{name}-{seed}", seed=seed, rate=rate, steps=9))
        for name, rate in (("sdar", 0.07), ("grpo", 0.01))
        for seed in range(3)
    ]


def measure(key, threshold=0.5):
    return next(m for m in measures(threshold) if m.key == key)


def test_runs_are_grouped_by_method_over_seeds(runs):
    comparison = load(runs)
    assert [(group.name, len(group.runs)) for group in comparison.groups] == [("sdar", 3), ("grpo", 3)]
    group = comparison.groups[0]
    assert group.success.shape == (3, 3, 40) and group.steps.tolist() == [0, 4, 9]
    assert comparison.arm == "student"


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ({"experiment": "sdar-2"}, "sdar"),
        ({"experiment": "sdar_seed12"}, "sdar"),
        ({"experiment": "grpo"}, "grpo"),
        ({"experiment": "x", "method": "rlsd"}, "rlsd"),
        ({"experiment": "x", "method": "my_v1"}, "my_v1"),
        ({"experiment": "7"}, "7"),
        ({"method": "sdar", "settings": {"sdar.context.control": "shuffled"}}, "sdar+shuffled"),
        ({"method": "sdar+wrong", "settings": {"sdar.context.control": "wrong"}}, "sdar+wrong"),
        ({"method": "sdar", "settings": {"sdar.context.control": "none"}}, "sdar"),
        ({"method": "grpo", "settings": {"sdar.context.control": "empty", "sdar.teacher.source": "none"}}, "grpo"),
    ],
)
def test_the_method_of_a_run(tmp_path, run, name):
    assert method_of(RunData(tmp_path, run=run)) == name


def test_a_method_can_be_named(runs):
    comparison = load([f"mine={runs[0]}", runs[3]])
    assert [group.name for group in comparison.groups] == ["mine", "grpo"]


def test_a_folder_may_hold_an_equals_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("lr=1e-4", "lr=1e-3")):
        write_run(tmp_path / "runs" / name, experiment=f"sdar-{number}", seed=number)
    assert [group.name for group in load(["runs/lr=1e-4", "runs/lr=1e-3"]).groups] == ["sdar"]
    assert [group.name for group in load(["runs/lr=1e-4", "fast=runs/lr=1e-3"]).groups] == ["sdar", "fast"]
    assert main(["compare", "runs/lr=1e-4", "runs/lr=1e-5"]) == 2
    assert "runs/lr=1e-5" in capsys.readouterr().err


def test_estimates_are_means_over_runs_and_tasks(runs):
    group = load(runs).groups[0]
    final = estimate(group, measure("final"), 500)
    assert final.value == pytest.approx(group.success[:, -1].mean())
    assert final.low < final.value < final.high
    half = estimate(group, measure("halfway"), 200)
    assert half.value == pytest.approx(group.success[:, 1].mean())  # validated at steps 0, 4 and 9
    best = estimate(group, measure("best"), 200)
    assert best.value == pytest.approx(np.mean([run.mean(axis=1).max() for run in group.success]))
    area = estimate(group, measure("area"), 200)
    a, b, c = group.success.mean(axis=(0, 2))
    assert area.value == pytest.approx((4 * (a + b) / 2 + 5 * (b + c) / 2) / 9)


def test_times_to_a_threshold_on_three_axes(runs):
    group = load(runs).groups[0]
    found = {key: estimate(group, measure(key, 0.5), 100) for key in ("steps", "tokens", "seconds")}
    assert found["steps"].reached == 3
    assert found["tokens"].value == pytest.approx(1000 * found["steps"].value)
    assert found["seconds"].value == pytest.approx(11 * found["steps"].value)


def test_half_of_the_steps_are_compared_with_all_of_the_baselines(runs):
    sdar, grpo = load(runs).groups
    found = difference(sdar, grpo, measure("halfway"), 200)
    assert found.value == pytest.approx(sdar.success[:, 1].mean() - grpo.success[:, -1].mean())
    assert found.low < found.value < found.high
    late = replace(sdar, steps=sdar.steps[-1:], success=sdar.success[:, -1:])
    nothing = estimate(late, measure("halfway"), 200)
    assert math.isnan(nothing.value) and cell(nothing, measure("halfway"), runs=3) == "–"


def test_a_threshold_that_is_not_reached_has_no_time_and_no_interval(runs):
    found = estimate(load(runs).groups[1], measure("steps", 0.99), 100)
    assert math.isinf(found.value) and math.isnan(found.low) and found.reached == 0
    assert cell(found, measure("steps"), runs=3) == "0 of 3 runs get there"


def test_a_time_whose_draws_may_never_come_has_no_upper_end(runs):
    comparison = load(runs)
    threshold = float(comparison.groups[0].success[:, -1].mean(axis=1).min())  # the worst run just gets there
    rows = table(comparison, "grpo", threshold, 200)
    found = rows[0].values["steps"]
    assert found.reached == 3 and 0 < found.low <= found.value < found.high == math.inf
    drawn = markdown(comparison, rows, threshold, "grpo")
    assert f"{found.value:.1f} [{found.low:.1f}, ∞]" in drawn and "∞: in more than 2.5% of the draws" in drawn
    assert as_json(comparison, rows, threshold, "grpo")["methods"][0]["values"]["steps"]["high"] is None
    assert "∞" not in markdown(comparison, table(comparison, "grpo", 0.0, 50), 0.0, "grpo")


def test_a_clear_difference_is_no_noise_and_a_method_against_itself_is(runs):
    sdar, grpo = load(runs).groups
    clear = difference(sdar, grpo, measure("final"), 500)
    assert clear.value > 0.3 and not clear.within_noise
    same = difference(sdar, sdar, measure("final"), 200)
    assert same == Estimate(0.0, 0.0, 0.0) and same.within_noise


def test_pairing_by_task_narrows_the_interval():
    from sdar_verl.report.compare import Group

    def made(success):
        group = Group("m", [RunData(None, run={})])
        group.steps, group.success = np.array([0.0]), success[None, None, :].astype(float)
        group.tokens = group.seconds = np.zeros((1, 1))
        return group

    hard = np.arange(100) < 50
    theirs, ours = hard.copy(), hard.copy()
    ours[50:55] = True  # the same tasks and five more
    found = difference(made(ours), made(theirs), measure("final"), 1000)
    assert found.value == pytest.approx(0.05) and found.low > 0
    assert (
        found.high - found.low
        < 0.1
        < estimate(made(ours), measure("final"), 1000).high - estimate(made(ours), measure("final"), 1000).low
    )


def test_different_panels_are_refused_unless_told_otherwise(tmp_path):
    one = write_run(tmp_path / "a-0", experiment="a-0")
    other = write_run(tmp_path / "b-0", experiment="b-0", panel="f" * 64)
    with pytest.raises(ComparisonError, match=r"different panels.*aaaa.*ffff.*--any-panel"):
        load([str(one), str(other)])
    assert any("different panels" in note for note in load([str(one), str(other)], any_panel=True).notes)


def test_different_tasks_of_one_panel_are_refused(tmp_path):
    one = write_run(tmp_path / "a-0", experiment="a-0", tasks=40)
    other = write_run(tmp_path / "b-0", experiment="b-0", tasks=30)
    with pytest.raises(ComparisonError, match="30 of up to 40"):
        load([str(one), str(other)])
    assert len(load([str(one), str(other)], any_panel=True).tasks) == 30


def test_tasks_of_which_none_is_common_are_refused(runs, tmp_path):
    other = shutil.copytree(runs[3], tmp_path / "other")
    for file in other.rglob("outcomes/*.parquet"):
        table = pq.read_table(file)
        ids = pa.array([f"other/{task}" for task in table["task_id"].to_pylist()])
        pq.write_table(table.set_column(table.schema.get_field_index("task_id"), "task_id", ids), file)
    with pytest.raises(ComparisonError, match="0 of up to 40 are common"):
        load([runs[0], str(other)])
    assert load([runs[0], str(other)], any_panel=True).tasks == []


def test_a_validation_without_outcomes_is_left_out_and_the_others_are_paired(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "other")
    next(other.rglob("outcomes/step_00000004.parquet")).unlink()
    comparison = load([str(other), runs[3]])
    assert len(comparison.tasks) == 40 and comparison.groups[0].steps.tolist() == [0, 9]
    assert any(f"these steps left out: {other} at step 4." in note for note in comparison.notes)


def test_runs_without_a_record_are_of_an_unknown_panel(tmp_path):
    for name, value in (("a-0", 0.5), ("b-0", 0.7)):
        (tmp_path / name).mkdir()
        line = {"step": 0, "data": {"sdar-val/student/success": value}}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    folders = [str(tmp_path / name) for name in ("a-0", "b-0")]
    with pytest.raises(ComparisonError, match="unknown"):
        load(folders)
    comparison = load(folders, any_panel=True)
    found = difference(comparison.groups[1], comparison.groups[0], measure("final"))
    assert found.value == pytest.approx(0.2) and found.within_noise
    assert any("not paired" in note for note in comparison.notes)


def test_runs_of_one_method_with_other_settings_are_refused(tmp_path):
    one = write_run(tmp_path / "a-0", experiment="a-0")
    other = write_run(tmp_path / "a-1", experiment="a-1", seed=1, **{"sdar.loss.beta": 9.0})
    with pytest.raises(ComparisonError, match=r"sdar.loss.beta \(5.0, 9.0\)"):
        load([str(one), str(other)])
    assert len(load([str(one), str(other)], any_settings=True).groups[0].runs) == 2


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            {"panels": {"train_files": ["c" * 64], "val_files": ["a" * 64]}},
            "the content of data.train_files (['bbbbbbbbbbbb'], ['cccccccccccc'])",
        ),
        ({"contents": {"sdar.skills.bank": ["c" * 64]}}, "the content of sdar.skills.bank (['bbb"),
        (
            {"validation": {"sdar.validation.arms.student.temperature": [0.4, 1.5]}},
            "sdar.validation.arms.student.temperature ([0.4], [0.4, 1.5])",
        ),
        ({"validation": {"sdar.validation.arms.told.temperature": [1.5]}}, None),
    ],
)
def test_other_files_and_another_validation_are_refused_within_a_method_and_noted_across(tmp_path, part, told):
    one = write_run(tmp_path / "a-0", experiment="a-0")
    other = write_run(tmp_path / "a-1", experiment="a-1", seed=1, described=part)
    across = load([str(one), f"b={other}"]).notes
    if told is None:
        assert load([str(one), str(other)]).notes == []
        assert not any("differ" in note and "seeds" not in note for note in across)
        return
    with pytest.raises(ComparisonError, match=re.escape(told)):
        load([str(one), str(other)])
    assert any(told in note for note in load([str(one), str(other)], any_settings=True).notes)
    assert any(told in note for note in across)


def test_runs_that_do_not_tell_how_they_were_validated_are_comparable_and_noted_once(runs, tmp_path):
    copies = [shutil.copytree(run, tmp_path / str(number)) for number, run in enumerate(runs[:3])]
    for copy in copies[:2]:
        (file,) = copy.rglob("run.json")
        described = json.loads(file.read_text())
        file.write_text(json.dumps({key: described[key] for key in described.keys() - {"contents", "validation"}}))
    (note,) = load([*map(str, copies)]).notes
    assert note.startswith("2 of 3 runs were recorded by an earlier version")


def test_methods_that_play_different_games_are_refused(tmp_path):
    one = write_run(tmp_path / "a-0", experiment="a-0", **{"sdar.env.max_steps": 12})
    other = write_run(tmp_path / "b-0", experiment="b-0", **{"sdar.env.max_steps": 50})
    with pytest.raises(ComparisonError, match="do not play the same game"):
        load([str(one), str(other)])


def test_an_unknown_arm_and_an_unknown_baseline_name_the_known(runs, capsys):
    assert main(["compare", *runs, "--arm", "no"]) == 2
    assert "['student']" in capsys.readouterr().err
    assert main(["compare", *runs, "--baseline", "no"]) == 2
    assert "sdar, grpo" in capsys.readouterr().err


def test_the_default_threshold_is_where_the_baseline_ends(runs):
    comparison = load(runs)
    assert default_threshold(comparison, "sdar") == pytest.approx(comparison.groups[0].success[:, -1].mean())
    lowest = default_threshold(comparison, None)
    assert lowest == pytest.approx(comparison.groups[1].success[:, -1].mean())
    comparison.groups[0].success *= 0  # where everybody begins
    assert default_threshold(comparison, "sdar") == default_threshold(comparison, None) == lowest
    comparison.groups[1].success *= 0
    assert default_threshold(comparison, "sdar") == 1.0


def test_what_a_time_is_counted_in_may_be_unknown(runs):
    comparison = load(runs)
    comparison.groups[0].tokens *= math.nan
    rows = table(comparison, "grpo", 0.35, 50)
    assert cell(rows[0].values["tokens"], measure("tokens"), runs=3) == "unknown"
    values = as_json(comparison, rows, 0.35, "grpo")["methods"][0]["values"]
    assert values["tokens"]["reached"] is None and values["steps"]["reached"] == 3 and "reached" not in values["final"]


def test_tables_say_which_difference_is_noise(runs):
    comparison = load(runs)
    rows = table(comparison, "grpo", 0.5, 200)
    text = markdown(comparison, rows, 0.5, "grpo")
    assert "| mean over runs | minus grpo |" in text and "fewer than five runs" in text
    close = Estimate(0.01, -0.05, 0.07)
    assert cell(close, measure("final"), runs=3, difference=True) == "+1.0 [-5.0, +7.0] within noise"
    assert "<td>success at the end</td>" in as_html(comparison, rows, 0.5, "grpo")
    found = as_json(comparison, rows, 0.5, "grpo")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["methods"][0]["differences"]["final"]["within_noise"] is False


def test_the_command_prints_a_table_and_writes_its_files(runs, tmp_path, capsys):
    assert main(["compare", *runs, "--baseline", "grpo", "--out", str(tmp_path / "c"), "--draws", "200"]) == 0
    assert "success at the end" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "comparison.html",
        "comparison.json",
        "comparison.md",
    ]


def test_a_run_counts_once(runs):
    with pytest.raises(ComparisonError, match="sdar-0 is named twice"):
        load([runs[0], runs[1], runs[0]])
    with pytest.raises(ComparisonError, match="record is named twice"):
        load([runs[0], f"{runs[0]}/checkpoints/record"])


def test_the_order_of_the_arguments_changes_nothing(runs):
    final, found = measure("final"), []
    for order in ([0, 1, 2], [2, 0, 1]):
        comparison = load([*runs[:3], *(runs[3:][i] for i in order)])
        found.append(difference(*comparison.groups, final, draws=200))
    assert found[0] == found[1]
    notes = load([*runs[:3], *runs[3:5]]).notes
    assert any("the same seeds; differences between those are not paired by seed" in note for note in notes)


def test_a_damaged_file_is_named_with_its_run(runs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (outcomes,) = broken.rglob("outcomes/step_00000009.parquet")
    outcomes.write_bytes(b"")
    assert any(f"{broken}: {outcomes.name} of the validation" in note for note in load([str(broken), runs[3]]).notes)
    (metrics,) = broken.rglob("metrics.jsonl")
    metrics.write_text(metrics.read_text().replace("\n", '\n{"step": 3, "da\n', 1))
    assert any(f"{broken}: metrics.jsonl: line 2 is not JSON" in note for note in load([str(broken), runs[3]]).notes)
    kept = [line for line in metrics.read_text().splitlines() if "sdar-val" not in line and '"step": 5' not in line]
    metrics.write_text("\n".join([*kept, '{"step": 10, "data": {"sdar/success": 1.0}}', ""]))
    with pytest.raises(ComparisonError) as error:
        load([str(broken), runs[3]])
    assert f"no validation in {broken} (" in str(error.value) and "no metrics of" in str(error.value)


def test_one_run_without_outcomes_against_several_has_no_interval(runs):
    one, several = load(runs).groups
    one, several = (replace(group, success=group.success.mean(axis=2, keepdims=True)) for group in (one, several))
    alone = replace(one, runs=one.runs[:1], success=one.success[:1])
    for pair in ((alone, several), (several, alone)):
        found = difference(*pair, measure("final"), 200)
        assert math.isnan(found.low) and found.within_noise
    assert not difference(one, several, measure("final"), 200).within_noise


@pytest.mark.parametrize("words", [["--draws", "3"], ["--threshold", "1.5"]])
def test_options_out_of_range_are_named(runs, words, capsys):
    assert main(["compare", *runs, *words]) == 2
    assert words[0] in capsys.readouterr().err
