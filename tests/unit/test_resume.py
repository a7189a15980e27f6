"""A run claims its checkpoint folder; another experiment's is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from omegaconf import OmegaConf

from sdar_verl.config import SdarConfig
from sdar_verl.errors import ConfigError
from sdar_verl.verl.resume import RUN_FILE, claim_checkpoints, from_scratch
from tests.support.toy_panel import write_toy_panels


def config(folder, mode="auto", **overrides):
    root = OmegaConf.create(
        {
            "sdar": SdarConfig().model_dump(),
            "trainer": {"default_local_dir": str(folder), "resume_mode": mode, "total_training_steps": 10},
            "algorithm": {"adv_estimator": "sdar"},
            "data": {"seed": 0, "train_batch_size": 4, "train_files": str(folder / "train.parquet")},
            "actor_rollout_ref": {"model": {"path": "m"}, "rollout": {"n": 8}, "actor": {"optim": {"lr": 1e-6}}},
        }
    )
    for option, value in overrides.items():
        OmegaConf.update(root, option, value)
    return root


@pytest.fixture(autouse=True)
def panels(tmp_path):
    write_toy_panels(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A folder with a checkpoint of the default experiment."""
    claim_checkpoints(config(tmp_path))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    return tmp_path


def test_the_same_experiment_goes_on(folder):
    claim_checkpoints(config(folder, **{"trainer.total_training_steps": 20, "sdar.env.processes": 9}))


def test_the_teacher_may_move_between_two_runs(folder):
    """Also from a folder whose note still holds such options."""
    note = json.loads((folder / RUN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps({**note, "sdar.teacher.sanity_tolerance": 0.001}))
    claim_checkpoints(config(folder, **{"sdar.teacher.offload": False, "sdar.teacher.sanity_check": False}))
    with pytest.raises(ConfigError, match=r"sdar\.teacher\.ema_decay: None there, 0\.9 here"):
        claim_checkpoints(config(folder, **{"sdar.teacher.ema_decay": 0.9}))


def test_another_panel_is_another_experiment_and_another_place_of_it_is_not(folder):
    moved = folder / "moved" / "train.parquet"
    moved.parent.mkdir()
    shutil.copy(folder / "train.parquet", moved)
    claim_checkpoints(config(folder, **{"data.train_files": [str(moved)]}))
    with pytest.raises(ConfigError, match=r"data\.train_files \(hashes\): \['[0-9a-f]{64}'\] there"):
        claim_checkpoints(config(folder, **{"data.train_files": str(folder / "validation.parquet")}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sdar.loss.beta", 1.0),
        ("sdar.skills.bank", "mine"),
        ("data.seed", 1),
        ("actor_rollout_ref.model.path", "n"),
        ("actor_rollout_ref.actor.entropy_coeff", 0.1),
    ],
)
def test_another_experiment_is_refused_by_name(folder, option, value):
    with pytest.raises(ConfigError, match=rf"{option}: .*{value!r} here.*resume_mode=disable"):
        claim_checkpoints(config(folder, **{option: value}))


def test_starting_over_takes_the_folder(folder):
    claim_checkpoints(config(folder, mode="disable", **{"data.seed": 1}))
    claim_checkpoints(config(folder, **{"data.seed": 1}))


def test_a_folder_without_a_checkpoint_is_free(tmp_path):
    claim_checkpoints(config(tmp_path))
    claim_checkpoints(config(tmp_path, **{"data.seed": 1}))
    assert '"data.seed": 1' in (tmp_path / RUN_FILE).read_text()


def test_a_run_that_died_in_its_first_checkpoint_starts_over_and_says_so(tmp_path):
    assert from_scratch(config(tmp_path)) == ""
    (tmp_path / "global_step_2").mkdir()
    assert "global_step_2, but no latest_checkpointed_iteration.txt" in from_scratch(config(tmp_path))
    assert from_scratch(config(tmp_path, mode="disable")) == ""
