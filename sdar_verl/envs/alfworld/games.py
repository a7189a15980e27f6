"""Reads ALFWorld's game files without the engine: what a game asks, and whether it can be played."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from sdar_verl.untrusted import parse_json, shorten

GAME_FILE, TRAJECTORY_FILE = "game.tw-pddl", "traj_data.json"

# The line of the grammar that the engine shows at the end of the first observation.
_TASK_LINE = re.compile(r'"rhs"\s*:\s*"Your task is to: ((?:[^"\\]|\\.)*)"')


class GameFileError(ValueError):
    """A game file is cut off or not ALFWorld's."""


@dataclass(frozen=True)
class GameFile:
    """What can be known of a game without playing it.

    Attributes:
        description: the task in the game's words, without the final full stop.
        solvable: the makers of the game found a solution (False also when they did not say).
        digest: SHA-256 of the file's bytes, in hex.
    """

    description: str
    solvable: bool
    digest: str


def read_game_file(path: str | Path) -> GameFile:
    """Read one ``game.tw-pddl``.

    Raises:
        GameFileError: not JSON, or without ALFWorld's task line.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        game = parse_json(content)
        grammar, solvable = game["grammar"], game.get("solvable", False) is True
        if not isinstance(grammar, str):
            raise TypeError(f"its grammar is {shorten(grammar)}, not text")
    except (ValueError, KeyError, TypeError) as error:
        raise GameFileError(f"{path} is not a whole ALFWorld game ({error}): download or generate it again") from error
    line = _TASK_LINE.search(grammar)
    if line is None:
        raise GameFileError(f"{path}: its grammar has no line 'Your task is to: ...'; is this an ALFWorld game?")
    try:
        description = json.loads(f'"{line.group(1)}"')
    except ValueError as error:
        raise GameFileError(f"{path}: its task {line.group(1)!r} is no JSON text ({error})") from error
    return GameFile(" ".join(description.split()).rstrip(" ."), solvable, sha256(content).hexdigest())


def game_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a game file's bytes; remembered until it is written again."""
    return _digest(str(path), Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=8192)
def _digest(path: str, written: int) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()


def read_walkthrough(path: str | Path) -> list[str]:
    """The solution that the makers of the game wrote into its file; empty when there is none.

    Raises:
        GameFileError: not a whole game file.
        OSError: the file cannot be read.
    """
    try:
        walkthrough = parse_json(Path(path).read_bytes()).get("walkthrough") or []
        if not isinstance(walkthrough, list):
            raise TypeError(f"its walkthrough is {shorten(walkthrough)}, not a list")
    except (ValueError, AttributeError, TypeError) as error:
        raise GameFileError(f"{path} is not a whole ALFWorld game ({error}): download or generate it again") from error
    return [" ".join(str(command).split()) for command in walkthrough]
