"""Kills processes of a run that goes on in the background."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.toy_run import toy_arguments
from tests.support.verl_run import Run, start_main_ppo


class LiveRun:
    """A run of :func:`tests.support.toy_run.toy_arguments` that has been started.

    Args:
        folder: for its files.
        *overrides: verl's and ours.
        env: further environment variables.
        **kwargs: of ``toy_arguments``.
    """

    def __init__(self, folder: Path, *overrides: str, env: Mapping[str, str] | None = None, **kwargs: Any):
        arguments, recording = toy_arguments(folder, *overrides, **kwargs)
        self.folder = folder
        self.process: subprocess.Popen[bytes] = start_main_ppo(folder, arguments, **recording, **(env or {}))

    @property
    def output(self) -> str:
        return (self.folder / "log.txt").read_text()

    def wait_for(self, happened: Callable[[], bool], timeout_s: float = 400) -> None:
        """Wait until ``happened()``. AssertionError, with the output's end, when it does not, or the run ends."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert self.process.poll() is None, f"the run has ended:\n{self.output[-6000:]}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s for nothing:\n{self.output[-6000:]}"
            time.sleep(0.1)

    def processes(self) -> dict[int, str]:
        """pid -> command line of every process below the driver: Ray's own, and its workers."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(") ", 1)[1].split()[1])
                except OSError:
                    continue
        found: dict[int, str] = {}
        for pid in parents:
            above = pid
            while above in parents and above != self.process.pid:
                above = parents[above]
            if above == self.process.pid and pid != above:
                found[pid] = _command(pid)
        return found

    def kill(self, title: str) -> int:
        """SIGKILL to the one process with ``title`` in its command line; its pid."""
        found = [pid for pid, command in self.processes().items() if title in command]
        assert len(found) == 1, f"{title}: {found} of {self.processes()}"
        os.kill(found[0], signal.SIGKILL)
        return found[0]

    def end(self, timeout_s: float) -> Run:
        """Wait for the run's end. AssertionError when it does not come in time; then it is killed."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"no end after {timeout_s} s:\n{self.output[-6000:]}") from None
        return Run(self.folder, self.output, self.process.returncode)

    def kill_all(self, timeout_s: float = 90) -> None:
        """SIGKILL to the driver and its process group. AssertionError when its Ray processes outlive it."""
        born = {pid: _born(pid) for pid in self.processes()}
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        deadline = time.monotonic() + timeout_s
        while left := [pid for pid, when in born.items() if _command(pid) and _born(pid) == when]:
            assert time.monotonic() < deadline, f"still there: {[_command(pid) for pid in left]}"
            time.sleep(0.2)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When the process started, which tells it from a later one with its number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[19]
    except OSError:
        return ""
