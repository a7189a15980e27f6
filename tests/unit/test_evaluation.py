"""Evaluation plans: what is read, in which order runs come, when an arm is given up."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from sdar_verl.cli import main
from sdar_verl.cloud import ledger
from sdar_verl.cloud.store import Store
from sdar_verl.compose import compose_config
from sdar_verl.envs.base import Task
from sdar_verl.errors import ConfigError
from sdar_verl.panels import write_panel
from sdar_verl.report import evaluation_run, layout
from sdar_verl.report.evaluation import Plan, affordable, give_up, order, planned_hours, read_plan
from sdar_verl.report.read import read_run
from tests.support.recorded_run import write_run

ROOT = Path(__file__).parents[2]
PLAN = {
    "config": "sdar_quickstart",
    "baseline": "grpo",
    "arms": {"grpo": ["method=grpo"], "sdar": ["method=sdar"], "revkl": ["method=revkl_frozen"]},
    "seeds": [0, 1, 2],
    "hours": 0.5,
}


def plan(**changes) -> Plan:
    return Plan.model_validate({**PLAN, **changes})


@pytest.mark.parametrize("name", ["alfworld", "quickstart"])
def test_the_shipped_plans_are_plans_and_compose(name):
    found = read_plan(ROOT / "recipes" / "evaluation" / f"{name}.yaml")
    configs = {arm: compose_config(found.config, [*found.overrides, *own]) for arm, own in found.arms.items()}
    hours, _ = planned_hours(found, configs, "h100-80gb")
    assert all(0.05 <= value < 24 for value in hours.values())
    assert found.kill.below is not None
    assert found.kill.below.at % configs[found.baseline].trainer.test_freq == 0
    if name == "quickstart":
        assert sum(run.hours for run in order(found, hours, None, dict.fromkeys(found.arms, 0))) < 1, "in under an hour"


@pytest.fixture
def priced():
    """The hours of one arm with these overrides, and what is not known of them."""
    found = read_plan(ROOT / "recipes" / "evaluation" / "alfworld.yaml").model_copy(update={"hours": None})

    def hours(*overrides: str) -> tuple[float, list[str]]:
        config = compose_config(found.config, [*found.overrides, *found.arms[found.baseline], *overrides])
        by_arm, told = planned_hours(found, {"one": config}, "h100-80gb")
        return by_arm["one"], told

    return hours


def games(path: Path, number: int) -> Path:
    write_panel([Task("alfworld", f"game-{i}", "pick", "put it") for i in range(number)], path, path.stem)
    return path


def test_planned_hours_hold_the_validations_of_a_panel_that_is_here(tmp_path, priced):
    here = f"data.val_files={games(tmp_path / 'val.parquet', 64)}"
    with_them, told = priced(here)
    assert not told and with_them > priced(here, "trainer.test_freq=-1", "trainer.val_before_train=False")[0]
    without, (missing,) = priced(f"data.val_files={tmp_path / 'gone.parquet'}")
    assert without < with_them and missing.startswith("one: ") and "data.val_files are not in the hours" in missing


def test_planned_hours_count_the_steps_of_epochs(tmp_path, priced):
    epochs = ["trainer.total_training_steps=null", "trainer.total_epochs=3", "data.train_batch_size=16"]
    here = f"data.train_files={games(tmp_path / 'train.parquet', 64)}"
    longer, _ = priced(here, *epochs)
    assert longer == pytest.approx(priced(here, "trainer.total_training_steps=12", "data.train_batch_size=16")[0])
    with pytest.raises(ConfigError, match="arm one: how many steps it has is not known"):
        priced(f"data.train_files={tmp_path / 'gone.parquet'}", *epochs)


def test_first_seeds_come_first_then_what_tells_most_per_hour():
    runs = order(plan(), {"grpo": 1.0, "sdar": 2.0, "revkl": 4.0}, 10.0, dict.fromkeys(plan().arms, 0))
    assert [(run.arm, run.seed) for run in runs] == [
        ("grpo", 0),
        ("sdar", 0),
        ("revkl", 0),
        ("grpo", 1),  # part of both differences
        ("grpo", 2),
        ("sdar", 1),
        ("revkl", 1),
        ("sdar", 2),
        ("revkl", 2),
    ]
    assert [run.usd for run in runs][:3] == [10.0, 20.0, 40.0]
    assert affordable(runs, 70.0) == 3 and affordable(runs, None) == 9 and affordable(runs, 5.0) == 0


def test_an_arm_is_given_up_for_a_warning_and_for_success_far_below(tmp_path):
    kill = {"warnings": ["zero_gap"], "below": {"by": 0.1, "at": 4}}
    base = read_run(write_run(tmp_path / "grpo", rate=0.08))
    low = read_run(write_run(tmp_path / "low", rate=-0.05))
    near = read_run(write_run(tmp_path / "near", rate=0.075))
    assert dict(base.column("sdar-val/student/success"))[4] > 0.3
    told = give_up(plan(kill=kill), "sdar", low, [base])
    assert told is not None and "at step 4, the baseline" in told
    assert give_up(plan(kill=kill), "sdar", near, [base]) is None
    assert give_up(plan(kill=kill), "sdar", low, []) is None, "nothing to compare with"
    assert give_up(plan(kill=kill), "grpo", low, [base]) is None, "the baseline itself"
    assert give_up(plan(kill={"below": {"by": 0.9, "at": 4}}), "sdar", low, [base]) is None
    uncounted = [
        replace(one, metrics={step: {n: v for n, v in data.items() if not n.endswith("/episodes")}
                              for step, data in one.metrics.items()})
        for one in (low, near, base)
    ]  # fmt: skip
    told = give_up(plan(kill=kill), "sdar", uncounted[0], uncounted[2:])
    assert told is not None and "interval" not in told, "a recipe of verl's"
    assert give_up(plan(kill=kill), "sdar", uncounted[1], uncounted[2:]) is None
    layout.append_line(
        tmp_path / "near/checkpoints/record/warnings.jsonl", {"step": 2, "name": "zero_gap", "text": "x"}
    )
    assert give_up(plan(kill=kill), "sdar", read_run(tmp_path / "near"), [base]) == "it warns of zero_gap"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"baseline": "grpp"}, "baseline='grpp' is none of the arms: grpo, sdar, revkl"),
        ({"arm": {}}, "arm: Extra inputs are not permitted; known: config, overrides, baseline"),
        ({"kill": {"warnings": ["zero_gp"]}}, "no such warning: zero_gp; known: zero_gap"),
        ({"kill": {"bellow": {}}}, "kill.bellow: Extra inputs are not permitted; known: warnings, below"),
        ({"seeds": [0, 0]}, "names a seed twice"),
        ({"arms": {"grpo": [], "a/b": []}}, "letters, digits and . _ + - alone: ['a/b']"),
        ({"arms": {"grpo": [], "a,b": []}}, "letters, digits and . _ + - alone: ['a,b']"),
        ({"hours": float("inf")}, "hours: "),
    ],
)
def test_a_faulty_plan_is_told(tmp_path, change, told):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **change}, sort_keys=False))
    with pytest.raises(ConfigError) as error:
        read_plan(tmp_path / "plan.yaml")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("arm", "words", "told"),
    [
        (["method=sdr"], [], "sdar-0 cannot start, so nothing was started"),
        (["method=sdar"], ["--budget", "5"], "--budget 5 has no effect without a price"),
        (["method=sdar"], ["--seeds", "0"], "--seeds: no effect with --plan"),
    ],
)
def test_a_fault_is_told_before_anything_starts(tmp_path, capsys, monkeypatch, arm, words, told):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a run was started"))
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump({**PLAN, "arms": {"grpo": ["method=grpo"], "sdar": arm}}, sort_keys=False)
    )
    command = ["sweep", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--dry-run", *words]
    assert main(command) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        ({}, ["--price", "-5"], "--price -5: must be above 0"),
        ({}, ["--price", "nan"], "--price nan: must be above 0"),
        ({}, ["--price", "5", "--budget", "-10"], "--budget -10: must be above 0"),
        ({}, ["--gpu", "h100-80gb"], "--gpu h100-80gb has no effect: the plan says how many hours a run takes"),
        ({"hours": None}, ["--gpu", "bogus"], "--gpu bogus: unknown card"),
        ({"validation": "studnt"}, [], "validation='studnt' is no arm of grpo's validations: student"),
        (
            {"kill": {"below": {"by": 0.1, "at": 100}}},
            [],
            "at=100: grpo does not validate then (trainer.test_freq=5, 12 ",
        ),
        ({"kill": {"below": {"by": 0.1, "at": 7}}}, [], "at=7: sdar does not validate then (trainer.test_freq=5, 12 "),
    ],
)
def test_what_a_plan_cannot_do_is_told_before_its_first_run(tmp_path, capsys, change, words, told):
    overrides = ["trainer.total_training_steps=12", "trainer.test_freq=5"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, "overrides": overrides, **change}, sort_keys=False))
    command = ["sweep", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--dry-run", *words]
    assert main(command) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        ({}, ["data.seed=7"], "data.seed=7: each run has a data.seed of its own"),
        ({"overrides": ["trainer.default_local_dir=here"]}, [], "each run has a trainer.default_local_dir of its own"),
        ({"arms": {"grpo": [], "sdar": ["sdar.rollout.seed=3"]}}, [], "each run has a sdar.rollout.seed of its own"),
        (
            {},
            ["method=rlsd"],
            "what makes grpo, sdar, revkl different; leave it out and change the plan's arms",
        ),
    ],
)
def test_an_override_does_not_undo_what_makes_arms_different(tmp_path, capsys, change, words, told):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **change}, sort_keys=False))
    command = ["sweep", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--dry-run", *words]
    assert main(command) == 2
    assert told in capsys.readouterr().err


def test_words_of_the_command_line_come_last(tmp_path, capsys):
    arms = {"grpo": ["method=grpo"], "sdar": ["method=sdar", "trainer.save_freq=4"]}
    changes = {"arms": arms, "overrides": ["trainer.test_freq=5", "trainer.save_freq=5"], "seeds": [0]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
    command = ["sweep", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*command, "trainer.test_freq=3"]) == 0
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if "main_ppo" in line]
    assert [words[-1] for words in commands] == ["trainer.test_freq=3"] * 2
    assert commands[1].index("trainer.save_freq=5") < commands[1].index("trainer.save_freq=4"), "an arm changes them"


def test_verl_validates_after_the_last_step(tmp_path):
    overrides = ["trainer.total_training_steps=12", "trainer.test_freq=5"]
    below = {"kill": {"below": {"by": 0.1, "at": 12}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, "overrides": overrides, **below}, sort_keys=False))
    assert main(["sweep", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]) == 0


def test_a_plan_knows_how_many_steps_its_runs_have(tmp_path, monkeypatch):
    listed = []
    check = evaluation_run.check
    monkeypatch.setattr(evaluation_run, "check", lambda words, *, whole: check(words, whole=False))
    monkeypatch.setattr(evaluation_run.Evaluation, "run", lambda self, runs: listed.extend(runs) or 0)
    arms = {"grpo": ["method=grpo"], "longer": ["method=grpo", "trainer.total_training_steps=24"]}
    changes = {"arms": arms, "overrides": ["trainer.total_training_steps=12"], "seeds": [0]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
    assert main(["sweep", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--price", "10"]) == 0
    assert [(run.arm, run.usd_from(6)) for run in listed] == [("grpo", 2.5), ("longer", 3.75)]


def test_a_dear_plan_is_told_before_its_first_run(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))
    command = ["sweep", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*command, "--price", "10", "--budget", "22"]) == 0
    out = capsys.readouterr().out
    assert "9 runs, about 4.5 h and 45.00 USD" in out and "the budget of 22 USD pays for the first 4 of them" in out


RUN = """
import shutil, sys
from sdar_verl.cloud import ledger
from sdar_verl.cloud.driver import tell_guard
from sdar_verl.cloud.store import Store
record, folder, status = sys.argv[1:4]
shutil.copytree(record, folder, dirs_exist_ok=True)
store = Store(folder + "/checkpoints")
tell_guard([store], [], 1, 8)
own = ledger.open_id(store)
line = {"first": 0, "step": 9, "cards": 8, "beats": 1, "seconds": 3600.0, "slowest": 1.0}
ledger.write(store, own, {**line, "ended": "finished" if status == "0" else "NonFiniteError: NaN"})
sys.exit(int(status))
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """An evaluation whose runs are scripts that leave a record, made here, and a ledger, as runs do."""

    def make(**of_arm: tuple[float, int]):
        found = plan(arms={name: [] for name in of_arm}, seeds=[0, 1], kill={"below": {"by": 0.1, "at": 4}})
        runs = evaluation_run.Evaluation(found, tmp_path / "out", [], 7.2, None)
        for arm, seed in itertools.product(found.arms, found.seeds):
            write_run(tmp_path / f"{arm}-{seed}", experiment=arm, seed=seed, rate=of_arm[arm][0])

        def words(self, arm: str, seed: int) -> list[str]:
            places = (tmp_path / f"{arm}-{seed}", self.folder(arm, seed))
            return [evaluation_run.sys.executable, "-c", RUN, *map(str, places), str(of_arm[arm][1])]

        monkeypatch.setattr(evaluation_run.Evaluation, "words", words)
        monkeypatch.setattr(evaluation_run, "EVERY_S", 0.2)
        return runs, order(found, dict.fromkeys(of_arm, 0.001), 7.2, dict.fromkeys(of_arm, 0))

    return make


