"""Runs' folders as a training writes them, without a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sdar_verl.observe.record import write_outcomes
from sdar_verl.report import layout
from sdar_verl.report.distributions import Tokens, reward_statistics, token_distributions
from sdar_verl.report.trace import write_trace

TYPES = ("pick_and_place_simple", "look_at_obj_in_light")
WORDS = ["<think>", " apple", " in", " fridge", "</think>", " <action>", " go to fridge", "</action>"]


def write_run(
    folder: Path,
    *,
    experiment: str = "sdar",
    seed: int = 0,
    steps: int = 9,
    rate: float = 0.06,
    tasks: int = 40,
    panel: str = "a" * 64,
    described: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Path:
    """A run whose success rises by ``rate`` per step from 0.3; validated at the start, in the middle, at the end.

    ``described`` are other parts of ``run.json``.
    """
    rng = np.random.default_rng(seed)
    record = folder / "checkpoints" / layout.RECORD
    record.mkdir(parents=True)
    run = {
        "schema": layout.SCHEMA,
        "project": "toy",
        "experiment": experiment,
        "started": "2026-01-02T03:04:05+0000",
        "panels": {"train_files": ["b" * 64], "val_files": [panel]},
        "settings": {"sdar.loss.coef": 0.01, "sdar.loss.beta": 5.0, "data.seed": seed, **settings},
        "contents": {"sdar.skills.bank": ["b" * 64]},
        "validation": {f"sdar.validation.arms.{arm}.temperature": [0.4] for arm in ("student", "told")},
        "versions": {"sdar-verl": "0.1.0", "verl": "0.9.1"},
        **described,
    }
    (record / layout.RUN_FILE).write_text(json.dumps(run))
    for step in range(steps + 1):
        data: dict[str, Any] = {}
        share = min(0.95, 0.3 + rate * step)
        if step in (0, steps // 2, steps):
            data |= _validation(rng, record, step, share, tasks)
        if step:
            data |= _training(rng, record, step, share)
        layout.append_line(record / layout.METRICS_FILE, {"step": step, "data": data})
    return folder


def _validation(rng, record: Path, step: int, share: float, tasks: int) -> dict[str, float]:
    solved = (rng.random(tasks) < share).astype(float)
    kinds = [TYPES[i % 2] for i in range(tasks)]
    outcomes = {
        "arm": ["student"] * tasks,
        "task_id": [f"t{i:03d}" for i in range(tasks)],
        "task_type": kinds,
        "acc": solved.tolist(),
        "turns": [5.0] * tasks,
    }
    write_outcomes(outcomes, layout.step_file(record / layout.OUTCOMES, step))
    types = {f"sdar-val/student/success/{kind}": float(solved[i::2].mean()) for i, kind in enumerate(TYPES)}
    return {"sdar-val/student/success": float(solved.mean()), "sdar-val/student/episodes": tasks, **types}


def _training(rng, record: Path, step: int, share: float) -> dict[str, float]:
    turn, position = (a.ravel() for a in np.indices((5, 80)))
    gap = rng.normal(-0.05, 0.6, 400)
    tokens = Tokens(gap, 1 / (1 + np.exp(-5 * gap)), turn, position % 8)
    line = {"step": step, "reward": reward_statistics((rng.random(16) < share).astype(float).tolist())}
    layout.append_line(record / layout.DISTRIBUTIONS_FILE, {**line, **token_distributions(tokens, 8)})
    write_trace(
        [turn_row(rng, step, group, session, t) for group in range(2) for session in range(2) for t in range(3)],
        layout.step_file(record / layout.TRACES, step),
    )
    return {
        "sdar/success": share,
        "sdar/episodes": 16,
        "sdar/gate_mean": 0.48,
        "sdar/gap_mean": -0.05,
        "sdar/invalid_share": 0.1 / step,
        "sdar/context_share": 1.0,
        "sdar/skill_episodes/apple": 8,
        "sdar/turns": 5.0,
        "timing_s/gen": 4.0 + rng.random(),
        "timing_s/update_actor": 6.0,
        "timing_s/step": 11.0,
        "perf/total_num_tokens": 1000,
    }


def turn_row(rng, step: int, group: int, session: int, turn: int) -> dict[str, Any]:
    """One turn of a trace; texts hold what must not become markup."""
    gap = rng.normal(0.3 if session else -0.3, 1.0, len(WORDS))
    return {
        "step": step,
        "group": f"s{step}p{group}",
        "episode": f"s{step}p{group}_{session}",
        "turn": turn,
        "task_id": f"task-{group}",
        "task_type": TYPES[group],
        "task": f"put an apple in fridge {group} <script>alert(1)</script>",
        "skills": ["apple"],
        "context": "Apples are usually in the fridge. </script><b>bold</b>",
        "prompt": f"<|im_start|>user\nturn {turn}",
        "token_ids": list(range(len(WORDS))),
        "tokens": WORDS,
        "student_log_prob": [-0.5] * len(WORDS),
        "teacher_log_prob": (gap - 0.5).tolist(),
        "gap": gap.tolist(),
        "gate": (1 / (1 + np.exp(-5 * gap))).tolist(),
        "entropy": [0.7] * len(WORDS),
        "advantage": [1.0] * len(WORDS),
        "observation": "You see a fridge & a table.",
        "action": "go to fridge" if turn else None,
        "unparsed": not turn,
        "inadmissible": False,
        "truncated": False,
        "result": "The fridge is closed.",
        "reward": float(session and turn == 2),
        "episode_reward": float(session),
        "success": bool(session),
    }
