"""TIDE's advantages by brute force: anchored returns, and outcome and teacher by the distance between the two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sdar_verl.algorithm.anchors import anchored_returns
from sdar_verl.algorithm.signals import get_signal
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.errors import ConfigError
from sdar_verl.method import Strengths
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.verl.advantage import AdvantageRows, advantage_rows, compute_sdar_advantage
from tests.support.checked_recipe import checked_recipe, run_checks
from tests.support.table import make_table
from tests.unit.test_turn_signals import rows_of, tensor


def brute(episodes: list[tuple[str, float, list[str]]], discount: float, depth: int) -> list[list[float]]:
    """Group, reward and observations of each episode -> Q of each of its turns, as the equations stand."""
    returns = [[discount ** (len(seen) - 1 - j) * reward for j in range(len(seen))] for _, reward, seen in episodes]

    def past(episode: int, turn: int, k: int) -> list[str]:
        return episodes[episode][2][max(0, turn - k + 1) : turn + 1]

    found = []
    for one, (group, _, seen) in enumerate(episodes):
        values = []
        for turn in range(len(seen)):
            above = below = 0.0
            for k in range(1, depth + 1):
                same = [
                    returns[other][at]
                    for other, (its, _, others) in enumerate(episodes)
                    for at in range(len(others))
                    if its == group and past(other, at, k) == past(one, turn, k)
                ]
                apart = returns[one][turn] - sum(same) / len(same)
                if abs(apart) > 1e-9:
                    above, below = above + (k + 1) * apart, below + k + 1
            values.append(above / below if below else 0.0)
        found.append(values)
    return found


def test_a_turn_that_was_taken_out_has_been_played() -> None:
    whole = [("g", 1.0, list("abc")), ("g", 0.0, list("abd")), ("g", 1.0, list("bbc"))]
    rows = [(e, j) for e in range(3) for j in range(3)]
    valid = torch.tensor([row != (0, 1) for row in rows])
    arguments = [tensor([whole[e][1] for e, _ in rows]), ["g"] * 9, [str(e) for e, _ in rows], [j for _, j in rows]]
    found = anchored_returns(*arguments, [whole[e][2][j] for e, j in rows], valid, discount=0.5, depth=2)
    returns = {row: 0.5 ** (2 - row[1]) * whole[row[0]][1] for row in rows}
    alike = {(0, 2): [[(0, 2), (2, 2)], [(0, 2), (2, 2)]], (1, 0): [[(0, 0), (1, 0)], [(0, 0), (1, 0)]]}
    for row, pasts in alike.items():
        apart = [returns[row] - sum(returns[one] for one in past) / 2 for past in pasts]
        weights = [k + 1 for k, value in enumerate(apart, 1) if value]
        expected = sum((k + 1) * value for k, value in enumerate(apart, 1)) / sum(weights) if weights else 0.0
        assert found[rows.index(row)] == pytest.approx(expected)
    assert found[rows.index((0, 1))] == 0.0


PLAYED = st.lists(
    st.tuples(
        st.sampled_from("gh"),
        st.sampled_from([0.0, 1.0, 10.0]),
        st.lists(st.sampled_from("abc"), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(PLAYED, st.sampled_from([0.95, 1.0, 0.5]), st.integers(1, 4), st.randoms(use_true_random=False))
def test_anchored_returns_are_the_equations_whatever_the_order_of_rows(episodes, discount, depth, random) -> None:
    rows = [(e, j) for e, (_, _, seen) in enumerate(episodes) for j in range(len(seen))]
    random.shuffle(rows)
    expected = brute(episodes, discount, depth)
    found = anchored_returns(
        tensor([episodes[e][1] for e, _ in rows]),
        [episodes[e][0] for e, _ in rows],
        [str(e) for e, _ in rows],
        [j for _, j in rows],
        [episodes[e][2][j] for e, j in rows],
        torch.ones(len(rows), dtype=torch.bool),
        discount=discount,
        depth=depth,
    )
    torch.testing.assert_close(found, tensor([expected[e][j] for e, j in rows]), rtol=1e-9, atol=1e-9)


def test_a_hand_made_case() -> None:
    """Two episodes of a task: from the same first room one went the good way at once, the other after a detour."""
    seen = [["hall", "kitchen"], ["hall", "attic", "kitchen"]]
    rows = [(e, j) for e in range(2) for j in range(len(seen[e]))]
    found = anchored_returns(
        tensor([1.0] * 5),
        ["g"] * 5,
        [str(e) for e, _ in rows],
        [j for _, j in rows],
        [seen[e][j] for e, j in rows],
        torch.ones(5, dtype=torch.bool),
        discount=0.5,
    )
    # hall: 1/2 against 1/4, the same for each k; the kitchen is worth 1 to both, the attic was seen by one alone.
    torch.testing.assert_close(found, tensor([0.125, 0.0, -0.125, 0.0, 0.0]))


def test_rows_that_do_not_count_are_in_no_mean() -> None:
    values: dict[str, Any] = {
        "scores": tensor([1.0, 0.0, float("nan")]),
        "group_ids": ["g"] * 3,
        "episode_ids": ["a", "b", "c"],
        "turns": [0] * 3,
        "observations": ["hall"] * 3,
    }
    found = anchored_returns(**values, valid=torch.tensor([True, True, False]))
    torch.testing.assert_close(found, tensor([0.5, -0.5, 0.0]))
    with pytest.raises(ValueError, match=r"NaN or infinity in valid rows \[2\]"):
        anchored_returns(**values, valid=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="discount is 0"):
        anchored_returns(**values, valid=torch.ones(3, dtype=torch.bool), discount=0.0)
    with pytest.raises(ValueError, match="depth is 0"):
        anchored_returns(**values, valid=torch.ones(3, dtype=torch.bool), depth=0)
    with pytest.raises(ValueError, match="turns has 1 entries for 3 rows"):
        anchored_returns(**{**values, "turns": [0]}, valid=torch.ones(3, dtype=torch.bool))


def test_verls_estimator_reads_the_observations_of_the_records() -> None:
    seen = [["hall", "kitchen"], ["hall", "attic", "kitchen"]]
    keys = [f"u_{e}_{j}" for e in range(2) for j in range(len(seen[e]))]
    infos = [
        RowInfo(j, "pick", observation=seen[e][j], inadmissible=(e, j) == (1, 1))
        for e in range(2)
        for j in range(len(seen[e]))
    ]
    table = make_table([*keys, "pad_0_0"], [*infos, None])
    node = SimpleNamespace(group_stats="anchor", invalid_action_penalty=0.1, discount=0.5, anchors=None)
    rewards, mask = torch.zeros(6, 2), torch.ones(6, 2)
    rewards[:5, 1] = 1.0
    with advantage_rows(AdvantageRows.of(node, table)) as rows:
        found, _ = compute_sdar_advantage(
            rewards,
            mask,
            config=OmegaConf.create({"norm_adv_by_std_in_grpo": False}),
            index=np.array(["u"] * 5 + ["pad"]),
        )
    expected = tensor([0.125, 0.0, -0.125, -0.1, 0.0, 0.0]).float().unsqueeze(-1).expand(6, 2)
    torch.testing.assert_close(found, expected)
    assert rows.counts is not None and rows.counts.groups == 1


# ---------------------------------------------------------------- the signal


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([0.1, 1.0]))
def test_the_signal_is_the_equations(seed: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (7,), generator=generator)
    response = torch.arange(6) < lengths.unsqueeze(-1)
    taught = response & (torch.rand(7, generator=generator) < 0.8).unsqueeze(-1)
    gap = torch.randn(7, 6, generator=generator).double() * taught
    base = torch.randn(7, 1, generator=generator).double() * response
    names = ["a", "b", "a", "a", "b", "c", "b"]
    rows = rows_of(base, response, gap, mask=taught, episode_ids=names, turns=[0, 2, 1, 2, 0, 0, 1])
    found = get_signal("advantage_distance")(rows, strength=strength)
    for row in range(7):
        mine = [other for other in range(7) if names[other] == names[row] and taught[other].any()]
        if row not in mine:
            assert torch.equal(found[row], base[row])
            continue
        size = {other: gap[other].abs().sum().item() / int(taught[other].sum()) for other in mine}
        outcome = {other: base[other, 0].item() for other in mine}

        def ranged(values: dict[int, float], row: int = row) -> float:
            low, high = min(values.values()), max(values.values())
            return 1.0 if high == low else (values[row] - low) / (high - low)

        for token in range(int(lengths[row])):
            expected = ranged(size) * outcome[row] + strength * ranged(outcome) * ranged(size) * gap[row, token].item()
            assert found[row, token].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert not found[~response].any()


def test_betas_size_does_not_change_the_teachers_part() -> None:
    response = torch.ones(3, 2, dtype=torch.bool)
    gap = tensor([[0.1, -0.2], [0.4, 0.3], [-0.5, 0.1]])
    base = tensor([[1.0], [-0.5], [0.25]]).expand(3, 2)
    signal = get_signal("advantage_distance")
    names = ["e"] * 3
    whole, tenth = (
        signal(rows_of(scale * base, response, gap, episode_ids=names), strength=1.0) for scale in (1.0, 0.1)
    )
    told = [signal(rows_of(scale * base, response, gap, episode_ids=names), strength=0.0) for scale in (1.0, 0.1)]
    torch.testing.assert_close(whole - told[0], tenth - told[1])
    torch.testing.assert_close(told[1], 0.1 * told[0])


# ---------------------------------------------------------------- preset and checks


def test_the_presets_weights_hand_over_by_one_r() -> None:
    strengths = Strengths(load_config(compose_config("sdar_quickstart", ["method=tide"]).sdar).loss)
    assert strengths.at(1).coef == pytest.approx(1.0) and strengths.at(1).rl == pytest.approx(0.1)
    for step in range(1, 21):
        strengths.observe(step, {"sdar/gap_size": 0.3 - 0.0001 * step})
    # Ten means are there after ten steps, and each step from then on hands over .02.
    assert strengths.at(21).coef == pytest.approx(0.1 + 0.9 * (1 - 0.22))
    assert strengths.at(21).rl == pytest.approx(0.1 + 0.9 * 0.22)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return checked_recipe(tmp_path_factory.mktemp("panels"))


ANCHOR = {"sdar.advantage.group_stats": "anchor", "algorithm.norm_adv_by_std_in_grpo": False}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"sdar.advantage.discount": 0.9}, ["sdar.advantage.discount=0.9 has no effect", "group_stats=episode"]),
        ({"sdar.advantage.anchors": 2}, ["sdar.advantage.anchors=2 has no effect", "group_stats=anchor"]),
        (
            {**ANCHOR, "algorithm.norm_adv_by_std_in_grpo": True},
            ["sdar.advantage.group_stats=anchor", "algorithm.norm_adv_by_std_in_grpo=True"],
        ),
        (
            {
                **ANCHOR,
                "sdar.rollout.rows": "trajectory",
                "sdar.rollout.turn_length": 20,
                "sdar.prompt.history_length": 0,
            },
            ["sdar.advantage.group_stats=anchor counts turn rows", "sdar.rollout.rows=trajectory"],
        ),
        (
            {**ANCHOR, "algorithm.adv_estimator": "grpo", "sdar.advantage.invalid_action_penalty": 0.0},
            ["sdar.advantage.group_stats=anchor has no effect with algorithm.adv_estimator=grpo"],
        ),
    ],
)
def test_a_fault_is_told_with_its_remedy(recipe, overrides, told) -> None:
    with pytest.raises(ConfigError) as error:
        run_checks(recipe, **overrides)
    for text in told:
        assert text in str(error.value)


def test_anchors_alone_are_let_through(recipe) -> None:
    run_checks(recipe, **ANCHOR)
