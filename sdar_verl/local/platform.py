"""A CPU platform for verl, used when a machine has no accelerator.

verl looks for NVIDIA, Huawei and AMD devices and, finding none, pretends to be on NVIDIA. This platform answers instead
on a machine of its own, and never on a cluster: see :func:`sdar_verl.local.on_cpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from sdar_verl.local import on_cpu

NAME = "cpu"


class _CpuDeviceModule(ModuleType):
    """``torch.cpu`` with the rest of the interface of ``torch.cuda`` that verl calls on its device module."""

    def __init__(self) -> None:
        super().__init__("sdar_verl.local.cpu_device", doc=self.__doc__)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """There is no device memory to manage."""

    def _zero(self, *args: Any, **kwargs: Any) -> int:
        return 0

    empty_cache = ipc_collect = reset_peak_memory_stats = set_device = _nothing
    memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = _zero

    def mem_get_info(self, *args: Any) -> tuple[int, int]:
        return 0, 0

    def get_device_name(self, *args: Any) -> str:
        return "CPU"

    def get_rng_state(self, *args: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *args: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed


_DEVICE_MODULE = _CpuDeviceModule()


class _CpuId(str):
    """The CPU as an index: ``tensor.to(id)`` reads ``cpu``, and verl's ``f"{device_name}:{id}"`` becomes ``cpu:0``."""

    def __format__(self, spec: str) -> str:
        return format("0", spec)


_DEVICE_ID = _CpuId("cpu")


@PlatformRegistry.register(platform=NAME)
class CpuPlatform(PlatformBase):
    """verl's device interface over the CPU."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Asked again: another plugin may have registered an accelerator since (:func:`sdar_verl.local.on_cpu`)."""
        return on_cpu()

    def current_device(self) -> Any:
        """Not an index: verl writes ``tensor.to(get_device_id())``, and torch reads 0 as an accelerator."""
        return _DEVICE_ID

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """There is one CPU device."""

    def synchronize(self, device_index: int | None = None) -> None:
        """CPU operations are synchronous."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """glibc's allocator is set by environment variables, see hydra_configs/hardware/cpu.yaml."""

    def empty_cache(self) -> None:
        """There is no cache of device memory."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        """``gloo``; in a training worker, the process group is made here too.

        verl/utils/distributed.py asks for this name to build ``cpu:gloo,<device>:<name>``, which torch refuses when the
        device is the CPU ("Duplicate device type cpu"). It evaluates the string first and skips its own
        initialisation when a process group exists; this is the last moment before that test, in every worker of
        every trainer, and needs no change of a worker class.
        """
        import torch.distributed as dist

        # WG_BACKEND is set by verl's RayWorkerGroup for its workers, with the rendezvous variables.
        if os.environ.get("WG_BACKEND") == "ray" and not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """verl's resource check counts "GPU" and "NPU" only; the hardware config declares virtual GPUs to Ray."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def cudart(self) -> None:
        return None
