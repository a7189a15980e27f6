"""Makes ALFWorld's task panels, from the downloaded data set or from games generated on the spot."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdar_verl.envs.alfworld.dataset import DOWNLOADED_FOLDER, PUBLISHED, find_data_root, read_games
from sdar_verl.envs.alfworld.generate import check_ours, described, generate_games, made_with
from sdar_verl.envs.alfworld.spec import TASK_TYPES, GeneratorConfig
from sdar_verl.envs.base import Task
from sdar_verl.envs.prepared import Prepared, check_counts, prepare_panels, versions
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
        if source.generator is not None:
            panels = _generated(source, source.generator, out, force, processes, progress)
        else:
            panels = _downloaded(source, settings["data"], skipped, notes)
        written = write_panels(panels, out, settings, versions(("sdar-verl", "alfworld", "textworld")))
        return Prepared(written, made=True, skipped=skipped, notes=tuple(notes))

    return prepare_panels(out, settings, make, force=force)


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
    out: Path,
    force: bool,
    processes: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, list[Task]]:
    """Games in ``out/games``. Those that ``force`` replaces stay until the new ones are whole."""
    root, new = out / "games", out / "games.new"
    made_in = new if force and root.is_dir() else root
    for split in PANELS.values():
        if made_in is new:
            check_ours(root / split)
            if made_with(new / split) not in (None, described(config)):
                shutil.rmtree(new / split)  # of a call that did not finish
    names = {}
    for panel, split in PANELS.items():
        report = None if progress is None else partial(progress, panel)
        files = generate_games(made_in, split, source.counts[panel], config, processes=processes, progress=report)
        names[panel] = {str((root / file.relative_to(made_in)).absolute()) for file in files}
    if made_in is new:
        (out / PANEL_FILE).unlink(missing_ok=True)
        for split in PANELS.values():
            if (root / split).exists():
                shutil.rmtree(root / split)
            (new / split).rename(root / split)
        new.rmdir()
    games = {panel: read_games(root, split).tasks for panel, split in PANELS.items()}
    return {panel: [task for task in games[panel] if task.data["game_file"] in names[panel]] for panel in PANELS}


def _seems_incomplete(root: str, split: str, count: int, task_types: tuple[str, ...]) -> bool:
    whole = set(task_types) == set(TASK_TYPES)
    return whole and Path(root).name == DOWNLOADED_FOLDER and count < PUBLISHED[split]
