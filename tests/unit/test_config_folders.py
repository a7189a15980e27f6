"""A primary YAML of the user's own, from a folder of theirs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sdar_verl import hydra_search_path
from sdar_verl.cli import main
from sdar_verl.compose import compose_config
from sdar_verl.config_folders import ConfigFolders
from sdar_verl.errors import ConfigError

MINE = """
defaults:
  - ppo_trainer
  - sdar_node
  - _self_
  - method: sdar
trainer:
  project_name: mine
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text(MINE)
    return tmp_path / "own"


def test_a_config_of_the_users_own_is_what_the_run_composes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Hydra's own main function, with the words of a run."""
    import hydra
    import verl  # noqa: F401  loads the plugin, as the module of the run does

    monkeypatch.setattr("sdar_verl.checks.callback.CheckBeforeStart.on_job_start", lambda *_, **__: None)
    monkeypatch.chdir(folder.parent)
    seen = []
    for folders in (ConfigFolders(dir="own"), ConfigFolders(dir=str(folder))):
        words = ["main_ppo", *folders.words, "--config-name", "mine", "trainer.nnodes=3", "hydra.run.dir=out"]
        monkeypatch.setattr(sys, "argv", [*words, "hydra.output_subdir=null"])
        hydra.main(config_path="pkg://verl.trainer.config", version_base=None)(seen.append)()
        config = compose_config("mine", ["trainer.nnodes=3"], folders)
        assert config.trainer.project_name == "mine" and config.trainer.nnodes == 3 and config.sdar.loss.coef > 0
        assert OmegaConf.to_container(config) == OmegaConf.to_container(seen.pop())
    with pytest.raises(ConfigError, match="mine"):
        compose_config("mine")  # the folder is not kept for the next


def test_a_config_path_stands_in_the_place_of_verls(folder: Path) -> None:
    (folder / "mine.yaml").write_text("hydra:\n  searchpath:\n    - pkg://verl.trainer.config\n" + MINE)
    assert compose_config("mine", [], ConfigFolders(path=str(folder))).trainer.project_name == "mine"
    # A relative one is Hydra's: relative to the file of verl's main function.
    assert "sdar" not in compose_config("ppo_trainer", [], ConfigFolders(path="config"))


@pytest.mark.parametrize("option", ["--config-dir", "--config-path"])
@pytest.mark.parametrize("place", ["nowhere", "own"])
def test_a_folder_or_name_that_is_not_there_is_named_with_the_other(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, place: str
) -> None:
    given = str(folder.parent / place)
    assert main(["plan", option, given, "--config-name", "yours"]) == 2
    said = capsys.readouterr().err
    assert f"{option} {given}" in said and "--config-name yours" in said and "Traceback" not in said


def test_faults_of_the_file_are_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config-dir", str(folder), "--config-name", "mine"]
    for text, told in (("a: [", "mine"), ("defaults:\n  - ppo_trainer\n  - _self_\n", "no `sdar:` node")):
        (folder / "mine.yaml").write_text(text)
        assert main(words) == 2
        assert told in capsys.readouterr().err


def test_doctor_and_plan_look_at_it(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from tests.unit.test_doctor import LAPTOP

    monkeypatch.setattr("sdar_verl.doctor.machine.look_around", lambda ray: LAPTOP)
    words = ["--config-dir", str(folder), "--config-name", "mine"]
    assert main(["doctor", *words]) == 1  # verl's own default, which a run ends with, too
    assert "actor_rollout_ref.rollout.name has no value" in capsys.readouterr().out
    assert main(["doctor", *words, "actor_rollout_ref.rollout.name=vllm", "data.train_files=/no/train.parquet"]) == 1
    assert "data.train_files=/no/train.parquet does not exist" in capsys.readouterr().out
    assert main(["doctor", "--config-dir", str(folder)]) == 2
    assert "no effect without --config-name" in capsys.readouterr().err
    model = ["actor_rollout_ref.model.path=Qwen/Qwen2.5-3B-Instruct", "data.train_batch_size=16", "--turns", "1"]
    assert main(["plan", *words, *model, "--json"]) in (0, 1)
    assert '"fits"' in capsys.readouterr().out


def test_a_sweep_starts_its_runs_with_it(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    words = ["sweep", "--config-dir", "own", "--config-name", "mine", "--methods", "grpo", "--out", "out", "--dry-run"]
    assert main(words) == 0
    assert f"main_ppo --config-dir {folder} --config-name mine method=grpo" in capsys.readouterr().out
    plan = "config: mine\nbaseline: a\narms: {a: [method=grpo], b: [method=sdar]}\nhours: 1\n"
    (folder.parent / "plan.yaml").write_text(plan)
    assert main(["sweep", "--plan", "plan.yaml", "--out", "out", "--config-dir", "own", "--dry-run"]) == 0
    assert capsys.readouterr().out.count(f"main_ppo --config-dir {folder} --config-name mine method=") == 6


def test_a_checkout_on_pythons_path_has_its_configs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There they are no part of the package, which a copy that pip installed hides from Python."""
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl

    monkeypatch.setattr(hydra_search_path, "find_spec", lambda name: None)
    searched = ConfigSearchPathImpl()
    hydra_search_path.SdarSearchPath().manipulate_search_path(searched)
    (found,) = searched.get_path()
    assert (Path(str(found.path).removeprefix("file://")) / "sdar_alfworld.yaml").is_file()
