"""Reads an ALFWorld data folder, downloaded or generated, into tasks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdar_verl.envs.alfworld.games import GAME_FILE, TRAJECTORY_FILE, GameFileError, read_game_file
from sdar_verl.envs.alfworld.spec import SPLITS, TASK_TYPES
from sdar_verl.envs.base import Task
from sdar_verl.errors import SdarError
from sdar_verl.untrusted import parse_json

DOWNLOADED_FOLDER = "json_2.1.1"
DEFAULT_DATA = "~/.cache/alfworld"  # alfworld-download's own default

# Playable games of the published data set.
PUBLISHED = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}

_REMEDY = (
    "run `alfworld-download` and set ALFWORLD_DATA to the folder it fills, point to that folder with --data, or make "
    "games without a download with --generate"
)


class DatasetError(SdarError):
    """The data folder is missing, incomplete or not ALFWorld's."""


@dataclass
class Games:
    """Playable games of one split.

    Attributes:
        tasks: sorted by id; ``data`` holds ``game_file`` (absolute path) and ``sha256`` of its content.
        skipped: reason -> number of trajectories left out.
    """

    tasks: list[Task]
    skipped: Counter[str] = field(default_factory=Counter)


def find_data_root(data: str | Path | None) -> Path:
    """The folder that holds ``train``, ``valid_seen`` and ``valid_unseen``.

    Args:
        data: that folder or the one above its ``json_2.1.1``; None takes ``$ALFWORLD_DATA``, or when that is not set
            the folder that ``alfworld-download`` fills by default.

    Raises:
        DatasetError: there is none; the message says how to get the data.
    """
    configured = os.environ.get("ALFWORLD_DATA")
    if data is not None:
        origin, folder = f"--data {data}", Path(data).expanduser()
    elif configured:
        origin, folder = f"ALFWORLD_DATA={configured}", Path(configured).expanduser()
    else:
        origin, folder = f"ALFWORLD_DATA is not set and {DEFAULT_DATA}", Path(DEFAULT_DATA).expanduser()
    if not folder.is_dir():
        raise DatasetError(f"{origin} is not a folder; {_REMEDY}")
    for root in (folder, folder / DOWNLOADED_FOLDER):
        if any((root / split).is_dir() for split in SPLITS):
            missing = [split for split in SPLITS if not (root / split).is_dir()]
            if missing:
                raise DatasetError(f"{root} lacks {', '.join(missing)}, so the download is not complete; {_REMEDY}")
            return root.resolve()
    raise DatasetError(f"{origin} holds neither {DOWNLOADED_FOLDER}/ nor {'/, '.join(SPLITS)}/; {_REMEDY}")


def read_games(root: str | Path, split: str, task_types: Sequence[str] = TASK_TYPES) -> Games:
    """All playable games of a split: the choice that ALFWorld's own loader makes, in an order that does not depend on
    the file system.

    Args:
        root: see :func:`find_data_root`.
        split: folder below it.
        task_types: types to keep.

    Raises:
        DatasetError: no playable game, a damaged file, or more than half of the games missing (a download cut short).
    """
    root, folder = Path(root), Path(root) / split
    tasks: list[Task] = []
    skipped: Counter[str] = Counter()
    for trajectory in sorted(folder.rglob(TRAJECTORY_FILE)):
        task_id = trajectory.parent.relative_to(folder).as_posix()
        if "movable" in task_id or "Sliced" in task_id:
            skipped["movable receptacle or sliced object (no text game)"] += 1
            continue
        if not trajectory.with_name(GAME_FILE).is_file():
            skipped[f"no {GAME_FILE}"] += 1
            continue
        try:
            task_type = parse_json(trajectory.read_bytes())["task_type"]
            game = read_game_file(trajectory.with_name(GAME_FILE))
        except GameFileError as error:
            raise DatasetError(str(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{trajectory} is damaged ({error}): download or generate it again") from error
        if task_type not in task_types:
            skipped["task type not asked for"] += 1
        elif not game.solvable:
            skipped["not known to be solvable"] += 1
        else:
            data = {"game_file": str(trajectory.with_name(GAME_FILE).absolute()), "sha256": game.digest}
            tasks.append(Task("alfworld", task_id, task_type, game.description, data))
    lacking = skipped[f"no {GAME_FILE}"]
    playable = sum(skipped.values()) + len(tasks) - lacking
    if lacking > playable:
        raise DatasetError(
            f"{folder}: {lacking} trajectories have no {GAME_FILE}, so the download stopped half-way "
            f"(json and pddl files come before the games); {_REMEDY}"
        )
    if not tasks:
        found = ", ".join(f"{number} {reason}" for reason, number in skipped.items()) or f"no {TRAJECTORY_FILE} at all"
        raise DatasetError(f"{folder} holds no playable game ({found}); {_REMEDY}")
    return Games(tasks, skipped)
