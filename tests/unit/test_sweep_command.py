"""``sdar-verl sweep``: methods times seeds, one run after the other."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from sdar_verl.cli import main
from sdar_verl.report.one_run import OneByOne


def test_a_sweep_is_methods_times_seeds_in_folders_of_their_own(tmp_path, capsys):
    words = ["sweep", "--config-name", "sdar_quickstart", "--methods", "sdar,grpo", "--seeds", "0,3"]
    assert main([*words, "--out", str(tmp_path), "--dry-run", "trainer.test_freq=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and len({line.split("default_local_dir=")[1].split()[0] for line in lines}) == 4
    assert all("trainer.test_freq=5" in line for line in lines)
    assert "method=grpo" in lines[3] and "sdar.rollout.seed=3" in lines[3]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("methods", "override", "words"),
    [
        ("grpo,sdr", [], ["sdr-0 cannot start", "Could not find 'method/sdr'", "sdar_frozen"]),
        ("grpo,sdar+shufled", [], ["sdar+shufled-0 cannot start", "sdar.context.control='shufled'", "random_text"]),
        ("grpo", ["sdar.loss.cof=1"], ["grpo-0 cannot start", "sdar.loss.cof"]),
    ],
)
def test_a_sweep_with_a_wrong_name_starts_nothing(tmp_path, monkeypatch, capsys, methods, override, words):
    monkeypatch.setattr(OneByOne, "start", lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr("sdar_verl.checks.run.check_run", lambda config, sdar: None)  # there are no panels
    command = ["sweep", "--config-name", "sdar_quickstart", "--methods", methods, "--out", str(tmp_path / "out")]
    for dry in ([], ["--dry-run"]):
        assert main([*command, *dry, *override]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_a_sweep_makes_the_checks_of_every_run_first(tmp_path, capsys):
    words = ["sweep", "--config-name", "sdar_quickstart", "--methods", "sdar", "--out", str(tmp_path / "out")]
    assert main([*words, "data.train_files=/no/train.parquet"]) == 2
    assert "data.train_files=/no/train.parquet does not exist" in capsys.readouterr().err


def test_a_placebo_is_a_method_of_a_sweep(tmp_path, capsys):
    words = ["sweep", "--config-name", "sdar_quickstart", "--methods", "sdar,sdar+shuffled", "--out", str(tmp_path)]
    assert main([*words, "--dry-run"]) == 0
    real, placebo = capsys.readouterr().out.splitlines()
    assert "sdar.context.control" not in real
    assert "method=sdar " in placebo and "sdar.context.control=shuffled" in placebo
    assert f"{tmp_path}/sdar+shuffled-0/checkpoints" in placebo


RUN = """
import json, os, pathlib, signal, sys, threading
folder, ended, status, number, parent = sys.argv[1:]
if int(number):
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    told = threading.Event()
    os.kill(int(parent), int(number))
    told.wait(20) or sys.exit(9)
