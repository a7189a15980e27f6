"""What the trainer's process does with its mirror and its ledger, without a trainer."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.cloud import cloud_faults
from sdar_verl.cloud import attempt, ledger, stop
from sdar_verl.cloud.attempt import CloudRun, TakenOver
from sdar_verl.cloud.driver import before_ray
from sdar_verl.cloud.mirror import Mirror, MirrorError
from sdar_verl.cloud.store import Store, StoreError
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.errors import ConfigError
from sdar_verl.verl.resume import experiment
from tests.support.toy_panel import write_toy_panels
from tests.unit.test_mirror import checkpoint


def config(folder: Path, mirror: str | None = None, **trainer: object) -> DictConfig:
    given = {"default_local_dir": str(folder / "run"), "resume_mode": "auto", "nnodes": 1, "n_gpus_per_node": 8}
    given |= {"save_freq": 2, "total_training_steps": 100, **trainer}
    return OmegaConf.create({"trainer": given, "sdar": {"cloud": {"mirror": mirror}}})


class Steps:
    """Plays the trainer's part: steps, and saves where they are due."""

    def __init__(self, folder: Path, mirror: str | None = None, **trainer: object):
        self.config = config(folder, mirror, **trainer)
        self.trainer = SimpleNamespace(total_training_steps=100, global_steps=0)
        self.run = CloudRun(self.config, load_config({"cloud": {"mirror": mirror}}), self.trainer)
        self.folder = folder / "run"

    def step(self, number: int) -> None:
        self.trainer.global_steps = number
        self.run.before_rollout(None)
        self.run._notes.submit(int).result()  # the mirror has answered
        self.run.after_updates(None, {})
        if number % self.config.trainer.save_freq == 0:
            checkpoint(self.folder, number)
        self.run.after_step(number, {"perf/total_num_tokens": 1000})

    def uploaded(self) -> None:
        assert self.run._upload is not None
        self.run._upload[1].exception()


@pytest.fixture
def place(tmp_path):
    return f"file://{tmp_path / 'mirror'}"


def test_checkpoints_are_mirrored_and_the_ledger_is_kept(tmp_path, place):
    steps = Steps(tmp_path, place)
    with steps.run:
        for number in (1, 2, 3, 4):
            steps.step(number)
    assert Mirror(place).steps() == {2: True, 4: True}
    (line,) = ledger.read(Store(place))
    assert (line.first, line.step, line.tokens, line.cards, line.ended) == (0, 4, 4000, 8, "finished")
    assert ledger.read(Store(steps.folder)) == [line]


def test_a_checkpoint_comes_with_the_record_up_to_its_step(tmp_path, place):
    steps = Steps(tmp_path, place)
    with steps.run:
        checkpoint(steps.folder, 2)
        assert steps.run._upload is None, "the record has no line of this step yet"
        steps.run.after_step(2, {})
    assert Mirror(place).steps() == {2: True}


def test_a_checkpoint_before_the_one_in_the_folder_is_mirrored(tmp_path, place):
    """As ``trainer.resume_mode=resume_path`` makes one."""
    checkpoint(tmp_path / "run", 10)
    steps = Steps(tmp_path, place, resume_mode="resume_path")
    with steps.run:
        steps.step(4)
    assert Mirror(place).steps() == {4: True}
    assert [(line.first, line.step) for line in ledger.read(Store(place))] == [(3, 4)]


def test_a_save_waits_for_the_upload_before_it_and_says_so(tmp_path, place, capsys):
    steps, going = Steps(tmp_path, place), threading.Event()
    upload = Mirror.upload

    def slow(self: Mirror, folder: Path, step: int):
        assert going.wait(60)
        return upload(self, folder, step)

    with mock.patch.object(Mirror, "upload", slow), steps.run:
        for number in (1, 2, 3):
            steps.step(number)  # training goes on beside the upload
        assert "waits" not in capsys.readouterr().out
        threading.Timer(0.5, going.set).start()
        steps.step(4)
        assert "step 4 waits for the upload of the checkpoint before" in capsys.readouterr().out
    assert Mirror(place).steps() == {2: True, 4: True}


