"""``sdar-verl prepare webshop``: same options, same panels; splits as WebShop's; what cannot be is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sdar_verl.cli import main
from sdar_verl.envs.registry import demonstration_of, make_env
from sdar_verl.envs.webshop import prepare as module
from sdar_verl.envs.webshop.goals import count_goals, make_goal, shuffled
from sdar_verl.panels import read_panel
from sdar_verl.rollout.actions import match_admissible
from tests.support.webshop_shop import shop


def prepare(*arguments: object) -> int:
    return main(["prepare", "webshop", *map(str, arguments)])


def hashes(folder: Path) -> dict[str, str]:
    described = json.loads((folder / "panel.json").read_text())
    return {name: panel["hash"] for name, panel in described["panels"].items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A download in small."""
    folder = tmp_path_factory.mktemp("download")
    files, _ = shop(seed=5, products=400)
    for file in (files.products, files.attributes, files.human):
        assert file is not None
        shutil.copy(file, folder / file.name)
    return folder


def test_the_panels_are_webshops_places(data, tmp_path, capsys):
    assert prepare("--out", tmp_path / "a", "--data", data) == 0
    assert "hash " + hashes(tmp_path / "a")["test"][:16] in capsys.readouterr().out
    panels = {name: read_panel(tmp_path / "a" / f"{name}.parquet") for name in ("train", "validation", "test")}
    places = {name: sorted(task.data["place"] for task in tasks) for name, tasks in panels.items()}
    assert places["test"] == list(range(500))
    assert places["validation"] == list(range(500, 1500))
    assert places["train"] == list(range(1500, 1500 + len(panels["train"])))
    # The goals at those places are those of the list that is made in order and shuffled.
    _, found = shop(seed=5, products=400)
    goals = [make_goal(p, "synthetic", n, 0) for p in found for n in range(count_goals(p, "synthetic"))]
    order = shuffled(len(goals))
    for task in panels["test"]:
        goal = goals[order[task.data["place"]]]
        assert (task.data["goal"]["asin"], task.description) == (goal.asin, goal.instruction)
        assert task.task_type == goal.category


def test_the_released_split_has_no_test_panel(data, tmp_path, capsys):
    assert prepare("--out", tmp_path / "a", "--data", data, "--split", "released") == 0
    assert set(hashes(tmp_path / "a")) == {"train", "validation"}
    assert max(task.data["place"] for task in read_panel(tmp_path / "a" / "validation.parquet")) == 499
    assert prepare("--out", tmp_path / "b", "--data", data, "--split", "released", "--test", 3) == 2
    assert "--test has no effect with --split released" in capsys.readouterr().err


def test_hashes_depend_on_content_and_not_on_place(data, tmp_path):
    shutil.copytree(data, tmp_path / "moved")
    for name, folder in (("a", data), ("b", tmp_path / "moved")):
        assert prepare("--out", tmp_path / name, "--data", folder) == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert prepare("--out", tmp_path / "c", "--data", data, "--seed", 1) == 0
    assert hashes(tmp_path / "a")["test"] != hashes(tmp_path / "c")["test"]


@pytest.mark.parametrize("kind", [(), ("--human-goals",)], ids=["synthetic", "human"])
def test_demonstrations_earn_the_full_score(data, tmp_path, kind):
    arguments = ("--data", data, "--split", "released", "--train", 60, "--validation", 1, *kind)
    assert prepare("--out", tmp_path / "a", *arguments) == 0
    env = make_env("webshop")
    for task in read_panel(tmp_path / "a" / "train.parquet"):
        steps = [env.reset(task)]
        for action in demonstration_of(task):
            offered = match_admissible(action, steps[-1].admissible_actions, steps[-1].action_forms)
            assert offered is not None
            steps.append(env.step(offered))
        assert steps[-1].success
        assert [step.reward for step in steps] == [0.0] * (len(steps) - 1) + [10.0]


