"""Signals that re-weight or shape advantages: brute force, the equivalence with the loss, what never changes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sdar_verl.algorithm.advantages import rlsd_advantages
from sdar_verl.algorithm.signals import (
    _SIGNALS,
    SignalRows,
    check_signal,
    get_signal,
    list_signals,
    register_signal,
    signal_reads,
    teacher_value,
)
from sdar_verl.verl.scalar_loss import gated_distillation_loss

EPISODES = ["a", "b", "a", "b", "a", "c"]
GROUPS = ["g", "g", "g", "g", "g", "h"]
TURNS = [1, 0, 0, 1, 2, 0]
LENGTH = 4


def make_rows(seed: int = 0, **changes: object) -> SignalRows:
    """Episode a: three turns that succeed; b: two that fail, one without a teacher; c: alone in its group."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return -torch.rand(6, LENGTH, generator=generator, dtype=torch.float64)

    response = torch.arange(LENGTH) < torch.tensor([4, 3, 2, 4, 1, 3]).unsqueeze(-1)
    mask = response & torch.tensor([1, 1, 1, 0, 1, 1]).bool().unsqueeze(-1)
    old, teacher = draw() * mask, 2 * draw() * mask
    gap = teacher - old
    per_episode = {"a": 1.2, "b": -0.8, "c": 0.3}
    advantages = torch.tensor([[per_episode[name]] for name in EPISODES], dtype=torch.float64) * response
    values: dict[str, object] = {
        "advantages": advantages,
        "response_mask": response,
        "mask": mask,
        "old_log_probs": old,
        "teacher_log_probs": teacher,
        "gap": gap,
        "gate": torch.sigmoid(5.0 * gap) * mask,
        "episode_ids": EPISODES,
        "group_ids": GROUPS,
        "turns": TURNS,
        "scores": torch.tensor([10.0, 0.0, 10.0, 0.0, 10.0, 10.0]),
    }
    return SignalRows(**{**values, **changes})  # type: ignore[arg-type]


def apply(name: str, rows: SignalRows, strength: float = 0.5, **options: object) -> torch.Tensor:
    return get_signal(name)(rows, strength=strength, **options)


def test_the_loss_leaves_advantages_alone() -> None:
    rows = make_rows()
    assert apply("loss", rows) is rows.advantages


@pytest.mark.parametrize("name", ["advantage_weight", "advantage_factor", "advantage_shaping"])
def test_strength_zero_and_rows_without_a_teacher_keep_their_advantages(name: str) -> None:
    rows = make_rows()
    assert torch.equal(apply(name, rows, strength=0.0), rows.advantages)
    changed = apply(name, rows)
    assert torch.equal(changed[3], rows.advantages[3])
    assert not changed[~rows.response_mask].any()
    assert (changed - rows.advantages)[rows.mask].abs().max() > 1e-3


def test_advantage_weight_is_rlsd() -> None:
    rows = make_rows()
    expected = rlsd_advantages(
        rows.advantages,
        rows.old_log_probs,
        rows.teacher_log_probs,
        rows.response_mask,
        mix=0.5,
        clip=0.3,
        distill_mask=rows.mask,
    )
    torch.testing.assert_close(apply("advantage_weight", rows, clip=0.3), expected)


def belief_factors(gaps: list[float], sign: float, *, band: float, prior: float) -> list[float]:
    """AgentOPSD's factor per turn, in plain Python."""
    logit, beliefs = math.log(prior / (1 - prior)), [prior]
    for gap in gaps:
        logit += gap
        beliefs.append(1 / (1 + math.exp(-logit)))
    moves = [after - before for before, after in pairwise(beliefs)]
    mean = sum(moves) / len(moves)
    std = math.sqrt(sum((move - mean) ** 2 for move in moves) / len(moves))
    return [min(max(1 + band * sign * (move - mean) / (std + 1e-6), 1 - band), 1 + band) for move in moves]


@pytest.mark.parametrize("prior", [0.5, 0.2])
def test_advantage_factor_is_the_belief_recursion(prior: float) -> None:
    rows = make_rows()
    result = apply("advantage_factor", rows, strength=0.5, band=0.2, prior=prior)
    in_order = {"a": [2, 0, 4], "b": [1], "c": [5]}  # rows of the judged turns; row 3 has no teacher
    for members in in_order.values():
        gaps = [rows.gap[row].sum().item() for row in members]
        sign = math.copysign(1.0, rows.advantages[members[0], 0].item())
        for row, factor in zip(members, belief_factors(gaps, sign, band=0.2, prior=prior), strict=True):
            expected = rows.advantages[row] * (0.5 + 0.5 * factor)
            torch.testing.assert_close(result[row], expected)


