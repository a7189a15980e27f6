"""Seconds that this package takes in the trainer's process for one step, without a model, against the number of rows.

    python -m benchmarks.driver [--rows 1600 3200 6400] [--tokens 150] [--prompt 1000] [--rounds 3]

A made-up step: groups of 8 episodes of up to 20 turns, a row per turn, log-probs drawn at random; rows lie in this
process, so verl's queue costs nothing. What :func:`sdar_verl.step.local_update` and the observers do of their own is
timed: records, the teacher's deal of rows to ranks, the read of the table, finite numbers, advantages, gate, gap and
signals, metrics, distributions. Prompts lie beside the rows, but nothing here reads them: neither does the trainer.
CPU seconds, the least of the rounds.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from benchmarks.common import cost, machine, table
from sdar_verl.config import load_config
from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.finite import UPDATE_COLUMNS, check_rows, check_teacher
from sdar_verl.method import Method
from sdar_verl.observe.metrics import gap_metrics, row_metrics
from sdar_verl.observe.record import distilled_tokens
from sdar_verl.report.distributions import token_distributions
from sdar_verl.rollout.rows import ROW_KEY, EpisodeNote, RowInfo
from sdar_verl.table import StepTable

TURNS, GROUP, RANKS = 20, 8, 8


class InMemory:
    """The rows of a step, without verl's queue."""

    batch = None

    def __init__(self, keys: list[str], columns: dict[str, torch.Tensor]):
        self.keys, self._columns = keys, columns

    def read(self, names: Any) -> TensorDict:
        found = {name: self._columns[name] for name in names if name in self._columns}
        return TensorDict(found, batch_size=len(self.keys))

    def write(self, columns: dict[str, torch.Tensor]) -> None:
        self._columns.update(columns)


def made_up(rows: int, tokens: int, prompt: int) -> tuple[list[str], list[dict], dict[str, torch.Tensor]]:
    """verl's keys, the agent loop's records as they are stored, and the columns."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    keys, extras = [], []
    while len(keys) < rows:
        for session in range(GROUP):
            turns = rng.randint(TURNS // 2, TURNS)
            for turn in range(min(turns, rows - len(keys))):
                info = RowInfo(turn, "pick", task_id="task", observation="You see a desk.", prompt_tokens=prompt)
                info.teacher_prompt_tokens = prompt + 900
                if turn == 0:
                    info.episode = EpisodeNote({"task_id": "task"}, reward=float(session % 2))
                keys.append(f"s{len(keys):06d}_{session}_{turn}")
                extras.append({ROW_KEY: info.as_dict()})
    lengths = [rng.randint(tokens // 2, 3 * tokens // 2) for _ in keys]

    def column(make: Any) -> torch.Tensor:
        return torch.nested.as_nested_tensor([make(length) for length in lengths], layout=torch.jagged)

    def drawn(scale: float) -> Any:
        return lambda length: -scale * torch.rand(length, generator=generator)

    scores = column(lambda length: torch.zeros(length))
    return (
        keys,
        extras,
        {
            "response_mask": column(lambda length: torch.ones(length, dtype=torch.int64)),
            "rm_scores": scores,
            "old_log_probs": column(drawn(1.0)),
            "rollout_log_probs": column(drawn(1.0)),
            "ref_log_prob": column(drawn(1.0)),
            "entropy": column(drawn(-1.0)),
            TEACHER_LOG_PROBS: column(drawn(1.2)),
        },
    )


def a_step(keys: list[str], extras: list[dict], columns: dict[str, torch.Tensor], signal: str) -> None:
    """What the trainer's process does of ours."""
    from sdar_verl.step import TABLE_COLUMNS
    from sdar_verl.verl.advantage import AdvantageRows, advantage_rows, compute_sdar_advantage
    from sdar_verl.verl.queue import row_id
    from sdar_verl.verl.teacher import balanced_order

    settings = load_config({"loss": {"signal": signal, "granularity": "trajectory", "centre": "trajectory"}})
    order = sorted(range(len(keys)), key=lambda i: row_id(keys[i]))
    infos = [RowInfo.from_extra_fields(extras[i]) for i in order]
    one = StepTable(1, InMemory(keys, dict(columns)), [row_id(key) for key in keys], infos)
    row_metrics(one)
    lengths = [0 if info is None else (info.teacher_prompt_tokens or 0) for info in one.infos]
    balanced_order(lengths, RANKS)
    one.read([*TABLE_COLUMNS, TEACHER_LOG_PROBS])
    check_rows(one, UPDATE_COLUMNS, "drop", 0)
    check_teacher(one, "drop")
    with advantage_rows(AdvantageRows.of(settings.advantage, one)) as rows:
        index = np.array(one.group_ids)
        compute_sdar_advantage(one.columns["rm_scores"], one.response, OmegaConf.create({}), index)
    one.columns["advantages"] = rows.advantages
    judged = Method(settings.loss).judge(one, 0.5, 5.0)
    gap = one.columns[TEACHER_LOG_PROBS] - one.columns["old_log_probs"]
    gap_metrics(gap, one.mask, one.response, one.episode_ids, one.turns, one.columns["entropy"])
    one.columns |= {"gap": judged.gap, "gate": judged.gate}
    one.write(judged.columns)
    token_distributions(distilled_tokens(one), 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1600, 3200, 6400])
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(machine("torch", "verl"))
    lines = []
    for rows in options.rows:
        step = made_up(rows, options.tokens, options.prompt)
        for signal in ("loss", "advantage_factor"):
            seconds = min(cost(lambda: a_step(*step, signal)).cpu for _ in range(options.rounds))  # noqa: B023
            lines.append([rows, signal, f"{seconds:.2f}", f"{1000 * seconds / rows:.3f}"])
    print(table(["rows", "signal", "CPU seconds", "ms per row"], lines))


if __name__ == "__main__":
    main()
