"""Distributions against brute force."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sdar_verl.report.distributions import GAP_EDGES, Tokens, pool, reward_statistics, token_distributions


def tokens(seed=0, size=500, turns=5, kl=True) -> Tokens:
    rng = np.random.default_rng(seed)
    gap = rng.normal(-0.1, 2.0, size)
    return Tokens(
        gap=gap,
        gate=1 / (1 + np.exp(-5 * gap)),
        turn=rng.integers(0, turns, size),
        position=rng.integers(0, 64, size),
        kl=rng.random(size) if kl else None,
    )


def test_means_by_turn_are_those_of_the_turns_tokens():
    given = tokens()
    by_turn = token_distributions(given, 64)["by_turn"]
    assert by_turn["index"] == [0, 1, 2, 3, 4]
    for turn, count, gap, size, gate, kl in zip(
        *(by_turn[name] for name in ("index", "tokens", "gap", "abs_gap", "gate", "kl")), strict=True
    ):
        mine = given.turn == turn
        assert count == mine.sum()
        assert gap == pytest.approx(given.gap[mine].mean(), abs=1e-4)
        assert size == pytest.approx(np.abs(given.gap[mine]).mean(), rel=1e-4)
        assert gate == pytest.approx(given.gate[mine].mean(), rel=1e-4)
        assert kl == pytest.approx(given.kl[mine].mean(), rel=1e-4)


@pytest.mark.parametrize(("longest", "width"), [(20, 1), (64, 2), (512, 16), (513, 17)])
def test_positions_fall_into_at_most_32_bins(longest, width):
    given = Tokens(*(np.zeros(longest) for _ in range(2)), np.zeros(longest, int), np.arange(longest))
    by_position = token_distributions(given, longest)["by_position"]
    assert by_position["width"] == width
    assert len(by_position["index"]) <= 32
    assert sum(by_position["tokens"]) == longest


def test_every_token_is_in_the_histograms():
    given = tokens()
    given.gap[:2] = -50.0, 50.0
    found = token_distributions(given, 64)
    assert sum(found["gap_histogram"]) == sum(found["gate_histogram"]) == found["tokens"] == 500
    assert len(found["gap_histogram"]) == len(GAP_EDGES) - 1
    assert found["gap_histogram"][0] == (given.gap < -4).sum()


def test_pooled_means_are_those_of_all_tokens_together():
    one, two = tokens(0, 500, 3), tokens(1, 300, 5)
    pooled = pool([token_distributions(part, 64)["by_turn"] for part in (one, two)])
    gap, turn = np.concatenate([one.gap, two.gap]), np.concatenate([one.turn, two.turn])
    assert pooled["index"] == [0, 1, 2, 3, 4]
    for index, count, mean in zip(pooled["index"], pooled["tokens"], pooled["gap"], strict=True):
        assert count == (turn == index).sum()
        assert mean == pytest.approx(gap[turn == index].mean(), abs=1e-4)


def test_pooling_leaves_out_what_a_step_does_not_have():
    pooled = pool([token_distributions(tokens(kl=kl), 64)["by_turn"] for kl in (True, False)])
    assert "kl" not in pooled and "gap" in pooled


def test_nothing_to_pool():
    assert pool([]) == {"index": [], "tokens": []}


def test_distributions_are_plain_json():
    found = token_distributions(tokens(), 64)
    assert json.loads(json.dumps(found)) == found


def test_rewards_count_episodes():
    assert reward_statistics([1.0, 0.0, 1.0, 0.0]) == pytest.approx({"episodes": 4, "mean": 0.5, "std": np.sqrt(1 / 3)})
    assert reward_statistics([2.0]) == {"episodes": 1, "mean": 2.0, "std": 0.0}
