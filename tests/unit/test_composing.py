"""Configs that tests compose quickly are those that Hydra composes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from sdar_verl.compose import compose_config
from sdar_verl.config_folders import ConfigFolders
from sdar_verl.errors import ConfigError
from tests.support.composing import OWN, quick


def composed_by(load: Any, name: str, overrides: list[str]) -> DictConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigLoaderImpl, "load_configuration", load)
        return compose_config(name, overrides)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("sdar_quickstart", []),
        ("sdar_quickstart", ["method=rlsd", "variant=released", "sdar.loss.coef=0.3", "data.train_batch_size=7"]),
        ("sdar_quickstart", ["+sdar.context.options.sibling.choice=first", "~sdar.validation.arms.teacher"]),
        ("sdar_quickstart", ["++sdar.env.options={a: 1}", "trainer.logger=[console]", "sdar.variant=paper"]),
        ("sdar_ppo", ["+hardware=cpu", "+model=qwen3-8b", "sdar.context.sources=[answer]", "data={train_files: a}"]),
        ("ppo_trainer", ["trainer.n_gpus_per_node=3", "actor_rollout_ref.rollout.name=???"]),
    ],
)
def test_it_is_the_same_config(name: str, overrides: list[str]) -> None:
    plain, calls = composed_by(OWN, name, overrides), []

    def counted(*args: Any, **kwargs: Any) -> DictConfig:
        calls.append(args)
        return OWN(*args, **kwargs)

    quickly = quick(counted)
    for _ in range(2):
        found = composed_by(quickly, name, overrides)
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(plain)
        assert OmegaConf.is_struct(found) and OmegaConf.is_struct(plain)
        found.trainer.n_gpus_per_node = 99  # a copy of its own
    assert len(calls) == 1


@pytest.mark.parametrize(
    "wrong", ["no.such=1", "method=none_such", "sdar.loss.coef", "+sdar.loss.coef=1", "sdar.loss.coef=1,2"]
)
def test_it_is_the_same_error(wrong: str) -> None:
    told = []
    for load in (OWN, quick()):
        with pytest.raises(ConfigError) as caught:
            composed_by(load, "sdar_quickstart", [wrong])
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_files_of_a_folder_are_read_each_time(tmp_path: Path) -> None:
    for size in (3, 4):
        (tmp_path / "mine.yaml").write_text(f"defaults: [ppo_trainer, _self_]\ndata: {{train_batch_size: {size}}}\n")
        assert compose_config("mine", folders=ConfigFolders(dir=str(tmp_path))).data.train_batch_size == size
