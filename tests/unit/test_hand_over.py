"""Schedules that follow gap and success: against their rules in plain Python; what is over; what a checkpoint keeps."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_verl.algorithm.schedules import GAP_SIZE, Schedule, Scheduled, make_schedule, measures_of
from sdar_verl.algorithm.turns import row_turns
from sdar_verl.config.loss import LossConfig
from sdar_verl.method import Strengths
from sdar_verl.observe.metrics import gap_size


def tide(sizes: list[float], window: int = 10, slow: float = 0.02, pace: float = 0.02) -> list[float]:
    """r after each step, as TIDE's rule is written."""
    means: list[float] = []
    handed, found = 0.0, []
    for size in sizes:
        means.append(0.9 * means[-1] + 0.1 * size if means else size)
        if len(means) >= window:
            before = means[-window]
            if 0 < (before - means[-1]) / before <= slow:
                handed = min(handed + pace, 1.0)
        found.append(handed)
    return found


@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_hand_off_is_tides_rule_on_any_gap(sizes: list[float]) -> None:
    falling, rising = (Scheduled(1.0, make_schedule("hand_off", {"rising": up})) for up in (False, True))
    for step, (size, handed) in enumerate(zip(sizes, tide(sizes), strict=True), 1):
        for one in (falling, rising):
            one.schedule.observe(one.value(step), size)
        assert falling.value(step + 1) == pytest.approx(0.1 + 0.9 * (1 - handed))
        assert rising.value(step + 1) == pytest.approx(0.1 + 0.9 * handed)


def test_a_gap_that_shrinks_slowly_hands_over_and_one_that_grows_or_shrinks_fast_does_not() -> None:
    for sizes, handed in (
        ([1.0 - 0.001 * n for n in range(30)], True),
        ([1.0 + 0.001 * n for n in range(30)], False),
        ([0.8**n for n in range(30)], False),
    ):
        one = make_schedule("hand_off", {})
        for size in [*sizes[:15], math.nan, *sizes[15:]]:  # a step without a gap is none
            one.observe(1.0, size)
        assert (one.factor(31) < 1.0) == handed
        assert not one.ended(31), "its floor keeps the teacher"


def retires(gaps: list[float], success: list[float], teacher: float, every: int = 5) -> int | None:
    """The step after which RetireOPD's teacher is off, in plain Python."""
    windows = [
        (-sum(gaps[i : i + every]) / every, sum(success[i : i + every]) / every)
        for i in range(0, len(gaps) - every + 1, every)
    ]
    for number in range(1, len(windows)):
        (before, won_before), (now, won) = windows[number - 1 : number + 1]
        if now - before >= 0 and (won_before + won) / 2 >= 0.9 * teacher:
            return (number + 1) * every
    return None


