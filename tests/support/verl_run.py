"""Runs verl's own entry point in a process of its own and reads what it logged."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fork_server import forking

RAY_IS_LATE = "The current node timed out during startup"
"""Ray gives its own processes 30 s to start, whatever the load of the machine; nothing of a run has begun by then."""
PORT_IS_TAKEN = "EADDRINUSE"
"""verl looks for a free port for its process group and binds it later; a run beside this one may have taken it then."""
STARTS = 4


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: its working folder.
        output: stdout and stderr.
        returncode: exit status.
    """

    folder: Path
    output: str
    returncode: int

    @property
    def metrics(self) -> dict[int, dict[str, Any]]:
        """Step -> what verl's file tracker got; records of one step are merged."""
        steps: dict[int, dict[str, Any]] = {}
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], {}).update(record["data"])
        return steps

    def column(self, name: str) -> dict[int, float]:
        """Step -> one metric, where it was logged."""
        return {step: data[name] for step, data in self.metrics.items() if name in data}


SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VERL_PLATFORM": "cpu"}


def main_ppo(folder: Path, overrides: list[str], config: str = "sdar_quickstart") -> tuple[list[str], dict[str, str]]:
    """``python -m verl.trainer.main_ppo --config-name CONFIG OVERRIDES`` with its files under ``folder``, and the
    environment variables that it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **SETTINGS,
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        *[sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", config],
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"hydra.run.dir={folder / 'hydra'}",
        *overrides,
    ]
    return command, settings


def forked_python() -> list[str]:
    """What stands in the place of ``python`` in a command line that imports verl, to have it forked."""
    return forking(**SETTINGS, OMP_WAIT_POLICY="PASSIVE")


def start_main_ppo(
    folder: Path, overrides: list[str], *, config: str = "sdar_quickstart", forked: bool = False, **env: str
) -> subprocess.Popen[bytes]:
    """Start :func:`main_ppo`. Its output goes to ``log.txt`` there; it leads a process group of its own.

    Args:
        folder, overrides, config: of :func:`main_ppo`.
        forked: the driver and Ray's workers are forks of :mod:`tests.support.fork_server`, which start sooner. They are
            not below the returned process then.
        **env: further environment variables.
    """
    command, settings = main_ppo(folder, overrides, config)
    if forked:
        python = forked_python()
        command = [*python, *command[1:], f"+ray_kwargs.ray_init.runtime_env.py_executable={shlex.join(python)!r}"]
    with (folder / "log.txt").open("w") as stream:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **settings, **env},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_main_ppo(
    folder: Path,
    overrides: list[str],
    *,
    timeout: float = 400,
    check: bool = True,
    forked: bool = True,
    **kwargs: Any,
) -> Run:
    """Run :func:`start_main_ppo`, whose further arguments these are, to its end.

    Raises:
        AssertionError: with the end of the output, when it does not end in time, or (``check``) not well.
    """
    for _ in range(STARTS):
        process, log = start_main_ppo(folder, overrides, forked=forked, **kwargs), folder / "log.txt"
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"no end after {timeout} s:\n{log.read_text()[-6000:]}") from None
        run = Run(folder, log.read_text(), process.returncode)
        if RAY_IS_LATE not in run.output and (PORT_IS_TAKEN not in run.output or run.returncode == 0):
            break
    assert not check or run.returncode == 0, run.output[-8000:]
    return run
