"""Checkpoints of others: what is ours in them runs no code, and what is damaged is named."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from omegaconf import OmegaConf

from sdar_verl.config import SdarConfig
from sdar_verl.errors import ConfigError, TeacherError
from sdar_verl.observe.base import STATE_FILE, load_states
from sdar_verl.observe.skill_statistics import SkillStatistics
from sdar_verl.teacher.weights import ShadowWeights
from sdar_verl.verl.resume import RUN_FILE, claim_checkpoints
from tests.support.fuzzing import damaged, mutations, quick
from tests.support.toy_panel import write_toy_panels


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.proof),)


@pytest.fixture(scope="module")
def weights() -> ShadowWeights:
    return ShadowWeights(torch.nn.Linear(2, 1))


@pytest.mark.parametrize("place", ["weights", "record", "everything"])
def test_a_teachers_file_cannot_run_code(tmp_path: Path, weights: ShadowWeights, place: str) -> None:
    file, proof = tmp_path / "teacher.pt", tmp_path / "proof"
    content: Any = {"format": 1, "weights": {}, "record": {}}
    content = Payload(proof) if place == "everything" else {**content, place: Payload(proof)}
    torch.save(content, file)
    with pytest.raises(TeacherError, match=r"teacher\.pt is damaged, or no file"):
        weights.load(file)
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(TeacherError):
        weights.load(file)
    assert not proof.exists()


@pytest.mark.parametrize("content", [[], {"weights": 1, "record": {}}, {"weights": {"weight": "x"}, "record": {}}, {}])
def test_a_teachers_file_of_another_kind_is_named(tmp_path: Path, weights: ShadowWeights, content: Any) -> None:
    torch.save(content, tmp_path / "teacher.pt")
    with pytest.raises(TeacherError, match=r"teacher\.pt"):
        weights.load(tmp_path / "teacher.pt")


@quick(30)
@given(cut=damaged(b"x" * 3000))
def test_a_damaged_teachers_file_is_named_or_whole(tmp_path: Path, weights: ShadowWeights, cut: bytes) -> None:
    file = tmp_path / "teacher.pt"
    weights.save(file, updates=3)
    content = file.read_bytes()
    at, piece = len(cut) * 7 % len(content), cut.replace(b"x", b"")
    file.write_bytes(content[:at] + piece)
    with pytest.raises(TeacherError):
        weights.load(file)


STATE = {"skill_statistics": {"by_type": {"pick": {"queries": 2, "supplied": {"a": 2}, "reward": {"a": 1.0}}}}}


@quick(60)
@given(state=mutations(STATE))
def test_a_state_with_wrong_parts_is_read_or_named(tmp_path: Path, state: Any) -> None:
    (tmp_path / STATE_FILE).write_text(json.dumps(state))
    try:
        load_states([SkillStatistics(SdarConfig())], tmp_path)
    except ConfigError as error:
        assert STATE_FILE in str(error)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, '{"skill_statistics": 3}'])
def test_a_damaged_state_is_named_with_the_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE_FILE).write_text(content)
    with pytest.raises(ConfigError, match=rf"{STATE_FILE}.*damaged.*resume from an earlier checkpoint"):
        load_states([SkillStatistics(SdarConfig())], tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000])
def test_a_damaged_note_of_the_experiment_is_named(tmp_path: Path, content: str) -> None:
    write_toy_panels(tmp_path)
    trainer = {"default_local_dir": str(tmp_path), "resume_mode": "auto"}
    data = {"train_files": str(tmp_path / "train.parquet")}
    roles = {"rollout": {"agent": {"default_agent_loop": "sdar_agent"}}}
    config = OmegaConf.create({"trainer": trainer, "data": data, "actor_rollout_ref": roles})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(ConfigError, match=rf"{RUN_FILE} is damaged"):
        claim_checkpoints(config)
    (tmp_path / RUN_FILE).unlink()
    claim_checkpoints(config)
