"""Advantages over trajectories against verl's GRPO and closed forms; RLSD's re-weighting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_verl.algorithm.advantages import (
    broadcast_to_tokens,
    rlsd_advantages,
    trajectory_group_advantages,
)

# four episodes of prompt "a" with 2, 1, 3 and 2 turns, two of prompt "b" with 1 and 2 turns
GROUPS = ["a"] * 8 + ["b"] * 3
EPISODES = [0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 5]
RETURNS = torch.tensor([10.0, 0.0, 0.0, 3.0, 0.0, 10.0])
SCORES = RETURNS[torch.tensor(EPISODES)]


def verl_grpo(scores: torch.Tensor, groups: list[str], norm_by_std: bool = True) -> torch.Tensor:
    """(rows,) advantages of verl's own GRPO for one row per sample."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    rewards = torch.zeros(len(scores), 3)
    rewards[:, -1] = scores
    advantages, _ = compute_grpo_outcome_advantage(
        token_level_rewards=rewards,
        response_mask=torch.ones(len(scores), 3),
        index=np.array(groups, dtype=object),
        norm_adv_by_std_in_grpo=norm_by_std,
    )
    return advantages[:, 0]


# group-relative advantages


@pytest.mark.parametrize("group_stats", ["episode", "turn"])
@pytest.mark.parametrize("norm_by_std", [True, False])
def test_one_row_per_episode_is_verls_grpo(group_stats: str, norm_by_std: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(13, generator=generator)
    groups = ["a", "b", "a", "c", "b", "a", "alone", "c", "b", "a", "c", "c", "c"]
    advantages, counts = trajectory_group_advantages(
        scores, groups, range(13), group_stats=group_stats, norm_by_std=norm_by_std
    )
    expected = verl_grpo(scores, groups, norm_by_std)
    expected[groups.index("alone")] = 0.0  # verl: its raw score
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)
    assert (counts.rows, counts.episodes, counts.groups, counts.groups_of_one) == (13, 13, 4, 1)


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_several_turns_count_their_episode_once(norm_by_std: bool) -> None:
    advantages, counts = trajectory_group_advantages(SCORES, GROUPS, EPISODES, norm_by_std=norm_by_std)
    per_episode = verl_grpo(RETURNS, ["a"] * 4 + ["b"] * 2, norm_by_std)
    torch.testing.assert_close(advantages, per_episode[torch.tensor(EPISODES)], rtol=1e-5, atol=1e-6)
    assert (counts.rows, counts.episodes, counts.groups) == (11, 6, 2)


def test_closed_form_for_one_success_in_four() -> None:
    advantages, _ = trajectory_group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), ["a"] * 4, range(4), epsilon=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]))  # mean 1/4, unbiased std 1/2


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_statistics_over_turns_are_verls_grpo_over_rows(norm_by_std: bool) -> None:
    advantages, _ = trajectory_group_advantages(SCORES, GROUPS, EPISODES, group_stats="turn", norm_by_std=norm_by_std)
    torch.testing.assert_close(advantages, verl_grpo(SCORES, GROUPS, norm_by_std), rtol=1e-5, atol=1e-6)
    by_episode, _ = trajectory_group_advantages(SCORES, GROUPS, EPISODES, norm_by_std=norm_by_std)
    assert (advantages - by_episode).abs().max() > 0.05


@pytest.mark.parametrize("group_stats", ["episode", "turn"])
def test_padding_rows_and_failed_rollouts_stay_out(group_stats: str) -> None:
    invalid = torch.tensor([True] + [False] * 12)
    valid = torch.tensor([True] * 13)
    valid[[2, 11, 12]] = False  # a failed rollout that was one row, and two padding rows
    scores = torch.cat([SCORES, torch.tensor([float("nan"), 1e9])])
    advantages, counts = trajectory_group_advantages(
        scores,
        [*GROUPS, "a", "pad"],
        [*EPISODES, 0, 99],
        valid,
        group_stats=group_stats,
        invalid_action=invalid | ~valid,
        invalid_action_penalty=0.1,
    )
    kept = valid.nonzero().flatten()
    expected, expected_counts = trajectory_group_advantages(
        scores[kept],
        [[*GROUPS, "a", "pad"][row] for row in kept],
        [[*EPISODES, 0, 99][row] for row in kept],
        group_stats=group_stats,
        invalid_action=invalid[kept],
        invalid_action_penalty=0.1,
    )
    assert torch.equal(advantages[kept], expected)
    assert not advantages[~valid].any()
    assert counts == expected_counts
    assert counts.episodes == 5


def test_no_valid_row_at_all() -> None:
    advantages, counts = trajectory_group_advantages(SCORES, GROUPS, EPISODES, torch.zeros(11))
    assert not advantages.any()
    assert (counts.rows, counts.episodes, counts.groups) == (0, 0, 0)


