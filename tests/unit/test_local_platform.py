"""When verl takes the CPU for its device, and what it is told then."""

from __future__ import annotations

import gc
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from verl.plugin.platform import PlatformRegistry

from sdar_verl.local import on_cpu
from sdar_verl.local import platform as cpu
from tests.support.verl_run import forked_python


@pytest.fixture
def lonely(monkeypatch):
    """A process on a machine of its own: no accelerator, no Ray cluster to join."""
    import ray._private.utils

    for name in ("RAY_ADDRESS", "RAY_JOB_ID", "VERL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray._private.utils, "read_ray_address", lambda *_: None)
    monkeypatch.setattr(PlatformRegistry, "_platforms", {"cpu": cpu.CpuPlatform})
    return monkeypatch


def chosen() -> bool:
    return cpu.CpuPlatform().is_platform_available(use_smi_check=True)


def test_it_is_the_fallback_on_a_machine_of_its_own(lonely):
    assert chosen()


def test_an_accelerator_wins(lonely):
    class Gpu(cpu.CpuPlatform):
        def is_platform_available(self, use_smi_check=False):
            return use_smi_check

    class Unprobed(cpu.CpuPlatform):
        def is_platform_available(self, use_smi_check=False):
            raise OSError("no driver")

    lonely.setattr(PlatformRegistry, "_platforms", {"cpu": cpu.CpuPlatform, "later": Unprobed})
    assert on_cpu() and chosen()
    # Also one that another plugin registers after ours.
    lonely.setattr(PlatformRegistry, "_platforms", {"cpu": cpu.CpuPlatform, "later": Unprobed, "latest": Gpu})
    assert not on_cpu() and not chosen()


@pytest.mark.parametrize(("told", "expected"), [("cpu", True), (" CPU ", True), ("cuda", False)])
def test_what_a_process_is_told_is_not_guessed(lonely, told, expected):
    lonely.setenv("VERL_PLATFORM", told)
    lonely.setenv("RAY_ADDRESS", "01000000")  # as in a run's own workers
    assert on_cpu() is expected


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_JOB_ID"])
def test_it_is_never_guessed_inside_a_ray_cluster(lonely, name):
    lonely.setenv(name, "01000000")
    assert not chosen()


def test_it_is_not_guessed_where_ray_start_has_run(lonely):
    import ray._private.utils

    lonely.setattr(ray._private.utils, "read_ray_address", lambda *_: "10.0.0.1:6379")
    assert not chosen()


REGISTERED = (
    "import verl\n"
    "from verl.plugin.platform import PlatformRegistry\n"
    "from verl.workers.rollout.base import _ROLLOUT_REGISTRY\n"
    "print('cpu' in PlatformRegistry.registered_names(), ('transformers', 'async') in _ROLLOUT_REGISTRY)\n"
)


def fresh(told: str, code: str) -> list[str]:
    """What a process prints that imports nothing of ours; verl's entry point does the rest."""
    env = {**os.environ, "VERL_PLATFORM": told}
    done = subprocess.run([*forked_python(), "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_verl_finds_platform_engine_and_rollout_by_importing_itself():
    found = (
        "from verl.utils.device import get_device_name, get_nccl_backend\n"
        "from verl.workers.engine import EngineRegistry\n"
        "from verl.workers.rollout.base import get_rollout_class\n"
        "engine = EngineRegistry.get_engine_cls('language_model', 'fsdp2')\n"
        "rollout = get_rollout_class('transformers')\n"
        "print(get_device_name(), get_nccl_backend(), engine.__name__, rollout.__name__)"
    )
    assert fresh("cpu", REGISTERED + found) == ["True", "True", "cpu", "gloo", "CpuFSDPEngine", "ServerAdapter"]


def test_nothing_is_registered_where_there_is_another_device():
    assert fresh("cuda", REGISTERED) == ["False", "False"]


def test_verls_memory_and_random_state_calls_work_on_the_device_module():
    device = cpu.CpuPlatform().device_module
    state = device.get_rng_state()
    first = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    device.manual_seed_all(3)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert device.mem_get_info() == (0, 0)
    assert device.max_memory_allocated() == device.memory_reserved(0) == 0
    assert device.is_available()  # torch.cpu's own
    index = cpu.CpuPlatform().current_device()
    assert torch.zeros(1).to(index).device.type == "cpu"
    assert torch.device(f"cpu:{index}") == torch.device("cpu", 0)


@pytest.mark.parametrize(
    ("engine_config", "message"),
    [
        ({"strategy": "fsdp2", "offload_policy": True}, "fsdp_config.offload_policy=True"),
    ],
)
def test_the_engine_refuses_what_needs_an_accelerator(engine_config, message):
    from sdar_verl.local.engine import CpuFSDPEngine

    with pytest.raises(ValueError, match=message):
        CpuFSDPEngine(None, SimpleNamespace(**engine_config), None, None)


def test_what_an_engine_starts_with_is_never_searched_for_garbage(monkeypatch):
    from sdar_verl.local.engine import CpuFSDPEngine

    monkeypatch.setattr(CpuFSDPEngine.__base__, "initialize", lambda self: None)
    before = gc.get_freeze_count()
    try:
        object.__new__(CpuFSDPEngine).initialize()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