@given(st.lists(st.tuples(st.floats(-1.0, 0.2), st.floats(0.0, 1.0)), max_size=40), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_retire_is_the_rule_on_any_run(seen: list[tuple[float, float]], every: int) -> None:
    one = Scheduled(0.01, make_schedule("retire", {"teacher_success": 0.4, "every": every}))
    expected = retires([gap for gap, _ in seen], [won for _, won in seen], 0.4, every)
    for step, (gap, won) in enumerate(seen, 1):
        gone = expected is not None and step > expected
        assert one.value(step) == (0.0 if gone else 0.01) and one.ended(step) == gone
        one.schedule.observe(one.value(step), gap, won)
    # Once it is gone nothing brings it back.
    if expected is not None and len(seen) > expected:
        for step in range(100):
            one.schedule.observe(0.0, -5.0 - step, 0.0)
        assert one.ended(200)


def test_a_window_or_a_decay_that_is_over_is_over_and_a_lambda_of_zero_is_a_way_to_look() -> None:
    decay = Scheduled(0.5, make_schedule("linear_decay", {"steps": 10}), start_step=3)
    assert [decay.ended(step) for step in (1, 11, 12, 50)] == [False, False, True, True]
    assert decay.value(12) == 0.0 < decay.value(11)
    assert not Scheduled(0.5, make_schedule("cosine_decay", {"steps": 10, "final": 0.1})).ended(99)
    assert Scheduled(0.5, make_schedule("cosine_decay", {"steps": 10})).ended(10)
    windowed = Scheduled(0.02, Schedule(), start_step=21, stop_step=71)
    assert [windowed.ended(step) for step in (1, 70, 71)] == [False, False, True]
    assert not Scheduled(0.0, Schedule(), stop_step=5).ended(9)


OPTIONS: dict[str, dict[str, Any]] = {
    "hand_off": {"window": 4, "slow": 0.5},
    "retire": {"teacher_success": 0.5, "every": 3},
    "grad_share": {"share": 0.2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cut", [0, 1, 5, 7])
def test_a_resumed_schedule_goes_on_bit_for_bit(name: str, cut: int) -> None:
    """Through JSON, as a checkpoint has it, wherever in its window the run was stopped."""
    measured = {
        "hand_off": [(1.0 - 0.01 * n,) for n in range(12)],
        "retire": [(-0.1 - 0.01 * (n % 4), 0.6) for n in range(12)],
        "grad_share": [(0.1 + 0.03 * n,) for n in range(12)],
    }[name]
    whole, first = make_schedule(name, OPTIONS[name]), make_schedule(name, OPTIONS[name])
    for seen in measured[:cut]:
        whole.observe(1.0, *seen)
        first.observe(1.0, *seen)
    resumed = make_schedule(name, OPTIONS[name])
    resumed.state = json.loads(json.dumps(first.state))
    for seen in measured[cut:]:
        whole.observe(1.0, *seen)
        resumed.observe(1.0, *seen)
        assert resumed.factor(1) == whole.factor(1) and resumed.ended(1) == whole.ended(1)
    assert resumed.state == whole.state


def test_strengths_follow_several_metrics_and_skip_a_step_that_lacks_one() -> None:
    settings = LossConfig(
        coef=0.01,
        coef_schedule={"name": "retire", "options": {"teacher_success": 0.5, "every": 1}},
        rl_coef=0.9,
        rl_schedule={"name": "hand_off", "options": {"rising": True, "window": 2, "momentum": 0.0, "pace": 0.5}},
    )
    strengths = Strengths(settings)
    assert strengths.measures == {"sdar/gap_mean", "sdar/success", GAP_SIZE}
    assert strengths.at(1) == pytest.approx((0.01, 5.0, 0.09))
    strengths.observe(1, {"sdar/gap_mean": -0.1, "sdar/success": 0.5, GAP_SIZE: 1.0})
    strengths.observe(2, {"sdar/gap_mean": -0.2, GAP_SIZE: 0.99})
    assert not strengths.retired(3) and strengths.at(3).rl == pytest.approx(0.9 * (0.1 + 0.9 * 0.5))
    strengths.observe(3, {"sdar/gap_mean": -0.2, "sdar/success": 0.5})
    assert strengths.retired(4) and strengths.at(4).coef == 0.0
    fresh = Strengths(settings)
    fresh.load_state_dict(json.loads(json.dumps(strengths.state_dict())))
    assert fresh.retired(4) and fresh.at(4) == strengths.at(4)


def test_the_size_of_the_gap_is_a_mean_over_turns() -> None:
    response = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    mask = response.clone()
    mask[0, 2] = False
    gap = torch.tensor([[1.0, -3.0, 99.0, 99.0, 0.5, 0.5], [-4.0, 0.0, 99.0, 99.0, 99.0, 99.0]])
    assert row_turns(response)[0].tolist()[4] == 1
    assert gap_size(gap, mask, response) == {GAP_SIZE: pytest.approx((2.0 + 0.5 + 2.0) / 3)}
    assert gap_size(gap, torch.zeros_like(mask), response) == {}


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("hand_off", {"window": 1}, "window=1; it must be at least 2"),
        ("hand_off", {"floor": 1.0}, r"floor=1.0; it must lie in \[0, 1\)"),
        ("hand_off", {"pace": 0.0}, "pace=0.0; it must be above 0"),
        ("retire", {}, "needs the option 'teacher_success'"),
        ("retire", {"teacher_success": 80}, r"teacher_success=80; it must lie in \(0, 1\]"),
        ("retire", {"teacher_success": 0.8, "every": 0}, "every=0; it must be at least 1"),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{text}"):
        make_schedule(name, options)


def test_a_schedule_may_name_one_measure_or_several() -> None:
    class One(Schedule):
        measures = "sdar/success"

    assert measures_of(One()) == ("sdar/success",) and measures_of(Schedule()) == ()
