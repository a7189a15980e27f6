"""Signals and metrics by turn: the same whether an episode is one row or a row per turn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from sdar_verl.config import LossConfig
from sdar_verl.observe.distillation import StepTable
from sdar_verl.rollout.rows import RowInfo, TurnNote
from sdar_verl.fields import TEACHER_ENTROPY, TEACHER_LOG_PROBS, TEACHER_MASK

EPISODES = {"u0_0": [3, 2, 4], "u0_1": [1, 5], "u1_0": [2], "u1_1": [4, 4, 1, 2]}
"""Episode -> tokens of each turn."""
GAP_TOKENS = 2
FIELDS = ("old_log_probs", TEACHER_LOG_PROBS, "advantages", "entropy", TEACHER_ENTROPY)


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
    length = len(rows[0][2]["old_log_probs"])
    empty = {name: torch.zeros(length).to(value.dtype) for name, value in rows[0][2].items()}
    rows = [*rows, ("pad_0_0", None, empty)]  # type: ignore[list-item]
    names = rows[0][2].keys()
    columns = {
        name: torch.nested.as_nested_tensor([row[2][name] for row in rows], layout=torch.jagged) for name in names
    }
    batch = SimpleNamespace(keys=[row[0] for row in rows])
    stored = TensorDict(columns, batch_size=len(rows))
    return StepTable.from_rows(stored, SimpleNamespace(batch=batch, infos=[row[1] for row in rows]))  # type: ignore[arg-type]


def turn_rows() -> StepTable:
    rows = []
    for name, turns in values().items():
        for number, fields in enumerate(turns):
            ones = torch.ones(len(fields["old_log_probs"]), dtype=torch.long)
            scores = torch.zeros(len(ones))
            scores[-1] = float(name.endswith("0"))
            fields = {**fields, "response_mask": ones, TEACHER_MASK: ones, "rm_scores": scores}
            rows.append((f"{name}_{number}", RowInfo(number, "t"), fields))
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
        whole |= {TEACHER_MASK: whole["response_mask"], "rm_scores": scores}
        rows.append((f"{name}_0", RowInfo(0, "t", turns=tuple(notes)), whole))
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
    settings = LossConfig(coef=0.5, **SETTINGS[case])
    apart, whole = turn_rows(), conversation_rows()
    assert len(apart.turns) == 11 and len(whole.turns) == 5
    changed = [
        sampled(rows, rows.shape_advantages(settings, 0.5, 5.0, rows.statistics(settings, 5.0)))
        for rows in (apart, whole)
    ]
    assert not torch.allclose(changed[0], sampled(apart, apart.advantages), atol=1e-3), "the signal did nothing"
    assert torch.allclose(changed[0], changed[1], atol=1e-6)


def test_metrics_by_turn_are_those_of_the_turns():
    apart, whole = turn_rows().metrics(), conversation_rows().metrics()
    assert {"sdar/gap_mean/first_third", "sdar/gap_mean/last_third"} <= apart.keys()
    assert whole == pytest.approx(apart)