attempts = pathlib.Path(folder, "checkpoints/attempts")
attempts.mkdir(parents=True, exist_ok=True)
number = 1 + len(list(attempts.iterdir()))
(attempts / f"{number:04d}-aaaaaa.json").write_text(json.dumps({"step": 3, "ended": ended}))
sys.exit(int(status))
"""


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """A sweep over methods a and b, seeds 0 and 1, whose runs are scripts that leave a ledger: (why it ended, status).

    Runs without an entry end as finished. With a signal, a run sends it to the sweep and goes on until it is told to
    end. Returns the sweep's status.
    """
    from sdar_verl.report import sweep_command

    monkeypatch.setattr(sweep_command, "check", lambda words, *, whole: None)
    monkeypatch.setattr(sweep_command, "check_finished", lambda words, folder: None)

    def sweep(number: int = 0, **ends: tuple[str, int]) -> int:
        def command(config, method, seed, folder, *_):
            ended, status = ends.get(f"{method}{seed}", ("finished", 0))
            return [sys.executable, "-c", RUN, *map(str, (folder, ended, status, number, os.getpid()))]

        monkeypatch.setattr(sweep_command, "command", command)
        return main(["sweep", "--config-name", "x", "--methods", "a,b", "--seeds", "0,1", "--out", str(tmp_path)])

    return sweep


def test_a_sweep_goes_on_after_a_failure_and_does_not_repeat_what_is_finished(tmp_path, swept, capsys):
    assert swept(a0=("NonFiniteError: NaN", 1)) == 1
    said = capsys.readouterr()
    assert "a-0 (log: train.log)\n  failed with status 1" in said.out and "1 of 4 runs did not finish" in said.err
    assert swept() == 0
    said = capsys.readouterr().out
    assert said.count("(log: train.log)") == 1 and said.count("is finished already") == 3
    (compare,) = (line for line in said.splitlines() if line.startswith("sdar-verl compare"))
    assert compare.split()[2:] == [*(f"{m}={tmp_path}/{m}-{s}" for m in "ab" for s in "01"), "--baseline", "a"]


def test_a_run_that_was_stopped_in_order_is_not_finished(tmp_path, swept, capsys):
    """It ends with status 0, and goes on when the command is given again."""
    assert swept(a1=("stopped: asked by hand", 0)) == 1
    assert "a-1 (log: train.log)\n  ended before its last step: stopped: asked by hand" in capsys.readouterr().out
    assert swept() == 0
    assert f"{tmp_path}/a-1 (log: train.log)" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_sweep_that_is_to_end_ends_its_run_in_order_first(tmp_path, swept, capsys, handled, number):
    assert swept(number, a0=("stopped: SIGTERM", 0)) == 128 + number
    said = capsys.readouterr().out
    assert "ended before its last step: stopped: SIGTERM" in said and said.count("(log: train.log)") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a-0"] and not (tmp_path / "a-0/finished").exists()
    handled(number)


def test_a_sweep_below_nohup_does_not_hear_sighup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with OneByOne() as processes:
            os.kill(os.getpid(), signal.SIGHUP)
        assert processes.status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["runs", "jürgen's (1)", "lr=1e-4,b~[x]", "back\\", "a\\'b"])
def test_a_sweep_takes_any_folder(tmp_path, name):
    from sdar_verl.report.one_run import check
    from sdar_verl.report.sweep_command import command

    folder = tmp_path / name / "sdar-0"
    config = check(command("sdar_quickstart", "sdar", 0, folder, []), whole=False)
    assert config.trainer.default_local_dir == str(folder / "checkpoints")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "0,0"], "'0,0' names a seed twice"),
        (["--gpu", "h100-80gb"], "--gpu: no effect without --plan"),
    ],
)
def test_what_a_sweep_cannot_use_is_told(tmp_path, capsys, words, told):
    command = ["sweep", "--config-name", "sdar_quickstart", "--methods", "sdar", "--out", str(tmp_path), "--dry-run"]
    try:
        status = main([*command, *words])
    except SystemExit as error:
        status = error.code
    assert status == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainer.default_local_dir=here", "each run has a trainer.default_local_dir of its own"),
        ("++data.seed=7", "++data.seed=7: each run has a data.seed of its own"),
        ("trainer={experiment_name: x}", "a trainer.experiment_name of its own"),
        ("~hydra.run.dir", "seeds: --seeds, or the plan's seeds; folders: --out"),
        (
            "method=rlsd",
            "that is what makes sdar, grpo+shuffled different; leave it out and change --methods",
        ),
        ("sdar.context.control=wrong", "that is what makes grpo+shuffled different"),
    ],
)
def test_an_override_does_not_undo_what_makes_runs_different(tmp_path, capsys, override, told):
    words = ["sweep", "--config-name", "sdar_quickstart", "--methods", "sdar,grpo+shuffled", "--out", str(tmp_path)]
    assert main([*words, "--dry-run", "trainer.test_freq=5", override]) == 2
    said = capsys.readouterr().err
    assert told in said and "test_freq" not in said


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sdar.loss.coef=9", " there, 9 here"),
        ("trainer.total_training_steps=40", "finished to let it go on from step 20 to trainer.total_training_steps=40"),
        ("nonsense=1", "nonsense"),
        ("trainer.test_freq=3", None),
    ],
)
def test_a_finished_run_counts_only_as_what_is_asked_for(tmp_path, capsys, monkeypatch, override, told):
    from sdar_verl.report.one_run import FINISHED, check
    from sdar_verl.report.sweep_command import command
    from sdar_verl.verl import resume

    monkeypatch.setattr(resume, "panel_digests", lambda config, option: ["0"])
    folder = tmp_path / "sdar_frozen-0"
    config = check(command("sdar_quickstart", "sdar_frozen", 0, folder, []), whole=False)
    resume.claim_checkpoints(config)
    (folder / "checkpoints" / resume.TRACKER).write_text("20")
    (folder / FINISHED).touch()
    words = ["sweep", "--config-name", "sdar_quickstart", "--methods", "sdar_frozen", "--out", str(tmp_path)]
    status, said = main([*words, override]), capsys.readouterr()
    assert status == (0 if told is None else 2) and (told or "is finished already") in said.out + said.err
