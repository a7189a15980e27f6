"""Ranks of one gloo group on this machine, each a process of its own, without Ray."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.fork_server import LIBRARIES


def run_on_ranks(job: Callable[..., None], *args: Any, ranks: int) -> None:
    """Call ``job(rank, *args)`` on every rank, with what verl's workers read from the environment.

    The ranks meet at a file, since a port that was free a moment ago may be another's by now.

    Raises:
        ProcessRaisedException: if a rank's job does; the others are stopped.
    """
    mp.set_forkserver_preload(list(LIBRARIES))
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, args=(job, args, ranks, str(Path(folder) / "store")), nprocs=ranks, start_method="forkserver"
        )


def _rank(rank: int, job: Callable[..., None], args: tuple[Any, ...], ranks: int, store: str) -> None:
    os.environ |= {"VERL_PLATFORM": "cpu", "RANK": str(rank), "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # verl asks for them and does not use them
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    job(rank, *args)
    dist.barrier()
    # A thread of PyTorch that asks a finishing interpreter for its lock ends the process by SIGABRT, now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
