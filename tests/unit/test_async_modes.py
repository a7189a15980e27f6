"""The asynchronous modes without Ray: worker classes, clients, and whose weights the teacher pass reads."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import verl  # noqa: F401  loads the plugin, which puts our configs on the search path
from hydra import compose, initialize_config_module
from verl.trainer.ppo.utils import Role

from sdar_verl.config import load_config
from sdar_verl.requests import StepRequests
from sdar_verl.verl.async_modes import SdarColocateAsync, SdarSeparateAsync
from sdar_verl.verl.continuing import ContinuingClient
from sdar_verl.verl.detach import DetachWorker, _own_copies, _storages
from sdar_verl.verl.teacher import PrivilegedTeacher
from tests.support.verl_version import IS_VERL_090


class Workers:
    """Notes what the trainer asks of its worker group."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda number: self.calls.append(f"{name}({number})")


def bare(trainer: type, *overrides: str) -> Any:
    """A trainer as far as its constructor goes without verl's."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("sdar_quickstart", overrides=[*overrides])
    made = object.__new__(trainer)
    made.config, made.sdar = config, load_config(config.sdar)
    taught = made.sdar.teacher.source != "none"
    made.teacher = PrivilegedTeacher(made.sdar.teacher, StepRequests(), made) if taught else None
    return made


@pytest.mark.parametrize(
    ("overrides", "role", "expected"),
    [
        ([], Role.ActorRolloutRef, "DetachTeacherWorker"),
        (["method=sdar", "actor_rollout_ref.actor.use_kl_loss=False"], Role.ActorRollout, "DetachTeacherWorker"),
        (["method=grpo", "actor_rollout_ref.actor.use_kl_loss=False"], Role.ActorRollout, "DetachWorker"),
        # The actor's engine answers requests of its update, whoever scores for the teacher.
        (
            ["sdar.teacher.placement=pool", "sdar.teacher.pool_gpus_per_node=1"],
            Role.ActorRolloutRef,
            "DetachTeacherWorker",
        ),
        pytest.param(
            ["method=sdar", "actor_rollout_ref.hybrid_engine=False"],
            Role.Actor,
            "DetachTeacherWorker",
            marks=pytest.mark.skipif(IS_VERL_090, reason="verl 0.9.0 has no such role"),
        ),
    ],
)
def test_the_separate_trainers_workers_keep_the_weights_of_a_steps_start(overrides, role, expected):
    trainer = bare(SdarSeparateAsync, *overrides)
    trainer._enable_hybrid_replicas = trainer.config.actor_rollout_ref.hybrid_engine
    trainer._init_resource_pool_mgr()
    worker = trainer.role_worker_mapping[role].__ray_metadata__.modified_class
    assert worker.__name__ == expected
    assert hasattr(worker, "save_model_to_cpu")
    assert hasattr(worker, "compute_teacher_log_prob") == (expected == "DetachTeacherWorker")


def test_the_colocated_trainers_worker_is_that_of_the_synchronous_one():
    trainer = bare(SdarColocateAsync)
    trainer._init_resource_pool_mgr()
    worker = trainer.role_worker_mapping[Role.ActorRolloutRef].__ray_metadata__.modified_class
    assert hasattr(worker, "compute_teacher_log_prob")
    assert not hasattr(worker, "save_model_to_cpu")


def test_interrupted_answers_go_on_through_our_client():
    manager = SimpleNamespace(get_client=lambda client_cls: client_cls)
    colocated, separate = (SimpleNamespace(**{f"{name}_server_manager": manager}) for name in ("llm", "standalone"))
    assert SdarColocateAsync.get_llm_client(colocated) is ContinuingClient
    assert SdarSeparateAsync.get_llm_client(separate) is ContinuingClient


@pytest.mark.parametrize(
    ("source", "part", "bypass", "before", "after"),
    [
        # verl has saved the weights itself, for its log-probs ...
        ("actor", 0, False, [], []),
        # ... which it takes from the rollout under bypass.
        ("actor", 0, True, ["save_model_to_cpu(0)"], []),
        (
            "actor",
            2,
            False,
            ["save_model_to_cpu(2)", "restore_model_from_cpu(0)"],
            ["restore_model_from_cpu(2)", "clear_cpu_model(2)"],
        ),
        # Weights of their own, or of the update itself.
        ("reference", 2, False, [], []),
        ("ema", 2, False, [], []),
        ("actor_fresh", 2, True, [], []),
    ],
)
def test_a_teacher_that_is_the_actor_reads_the_weights_of_the_steps_start(source, part, bypass, before, after):
    overrides = [f"sdar.teacher.source={source}", f"algorithm.rollout_correction.bypass_mode={bypass}"]
    trainer = bare(SdarSeparateAsync, *overrides)
    trainer.actor_rollout_wg = workers = Workers()
    trainer.local_trigger_step, trainer.parameter_sync_step = part, 4
    with pytest.raises(KeyError), trainer._weights_of_the_step():
        assert workers.calls == before
        raise KeyError("a pass that fails must not leave the student with old weights")
    assert workers.calls == [*before, *after]


def test_with_one_update_per_sync_nothing_is_saved():
    trainer = bare(SdarSeparateAsync, "sdar.teacher.source=actor", "algorithm.rollout_correction.bypass_mode=True")
    trainer.actor_rollout_wg = workers = Workers()
    trainer.local_trigger_step, trainer.parameter_sync_step = 0, 1
    with trainer._weights_of_the_step():
        assert workers.calls == []


def test_saved_weights_share_no_memory_with_the_module():
    module = torch.nn.Linear(2, 3)
    elsewhere = torch.ones(2)
    saved = ({"weight": (module.weight.detach(), "a specification"), "other": elsewhere}, None)
    copied = _own_copies(saved, _storages(module))
    with torch.no_grad():
        module.weight.fill_(7.0)
    assert not (copied[0]["weight"][0] == 7.0).any()
    assert copied[0]["weight"][1] == "a specification" and copied[1] is None
    assert copied[0]["other"] is elsewhere, "what verl copied already is not copied again"


@pytest.fixture
def on_its_way(monkeypatch) -> list[Callable[[], Any]]:
    """Copies between device and CPU that are done when somebody waits for the device, as after verl's offload."""
    pending: list[Callable[[], Any]] = []

    def synchronize() -> None:
        while pending:
            pending.pop(0)()

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    return pending


def detached(module: torch.nn.Module) -> DetachWorker:
    """A worker as far as saving and restoring go; verl's two functions, for a plain module."""
    worker = object.__new__(DetachWorker)
    worker._strategy_handlers = (
        lambda module: module.state_dict(),
        lambda module, saved: module.load_state_dict(saved),
    )
    return worker


def test_weights_are_saved_when_verls_offload_has_arrived(on_its_way):
    module = torch.nn.Linear(2, 3)
    on_its_way.append(lambda: torch.nn.init.constant_(module.weight, 5.0))
    saved = detached(module).copy_handler(module)
    assert (saved["weight"] == 5.0).all()


def test_an_offload_that_arrives_late_does_not_undo_a_restore(on_its_way):
    module = torch.nn.Linear(2, 3)
    worker = detached(module)
    saved = worker.copy_handler(module)
    on_its_way.append(lambda: torch.nn.init.constant_(module.weight, 5.0))
    worker.restore_handler(module, saved)
    torch.accelerator.synchronize()
    assert torch.equal(module.weight, saved["weight"])