def test_an_upload_that_fails_is_told_and_the_next_one_mends_it(tmp_path, place, capsys):
    steps = Steps(tmp_path, place)
    with steps.run:
        with mock.patch.object(Mirror, "upload", side_effect=StoreError("no bucket today")):
            for number in (1, 2, 3):
                steps.step(number)
            steps.uploaded()
        steps.step(4)
        assert "global_step_2 could not be mirrored: no bucket today" in capsys.readouterr().out
    assert Mirror(place).steps() == {4: True}


def test_a_run_does_not_end_well_without_its_last_checkpoint(tmp_path, place):
    steps = Steps(tmp_path, place)
    with (
        pytest.raises(MirrorError, match="global_step_2, is not in the mirror: no bucket today"),
        mock.patch.object(Mirror, "upload", side_effect=StoreError("no bucket today")),
        steps.run,
    ):
        steps.step(2)
    assert (ledger.read(Store(steps.folder))[0].ended or "").startswith("MirrorError")


def test_an_error_between_save_and_the_steps_end_does_not_lose_the_checkpoint(tmp_path, place):
    steps = Steps(tmp_path, place)
    with pytest.raises(RuntimeError, match="validation"), steps.run:
        checkpoint(steps.folder, 2)
        raise RuntimeError("validation broke")
    assert Mirror(place).steps() == {2: True}
    assert ledger.read(Store(place))[0].ended == "RuntimeError: 'validation broke'"


def test_of_two_runs_on_one_mirror_the_earlier_ends_and_keeps_its_own(tmp_path, place):
    first = Steps(tmp_path / "a", place)
    second = Steps(tmp_path / "b", place)
    with pytest.raises(TakenOver, match="two runs on one mirror"), first.run:
        first.step(2)
        first.uploaded()
        first.run._notes.submit(int).result()  # its line is in the mirror
        with second.run:
            second.run._notes.submit(int).result()
            second.step(4)
            first.step(4)
            first.uploaded()
    manifest = Store(place).read_json("global_step_4/manifest.json")
    assert Mirror(place).steps() == {2: True, 4: True} and manifest is not None
    assert manifest["attempt"] == second.run._id, "the later run's checkpoint of that step is untouched"
    assert (first.folder / "global_step_4" / "data.pt").is_file()
    assert (ledger.read(Store(first.folder))[0].ended or "").startswith("TakenOver")


def test_a_run_that_is_taken_over_while_it_uploads_does_not_seal(tmp_path, place):
    first, second = Steps(tmp_path / "a", place), Steps(tmp_path / "b", place)
    upload = Mirror.upload

    def slow(self: Mirror, folder: Path, step: int):
        with second.run:
            second.run._notes.submit(int).result()
        return upload(self, folder, step)

    with pytest.raises(TakenOver), mock.patch.object(Mirror, "upload", slow), first.run:
        first.run._notes.submit(int).result()
        first.step(2)
    assert Mirror(place).steps() == {2: False}


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "_ALONE_S", 0.1)
    refused = pytest.raises(ConfigError, match=r"another process trains there.*trainer\.experiment_name")
    first = Steps(tmp_path)
    with refused:
        Steps(tmp_path)
    with first.run:
        pass
    with Steps(tmp_path).run:
        pass
    assert len(ledger.read(Store(tmp_path / "run"))) == 2


@pytest.mark.parametrize("failing", ["data.pt", "global_step"])
def test_a_mirror_that_cannot_be_read_starts_nothing_over(tmp_path, place, monkeypatch, failing):
    first = Steps(tmp_path / "a", place)
    with first.run:
        first.step(2)
        first.step(4)
    download = Store.download

    def unreachable(self: Store, name: str, path: Path):
        if failing in name:
            raise StoreError(f"{self.place}: cannot read {name}: it cannot be reached")
        return download(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "download", unreachable)
        with pytest.raises(StoreError, match="cannot be reached"):
            Steps(tmp_path / "b", place)
    Steps(tmp_path / "b", place)
    assert (tmp_path / "b/run/latest_checkpointed_iteration.txt").read_text() == "4"


