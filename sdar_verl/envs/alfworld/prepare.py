"""Makes ALFWorld's task panels, from the downloaded data set or from games generated on the spot."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdar_verl.envs.alfworld.dataset import DOWNLOADED_FOLDER, PUBLISHED, find_data_root, read_games
from sdar_verl.envs.alfworld.generate import CONFIG_FILE, generate_games
from sdar_verl.envs.alfworld.spec import TASK_TYPES, GeneratorConfig
from sdar_verl.envs.base import Task
from sdar_verl.envs.prepared import Prepared, check_counts, finished_panels, versions
from sdar_verl.panels import PANEL_FILE, PanelError, choose, write_panels

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
        force: replace panels that were made with other settings, and their generated games.
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
    finished = finished_panels(out, settings, force=force)
    if finished is not None:
        return finished
    panels: dict[str, list[Task]] = {}
    skipped: dict[str, Counter[str]] = {}
    notes = []
    if source.generator is not None and force:
        _remove_generated(out)
    for panel, split in PANELS.items():
        if source.generator is not None:
            panels[panel] = _generated(source, out / "games", panel, processes, progress)
            continue
        games = read_games(settings["data"], split, source.task_types)
        skipped[panel] = games.skipped
        if _seems_incomplete(settings["data"], split, len(games.tasks), source.task_types):
            notes.append(
                f"{split} holds {len(games.tasks)} playable games, the published data set {PUBLISHED[split]}: "
                "the download may be incomplete"
            )
        count = source.counts.get(panel, len(games.tasks))
        if count > len(games.tasks):
            raise PanelError(f"--{panel} {count}: {split} holds only {len(games.tasks)} playable games; ask for fewer")
        panels[panel] = choose(games.tasks, count, source.seed)
    described = write_panels(panels, out, settings, versions(("sdar-verl", "alfworld", "textworld")))
    return Prepared(described, made=True, skipped=skipped, notes=tuple(notes))


def _generated(
    source: Source, root: Path, panel: str, processes: int, progress: Callable[[str, int, int], None] | None
) -> list[Task]:
    assert source.generator is not None
    split = PANELS[panel]
    report = None if progress is None else lambda done, count: progress(panel, done, count)
    files = generate_games(root, split, source.counts[panel], source.generator, processes=processes, progress=report)
    wanted = {str(file.absolute()) for file in files}
    return [task for task in read_games(root, split).tasks if task.data["game_file"] in wanted]


def _remove_generated(out: Path) -> None:
    """Remove games and panels that an earlier call made, and nothing else."""
    (out / PANEL_FILE).unlink(missing_ok=True)
    for split in PANELS.values():
        if (out / "games" / split / CONFIG_FILE).is_file():
            shutil.rmtree(out / "games" / split)


def _seems_incomplete(root: str, split: str, count: int, task_types: tuple[str, ...]) -> bool:
    whole = set(task_types) == set(TASK_TYPES)
    return whole and Path(root).name == DOWNLOADED_FOLDER and count < PUBLISHED[split]
