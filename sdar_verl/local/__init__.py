"""The embedded default: what lets the recipes run on a machine without a GPU, with a small policy of our own."""

from __future__ import annotations

import os
from pathlib import Path


def start_policy() -> str:
    """Folder of the shipped start policy: a Hugging Face checkpoint with its tokenizer (about 1 MB)."""
    return str(Path(__file__).parent / "policy")


def joins_ray_cluster() -> bool:
    """Whether this process belongs to, or ``ray.init`` would join, a Ray cluster that someone else started."""
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):  # Ray sets the latter in its workers
        return True
    from ray._private.utils import read_ray_address  # the file that `ray start` leaves behind

    return read_ray_address() is not None


def on_cpu() -> bool:
    """Whether this process is to compute on the CPU: it was told so, or it is alone on a machine without accelerator.

    Alone: it will start a Ray cluster of its own. The head node of a GPU cluster often has no GPU, and there verl's own
    fallback is the right answer. The Ray workers of a CPU run do not guess: hydra_configs/hardware/cpu.yaml tells them
    (``VERL_PLATFORM=cpu``).
    """
    told = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if told:
        return told == "cpu"
    return not joins_ray_cluster() and not _accelerator()


def _accelerator() -> bool:
    from verl.plugin.platform import PlatformRegistry

    for name in PlatformRegistry.registered_names():
        platform = PlatformRegistry.get(name)
        try:
            if platform is not None and name != "cpu" and platform().is_platform_available(use_smi_check=True):
                return True
        except Exception:  # verl's own detection passes over a platform that cannot be probed
            continue
    return False
