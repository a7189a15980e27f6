"""The run's record: what ``sdar-verl report`` and ``sdar-verl compare`` read, written while the run goes on.

It lies in ``<trainer.default_local_dir>/record`` (docs/report.md). verl's file tracker starts its file anew on resume;
this one goes on, and forgets the steps that a resume plays again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.config import SdarConfig
from sdar_verl.report import layout
from sdar_verl.report.distributions import reward_statistics, token_distributions
from sdar_verl.report.trace import choose_episodes, split_tokens, thin, write_trace
from sdar_verl.rollout.rows import RowInfo, TurnNote
from sdar_verl.training.parts.base import StepRows, TrainerPart, joined_rows
from sdar_verl.training.parts.step_tokens import StepTokens, joined_tokens, read_tokens
from sdar_verl.training.parts.trackers import log_histograms

_OUTCOMES = ("arm", "task_id", "task_type", "acc", "reward", "turns", "invalid_actions", "failed")
_PACKAGES = ("sdar-verl", "verl", "torch", "transformers", "ray", "TransferQueue", "vllm", "alfworld")


class RunRecord(TrainerPart):
    """Metrics, distributions and validation outcomes of every step, and traces of some (``sdar.trace``).

    Args:
        settings: the ``sdar`` node.
        config: verl's whole config.
    """

    name = "record"

    def __init__(self, settings: SdarConfig, config: DictConfig):
        self.folder = Path(str(config.trainer.default_local_dir)) / layout.RECORD
        self.latest: dict[str, Any] = {}
        self._settings = settings
        self._config = config
        self._every = settings.trace.every
        self._open = False
        self._step = 0
        self._seen: list[tuple[StepRows, StepTokens]] = []  # parts of the step under way

    # ---------------------------------------------------------------- the trainer's calls

    def on_advantages(self, rows: StepRows) -> None:
        self._seen = [*(self._seen if rows.part else []), (rows, read_tokens(rows))]
        if rows.part < rows.parts - 1:
            return
        self._begin()
        rows, tokens = joined_rows([rows for rows, _ in self._seen]), joined_tokens([one for _, one in self._seen])
        self._seen = []
        self.latest = self._distributions(rows, tokens)
        layout.append_line(self.folder / layout.DISTRIBUTIONS_FILE, {"step": rows.step, **self.latest})
        log_histograms(rows.trainer, rows.step, self.latest)
        if self._every and rows.step % self._every == 0:
            self._trace(rows, tokens)
        self._step = rows.step

    def on_validated(self, step: int, metrics: dict[str, float], outcomes: dict[str, list[Any]]) -> None:
        self._begin()
        layout.append_line(self.folder / layout.METRICS_FILE, {"step": step, "data": plain(metrics)})
        write_outcomes(outcomes, layout.step_file(self.folder / layout.OUTCOMES, step))

    def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
        self._begin()
        layout.append_line(self.folder / layout.METRICS_FILE, {"step": step, "data": plain(metrics)})

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "every": self._every} if self._step else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        last = state["step"]
        # Another sdar.trace.every than before the resume is the user's wish; the same one may have been doubled.
        if self._every and state["every"] % self._every == 0:
            self._every = state["every"]
        self._step, self._open = last, self.folder.is_dir()
        for name in (layout.METRICS_FILE, layout.DISTRIBUTIONS_FILE, layout.WARNINGS_FILE):
            layout.keep_steps(self.folder / name, last)
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
            number = 1 + sum(1 for _ in self.folder.parent.glob(f"{layout.RECORD}.*"))
            self.folder.rename(self.folder.with_name(f"{layout.RECORD}.{number}"))
        self.folder.mkdir(parents=True)
        layout.write_json(self.folder / layout.RUN_FILE, describe_run(self._config))
        self._open = True

    def _distributions(self, rows: StepRows, tokens: StepTokens) -> dict[str, Any]:
        episodes = {
            key.rsplit("_", 1)[0]: float(scores.sum())
            for key, info, scores in zip(rows.batch.keys, rows.infos, tokens.columns["rm_scores"], strict=True)
            if info is not None and not info.failed
        }
        result: dict[str, Any] = {"reward": reward_statistics(list(episodes.values()))}
        distilled = tokens.distilled(rows)
        if distilled is not None:
            result |= token_distributions(distilled, int(self._config.data.max_response_length))
        return result

    def _trace(self, rows: StepRows, tokens: StepTokens) -> None:
        folder = self.folder / layout.TRACES
        turns = trace_rows(rows, tokens, self._settings.trace.episodes)
        if turns:
            write_trace(turns, layout.step_file(folder, rows.step))
            self._every = thin(folder, self._settings.trace.max_mb * 1e6, self._every)


def trace_rows(rows: StepRows, tokens: StepTokens, limit: int) -> list[dict[str, Any]]:
    """The chosen episodes' turns, one row of :func:`sdar_verl.report.trace.trace_schema` each, in order."""
    keys = rows.batch.keys
    traced = {i: info for i, info in enumerate(rows.infos) if info is not None and info.steps[0].text is not None}
    if not traced:
        return []
    chosen = set(choose_episodes([keys[i].rsplit("_", 1)[0] for i in traced], limit))
    prompts = rows.get(["prompts"])["prompts"].unbind()
    turns = [
        {"episode": episode, "group": episode.rsplit("_", 1)[0], "step": rows.step, **turn}
        for i, info in traced.items()
        if (episode := keys[i].rsplit("_", 1)[0]) in chosen
        for turn in _row_turns(info, i, prompts[i].tolist(), tokens, rows.trainer.tokenizer)
    ]
    return sorted(turns, key=lambda turn: (turn["episode"], turn["turn"]))


def _row_turns(
    info: RowInfo, row: int, prompt: list[int], tokens: StepTokens, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The turns of one row: itself, or those of a conversation, whose tokens lie between its environment's."""
    answer = [int(token) for token in tokens.columns["responses"][row]]
    columns = {name: tokens.columns.get(source) for name, source in _TOKEN_SOURCES.items()}
    if info.teacher_prompt_ids is None or info.teacher_failure is not None:
        columns["teacher_log_prob"] = None
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
                name: None if column is None else [_number(value) for value in column[row][start:stop]]
                for name, column in columns.items()
            },
            "unparsed": turn.unparsed,
            "inadmissible": turn.inadmissible,
            "truncated": info.truncated,
            "episode_reward": float(tokens.columns["rm_scores"][row].sum()),
            "success": info.success,
            **(turn.text or {}),
        }


_TOKEN_SOURCES = {
    "student_log_prob": "old_log_probs",
    "teacher_log_prob": "sdar_teacher_log_probs",
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
    from sdar_verl.training.panel_tasks import panel_digests
    from sdar_verl.training.resume import fingerprint

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
        "panels": {option: panel_digests(config, option) for option in ("train_files", "val_files")},
        "settings": plain(fingerprint(config)),
        "max_steps": config.sdar.env.max_steps,
        "total_steps": config.trainer.total_training_steps,
        "gpus": config.trainer.n_gpus_per_node * config.trainer.nnodes,
        "versions": versions,
    }


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