def test_human_goals(data, tmp_path, capsys):
    arguments = ("--data", data, "--human-goals")
    assert prepare("--out", tmp_path / "a", *arguments, "--split", "released", "--train", 10, "--validation", 5) == 0
    assert len(read_panel(tmp_path / "a" / "train.parquet")) == 10
    assert all(isinstance(t.data["goal"]["options"], list) for t in read_panel(tmp_path / "a" / "train.parquet"))
    assert prepare("--out", tmp_path / "b", *arguments) == 2
    told = capsys.readouterr().err
    assert "human goals" in told
    assert "use a larger catalogue" in told


def test_generated_panels_and_their_second_call(tmp_path, capsys):
    arguments = ("--generate", "--products", 450, "--validation", 20, "--train", 30)
    assert prepare("--out", tmp_path / "a", *arguments) == 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert prepare("--out", tmp_path / "a", *arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    assert prepare("--out", tmp_path / "a", *arguments, "--seed", 1) == 2
    told = capsys.readouterr().err
    assert "generator.seed: 0 there, 1 asked for" in told and "--force" in told
    assert prepare("--out", tmp_path / "a", *arguments, "--seed", 1, "--force") == 0
    assert len(read_panel(tmp_path / "a" / "train.parquet")) == 30
    # What is to be replaced stays until the new is whole.
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert prepare("--out", tmp_path / "a", *arguments, "--train", 999_999, "--force") == 2
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    (tmp_path / "a" / "catalogue").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "catalogue").symlink_to(tmp_path / "elsewhere")
    assert prepare("--out", tmp_path / "a", *arguments, "--seed", 2, "--force") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a", "elsewhere"}
    assert prepare("--out", tmp_path / "a", *arguments, "--seed", 1, "--force") == 0
    (tmp_path / "a" / "catalogue").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "a" / "catalogue")
    # A folder that was moved, or has lost something, is put right by the same call.
    (tmp_path / "a").rename(tmp_path / "b")
    for lose in ((), ("catalogue",), ("test.parquet",)):
        for name in lose:
            path = tmp_path / "b" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert prepare("--out", tmp_path / "b", *arguments, "--seed", 1) == 0
        task = read_panel(tmp_path / "b" / "train.parquet")[0]
        assert task.data["catalogue"] == str(tmp_path / "b" / "catalogue")
        make_env("webshop").reset(task)
    assert {file.name: file.read_bytes() for file in (tmp_path / "b" / "generated").iterdir()} == {
        file.name: content for file, content in before.items() if file.parent.name == "generated"
    }


def test_a_long_training_list_is_chosen_from(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "MAX_TRAIN", 50)
    assert prepare("--out", tmp_path / "a", "--data", data) == 0
    assert "train holds 50 of" in capsys.readouterr().err
    assert len(read_panel(tmp_path / "a" / "train.parquet")) == 50


def test_tasks_that_nobody_can_solve_are_counted(data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "data")
    file = folder / "items_shuffle.json"
    file.write_text(file.read_text().replace('"Oblong"', '"Rectangular"'))
    assert prepare("--out", tmp_path / "a", "--data", folder, "--test", 500) == 0
    never = sum("shape: rectangular" in task.description for task in read_panel(tmp_path / "a" / "test.parquet"))
    assert never > 0
    assert f"test: {never} of 500 tasks cannot reach the full score" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "--data, or make a catalogue with --generate"),
        (("--data", "nowhere"), "--data nowhere is not a folder"),
        (("--generate", "--data", "x"), "--data x has no effect with --generate"),
        (("--generate", "--size", "full"), "--size full has no effect with --generate"),
        (("--products", "300"), "--products only has an effect with --generate"),
        (("--generate", "--train", "0"), "--train 0: ask for at least one task"),
        (("--generate", "--products", "100"), "the train panel takes those from number 1501 on (--split webshop)"),
        (("--generate", "--products", "5"), "choose 100 to"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, capsys, arguments, told):
    assert prepare("--out", tmp_path / "a", *arguments) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "a" / "panel.json").exists()