@pytest.mark.parametrize("group_stats", ["episode", "turn"])
@pytest.mark.parametrize("score", [0.0, 0.1, 10.0])
def test_a_group_without_variance_is_exactly_zero_and_counted(group_stats: str, score: float) -> None:
    scores = torch.tensor([score] * 6 + [1.0, 0.0], dtype=torch.float64)
    advantages, counts = trajectory_group_advantages(
        scores, ["flat"] * 6 + ["b"] * 2, [0, 0, 1, 2, 2, 2, 3, 4], group_stats=group_stats
    )
    assert torch.equal(advantages[:6], torch.zeros(6, dtype=torch.float64))
    assert advantages[6] > 0 > advantages[7]
    assert (counts.groups, counts.groups_without_variance) == (2, 1)


def test_sums_in_another_order_are_one_score() -> None:
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in their last digit: that is no reason to learn."""
    scores = torch.tensor([0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.6 + 1e-8], dtype=torch.float64)
    assert len(set(scores.tolist())) == 3
    advantages, counts = trajectory_group_advantages(scores, ["a"] * 3, [0, 1, 2])
    assert not advantages.any() and counts.groups_without_variance == 1


def test_whole_scores_have_advantages_with_fractions() -> None:
    advantages, _ = trajectory_group_advantages(torch.tensor([1, 0, 0]), ["a"] * 3, [0, 1, 2])
    expected, _ = trajectory_group_advantages(torch.tensor([1.0, 0.0, 0.0]), ["a"] * 3, [0, 1, 2])
    assert torch.equal(advantages, expected)


@pytest.mark.parametrize("group_stats", ["episode", "turn"])
@pytest.mark.parametrize("norm_by_std", [True, False])
@pytest.mark.parametrize("score", [10.0, -3.0, 0.0])
def test_a_survivor_of_its_group_has_nothing_to_be_compared_with(
    group_stats: str, norm_by_std: bool, score: float
) -> None:
    """Two turns of one rollout, whose three fellows failed; the other group is whole."""
    scores = torch.tensor([score, score, 0.0, 99.0, 7.0, 10.0, 0.0])
    advantages, counts = trajectory_group_advantages(
        scores,
        [*"aaaaa", *"bb"],
        [0, 0, 1, 2, 3, 4, 5],
        torch.tensor([True, True, False, False, False, True, True]),
        group_stats=group_stats,
        norm_by_std=norm_by_std,
    )
    assert not advantages[:5].any()
    assert advantages[5] > 0 > advantages[6]
    assert (counts.groups, counts.groups_of_one, counts.groups_without_variance) == (2, 1, 0)
    punished, _ = trajectory_group_advantages(
        scores[:2],
        ["a", "a"],
        [0, 0],
        group_stats=group_stats,
        norm_by_std=norm_by_std,
        invalid_action=torch.tensor([True, False]),
        invalid_action_penalty=0.1,
    )
    torch.testing.assert_close(punished, torch.tensor([-0.1, 0.0]))


# the penalty for invalid actions


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_penalty_falls_on_its_own_turn_after_normalising(norm_by_std: bool) -> None:
    invalid = torch.zeros(11)
    invalid[[1, 4]] = 1
    options = {"norm_by_std": norm_by_std}
    plain, _ = trajectory_group_advantages(SCORES, GROUPS, EPISODES, **options)
    punished, _ = trajectory_group_advantages(
        SCORES, GROUPS, EPISODES, invalid_action=invalid, invalid_action_penalty=0.1, **options
    )
    torch.testing.assert_close(punished, plain - 0.1 * invalid)


def test_penalty_acts_where_all_episodes_fail() -> None:
    options = {"invalid_action": torch.tensor([0, 1, 0, 0]), "invalid_action_penalty": 0.1}
    advantages, counts = trajectory_group_advantages(torch.zeros(4), ["a"] * 4, [0, 0, 1, 2], **options)
    torch.testing.assert_close(advantages, torch.tensor([0.0, -0.1, 0.0, 0.0]))
    assert counts.groups_without_variance == 1
    by_turn, counts = trajectory_group_advantages(
        torch.zeros(4), ["a"] * 4, [0, 0, 1, 2], group_stats="turn", epsilon=0.0, **options
    )
    # the released code's form: rewards 0, -.1, 0, 0 have mean -.025 and std .05, so the size of the penalty is lost
    torch.testing.assert_close(by_turn, torch.tensor([0.5, -1.5, 0.5, 0.5]))
    assert counts.groups_without_variance == 0


def test_penalty_over_turns_enters_the_score_first() -> None:
    invalid = torch.zeros(11)
    invalid[[1, 4, 9]] = 1
    advantages, _ = trajectory_group_advantages(
        SCORES, GROUPS, EPISODES, group_stats="turn", invalid_action=invalid, invalid_action_penalty=2.0
    )
    torch.testing.assert_close(advantages, verl_grpo(SCORES - 2.0 * invalid, GROUPS), rtol=1e-5, atol=1e-6)


# properties

episodes = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 1.0, 10.0]), st.integers(1, 5)), min_size=1, max_size=12
)


def rows_of(drawn: list[tuple[int, float, int]]) -> tuple[torch.Tensor, list[int], list[int]]:
    rows = [(score, group, episode) for episode, (group, score, turns) in enumerate(drawn) for _ in range(turns)]
    scores, groups, ids = zip(*rows, strict=True)
    return torch.tensor(scores), list(groups), list(ids)


@settings(deadline=None, max_examples=80)
@given(drawn=episodes)
def test_length_of_an_episode_does_not_matter(drawn: list[tuple[int, float, int]]) -> None:
    scores, groups, ids = rows_of(drawn)
    advantages, _ = trajectory_group_advantages(scores, groups, ids)
    per_episode, _ = trajectory_group_advantages(*rows_of([(group, score, 1) for group, score, _ in drawn]))
    assert torch.equal(advantages, per_episode[torch.tensor(ids)])


@settings(deadline=None, max_examples=80)
@given(drawn=episodes, group_stats=st.sampled_from(["episode", "turn"]), seed=st.integers(0, 1000))
def test_order_of_rows_does_not_matter(drawn: list[tuple[int, float, int]], group_stats: str, seed: int) -> None:
    scores, groups, ids = rows_of(drawn)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    invalid = torch.arange(len(scores)) % 3 == 0
    options = {"group_stats": group_stats, "invalid_action_penalty": 0.1}
    plain, counts = trajectory_group_advantages(scores, groups, ids, invalid_action=invalid, **options)
    shuffled, shuffled_counts = trajectory_group_advantages(
        scores[order], torch.tensor(groups)[order], torch.tensor(ids)[order], invalid_action=invalid[order], **options
    )
    torch.testing.assert_close(shuffled, plain[order], rtol=1e-5, atol=1e-5)
    assert shuffled_counts == counts


@settings(deadline=None, max_examples=80)
@given(drawn=episodes)
def test_episodes_of_a_group_sum_to_zero(drawn: list[tuple[int, float, int]]) -> None:
    scores, groups, ids = rows_of([(group, score, 1) for group, score, _ in drawn])
    advantages, _ = trajectory_group_advantages(scores, groups, ids)
    for group in set(groups):
        members = torch.tensor([other == group for other in groups])
        if members.sum() > 1:
            assert advantages[members].sum().item() == pytest.approx(0.0, abs=1e-5)


# bad input


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="group_stats is 'row'; known: episode"):
        trajectory_group_advantages(SCORES, GROUPS, EPISODES, group_stats="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"invalid_action_penalty is -0\.1"):
        trajectory_group_advantages(SCORES, GROUPS, EPISODES, invalid_action_penalty=-0.1)
    with pytest.raises(ValueError, match="invalid_action is not given"):
        trajectory_group_advantages(SCORES, GROUPS, EPISODES, invalid_action_penalty=0.1)


def test_bad_rows_are_named() -> None:
    with pytest.raises(ValueError, match="episode_ids has 10 entries for 11 rows"):
        trajectory_group_advantages(SCORES, GROUPS, EPISODES[:-1])
    with pytest.raises(ValueError, match=r"scores has shape \(11, 1\)"):
        trajectory_group_advantages(SCORES.unsqueeze(-1), GROUPS, EPISODES)
    broken = SCORES.clone()
    broken[7] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in valid rows \[7\]"):
        trajectory_group_advantages(broken, GROUPS, EPISODES)
    with pytest.raises(ValueError, match="episode 0 has rows in groups 'a' and 'b'"):
        trajectory_group_advantages(SCORES, GROUPS, [*EPISODES[:-1], 0])
    last_turn_only = torch.where(torch.arange(11) == 0, 0.0, SCORES)
    with pytest.raises(ValueError, match=r"episode 0 has rows with scores 0\.0 and 10\.0"):
        trajectory_group_advantages(last_turn_only, GROUPS, EPISODES)


# tokens


def test_broadcast_gives_valid_tokens_their_rows_advantage() -> None:
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0]])
    tokens = broadcast_to_tokens(torch.tensor([2.0, -1.0, 5.0]), mask)
    assert tokens.tolist() == [[2.0, 0.0, 2.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
    assert broadcast_to_tokens(torch.tensor([2.0, -1.0, 5.0]), mask.bool()).equal(tokens)


# RLSD

OLD = torch.tensor([[-1.0, -1.0, -1.0, -1.0, -1.0]])


def test_rlsd_in_closed_form() -> None:
    teacher = OLD + torch.tensor([[0.1, -0.1, 3.0, -3.0, 0.0]])
    mask = torch.ones(1, 5)
    up, down = math.exp(0.1), math.exp(-0.1)
    positive = rlsd_advantages(torch.full((1, 5), 2.0), OLD, teacher, mask)
    torch.testing.assert_close(positive, 2 * (0.5 + 0.5 * torch.tensor([[up, down, 1.2, 0.8, 1.0]])))
    negative = rlsd_advantages(torch.full((1, 5), -2.0), OLD, teacher, mask)
    torch.testing.assert_close(negative, -2 * (0.5 + 0.5 * torch.tensor([[down, up, 0.8, 1.2, 1.0]])))
    wide = rlsd_advantages(torch.full((1, 5), 2.0), OLD, teacher, mask, mix=1.0, clip=0.5)
    torch.testing.assert_close(wide, 2 * torch.tensor([[up, down, 1.5, 0.5, 1.0]]))


def test_rlsd_with_mix_zero_or_advantage_zero_changes_nothing() -> None:
    advantages = torch.tensor([[1.0, -1.0, 0.0, 2.0, 0.0]])
    teacher = OLD + torch.tensor([[1.0, 1.0, 1.0, -1.0, -800.0]])
    assert torch.equal(rlsd_advantages(advantages, OLD, teacher, torch.ones(1, 5), mix=0.0), advantages)
    changed = rlsd_advantages(advantages, OLD, teacher, torch.ones(1, 5))
    assert torch.equal(changed != advantages, advantages != 0)


def test_rlsd_respects_masks_and_carries_no_gradient() -> None:
    nan = float("nan")
    advantages = torch.tensor([[1.0, 1.0, nan], [-1.0, -1.0, 7.0]])
    old = torch.tensor([[-1.0, -1.0, nan], [nan, -1.0, nan]], requires_grad=True)
    teacher = torch.tensor([[-0.9, -1.1, nan], [nan, nan, nan]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    result = rlsd_advantages(advantages, old, teacher, mask, distill_mask=torch.tensor([True, False]))
    expected = [[0.5 + 0.5 * math.exp(0.1), 0.5 + 0.5 * math.exp(-0.1), 0.0], [-1.0, -1.0, 0.0]]
    torch.testing.assert_close(result, torch.tensor(expected))
    assert not result.requires_grad
    with pytest.raises(ValueError, match=r"teacher_log_probs holds NaN .* rows: 1\."):
        rlsd_advantages(advantages, old, teacher, mask)


@pytest.mark.parametrize(("name", "value"), [("mix", -0.1), ("mix", 1.1), ("clip", -0.1), ("clip", 1.0)])
def test_rlsd_options_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        rlsd_advantages(torch.ones(1, 5), OLD, OLD, torch.ones(1, 5), **{name: value})


finite = st.lists(st.floats(-1e4, 0.0, width=32), min_size=5, max_size=5)


@settings(deadline=None, max_examples=80)
@given(
    advantage=st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5),
    old=finite,
    teacher=finite,
    mix=st.floats(0.0, 1.0),
    clip=st.floats(0.0, 0.99),
)
def test_rlsd_factor_is_bounded_and_never_turns_the_sign(advantage, old, teacher, mix, clip) -> None:  # type: ignore[no-untyped-def]
    before = torch.tensor([advantage], dtype=torch.float64)
    log_probs = [torch.tensor([values], dtype=torch.float64) for values in (old, teacher)]
    after = rlsd_advantages(before, *log_probs, torch.ones(1, 5), mix=mix, clip=clip)
    slack = 1e-9 * before.abs()
    assert (after.sign() == before.sign()).all()
    assert (after.abs() <= before.abs() * (1 + mix * clip) + slack).all()
    assert (after.abs() >= before.abs() * (1 - mix * clip) - slack).all()


def test_one_sided_rlsd_only_adds_or_only_takes_away() -> None:
    base, old = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.zeros(1, 4)
    teacher, on = torch.tensor([[0.1, -0.1, 0.1, -0.9]]), torch.ones(1, 4)
    adds = rlsd_advantages(base, old, teacher, on, mix=1.0, clip=0.2, clip_low=0.0)
    torch.testing.assert_close(adds, torch.tensor([[math.exp(0.1), 1.0, -1.0, -1.2]]))
    takes = rlsd_advantages(base, old, teacher, on, mix=1.0, clip=0.0, clip_low=0.05)
    torch.testing.assert_close(takes, torch.tensor([[1.0, 0.95, -0.95, -1.0]]))
    with pytest.raises(ValueError, match=r"clip_low is 1.0; it must lie in \[0, 1\)"):
        rlsd_advantages(base, old, teacher, on, clip_low=1.0)
