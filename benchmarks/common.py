"""What all benchmarks share: paired measurements, tables, a line about the machine, small real games."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdar_verl.envs.alfworld.games import read_game_file
from sdar_verl.envs.alfworld.generate import generate_games
from sdar_verl.envs.alfworld.spec import GeneratorConfig
from sdar_verl.envs.base import Task


@dataclass(frozen=True)
class Cost:
    """Of one call.

    Attributes:
        wall: seconds on the clock.
        cpu: seconds of this process on the CPU, all threads together: what others do on the machine moves it less.
    """

    wall: float
    cpu: float


def cost(run: Callable[[], object]) -> Cost:
    """Of calling ``run`` once."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(
    arms: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[Cost]]:
    """Every arm once per round, one after the other, the order turned around in every second round.

    A machine that other jobs use changes its speed from minute to minute; arms that are measured side by side are
    slowed down alike, so ratios within a round hold where seconds do not.
    """
    if warm_up:
        for run in arms.values():
            run()
    costs: dict[str, list[Cost]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else reversed(list(arms)):
            costs[name].append(cost(arms[name]))
    return costs


def median(costs: Iterable[Cost], unit: str = "cpu") -> float:
    """Median seconds, ``cpu`` or ``wall``."""
    return statistics.median(getattr(one, unit) for one in costs)


def ratio(over: Sequence[Cost], under: Sequence[Cost], unit: str = "cpu") -> float:
    """Median over the rounds of one arm's seconds by the other's in the same round."""
    return statistics.median(getattr(a, unit) / getattr(b, unit) for a, b in zip(over, under, strict=True))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(*packages: str) -> str:
    """One line: date, cores, load, Python and the versions of ``packages`` (those that are installed)."""
    versions = []
    for package in ("sdar-verl", *packages):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    date = time.strftime("%Y-%m-%d")
    python = platform.python_version()
    return f"{date}, {os.cpu_count()} cores, load {load}, Python {python}, {', '.join(versions)}"


def real_games(folder: Path, count: int, **difficulty: int) -> list[Path]:
    """``count`` generated ALFWorld games below ``folder``, made when they are not there.

    Args:
        folder: of this number and difficulty; a later call finds them again.
        count: of games.
        difficulty: fields of :class:`sdar_verl.envs.alfworld.spec.GeneratorConfig`.
    """
    # Absolute: runs have working folders of their own.
    return generate_games(folder.resolve(), "train", count, GeneratorConfig(**difficulty))


def as_task(game: Path) -> Task:
    """A game's task, without a panel."""
    task_type = game.parent.parent.name.split("-")[0]
    return Task("alfworld", game.parent.name, task_type, read_game_file(game).description, {"game_file": str(game)})