def test_advantage_factor_is_the_same_for_turns_in_rows_and_turns_in_one_conversation() -> None:
    generator = torch.Generator().manual_seed(5)
    gaps = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    on = torch.ones(3, 2, dtype=torch.bool)

    def made(gap: torch.Tensor, mask: torch.Tensor, turns: list[int]) -> SignalRows:
        same = dict.fromkeys(("old_log_probs", "teacher_log_probs", "gap", "gate"), gap)
        ids = {name: ["e"] * len(gap) for name in ("episode_ids", "group_ids")}
        advantages = mask.double()
        return make_rows(
            **same, **ids, advantages=advantages, mask=mask, response_mask=mask, turns=turns, scores=gap[:, 0]
        )

    split = apply("advantage_factor", made(gaps[[1, 0, 2]], on, [1, 0, 2]))[[1, 0, 2]]
    conversation = torch.zeros(1, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1]]).bool()
    conversation[mask] = gaps.flatten()
    whole = apply("advantage_factor", made(conversation, mask, [0]))
    torch.testing.assert_close(whole[mask], split.flatten())


def test_advantage_factor_rewards_the_turn_that_moved_the_belief_with_the_outcome() -> None:
    response = torch.ones(2, 1, dtype=torch.bool)
    for outcome in (1.0, -1.0):
        rows = make_rows(
            advantages=torch.full((2, 1), outcome),
            response_mask=response,
            mask=response,
            old_log_probs=torch.zeros(2, 1),
            teacher_log_probs=torch.zeros(2, 1),
            gap=torch.tensor([[1.0], [-1.0]]),
            gate=torch.zeros(2, 1),
            episode_ids=["e", "e"],
            group_ids=["g", "g"],
            turns=[0, 1],
            scores=torch.zeros(2),
        )
        for evidence in ("belief", "gap"):
            towards, away = apply("advantage_factor", rows, strength=1.0, evidence=evidence).flatten().tolist()
            assert abs(towards) == pytest.approx(1.2 if outcome > 0 else 0.8, abs=1e-5)
            assert abs(away) == pytest.approx(0.8 if outcome > 0 else 1.2, abs=1e-5)


def test_shaping_by_the_gate_has_the_gradient_of_the_auxiliary_loss() -> None:
    """ADRS's equivalence: -sum (A + lambda g) grad log pi is the gradient of both losses together, on-policy."""
    rows = make_rows()
    student = rows.old_log_probs.clone().requires_grad_()
    distillation, _ = gated_distillation_loss(
        student, rows.teacher_log_probs, rows.response_mask, distill_mask=rows.mask
    )
    tokens = rows.response_mask.sum()
    reinforce = -(rows.advantages * torch.where(rows.response_mask, student, 0.0)).sum() / tokens
    (both,) = torch.autograd.grad(reinforce + 0.3 * distillation, student)
    shaped = apply("advantage_shaping", rows, strength=0.3)
    (alone,) = torch.autograd.grad(-(shaped * torch.where(rows.response_mask, student, 0.0)).sum() / tokens, student)
    torch.testing.assert_close(alone, both)


def test_shaping_by_standardised_teacher_log_probs_adds_a_unit_variance_per_turn() -> None:
    rows = make_rows()
    change = apply("advantage_shaping", rows, strength=1.0, weight="teacher", standardise="turn") - rows.advantages
    for row in (0, 1, 2, 5):
        values = rows.teacher_log_probs[row][rows.mask[row]]
        expected = (values - values.mean()) / values.std(unbiased=False)
        torch.testing.assert_close(change[row][rows.mask[row]], expected, rtol=1e-5, atol=1e-6)
    assert change[4].abs().max() < 1e-6  # a single token has nothing to be compared with


def test_shaping_over_the_group_has_mean_zero_and_variance_one_there() -> None:
    rows = make_rows()
    change = apply("advantage_shaping", rows, strength=1.0, weight="gap", standardise="group") - rows.advantages
    inside = rows.mask & torch.tensor([name == "g" for name in GROUPS]).unsqueeze(-1)
    assert change[inside].mean().item() == pytest.approx(0.0, abs=1e-9)
    assert change[inside].std(unbiased=False).item() == pytest.approx(1.0)


def test_shaping_is_clipped() -> None:
    rows = make_rows()
    change = apply("advantage_shaping", rows, strength=5.0, weight="gap", clip=0.2) - rows.advantages
    assert change.abs().max().item() == pytest.approx(0.2)


def test_shaping_can_leave_tasks_without_an_advantage_alone() -> None:
    rows = make_rows()
    advantages = rows.advantages * torch.tensor([name == "g" for name in GROUPS]).unsqueeze(-1)
    rows = make_rows(advantages=advantages)
    everywhere, elsewhere = (apply("advantage_shaping", rows, flat_groups=choice) for choice in (True, False))
    alone = GROUPS.index("h")
    assert (everywhere - advantages)[alone].abs().max() > 0.1
    assert torch.equal(elsewhere[alone], advantages[alone])
    assert torch.equal(elsewhere[:alone], everywhere[:alone])


