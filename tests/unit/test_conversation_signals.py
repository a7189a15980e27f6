"""Signals and metrics by turn: the same whether an episode is one row or a row per turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdar_verl.config.loss import LossConfig
from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.method import Method
from sdar_verl.observe.metrics import gap_metrics
from sdar_verl.rollout.rows import RowInfo, TurnNote
from sdar_verl.table import StepTable
from tests.support.table import make_table

EPISODES = {"u0_0": [3, 2, 4], "u0_1": [1, 5], "u1_0": [2], "u1_1": [4, 4, 1, 2]}
"""Episode -> tokens of each turn."""
GAP_TOKENS = 2
FIELDS = ("old_log_probs", TEACHER_LOG_PROBS, "advantages", "entropy")


def values(seed: int = 0) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Episode -> fields of each turn."""
    generator = torch.Generator().manual_seed(seed)

    def turn(name: str, tokens: int) -> dict[str, torch.Tensor]:
        drawn = {field: -torch.rand(tokens, generator=generator) for field in FIELDS}
        # An episode's outcome, and a penalty on one of its turns.
        return {**drawn, "advantages": torch.full((tokens,), 1.0 if name.endswith("0") else -0.5)}

    return {name: [turn(name, tokens) for tokens in lengths] for name, lengths in EPISODES.items()}


def table(rows: list[tuple[str, RowInfo, dict[str, torch.Tensor]]]) -> StepTable:
    """From (key, record, fields), and a padding row at the end."""
    empty = {name: torch.zeros_like(value) for name, value in rows[0][2].items()}
    columns = {name: [*[fields[name] for _, _, fields in rows], empty[name]] for name in empty}
    return make_table([*[key for key, _, _ in rows], "pad_0_0"], [*[info for _, info, _ in rows], None], columns)


def turn_rows() -> StepTable:
    rows = []
    for name, turns in values().items():
        for number, fields in enumerate(turns):
            ones = torch.ones(len(fields["old_log_probs"]), dtype=torch.long)
            scores = torch.zeros(len(ones))
            scores[-1] = float(name.endswith("0"))
            fields = {**fields, "response_mask": ones, "rm_scores": scores}
            rows.append((f"{name}_{number}", RowInfo(number, "t", teacher_prompt_tokens=1), fields))
    return table(rows)


def conversation_rows() -> StepTable:
    rows = []
    for name, turns in values().items():
        joined: dict[str, list[torch.Tensor]] = {field: [] for field in (*FIELDS, "response_mask")}
        notes: list[TurnNote] = []
        for number, fields in enumerate(turns):
            said = GAP_TOKENS if number else 0
            start = sum(map(len, joined["response_mask"])) + said
            tokens = len(fields["old_log_probs"])
            notes.append(TurnNote(start, start + tokens))
            for field in FIELDS:
                joined[field] += [torch.full((said,), -9.0), fields[field]]
            joined["response_mask"] += [torch.zeros(said, dtype=torch.long), torch.ones(tokens, dtype=torch.long)]
        whole: dict[str, Any] = {field: torch.cat(parts) for field, parts in joined.items()}
        whole["advantages"] = whole["advantages"] * whole["response_mask"]
        scores = torch.zeros(len(whole["response_mask"]))
        scores[-1] = float(name.endswith("0"))
        whole["rm_scores"] = scores
        rows.append((f"{name}_0", RowInfo(0, "t", turns=tuple(notes), teacher_prompt_tokens=1), whole))
    return table(rows)


def sampled(table: StepTable, of: torch.Tensor) -> torch.Tensor:
    """Values at the sampled tokens, in order of episode, turn and token."""
    return of[table.response]


SETTINGS = {
    "belief": {"signal": "advantage_factor"},
    "belief, centred": {"signal": "advantage_factor", "centre": "trajectory"},
    "shaped by turn": {"signal": "advantage_shaping", "signal_options": {"weight": "gap", "standardise": "turn"}},
    "shaped by task": {
        "signal": "advantage_shaping",
        "signal_options": {"standardise": "group"},
    },
    "pooled": {"signal": "advantage_shaping", "granularity": "turn", "centre": "batch", "clamp": 0.5},
    "re-weighted": {"signal": "advantage_weight"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_signals_change_a_conversation_as_they_change_its_turns(case):
    method = Method(LossConfig(coef=0.5, **SETTINGS[case]))
    apart, whole = turn_rows(), conversation_rows()
    assert len(apart.turns) == 11 and len(whole.turns) == 5
    changed = [sampled(rows, method.judge(rows, 0.5, 5.0).columns["advantages"]) for rows in (apart, whole)]
    assert not torch.allclose(changed[0], sampled(apart, apart.columns["advantages"]), atol=1e-3), (
        "the signal did nothing"
    )
    assert torch.allclose(changed[0], changed[1], atol=1e-6)


def test_metrics_by_turn_are_those_of_the_turns():
    apart, whole = (
        gap_metrics(
            rows.columns[TEACHER_LOG_PROBS] - rows.columns["old_log_probs"],
            rows.mask,
            rows.response,
            rows.episode_ids,
            rows.turns,
            rows.columns["entropy"],
        )
        for rows in (turn_rows(), conversation_rows())
    )
    assert {"sdar/gap_mean/first_third", "sdar/gap_mean/last_third"} <= apart.keys()
    assert whole == pytest.approx(apart)
