"""Generates ALFWorld games offline, each proven solvable by the stock engine, in ALFWorld's own on-disk layout."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sdar_verl.atomic import write_text_atomically
from sdar_verl.envs.alfworld.games import GAME_FILE, TRAJECTORY_FILE
from sdar_verl.envs.alfworld.problem import game_data, trajectory_data
from sdar_verl.envs.alfworld.sampling import sample_spec
from sdar_verl.envs.alfworld.spec import GameSpec, GeneratorConfig

STATE_FILE, CONFIG_FILE = "initial_state.pddl", "generator.json"


class UnsolvableGameError(RuntimeError):
    """The planner finds no plan, or its plan does not win; a fault of the generator."""


def solve(spec: GameSpec) -> list[str]:
    """The planner's plan, replayed to a win on the stock engine.

    Returns:
        Commands in ALFWorld's words.

    Raises:
        UnsolvableGameError: no plan, or the plan does not end in a win.
    """
    environment = _engine()
    try:
        with _translated_once():
            environment.load(game_data(spec, walkthrough=None))
            plan = list(environment.reset()["extra.walkthrough"] or ())
    except KeyError as error:  # how fast downward's translator reports a goal that cannot hold (KeyError: 'val1')
        raise UnsolvableGameError(
            f"{spec.split} game {spec.index} ({spec.relative_path}): the goal cannot hold"
        ) from error
    state: Mapping[str, Any] = {"won": False}
    for command in plan:
        state, _, _ = environment.step(command)
    if not state["won"]:
        raise UnsolvableGameError(
            f"{spec.split} game {spec.index} ({spec.relative_path}): the plan {plan} does not win"
        )
    return plan


def write_game(spec: GameSpec, root: str | Path) -> Path:
    """Solve a game and write it below ``root``.

    Args:
        spec: the game.
        root: data folder, that holds ``train``, ``valid_seen``, ``valid_unseen``.

    Returns:
        Path of ``game.tw-pddl``. It is written last: a folder without it is not a game.

    Raises:
        UnsolvableGameError: see :func:`solve`.
    """
    game = game_data(spec, solve(spec))
    folder = Path(root) / spec.split / spec.relative_path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAJECTORY_FILE).write_text(json.dumps(trajectory_data(spec), indent=1))
    (folder / STATE_FILE).write_text(game["pddl_problem"])
    partial = folder / f".{GAME_FILE}.{os.getpid()}"
    partial.write_text(json.dumps(game))
    partial.replace(folder / GAME_FILE)
    return folder / GAME_FILE


def generate_games(
    root: str | Path,
    split: str,
    count: int,
    config: GeneratorConfig,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write the first ``count`` games of a split; games already there are kept, so an interrupted run goes on.

    Args:
        root: data folder; one configuration per split of a folder.
        split: ``train``, ``valid_seen`` or ``valid_unseen``.
        count: number of games; game i is the same for every count and every number of processes.
        config: what to draw.
        processes: worker processes; 1 works in this process (the engine is not thread-safe: not from two threads).
        progress: called with (games done, count) after each game.

    Returns:
        Paths of the ``game.tw-pddl`` files, game 0 first.

    Raises:
        ValueError: bad argument, or the folder holds games of another configuration.
        UnsolvableGameError: see :func:`solve`.
    """
    if count < 1:
        raise ValueError(f"count = {count}: ask for at least one game")
    if processes < 1:
        raise ValueError(f"processes = {processes}: at least one does the work")
    specs = [sample_spec(config, split, index) for index in range(count)]
    folder = Path(root) / split
    _claim(folder, config)
    paths = [folder / spec.relative_path / GAME_FILE for spec in specs]
    missing = [spec for spec, path in zip(specs, paths, strict=True) if not path.is_file()]
    done = count - len(missing)
    if processes == 1 or len(missing) <= 1:
        for spec in missing:
            write_game(spec, root)
            done += 1
            if progress is not None:
                progress(done, count)
        return paths
    # spawn: a fork would copy whatever threads and engine state the caller has
    with ProcessPoolExecutor(min(processes, len(missing)), mp_context=get_context("spawn")) as pool:
        for _ in pool.map(write_game, missing, [root] * len(missing)):
            done += 1
            if progress is not None:
                progress(done, count)
    return paths


def is_of(folder: Path, config: GeneratorConfig) -> bool:
    """Whether the games in ``folder`` were made with ``config``; False where there are none, or the note is damaged."""
    try:
        return json.loads((folder / CONFIG_FILE).read_bytes()) == _described(config)
    except (OSError, ValueError):
        return False


def _described(config: GeneratorConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def check_ours(folder: Path) -> None:
    """ValueError where ``folder`` holds something else than generated games."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds something else than generated games: use another folder")


def _claim(folder: Path, config: GeneratorConfig) -> None:
    """Note the configuration in the folder; refuse a folder with games of another one."""
    check_ours(folder)
    note = folder / CONFIG_FILE
    if not note.is_file():
        write_text_atomically(note, json.dumps(_described(config), indent=1))
    elif not is_of(folder, config):
        raise ValueError(
            f"{folder} holds games of another configuration, or its {note.name} is damaged: use another folder, or "
            "remove it"
        )


@contextmanager
def _translated_once() -> Iterator[None]:
    """Load and reset share their translations of the problem; the planner gets its own, much quicker to plan with."""
    import fast_downward

    installed = fast_downward.pddl2sas
    fast_downward.pddl2sas = lru_cache(maxsize=2)(inspect.unwrap(installed))
    try:
        yield
    finally:
        fast_downward.pddl2sas = installed


@lru_cache(maxsize=1)
def _engine() -> Any:
    """ALFWorld's engine as AlfredTWEnv wraps it, one per process, with the speed-ups that change no word of it."""
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs import PddlEnv

    from sdar_verl.envs.alfworld import speedups

    speedups.install()
    infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["walkthrough"])
    return AlfredDemangler(PddlEnv(infos), shuffle=False)
