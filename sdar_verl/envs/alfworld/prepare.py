"""Makes ALFWorld's task panels, from the downloaded data set or from games generated on the spot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdar_verl.atomic import remove
from sdar_verl.envs.alfworld.dataset import DOWNLOADED_FOLDER, PUBLISHED, find_data_root, read_games
from sdar_verl.envs.alfworld.generate import check_ours, generate_games, is_of
from sdar_verl.envs.alfworld.spec import TASK_TYPES, GeneratorConfig
from sdar_verl.envs.base import Task
from sdar_verl.envs.prepared import Prepared, check_counts, prepare_panels, versions
from sdar_verl.panels import PanelError, choose, write_panels

#: Panel -> folder of ALFWorld's layout. The test panel's rooms are never trained in.
PANELS = {"train": "train", "validation": "valid_seen", "test": "valid_unseen"}


@dataclass(frozen=True)
class Source:
    """Where the games come from.

    Attributes:
        counts: panel -> number of tasks; a panel that is not named takes all there are.
        task_types: types to keep or generate.
        seed: of the generated games, or of the choice among downloaded ones.
        generator: draws the games; None reads downloaded ones.
        data: folder of the downloaded data set, see :func:`find_data_root`.
    """

    counts: Mapping[str, int]
    task_types: tuple[str, ...] = TASK_TYPES
    seed: int = 0
    generator: GeneratorConfig | None = None
    data: str | None = None

    def settings(self) -> dict[str, Any]:
        """What decides which tasks the panels hold, as JSON gives it back."""
        common = {"env": "alfworld", "counts": dict(self.counts)}
        if self.generator is not None:
            return json.loads(json.dumps({**common, "generator": asdict(self.generator)}))
        root = str(find_data_root(self.data))
        return {**common, "data": root, "task_types": list(self.task_types), "seed": self.seed}


def prepare(
    source: Source,
    out: str | Path,
    *,
    force: bool = False,
    processes: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Prepared:
    """Write train, validation and test panels to ``out``, and generated games to ``out/games``.

    Args:
        source: the games.
        out: folder; finished panels with the same settings in it are left as they are.
        force: replace panels that were made with other settings, and their generated games, once the new are whole.
        processes: that generate games.
        progress: called with (panel, games done, games).

    Raises:
        PanelError: ``out`` holds panels of other settings and ``force`` is not set, or a count cannot be had.
        DatasetError: the downloaded data is missing or incomplete.
        ValueError: ``out/games`` holds games of other settings, left by a call that did not finish.
        ImportError: games shall be generated, but the package alfworld is not installed.
    """
    out = Path(out)
    check_counts(source.counts)
    settings = source.settings()

    def make() -> Prepared:
        skipped: dict[str, Counter[str]] = {}
        notes: list[str] = []
        beside: dict[Path, Path | None] = {}
        root = out / "games"
        disk = root.resolve()  # where a link leads
        new = disk.with_name(f".{disk.name}.new")
        if source.generator is None:
            panels = _downloaded(source, settings["data"], skipped, notes)
        elif force and root.is_dir():
            for split in PANELS.values():
                check_ours(root / split)
                if not is_of(new / split, source.generator):
                    remove(new / split)  # of another call, which did not finish
            panels = _generated(source, source.generator, new, root, processes, progress)
            beside = {root / split: new / split for split in PANELS.values()}
        else:
            panels = _generated(source, source.generator, root, root, processes, progress)
        written = write_panels(panels, out, settings, versions(("sdar-verl", "alfworld", "textworld")), beside)
        remove(new)
        return Prepared(written, made=True, skipped=skipped, notes=tuple(notes))

    return prepare_panels(out, settings, make, force=force, places=["data"])


def _downloaded(source: Source, data: str, skipped: dict[str, Counter[str]], notes: list[str]) -> dict[str, list[Task]]:
    panels = {}
    for panel, split in PANELS.items():
        games = read_games(data, split, source.task_types)
        skipped[panel] = games.skipped
        if _seems_incomplete(data, split, len(games.tasks), source.task_types):
            notes.append(
                f"{split} holds {len(games.tasks)} playable games, the published data set {PUBLISHED[split]}: "
                "the download may be incomplete"
            )
        count = source.counts.get(panel, len(games.tasks))
        if count > len(games.tasks):
            raise PanelError(f"--{panel} {count}: {split} holds only {len(games.tasks)} playable games; ask for fewer")
        panels[panel] = choose(games.tasks, count, source.seed)
    return panels


def _generated(
    source: Source,
    config: GeneratorConfig,
    made_in: Path,
    root: Path,
    processes: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, list[Task]]:
    """Tasks of games that are made in one folder and will lie in ``root``."""
    panels = {}
    for panel, split in PANELS.items():
        report = None if progress is None else partial(progress, panel)
        files = generate_games(made_in, split, source.counts[panel], config, processes=processes, progress=report)
        places = {str(file.absolute()): str((root / file.relative_to(made_in)).absolute()) for file in files}
        panels[panel] = [
            replace(task, data={**task.data, "game_file": places[task.data["game_file"]]})
            for task in read_games(made_in, split).tasks
            if task.data["game_file"] in places
        ]
    return panels


def _seems_incomplete(root: str, split: str, count: int, task_types: tuple[str, ...]) -> bool:
    whole = set(task_types) == set(TASK_TYPES)
    return whole and Path(root).name == DOWNLOADED_FOLDER and count < PUBLISHED[split]