def test_teacher_value_is_positive_where_the_teacher_likes_what_succeeded() -> None:
    """Two rows per task, one solved: brute force of E[R | agrees] - E[R | does not]."""
    liked, disliked = -0.1, -3.0
    likes_success = torch.tensor([[liked], [disliked], [disliked], [liked]])
    response = torch.ones(4, 1, dtype=torch.bool)
    rows = make_rows(
        advantages=torch.zeros(4, 1),
        response_mask=response,
        mask=response,
        old_log_probs=torch.zeros(4, 1),
        teacher_log_probs=likes_success,
        gap=likes_success,
        gate=torch.zeros(4, 1),
        episode_ids=["a", "b", "c", "d"],
        group_ids=["g", "g", "h", "h"],
        turns=[0] * 4,
        scores=torch.tensor([1.0, 0.0, 1.0, 0.0]),
    )
    middle = (liked + disliked) / 2
    high, low = (1 / (1 + math.exp(-(value - middle))) for value in (liked, disliked))
    expected = high / (high + low) - (1 - high) / (2 - high - low)
    torch.testing.assert_close(
        teacher_value(rows), torch.tensor([expected, expected, -expected, -expected], dtype=torch.float64)
    )
    shaped = apply("advantage_shaping", rows, strength=1.0, weight="teacher", reliability="group")
    gates = [1 / (1 + math.exp(-2.0 * value)) for value in (expected, expected, -expected, -expected)]
    torch.testing.assert_close(shaped, likes_success * torch.tensor(gates).unsqueeze(-1))


def test_teacher_value_without_a_difference_in_return_is_zero() -> None:
    rows = make_rows(scores=torch.full((6,), 10.0))
    torch.testing.assert_close(teacher_value(rows), torch.zeros(6, dtype=torch.float64), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    gap=arrays("float64", (6, LENGTH), elements=st.floats(-1e4, 1e4)),
    advantages=arrays("float64", (6, 1), elements=st.floats(-10.0, 10.0)),
    name=st.sampled_from(["advantage_weight", "advantage_factor"]),
    strength=st.floats(0.0, 1.0),
)
def test_bounded_signals_keep_the_sign_and_stay_in_their_band(gap, advantages, name, strength) -> None:  # type: ignore[no-untyped-def]
    rows = make_rows()
    base = torch.from_numpy(advantages) * rows.response_mask
    rows = make_rows(gap=torch.from_numpy(gap) * rows.mask, advantages=base)
    result = apply(name, rows, strength=strength)
    assert torch.isfinite(result).all()
    assert ((result - base).abs() <= 0.2 * strength * base.abs() + 1e-9).all()
    assert torch.equal(result.sign(), base.sign())


@pytest.mark.parametrize(
    ("name", "strength", "options", "words"),
    [
        ("reward", 0.5, {}, "unknown signal 'reward'; known: .*advantage_weight.*loss"),
        ("loss", 0.5, {"clip": 0.2}, "signal 'loss' has no option 'clip'; known: none"),
        ("advantage_weight", 0.5, {"band": 0.2}, "signal 'advantage_weight' has no option 'band'; known: clip"),
        ("advantage_weight", 1.5, {}, "mix is 1.5"),
        ("advantage_factor", 1.5, {}, "strength 1.5"),
        ("advantage_factor", 0.5, {"band": 1.0}, "band=1.0"),
        ("advantage_factor", 0.5, {"prior": 0.0}, "prior=0.0"),
        ("advantage_factor", 0.5, {"evidence": "log"}, "evidence='log'; known: belief, gap"),
        ("advantage_shaping", 0.5, {"weight": "ref"}, "weight='ref'; known: gate, gap, teacher"),
        ("advantage_shaping", 0.5, {"standardise": "row"}, "standardise='row'; known: none, turn, group"),
        ("advantage_shaping", 0.5, {"reliability": "yes"}, "reliability='yes'; known: none, group"),
        ("advantage_shaping", 0.5, {"clip": 0}, "clip=0"),
    ],
)
def test_wrong_options_are_named(name: str, strength: float, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_signal(name, strength, options)


def test_own_signal_is_selectable_and_says_what_it_reads() -> None:
    @register_signal("doubled_in_a_test", reads=("gap",))
    def doubled(rows: SignalRows, *, strength: float) -> torch.Tensor:
        return rows.advantages * (1.0 + strength)

    try:
        assert torch.equal(apply("doubled_in_a_test", make_rows(), strength=1.0), 2 * make_rows().advantages)
        assert "doubled_in_a_test" in list_signals()
        reads = [what for what in ("gap", "gate", "loss") if signal_reads("doubled_in_a_test", what, {})]
        assert reads == ["gap"]
    finally:
        del _SIGNALS._entries["doubled_in_a_test"]
    assert signal_reads("advantage_shaping", "gate", {})
    assert not signal_reads("advantage_shaping", "gate", {"weight": "gap"})