def test_a_plan_runs_gives_up_and_goes_on(scripted, capsys):
    runs, listed = scripted(grpo=(0.08, 0), sdar=(0.075, 0), bad=(-0.05, 0), broken=(0.08, 1))
    assert runs.run(listed) == 1
    assert runs.finished() == [f"{arm}={runs.folder(arm, seed)}" for arm in ("grpo", "sdar") for seed in (0, 1)]
    assert "at step 4, the baseline" in (runs.given_up("bad") or "")
    assert "NonFiniteError: NaN" in (runs.given_up("broken") or "")
    assert not runs.folder("bad", 1).exists() and not runs.folder("broken", 1).exists()
    assert runs.spent() > 0
    capsys.readouterr()
    runs.run(listed)
    again = capsys.readouterr().out
    assert again.count("is finished already") == 4 and again.count("is left out") == 4


def test_a_plan_ends_when_its_budget_is_spent(scripted, capsys):
    runs, listed = scripted(grpo=(0.08, 0), sdar=(0.075, 0))
    folder = runs.folder("grpo", 0) / "checkpoints"
    folder.mkdir(parents=True)
    ledger.write(Store(folder), "0001-aaaaaa", {"seconds": 3600.0, "step": 1})
    runs.budget = 7.2
    assert runs.spent() == pytest.approx(7.2)
    assert runs.run(listed) == 1
    assert "not run: grpo-0, sdar-0, grpo-1, sdar-1" in capsys.readouterr().out
    assert json.loads((folder / "attempts" / "0001-aaaaaa.json").read_text())["seconds"] == 3600.0