def test_checkpoints_of_which_none_can_be_used_are_not_trained_over(tmp_path, place):
    first = Steps(tmp_path / "a", place)
    with first.run:
        first.step(2)
    Store(place).write("global_step_2/data.pt", b"other")
    with pytest.raises(
        MirrorError, match=r"checkpoints of the steps 2, and none is as it was uploaded.*sdar\.cloud\.mirror"
    ):
        Steps(tmp_path / "b", place)
    assert Steps(tmp_path / "a", place).folder.is_dir(), "its own folder has what it needs"


def test_a_note_that_cannot_be_written_costs_the_note(tmp_path, monkeypatch, capsys):
    steps = Steps(tmp_path)
    with steps.run:
        with monkeypatch.context() as patch:
            patch.setattr(ledger, "write", mock.Mock(side_effect=StoreError("the disk is full")))
            steps.step(1)
        steps.step(2)
    assert "the disk is full" in capsys.readouterr().out
    assert ledger.read(Store(steps.folder))[0].step == 2


@pytest.mark.parametrize("again", [False, True])
def test_the_line_says_whether_the_run_goes_on_elsewhere(tmp_path, again):
    steps = Steps(tmp_path)
    with steps.run:
        stop.ask([Store(steps.folder)], stop.Wish("notice", steps.run._id, again))
        steps.step(1)
    line = ledger.read(Store(steps.folder))[0]
    assert (line.ended, line.again) == ("stopped: notice", again)


@pytest.mark.parametrize("where", ["folder", "mirror"])
def test_asked_to_stop_it_saves_this_step_and_takes_no_other(tmp_path, place, where):
    steps = Steps(tmp_path, place, save_freq=50)
    with steps.run:
        steps.step(1)
        stop.ask([Store(steps.folder if where == "folder" else place)], stop.Wish("enough", steps.run._id))
        steps.step(2)
    assert steps.config.trainer.save_freq == 1 and steps.trainer.total_training_steps == 2
    assert Mirror(place).steps() == {2: True}
    assert ledger.read(Store(place))[0].ended == "stopped: enough"
    assert stop.asked(Store(place), steps.run._id) is None


def test_a_mirror_that_does_not_answer_does_not_stop_a_step(tmp_path, place, monkeypatch):
    monkeypatch.setattr(attempt, "_ANSWER_S", 0.1)
    steps = Steps(tmp_path, place)
    with steps.run:
        released = threading.Event()
        steps.run._notes.submit(released.wait, 60)
        steps.run.before_rollout(None)
        steps.trainer.global_steps = 1
        steps.run.after_updates(None, {})
        steps.run.after_step(1, {})
        released.set()
    assert ledger.read(Store(place))[0].step == 1


def test_the_next_start_fills_an_empty_folder_with_record_and_ledger(tmp_path, place):
    first = Steps(tmp_path / "a", place)
    with first.run:
        first.step(1)
        first.step(2)
    second = Steps(tmp_path / "b", place)
    assert (second.folder / "global_step_2" / "data.pt").is_file()
    with second.run:
        second.step(3)
    assert [(line.first, line.step) for line in ledger.read(Store(second.folder))] == [(0, 2), (2, 3)]


def test_resuming_elsewhere_or_not_at_all_fills_nothing(tmp_path, place):
    first = Steps(tmp_path / "a", place)
    with first.run:
        first.step(2)
    assert not Steps(tmp_path / "b", place, resume_mode="disable").folder.joinpath("global_step_2").exists()


def test_a_run_without_a_mirror_has_a_ledger_and_can_be_stopped(tmp_path):
    steps = Steps(tmp_path)
    with steps.run:
        stop.ask([Store(steps.folder)], stop.Wish("enough"))
        steps.step(1)
    assert ledger.read(Store(steps.folder))[0].ended == "stopped: enough"


