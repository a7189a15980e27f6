"""Reads ALFWorld's game files without the engine: what a game asks, and whether it can be played."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

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
        game = json.loads(content)
        grammar, solvable = game["grammar"], game.get("solvable", False) is True
    except (ValueError, KeyError, TypeError) as error:
        raise GameFileError(f"{path} is not a whole ALFWorld game ({error}): download or generate it again") from error
    line = _TASK_LINE.search(grammar)
    if line is None:
        raise GameFileError(f"{path}: its grammar has no line 'Your task is to: ...'; is this an ALFWorld game?")
    description = json.loads(f'"{line.group(1)}"')
    return GameFile(" ".join(description.split()).rstrip(" ."), solvable, sha256(content).hexdigest())


def read_walkthrough(path: str | Path) -> list[str]:
    """The solution that the makers of the game wrote into its file; empty when there is none.

    Raises:
        GameFileError: not a whole game file.
        OSError: the file cannot be read.
    """
    try:
        walkthrough = json.loads(Path(path).read_bytes()).get("walkthrough") or []
    except (ValueError, AttributeError) as error:
        raise GameFileError(f"{path} is not a whole ALFWorld game ({error}): download or generate it again") from error
    return [" ".join(str(command).split()) for command in walkthrough]