def not_started(monkeypatch) -> list[list[str]]:
    """The commands that would be started; the first one ends the plan with KeyboardInterrupt."""
    commands = []

    def start(words, **_):
        commands.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    return commands


def test_an_attempt_costs_what_it_cost_then(scripted, monkeypatch):
    """A run of 10 USD at the old price; 5 of 20 USD are left for it and for all others, whatever the price is now."""
    runs, listed = scripted(grpo=(0.08, 0), sdar=(0.075, 0))
    started = not_started(monkeypatch)
    for arm, usd in (("grpo", 10.0), ("sdar", 5.0)):
        store = Store(runs.folder(arm, 0) / "checkpoints")
        ledger.write(store, "0001-aaaaaa", {"seconds": 3600.0, "step": 1, "price": usd})
    runs.price, runs.budget = 40.0, 20.0
    assert runs.spent() == pytest.approx(15.0)
    with pytest.raises(KeyboardInterrupt):
        runs.run(listed)
    assert float(started[0][started[0].index("--budget") + 1]) == pytest.approx(15.0), "its 10, and the 5 that are left"


def test_a_run_that_goes_on_takes_what_its_steps_from_the_checkpoint_take(scripted, monkeypatch, capsys):
    """Of 10 USD for 100 steps it needs 2 after 80. It was stopped, so its ledger calls 80 the total."""
    runs, listed = scripted(grpo=(0.08, 0), sdar=(0.075, 0))
    listed = [replace(run, usd=10.0, steps=100) for run in listed]
    folder = runs.folder("grpo", 0) / "checkpoints"
    ledger.write(Store(folder), "0001-aaaaaa", {"seconds": 3600.0, "step": 80, "total": 80, "price": 9.0})
    runs.budget = 12.0
    started = not_started(monkeypatch)
    assert runs.run(listed) == 1
    assert "3.00 USD left, and grpo-0 takes about 10.00" in capsys.readouterr().out, "without a checkpoint"
    (folder / "latest_checkpointed_iteration.txt").write_text("80")
    with pytest.raises(KeyboardInterrupt):
        runs.run(listed)
    assert len(started) == 1
    assert replace(listed[0], steps=0).usd_from(80) == 10.0, "nobody knows how many steps it has"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_plan_that_is_to_end_ends_its_run_first(scripted, monkeypatch, capsys, handled, number):
    """Its guard ends it. The arm is not given up for that, and nothing else starts."""
    runs, listed = scripted(grpo=(0.08, 0), sdar=(0.075, 0))
    pids = runs.out.parent / "pids"
    code = (
        f"import os, time; print(os.getpid(), file=open({str(pids)!r}, 'a'), flush=True); "
        f"os.kill({os.getpid()}, {int(number)}); time.sleep(60)"
    )
    monkeypatch.setattr(evaluation_run.Evaluation, "words", lambda *_: [evaluation_run.sys.executable, "-c", code])
    assert runs.run(listed) == 128 + number
    (pid,) = map(int, pids.read_text().split())
    assert not psutil.pid_exists(pid)
    assert capsys.readouterr().out.count("(log: train.log)") == 1
    assert [path.name for path in runs.out.iterdir()] == ["grpo-0"] and runs.given_up("grpo") is None
    handled(number)
