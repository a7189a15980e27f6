"""Signals per turn, by brute force and against the released function: GRSD, OCSD; AHEAD's and OPID's presets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_verl.algorithm.signals import SignalRows, get_signal
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.method import Strengths

RELEASED = json.loads((Path(__file__).parents[1] / "data" / "released_family.json").read_text())["cases"]


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows_of(advantages: torch.Tensor, response: torch.Tensor, gap: torch.Tensor, **given: Any) -> SignalRows:
    rows = len(response)
    mask = given.pop("mask", response)
    values: dict[str, Any] = {
        "old_log_probs": torch.zeros_like(gap),
        "teacher_log_probs": gap,
        "gate": torch.zeros_like(gap),
        "episode_ids": [str(row) for row in range(rows)],
        "group_ids": ["g"] * rows,
        "turns": [0] * rows,
        "scores": torch.arange(rows).double(),
        **given,
    }
    return SignalRows(advantages=advantages, response_mask=response, mask=mask, gap=gap * mask, **values)


@pytest.mark.parametrize("case", RELEASED)
@pytest.mark.parametrize("clip", [0.2, 3.0])
def test_grsds_advantages_are_the_released_functions(case: dict[str, Any], clip: float) -> None:
    response = tensor(case["mask"]).bool()
    # Its caller marks the groups with both outcomes; here the returns say it.
    scores = [10.0 * ((row % 2) == 0) if mixed else 10.0 for row, mixed in enumerate(case["mixed"])]
    lone = len(case["mixed"]) % 2 and case["mixed"][-1]
    rows = rows_of(
        tensor(case["advantages"]),
        response,
        tensor(case["teacher"]) - tensor(case["old"]),
        group_ids=case["groups"],
        scores=tensor(scores),
    )
    ours = get_signal("advantage_turn_weight")(rows, strength=0.5, clip=clip)
    keep = slice(0, len(response) - 1 if lone else None)  # a group of one row has one outcome, whatever its mark
    torch.testing.assert_close(ours[keep], tensor(case["grsd"][str(clip)])[keep], rtol=1e-6, atol=1e-9)
    assert (ours - rows.advantages)[keep].abs().max() > 1e-3


def grsd(gaps: list[list[float]], signs: list[float], clip: float) -> list[float]:
    """Factors of a mixed group's turns, in plain Python."""
    q = [math.expm1(sign * sum(gap) / len(gap)) for gap, sign in zip(gaps, signs, strict=True)]
    mean = sum(map(abs, q)) / len(q)
    return [max(0.1, 1 + 0.5 * max(-clip, min(clip, value / (mean + 1e-6)))) for value in q]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_turns_in_rows_and_turns_in_a_conversation_weigh_the_same(data: st.DataObject) -> None:
    """Three turns of two tokens, as three rows or as one row with observations between them."""
    numbers = st.floats(-1.0, 1.0)
    gaps = [[data.draw(numbers), data.draw(numbers)] for _ in range(6)]
    signs = [1.0] * 3 + [-1.0] * 3
    on = torch.ones(6, 2, dtype=torch.bool)
    base = tensor(signs).unsqueeze(-1) * on
    scores = tensor([1.0] * 3 + [0.0] * 3)
    apart = get_signal("advantage_turn_weight")(rows_of(base, on, tensor(gaps), scores=scores), strength=0.5)
    expected = tensor(grsd(gaps, signs, 0.2)) * tensor(signs)
    torch.testing.assert_close(apart[:, 0], expected)
    response = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1]] * 2).bool()
    gap = torch.zeros(2, 8, dtype=torch.float64)
    gap[response] = tensor(gaps).flatten()
    whole = get_signal("advantage_turn_weight")(
        rows_of(tensor([[1.0], [-1.0]]) * response, response, gap, scores=tensor([1.0, 0.0])), strength=0.5
    )
    torch.testing.assert_close(whole[response], apart.flatten())


