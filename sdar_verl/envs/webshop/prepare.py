"""Makes WebShop's task panels and the catalogue that goes with them, from the downloaded files or generated ones."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sdar_verl.atomic import remove
from sdar_verl.envs.base import Task
from sdar_verl.envs.prepared import Prepared, check_counts, prepare_panels, versions
from sdar_verl.envs.webshop.catalogue import CatalogueError, DataFiles, Product, find_data_files, read_products
from sdar_verl.envs.webshop.generate import CatalogueConfig, generate_catalogue
from sdar_verl.envs.webshop.goals import Goal, Kind, count_goals, make_goal, shuffled
from sdar_verl.envs.webshop.nouns import RULES, NounRule
from sdar_verl.envs.webshop.reward import options_can_count
from sdar_verl.envs.webshop.store import META_FILE, Catalogue, read_meta, write_catalogue
from sdar_verl.panels import PanelError, choose, write_panels

CATEGORIES = ("beauty", "electronics", "fashion", "garden", "grocery")

PANELS: dict[str, dict[str, tuple[int, int | None]]] = {
    "webshop": {"train": (1500, None), "validation": (500, 1500), "test": (0, 500)},
    "released": {"train": (500, None), "validation": (0, 500)},
}
"""Split -> panel -> places in WebShop's shuffled list of goals. ``webshop`` is its own split; ``released`` is that of
SDAR's released code, which has no test panel: it validates on WebShop's."""

CATALOGUE, GENERATED = "catalogue", "generated"
"""Folders beside the panels: what is searched, and the files that ``--generate`` drew it from."""

MAX_TRAIN = 20_000
"""Tasks of the training panel when no number is asked for; the full catalogue gives millions of synthetic goals."""


@dataclass(frozen=True)
class Source:
    """Where products and goals come from.

    Attributes:
        counts: panel -> number of tasks; a panel that is not named takes all there are (training: at most MAX_TRAIN).
        kind: whose instructions.
        split: key of :data:`PANELS`.
        seed: of prices, price caps and the choice among goals.
        generator: draws a catalogue; None reads downloaded files.
        data: folder of the downloaded files.
        size: which of them, see :func:`find_data_files`.
        nouns: how the nouns of titles are found; None: as WebShop does (``spacy``) in downloaded titles, by ``rules``
            in generated ones.
    """

    counts: Mapping[str, int]
    kind: Kind = "synthetic"
    split: str = "webshop"
    seed: int = 0
    generator: CatalogueConfig | None = None
    data: str | None = None
    size: str | None = None
    nouns: NounRule | None = None

    @property
    def noun_rule(self) -> NounRule:
        """What ``nouns`` comes to."""
        return self.nouns or ("spacy" if self.generator is None else RULES)

    def files(self) -> DataFiles:
        """The downloaded files.

        Raises:
            CatalogueError: no folder was named, or it is incomplete.
        """
        if self.data is None:
            raise CatalogueError(
                "name the folder of WebShop's downloaded files with --data, or make a catalogue with --generate"
            )
        return find_data_files(self.data, self.size, human=self.kind == "human")

    def settings(self) -> dict[str, Any]:
        """What decides which tasks the panels hold, as JSON gives it back."""
        common = {"env": "webshop", "kind": self.kind, "split": self.split, "seed": self.seed, "nouns": self.noun_rule}
        if self.generator is not None:
            made: dict[str, Any] = {"generator": asdict(self.generator)}
        else:
            files = self.files()
            # By content, as far as that is cheap: the full file has gigabytes.
            made = {"data": {file.name: _fingerprint(file) for file in _all(files)}}
        return json.loads(json.dumps({**common, "counts": dict(self.counts), **made}))


def prepare(source: Source, out: str | Path, *, force: bool = False) -> Prepared:
    """Write the panels to ``out``, and the catalogue to ``out/catalogue``.

    Args:
        source: products and goals.
        out: folder; finished panels with the same settings in it are left as they are.
        force: replace panels that were made with other settings, and their catalogue, once the new are whole.

    Raises:
        PanelError: ``out`` holds panels of other settings and ``force`` is not set, or a count cannot be had.
        CatalogueError: the downloaded files are missing, incomplete or damaged.
        ImportError: the search library, or what finds the nouns, is not installed.
    """
    out = Path(out)
    check_counts(source.counts)
    unknown = sorted(source.counts.keys() - PANELS[source.split].keys())
    if unknown:
        raise PanelError(f"--{unknown[0]} has no effect with --split {source.split}, which has no such panel")
    settings = source.settings()
    prepared = prepare_panels(
        out,
        settings,
        lambda: _make(source, settings, out),
        force=force,
        fits=lambda _: (out / CATALOGUE / META_FILE).is_file(),
    )
    read_meta(out / CATALOGUE)  # of this version
    return prepared


def _make(source: Source, settings: Mapping[str, Any], out: Path) -> Prepared:
    finals = {name: (out / name).resolve() for name in (CATALOGUE, GENERATED)}
    new = {name: final.with_name(f".{final.name}.new") for name, final in finals.items()}
    try:
        for folder in new.values():
            remove(folder)
        files = source.files() if source.generator is None else generate_catalogue(source.generator, new[GENERATED])
        counts: list[int] = []
        products = _counting(read_products(files), source.kind, counts)
        catalogue = write_catalogue(products, new[CATALOGUE], source.noun_rule)
        panels = _choose(source, catalogue, counts, out / CATALOGUE)
        described = write_panels(
            panels,
            out,
            settings,
            {**versions(("sdar-verl", "bm25s", "rapidfuzz")), "nouns": catalogue.tagger},
            {finals[name]: new[name] if new[name].is_dir() else None for name in finals},
        )
    finally:
        for folder in new.values():
            remove(folder)
    return Prepared(described, made=True, skipped={}, notes=_notes(source, counts, panels))


def _counting(products: Iterator[Product], kind: Kind, counts: list[int]) -> Iterator[Product]:
    for product in products:
        counts.append(count_goals(product, kind))
        yield product


def _choose(source: Source, catalogue: Catalogue, counts: Sequence[int], folder: Path) -> dict[str, list[Task]]:
    """Tasks of every panel, whose catalogue will lie in ``folder``."""
    ends = list(itertools.accumulate(counts))
    order = shuffled(ends[-1])
    panels = {}
    for panel, (start, stop) in PANELS[source.split].items():
        places = range(len(order))[start:stop]
        wanted = source.counts.get(panel, min(len(places), MAX_TRAIN) if panel == "train" else len(places))
        if not places:
            raise PanelError(
                f"the catalogue gives {len(order)} {source.kind} goals, and the {panel} panel takes those from number "
                f"{start + 1} on (--split {source.split}): it would be empty; use a larger catalogue"
                + (" (--products)" if source.generator is not None else "")
            )
        if wanted > len(places):
            raise PanelError(
                f"--{panel} {wanted}: the catalogue gives {len(order)} {source.kind} goals, {len(places)} of them for "
                f"the {panel} panel; ask for fewer, or use a larger catalogue"
            )
        # The order is random already, so a longer list need not be made whole to be chosen from.
        places = places[: max(MAX_TRAIN, wanted)]
        tasks = [_task(source, catalogue, folder, ends, place, order[place]) for place in places]
        panels[panel] = choose(tasks, wanted, source.seed)
    return panels


def _task(source: Source, catalogue: Catalogue, folder: Path, ends: Sequence[int], place: int, number: int) -> Task:
    """The goal with this number in the order of the data, at this place in the shuffled order."""
    row = bisect.bisect_right(ends, number)
    within = number - (ends[row - 1] if row else 0)
    goal = make_goal(catalogue[row], source.kind, within, source.seed)
    data = {
        "catalogue": str(folder.absolute()),
        "digest": catalogue.digest,
        "price_seed": source.seed,
        "place": place,
        "goal": goal.as_dict(),
    }
    return Task("webshop", f"{goal.asin}-{within:04d}", goal.category, goal.instruction, data)


def _notes(source: Source, counts: Sequence[int], panels: Mapping[str, Sequence[Task]]) -> tuple[str, ...]:
    notes = []
    start, stop = PANELS[source.split]["train"]
    there = len(range(sum(counts))[start:stop])
    if "train" not in source.counts and there > MAX_TRAIN:
        notes.append(f"train holds {MAX_TRAIN} of {there} goals; choose another number with --train")
    for panel, tasks in panels.items():
        never = sum(not options_can_count(Goal.from_dict(task.data["goal"])) for task in tasks)
        if never:
            notes.append(
                f"{panel}: {never} of {len(tasks)} tasks cannot reach the full score, whatever is bought: WebShop's "
                "reward takes a part of an option for a colour"
            )
    return tuple(notes)


def _all(files: DataFiles) -> list[Path]:
    return [file for file in (files.products, files.attributes, files.human) if file is not None]


def _fingerprint(file: Path) -> str:
    """Hash of a file's length, first and last megabyte."""
    size, piece = file.stat().st_size, 1 << 20
    with file.open("rb") as stream:
        first = stream.read(piece)
        stream.seek(max(0, size - piece))
        return sha256(b"%d" % size + first + stream.read()).hexdigest()[:16]
