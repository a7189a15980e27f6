"""The run's record: what ``sdar-verl report`` and ``sdar-verl compare`` read, written while the run goes on.

It lies in ``<trainer.default_local_dir>/record`` (docs/report.md). verl's file tracker starts its file anew on resume;
this one goes on, and forgets the steps that a resume plays again.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from sdar_verl.config import SdarConfig
from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.observe.base import Observer
from sdar_verl.observe.trackers import log_histograms
from sdar_verl.panels import panel_digest
from sdar_verl.report import layout
from sdar_verl.report.checked import read_run_file
from sdar_verl.report.distributions import Tokens, reward_statistics, token_distributions
from sdar_verl.report.trace import choose_episodes, split_tokens, thin, write_trace
from sdar_verl.rollout.rows import RowInfo, TurnNote
from sdar_verl.table import StepTable

logger = logging.getLogger(__name__)

_OUTCOMES = ("arm", "task_id", "task_type", "acc", "reward", "turns", "invalid_actions", "failed")
_VALIDATION = ("sdar.validation.arms.", "actor_rollout_ref.rollout.val_kwargs.")
_PACKAGES = ("sdar-verl", "verl", "torch", "transformers", "ray", "TransferQueue", "vllm", "alfworld")


class RunRecord(Observer):
    """Metrics, distributions and validation outcomes of every step, and traces of some (``sdar.trace``).

    Args:
        settings: the ``sdar`` node.
        config: verl's whole config.
        run: verl's trainer, for its tokenizer and its trackers.
    """

    name = "record"

    def __init__(self, settings: SdarConfig, config: DictConfig, run: Any):
        self.folder = Path(str(config.trainer.default_local_dir)) / layout.RECORD
        self.latest: dict[str, Any] = {}
        self._settings = settings
        self._config = config
        self._run = run
        self._every = settings.trace.every
        self._open = False
        self._step = 0
        self._metrics: Mapping[str, Any] = {}
        self._lacks_validation = False

    # ---------------------------------------------------------------- the trainer's calls

    def after_updates(self, table: StepTable, metrics: Mapping[str, Any]) -> Mapping[str, float]:
        self._begin()
        self.latest = self._distributions(table)
        layout.append_line(self.folder / layout.DISTRIBUTIONS_FILE, {"step": table.step, **self.latest})
        log_histograms(self._run, table.step, self.latest)
        if self._every and table.step % self._every == 0:
            self._trace(table)
        self._step, self._metrics = table.step, metrics  # other observers add theirs before the checkpoint
        return {}

    def after_validation(self, step: int, metrics: Mapping[str, float], outcomes: dict[str, list[Any]]) -> None:
        self._begin()
        self._lacks_validation = False
        # The metrics come last: by them a resumed run knows that this validation is whole.
        write_outcomes(outcomes, layout.step_file(self.folder / layout.OUTCOMES, step))
        if metrics:
            layout.append_line(self.folder / layout.METRICS_FILE, {"step": step, "data": plain(metrics)})

    @property
    def awaits_validation(self) -> bool:
        """A kill took the validation that was due after the checkpoint."""
        return self._lacks_validation

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._begin()
        layout.append_line(self.folder / layout.METRICS_FILE, {"step": step, "data": plain(metrics)})

    def state_dict(self) -> dict[str, Any]:
        if not self._step:
            return {}
        every = self._config.trainer.test_freq
        return {
            "step": self._step,
            "asked": self._settings.trace.every,
            "every": self._every,
            "metrics": plain(self._metrics),
            "validates": every > 0 and (self._step % every == 0 or self._step >= self._run.total_training_steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        last = state["step"]
        # Another sdar.trace.every than before the resume is the user's wish; the same one may have been doubled.
        if state.get("asked") == self._settings.trace.every:
            self._every = state["every"]
        self._step, self._open = last, self.folder.is_dir()
        if self._open:
            self._describe()
        self._metrics = state.get("metrics", {})
        for name in (layout.METRICS_FILE, layout.DISTRIBUTIONS_FILE, layout.WARNINGS_FILE, layout.SKILLS_FILE):
            kept = layout.keep_steps(self.folder / name, last)
            if name == layout.METRICS_FILE and self._open:
                self._complete([line for line in kept if line["step"] == last], state)
        for name in (layout.TRACES, layout.OUTCOMES):
            for step, path in layout.step_files(self.folder / name).items():
                if step > last:
                    path.unlink()

    # ---------------------------------------------------------------- what is written

    def _begin(self) -> None:
        """Write ``run.json``; the record of an earlier run in this folder is moved out of the way."""
        if self._open:
            return
        if self.folder.exists():
            names = (path.suffix[1:] for path in self.folder.parent.glob(f"{layout.RECORD}.*"))
            number = 1 + max((int(name) for name in names if name.isdecimal()), default=0)
            self.folder.rename(self.folder.with_name(f"{layout.RECORD}.{number}"))
        self.folder.mkdir(parents=True)
        self._describe()
        self._open = True

    def _describe(self) -> None:
        """Write ``run.json``; after a resume with the arms, panels, ... of before, too, if they were others."""
        path, described = self.folder / layout.RUN_FILE, describe_run(self._config)
        try:
            earlier = read_run_file(path) if self._open else {}
        except (OSError, layout.RecordError) as error:
            logger.warning("%s; it is written anew", error)
            earlier = {}
        described["started"] = earlier.get("started", described["started"])
        described["arms"] = sorted({*earlier.get("arms", []), *described["arms"]})
        for part in layout.RUN_LISTS:
            for option, values in earlier.get(part, {}).items():
                described[part][option] = list(dict.fromkeys([*values, *described[part].get(option, [])]))
        layout.write_json(path, described)

    def _complete(self, lines: list[dict[str, Any]], state: Mapping[str, Any]) -> None:
        """A kill between a checkpoint and the end of its step took the step's line; what the checkpoint knows of it
        stands in for it, without what is only known at the end (timings, verl's own), and its validation is made.

        Args:
            lines: of the step.
            state: of the checkpoint.
        """
        names = {name for line in lines if isinstance(line.get("data"), dict) for name in line["data"]}
        if self._metrics and not self._metrics.keys() & names:
            layout.append_line(self.folder / layout.METRICS_FILE, {"step": self._step, "data": self._metrics})
        validated = any(name.startswith(("sdar-val/", "val-")) for name in names)
        self._lacks_validation = bool(state.get("validates")) and not validated

    def _distributions(self, table: StepTable) -> dict[str, Any]:
        scores = table.columns["rm_scores"].sum(dim=-1).tolist()
        episodes = {name: scores[rows[-1][0]] for name, rows in table.episodes().items() if not rows[-1][1].failed}
        result: dict[str, Any] = {"reward": reward_statistics(list(episodes.values()))}
        tokens = distilled_tokens(table)
        if tokens is not None:
            result |= token_distributions(tokens, int(self._config.data.max_response_length))
        return result

    def _trace(self, table: StepTable) -> None:
        folder = self.folder / layout.TRACES
        turns = trace_rows(table, self._settings.trace.episodes, self._run.tokenizer)
        if turns:
            write_trace(turns, layout.step_file(folder, table.step))
            self._every = thin(folder, self._settings.trace.max_mb * 1e6, self._every)


def distilled_tokens(table: StepTable) -> Tokens | None:
    """All distilled tokens of a step, flat; None when there is none."""
    if "gap" not in table.columns or not table.mask.any():
        return None
    mask, places = table.mask, _places(table)

    def flat(values: torch.Tensor) -> np.ndarray:
        return values[mask].double().numpy()

    kl = None
    if "ref_log_prob" in table.columns:
        ratio = flat(table.columns["ref_log_prob"]) - flat(table.columns["old_log_probs"])
        kl = np.expm1(ratio) - ratio
    return Tokens(
        gap=flat(table.columns["gap"]),
        gate=flat(table.columns["gate"]),
        turn=places[0][mask.numpy()],
        position=places[1][mask.numpy()],
        kl=kl,
    )


def _places(table: StepTable) -> tuple[np.ndarray, np.ndarray]:
    """Turn of each token, and its position within that turn's answer; both (rows, response_length)."""
    rows, width = table.response.shape
    turn = np.repeat(np.asarray(table.turns)[:, None], width, axis=1)
    position = np.repeat(np.arange(width)[None], rows, axis=0)
    for row, info in enumerate(table.infos):
        for number, note in enumerate(info.turns if info is not None else ()):
            turn[row, note.start : note.stop] = number
            position[row, note.start : note.stop] = np.arange(note.stop - note.start)
    return turn, position


def trace_rows(table: StepTable, limit: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The chosen episodes' turns, one row of :func:`sdar_verl.report.trace.trace_schema` each, in order."""
    traced = {
        name: rows for name, rows in table.episodes().items() if any(info.steps[0].text is not None for _, info in rows)
    }
    if not traced:
        return []
    stored = table.rows.read(["prompts", "responses"])
    prompts, responses = stored["prompts"].unbind(), stored["responses"].unbind()
    turns = [
        {"episode": name, "group": table.ids[row].uid, "step": table.step, **turn}
        for name in choose_episodes(list(traced), limit)
        for row, info in traced[name]
        if info.steps[0].text is not None
        for turn in _row_turns(table, row, info, prompts[row].tolist(), responses[row].tolist(), tokenizer)
    ]
    return sorted(turns, key=lambda turn: (turn["episode"], turn["turn"]))


def _row_turns(
    table: StepTable, row: int, info: RowInfo, prompt: list[int], answer: list[int], tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The turns of one row: itself, or those of a conversation, whose tokens lie between its environment's."""
    columns = {name: table.columns.get(source) for name, source in _TOKEN_SOURCES.items()}
    unseen = {"teacher_log_prob"} if not info.has_teacher else set()
    distilled = table.mask[row].tolist()
    for number, turn in enumerate(info.steps):
        start, stop = (turn.start, turn.stop) if isinstance(turn, TurnNote) else (0, len(answer))
        ids = answer[start:stop]
        yield {
            "turn": info.turn + number,
            "task_type": info.task_type,
            "skills": list(info.skills),
            "prompt": tokenizer.decode(prompt + answer[:start]),
            "token_ids": ids,
            "tokens": split_tokens(ids, tokenizer.decode),
            **{
                name: None
                if column is None or name in unseen
                else [
                    _number(value) if seen or name not in ("gap", "gate") else None
                    for value, seen in zip(column[row, start:stop].tolist(), distilled[start:stop], strict=True)
                ]
                for name, column in columns.items()
            },
            "unparsed": turn.unparsed,
            "inadmissible": turn.inadmissible,
            "truncated": info.truncated,
            "episode_reward": float(table.columns["rm_scores"][row].sum()),
            "success": info.success,
            **(turn.text or {}),
        }


_TOKEN_SOURCES = {
    "student_log_prob": "old_log_probs",
    "teacher_log_prob": TEACHER_LOG_PROBS,
    "gap": "gap",
    "gate": "gate",
    "entropy": "entropy",
    "advantage": "advantages",
}


def write_outcomes(outcomes: Mapping[str, list[Any]], path: Path) -> None:
    """One row per validation episode, with the columns that the agent loop gave; atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [name for name in (*_OUTCOMES, "task_score") if name in outcomes]
    if not {"arm", "task_id", "acc"} <= set(names):
        return  # rows of another agent loop
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.table({name: list(outcomes[name]) for name in names}), partial)
    partial.replace(path)


def describe_run(config: DictConfig) -> dict[str, Any]:
    """Content of ``run.json``: what makes this run comparable to another one, or not."""
    from sdar_verl.checks.options import options_of
    from sdar_verl.checks.panel_tasks import panel_digests
    from sdar_verl.verl.resume import content_digests, fingerprint

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "schema": layout.SCHEMA,
        "project": config.trainer.project_name,
        "experiment": config.trainer.experiment_name,
        "method": OmegaConf.select(config, "sdar.method"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "panels": {option: panel_digests(config, option) for option in ("train_files", "val_files")}
        | _deciding(config),
        "contents": {option: [digest] for option, digest in content_digests(config).items()},
        "validation": {
            option: [plain(value)] for option, value in options_of(config).items() if option.startswith(_VALIDATION)
        },
        "arms": sorted(OmegaConf.select(config, "sdar.validation.arms") or ()),
        "settings": plain(fingerprint(config)),
        "max_steps": config.sdar.env.max_steps,
        "total_steps": config.trainer.total_training_steps,
        "gpus": config.trainer.n_gpus_per_node * config.trainer.nnodes,
        "versions": versions,
    }


def _deciding(config: DictConfig) -> dict[str, list[str]]:
    """The panel by which skills were chosen: no later choice may be made by it."""
    panel = OmegaConf.select(config, "sdar.skills.learn.panel")
    return {"sdar.skills.learn.panel": [panel_digest(panel)]} if panel else {}


def plain(values: Any) -> Any:
    """JSON values: numpy scalars become numbers, what is not finite becomes null, anything else text."""
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    if hasattr(values, "item") and len(values.shape) == 0:
        values = values.item()
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    return values if values is None or isinstance(values, (str, int, bool)) else str(values)


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
