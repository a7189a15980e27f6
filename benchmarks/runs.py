"""Training runs under observation: when each line of their log came, and what their processes hold."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.support.verl_run import Run

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
STEP_LINE = re.compile(r"sdar step (\d+)/")


@dataclass(frozen=True)
class Sample:
    """One process at one moment.

    Attributes:
        seconds: since the run was started.
        pid: process id.
        name: what it is, :func:`process_name`.
        memory: bytes of its resident set without shared and file-backed pages.
        files: open file descriptors.
        cpu: seconds of CPU it has used.
    """

    seconds: float
    pid: int
    name: str
    memory: int
    files: int
    cpu: float


@dataclass
class Watched:
    """A run and what was seen of it.

    Attributes:
        run: the finished run; None while it goes on.
        lines: (seconds since the start, text) of its log.
        samples: of all processes below this one.
        error: what stopped it.
    """

    run: Run | None = None
    lines: list[tuple[float, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    error: BaseException | None = None

    def when(self, pattern: str) -> float | None:
        """Seconds at which the first line with ``pattern`` came, None when none did."""
        return next((seconds for seconds, text in self.lines if re.search(pattern, text)), None)

    def step_ends(self) -> dict[int, float]:
        """Training step -> seconds at its end."""
        found = ((seconds, STEP_LINE.search(text)) for seconds, text in self.lines)
        return {int(match.group(1)): seconds for seconds, match in found if match}

    def cpu_between(self, start: float, stop: float) -> dict[str, float]:
        """Name of process -> CPU seconds that its processes used between two moments, and ``all`` of them together."""
        seen: dict[int, list[Sample]] = defaultdict(list)
        for sample in self.samples:
            seen[sample.pid].append(sample)
        used: dict[str, float] = defaultdict(float)
        for samples in seen.values():
            times, cpu = [sample.seconds for sample in samples], [sample.cpu for sample in samples]
            if times[0] < stop and times[-1] > start:
                # A process that began in between began with nothing.
                before = 0.0 if times[0] > start else float(np.interp(start, times, cpu))
                name = next((one.name for one in reversed(samples) if one.name != "IDLE"), "IDLE")
                used[name] += float(np.interp(stop, times, cpu)) - before
        return {**used, "all": sum(used.values())}


def watch(folder: Path, start: Callable[[], Run], every: float = 1.0) -> Watched:
    """Run ``start`` (:func:`tests.support.verl_run.run_main_ppo` into ``folder``) and look at it until it ends.

    Args:
        folder: of the run; its ``log.txt`` is read while it is written.
        start: starts the run and waits for it; ``PYTHONUNBUFFERED`` must be set in it for the times of lines to hold.
        every: seconds between two samples of the processes. The log is read ten times as often.

    Raises:
        BaseException: what ``start`` raised.
    """
    watched = Watched()

    def target() -> None:
        try:
            watched.run = start()
        except BaseException as error:
            watched.error = error

    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    thread = threading.Thread(target=target, name="run")
    began = time.monotonic()
    thread.start()
    done, rest, turn = 0, b"", 0
    while True:
        alive = thread.is_alive()
        now = time.monotonic() - began
        if log.exists():
            with log.open("rb") as stream:
                stream.seek(done)
                new = stream.read()
            done += len(new)
            *whole, rest = re.split(rb"[\n\r]", rest + new)
            watched.lines += [(now, _COLOUR.sub("", line.decode(errors="replace"))) for line in whole if line]
        if turn % 10 == 0:
            watched.samples += [_sample(now, pid, name) for pid, name in below(os.getpid())]
        turn += 1
        if not alive:
            break
        time.sleep(every / 10)
    thread.join()
    # The others were gone while they were looked at.
    watched.samples = [sample for sample in watched.samples if sample.memory and sample.files]
    if watched.error is not None:
        raise watched.error
    return watched


def below(pid: int) -> Iterator[tuple[int, str]]:
    """Id and name of every process that ``pid`` started, directly or not."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    waiting = list(parents.get(pid, []))
    while waiting:
        child = waiting.pop()
        waiting += parents.get(child, [])
        yield child, process_name(child)


def process_name(pid: int) -> str:
    """Ray's actors call themselves ``ray::Class.method``: the class; else the program or its script or module."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split(".")[0].split("(")[0].strip()
    if "python" in Path(words[0]).name:
        word = next((word for word in words[1:] if word and not word.startswith("-")), "python")
        return Path(word).stem if word.endswith(".py") else word
    return Path(words[0]).name


def _sample(seconds: float, pid: int, name: str) -> Sample:
    try:
        _, resident, shared, *_ = (int(word) for word in Path(f"/proc/{pid}/statm").read_text().split())
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, ValueError):
        return Sample(seconds, pid, name, 0, 0, 0.0)
    cpu = (int(fields[11]) + int(fields[12])) / _TICKS
    return Sample(seconds, pid, name, (resident - shared) * _PAGE, files, cpu)
