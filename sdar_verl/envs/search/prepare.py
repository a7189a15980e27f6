"""Makes Search-QA's task panels: questions about the invented world with its corpus, or the user's question files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_verl.envs.base import Task
from sdar_verl.envs.prepared import Prepared, check_counts, prepare_panels, versions
from sdar_verl.envs.search.bm25 import Bm25Retriever
from sdar_verl.envs.search.dataset import PANELS, QuestionFile, read_questions
from sdar_verl.envs.search.passages import CheckedCorpus, CorpusError, corpus_digest, read_corpus, write_corpus
from sdar_verl.envs.search.questions import make_questions, make_tasks
from sdar_verl.envs.search.world import make_world
from sdar_verl.panels import PANEL_FILE, PanelError, choose, write_panels

CORPUS_FILE = "corpus.jsonl"
GENERATED_COUNTS: Mapping[str, int] = {"train": 512, "validation": 128, "test": 128}
HELD_OUT = 512
"""Training questions held out for validation when no file is given for that."""


@dataclass(frozen=True)
class Source:
    """Where the questions come from.

    Attributes:
        counts: panel -> number of tasks; a panel that is not named takes its default.
        seed: of the world, and of the choice among questions.
        scale: size of the world; 1 has 338 passages.
        files: question files; empty for the world.
        corpus: what was found in the corpus that will be searched, or None.
    """

    counts: Mapping[str, int]
    seed: int = 0
    scale: int = 1
    files: tuple[QuestionFile, ...] = ()
    corpus: CheckedCorpus | None = None

    def settings(self) -> dict[str, Any]:
        """What decides which tasks the panels hold, as JSON gives it back."""
        common: dict[str, Any] = {"env": "search", "counts": dict(self.counts), "seed": self.seed}
        if not self.files:
            return {**common, "scale": self.scale}
        prints: dict[str, list[str]] = {}
        for file in self.files:
            prints.setdefault(file.panel, []).append(file.fingerprint())
        settings = {**common, "files": {panel: sorted(found) for panel, found in sorted(prints.items())}}
        return settings if self.corpus is None else {**settings, "corpus": self.corpus.digest}


def prepare(source: Source, out: str | Path, *, force: bool = False) -> Prepared:
    """Write the panels to ``out``, and the world's passages to ``out/corpus.jsonl``.

    Args:
        source: the questions.
        out: folder; finished panels with the same settings in it are left as they are.
        force: replace panels that were made with other settings.

    Raises:
        PanelError: ``out`` holds panels of other settings and ``force`` is not set, or a count cannot be had.
        QuestionFileError: a question file is missing, damaged or in another form.
        ImportError: the search library is not installed.
    """
    out = Path(out)
    check_counts(source.counts)
    settings = source.settings()

    def fits(tasks: Sequence[Task]) -> bool:
        if source.files:
            return True
        try:
            found = corpus_digest(read_corpus(out / CORPUS_FILE))
        except CorpusError:
            return False
        return all(task.data.get("corpus") == found for task in tasks)

    return prepare_panels(out, settings, lambda: _make(source, settings, out), force=force, fits=fits)


def _make(source: Source, settings: Mapping[str, Any], out: Path) -> Prepared:
    made_here = _made_here(out)
    corpus = out / CORPUS_FILE
    new = corpus.with_name(f".{corpus.name}.new")
    if not source.files:
        panels, skipped, notes = _from_world(source, corpus, new, made_here)
    else:
        panels, skipped, notes = _from_files(source)
    # A corpus of before would be found by the recipe, and searched for answers that it does not hold.
    beside = {corpus: None if source.files else new} if made_here or not source.files else {}
    if source.corpus is not None:
        notes += (
            f"the corpus has {source.corpus.passages} passages (hash {source.corpus.digest[:16]}); "
            f"{source.corpus.empty} without a text are left out",
        )
    described = write_panels(panels, out, settings, versions(("sdar-verl", "bm25s")), beside)
    return Prepared(described, made=True, skipped=skipped, notes=notes)


_Made = tuple[dict[str, list[Task]], dict[str, Counter[str]], tuple[str, ...]]


def _made_here(out: Path) -> bool:
    """Whether the corpus in ``out`` is one that an earlier call has written, rather than the user's."""
    try:
        return "scale" in json.loads((out / PANEL_FILE).read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _from_world(source: Source, corpus: Path, new: Path, replace_corpus: bool) -> _Made:
    """Questions and, in ``new``, the passages that will lie in ``corpus``."""
    try:
        world = make_world(source.seed, source.scale)
        retriever = Bm25Retriever(world.passages)
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed here: pip install "sdar-verl[search]"') from error
    questions = make_questions(world, retriever, source.seed)
    panels = make_tasks(questions, {**GENERATED_COUNTS, **source.counts}, retriever.digest, source.seed)
    if corpus.is_file() and not replace_corpus and corpus_digest(read_corpus(corpus)) != retriever.digest:
        raise PanelError(f"{corpus} is another corpus, not made here: move it away, or use another --out")
    write_corpus(world.passages, new)
    return panels, {}, ()


def _from_files(source: Source) -> _Made:
    read = {
        panel: read_questions([file for file in source.files if file.panel == panel])
        for panel in PANELS
        if any(file.panel == panel for file in source.files)
    }
    if "train" not in read:
        raise PanelError("--source names no file of training questions; add train=FILE")
    if "test" in source.counts and "test" not in read:
        raise PanelError(f"--test {source.counts['test']} has no effect: --source names no test=FILE; leave it out")
    tasks = {panel: dict(questions.tasks) for panel, questions in read.items()}
    notes = []
    if "validation" not in tasks:
        wanted = source.counts.get("validation", HELD_OUT)
        if wanted >= len(tasks["train"]):
            raise PanelError(
                f"--validation {wanted}: that many cannot be held out of {len(tasks['train'])} training questions; ask "
                "for fewer, or name validation=FILE"
            )
        held_out = choose(tasks["train"].values(), wanted, source.seed)
        tasks["validation"] = {task.task_id: tasks["train"].pop(task.task_id) for task in held_out}
        notes.append(f"{wanted} training questions are held out for validation (name validation=FILE to change that)")
    panels = {
        panel: _chosen(panel, tasks[panel], source.counts.get(panel), source.seed) for panel in PANELS if panel in tasks
    }
    for panel in ("validation", "test"):
        asked, trained = ({task.description.casefold() for task in panels.get(name, ())} for name in (panel, "train"))
        both = len(asked & trained)  # whatever their golden answers and their order
        if both:
            notes.append(f"{both} questions of the {panel} panel are training questions, too")
    return panels, {panel: questions.skipped for panel, questions in read.items()}, tuple(notes)


def _chosen(panel: str, tasks: Mapping[str, Task], count: int | None, seed: int) -> list[Task]:
    if count is None or count == len(tasks):
        return list(tasks.values())
    if count > len(tasks):
        raise PanelError(f"--{panel} {count}: the files hold only {len(tasks)} different questions; ask for fewer")
    return choose(tasks.values(), count, seed)