def test_a_group_of_one_outcome_and_turns_without_a_teacher_keep_their_advantages() -> None:
    on = torch.ones(4, 3, dtype=torch.bool)
    base, gap = tensor([[1.0], [-1.0], [0.5], [0.5]]) * on, torch.rand(4, 3).double()
    groups, mask = ["a", "a", "b", "b"], on & torch.tensor([[1], [0], [1], [1]]).bool()
    rows = rows_of(base, on, gap, mask=mask, group_ids=groups, scores=tensor([10.0, 0.0, 10.0, 10.0]))
    found = get_signal("advantage_turn_weight")(rows, strength=0.5, clip=3.0)
    assert torch.equal(found[1:], base[1:])
    # The one judged turn of its group is its own mean: z is 1 but for epsilon.
    torch.testing.assert_close(found[0], base[0] * 1.5, rtol=1e-4, atol=0.0)


def test_a_row_that_was_taken_out_has_not_lost() -> None:
    response = torch.ones(3, 2, dtype=torch.bool)
    base, gap = torch.full((3, 2), 0.7).double(), torch.rand(3, 2).double()
    response[2] = False
    rows = rows_of(base * response, response, gap, scores=tensor([10.0, 10.0, 0.0]))
    assert torch.equal(get_signal("advantage_turn_weight")(rows, strength=0.5), base * response)


def test_a_tilt_gives_credit_to_what_the_teacher_likes_and_keeps_the_sign() -> None:
    base, gap = tensor([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]]), tensor([[1.0, 0.0, -9.0]] * 3)
    on = torch.ones(3, 3, dtype=torch.bool)
    mask = on & tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    found = get_signal("advantage_tilt")(rows_of(base, on, gap, mask=mask), strength=0.5)
    tilt = math.tanh(0.5)
    expected = [2 * (1 + tilt / 2), 2.0, 2 * (1 + math.tanh(-4.5) / 2)], [-(1 - tilt / 2), -1.0, -1.0], [0.0, 0.0, 0.0]
    torch.testing.assert_close(found, tensor(expected))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("advantage_turn_weight", {"clip": 0.0}, "clip=0.0; it must be above 0"),
        ("advantage_turn_weight", {"floor": 1.5}, r"floor=1.5; it must lie in \[0, 1\]"),
        ("advantage_tilt", {"strength": 1.5}, r"strength 1.5; it must lie in \[0, 1\]"),
    ],
)
def test_an_option_out_of_range_is_named(name: str, options: dict[str, float], text: str) -> None:
    on = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"{name} has {text}"):
        get_signal(name)(rows_of(torch.zeros(1, 1), on, torch.zeros(1, 1)), **{"strength": 0.5, **options})


def test_aheads_preset_is_its_equation_and_fades_out() -> None:
    sdar = load_config(compose_config("sdar_quickstart", ["method=ahead"]).sdar)
    strengths = Strengths(sdar.loss)
    assert [strengths.at(k).coef for k in (1, 25, 49)] == pytest.approx([0.5 * (1 - k / 50) for k in (1, 25, 49)])
    assert strengths.at(50).coef == 0.0 and strengths.retired(50)
    on = torch.ones(2, 3, dtype=torch.bool)
    gap = tensor([[0.1, -0.9, 0.3]] * 2)
    base = tensor([[-1.0], [0.7]]) * on
    failed = on & torch.tensor([[1], [0]]).bool()  # the success has no teacher
    found = get_signal(sdar.loss.signal)(rows_of(base, on, gap, mask=failed), strength=0.3, **sdar.loss.signal_options)
    expected = [-(0.7 + 0.3 * min(max(math.exp(-value), 0.8), 1.2)) for value in (0.1, -0.9, 0.3)]
    torch.testing.assert_close(found, tensor([expected, [0.7] * 3]))


def test_opids_preset_adds_the_plain_gap() -> None:
    sdar = load_config(compose_config("sdar_quickstart", ["method=opid"]).sdar)
    on, gap = torch.ones(2, 2, dtype=torch.bool), tensor([[3.0, -4.0], [0.5, 0.0]])
    base = tensor([[0.0, 0.0], [1e-4, 1e-4]])
    found = get_signal(sdar.loss.signal)(
        rows_of(base, on, gap), strength=Strengths(sdar.loss).at(9).coef, **sdar.loss.signal_options
    )
    torch.testing.assert_close(found, base + 0.001 * gap)
