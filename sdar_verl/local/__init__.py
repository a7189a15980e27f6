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
