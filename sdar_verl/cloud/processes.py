"""The processes below a command: their stacks, and their end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

_DUMP_S = 20


def below(pid: int) -> list[psutil.Process]:
    """A process and all that it started, as far as they live."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def stacks(processes: Iterable[psutil.Process]) -> str:
    """Where every Python process stands, by py-spy, as text for a log."""
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        return 'no stacks: py-spy is not installed (pip install "sdar-verl[cloud]")'
    texts = []
    for process in processes:
        try:
            title = " ".join(process.cmdline())[:120]
            if "python" not in process.name() and not title.startswith("ray::"):
                continue
            done = subprocess.run(
                [program, "dump", "--nonblocking", "--pid", str(process.pid)],
                capture_output=True,
                text=True,
                timeout=_DUMP_S,
                check=False,
            )
            texts.append(f"---- {process.pid} {title} ({process.status()})\n{done.stdout or done.stderr}")
        except (psutil.Error, subprocess.TimeoutExpired) as error:
            texts.append(f"---- {process.pid}: {type(error).__name__}: {error}")
    return "\n".join(texts)


def end(command: subprocess.Popen[bytes], wait_s: float = 30.0) -> None:
    """SIGKILL to a command that leads its process group; what it started elsewhere follows by itself, or is made to."""
    started = below(command.pid)
    if command.poll() is None:
        os.killpg(command.pid, signal.SIGKILL)
        command.wait()
    deadline = time.monotonic() + wait_s
    while (left := [process for process in started if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