def test_a_run_that_was_asked_to_stop_while_down_does_not_start(tmp_path, place, monkeypatch):
    monkeypatch.delenv("SDAR_GUARD", raising=False)
    stop.ask([Store(place)], stop.Wish("enough"))
    assert before_ray(config(tmp_path, place)) == "enough"
    with mock.patch("sdar_verl.cloud.driver.answer_sigterm") as answered:
        assert before_ray(config(tmp_path, place)) is None, "once is enough"
    answered.assert_called_once()


# ---------------------------------------------------------------- before the start


@pytest.fixture
def real(tmp_path):
    """A whole config, and its experiment's note in a mirror."""

    def make(*overrides: str) -> DictConfig:
        panels = write_toy_panels(tmp_path)
        words = [*panels, f"trainer.default_local_dir={tmp_path}/run", f"sdar.cloud.mirror=file://{tmp_path}/mirror"]
        return compose_config("sdar_quickstart", [*words, *overrides])

    return make


def faults(made: DictConfig) -> list[str]:
    return cloud_faults(made, load_config(made.sdar))


def test_the_same_experiments_mirror_is_taken_and_anothers_is_refused_by_name(tmp_path, real):
    note = json.dumps(experiment(real())).encode()
    Store(f"file://{tmp_path}/mirror").write("sdar_run.json", note)
    assert faults(real()) == []
    (told,) = faults(real("sdar.loss.coef=0.5"))
    assert "holds another experiment (sdar.loss.coef: " in told and "0.5 here" in told
    assert faults(real("sdar.cloud.mirror=null")) == []


def test_starting_over_beside_mirrored_checkpoints_is_refused(tmp_path, real):
    Store(f"file://{tmp_path}/mirror").write_json("global_step_4/manifest.json", {})
    (told,) = faults(real("trainer.resume_mode=disable"))
    assert "holds global_step_4, and trainer.resume_mode=disable" in told
    resumed = [f"trainer.resume_from_path={tmp_path}/run/global_step_{step}" for step in (2, 4)]
    (told,) = faults(real("trainer.resume_mode=resume_path", resumed[0]))
    assert "trainer.resume_mode=resume_path would begin at step 2 beside it" in told
    assert faults(real("trainer.resume_mode=resume_path", resumed[1])) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainer.save_freq=-1", "has no effect with trainer.save_freq=-1"),
        ("trainer.max_actor_ckpt_to_keep=1", "keep 2"),
        ("sdar.cloud.mirror=somewhere", "must be s3://"),
        ("sdar.cloud.mirror=ftp://x/y", "unknown scheme ftp://"),
        ("sdar.cloud.mirror=az://x/y", "AZURE_STORAGE_ACCOUNT"),
        ("sdar.cloud.mirror='s3://bucket/run#2'", "must not hold #"),
        ("sdar.cloud.mirror=file:///proc/nothing", "cannot write"),
    ],
)
def test_a_mirror_that_cannot_work_is_told(real, monkeypatch, override, told):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    (found,) = faults(real(override))
    assert told in found and "sdar.cloud.mirror" in found


def test_a_mirror_inside_the_runs_folder_is_refused(tmp_path, real):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for inside in ("run/mirror", "other/../run/mirror", "link/mirror", "ru%6e/mirror"):
        (told,) = faults(real(f"sdar.cloud.mirror=file://{tmp_path}/{inside}"))
        assert "outside of trainer.default_local_dir" in told


def test_a_number_of_checkpoints_without_a_mirror_is_told(real):
    (told,) = faults(real("sdar.cloud.mirror=null", "sdar.cloud.keep=5"))
    assert told.startswith("sdar.cloud.keep=5 has no effect without a mirror")


@pytest.mark.parametrize("name", ["my run", "läuf", "run#2", "a?x=1", "a[1]"])
def test_a_folder_may_have_any_name(tmp_path, name):
    place = f"file://{tmp_path}/{name}/mirror"
    first = Steps(tmp_path / "a", place)
    with first.run:
        first.step(2)
    assert (tmp_path / name / "mirror/global_step_2/manifest.json").is_file()
    assert (Steps(tmp_path / "b", place).folder / "global_step_2/data.pt").is_file()
