"""Facts about this machine and its Python packages, gathered once; the checks on them are pure functions."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import glob
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from sdar_verl.doctor.build_tools import Missing, missing_build_tools, missing_python
from sdar_verl.doctor.probe import probe_fresh_process, probe_ray_worker
from sdar_verl.envs.registry import packages_of_extras

PACKAGES = (
    "verl",
    "torch",
    "vllm",
    "flash-attn",
    "transformers",
    "tensordict",
    "ray",
    "TransferQueue",
    *sorted({package for packages in packages_of_extras().values() for package in packages}),
    "sentence-transformers",
)


@dataclass(frozen=True)
class Machine:
    """What the checks of an installation look at.

    Attributes:
        python: (major, minor).
        versions: package -> version, None when it is not installed.
        pins: package -> version range that verl's own metadata ask for, extras included.
        cuda_build: CUDA version that torch was built for; None for a CPU build.
        gpus: devices that torch can use.
        gpu_files: whether the operating system shows NVIDIA devices.
        fresh: what verl knows in a fresh process (``probe.py``), or ``{"error": ...}``.
        worker: the same in a Ray worker; None when it was not looked at.
        missing_tools: what pip would lack here to compile ALFWorld's engines.
    """

    python: tuple[int, int]
    versions: Mapping[str, str | None]
    pins: Mapping[str, str] = field(default_factory=dict)
    cuda_build: str | None = None
    gpus: int = 0
    gpu_files: bool = False
    fresh: Mapping[str, Any] = field(default_factory=dict)
    worker: Mapping[str, Any] | None = None
    missing_tools: tuple[Missing, ...] = ()


def look_around(*, ray: bool = True) -> Machine:
    """Gather the facts.

    Args:
        ray: also ask a Ray worker, which takes some seconds.
    """
    cuda_build, gpus = _torch()
    return Machine(
        python=sys.version_info[:2],
        versions={name: _version(name) for name in PACKAGES},
        pins=_pins(),
        cuda_build=cuda_build,
        gpus=gpus,
        gpu_files=bool(glob("/dev/nvidia[0-9]*")),
        fresh=probe_fresh_process(),
        worker=probe_ray_worker() if ray else None,
        missing_tools=(*missing_build_tools(), *missing_python()),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _pins() -> dict[str, str]:
    """verl's requirements without an extra, and those of its extras for vllm and flash-attn."""
    try:
        lines = metadata.requires("verl") or []
    except metadata.PackageNotFoundError:
        return {}
    pins: dict[str, str] = {}
    for line in lines:
        requirement = Requirement(line)
        name = {known.lower(): known for known in PACKAGES}.get(requirement.name.lower())
        extra = str(requirement.marker or "")
        of_gpu = name in ("torch", "vllm", "flash-attn") and ("vllm" in extra or "flash-attn" in extra)
        if name and requirement.specifier and ("extra" not in extra or of_gpu):
            pins.setdefault(name, str(requirement.specifier))
    return pins


def _torch() -> tuple[str | None, int]:
    try:
        import torch
    except ImportError:
        return None, 0
    return torch.version.cuda, torch.cuda.device_count()
