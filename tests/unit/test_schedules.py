"""Schedules in closed form, windows, and the one that follows a measured share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_verl.algorithm.schedules import _SCHEDULES, Schedule, Scheduled, make_schedule, register_schedule


def values(scheduled: Scheduled, *steps: int) -> list[float]:
    return [scheduled.value(step) for step in steps]


def test_constant() -> None:
    assert values(Scheduled(0.3, make_schedule("constant", {})), 1, 2, 1000) == [0.3, 0.3, 0.3]


def test_linear_decay_reaches_its_share_and_stays() -> None:
    decay = Scheduled(0.5, make_schedule("linear_decay", {"steps": 100}))
    assert values(decay, 1, 50, 100, 150) == pytest.approx([0.495, 0.25, 0.0, 0.0])
    halfway = Scheduled(1.0, make_schedule("linear_decay", {"steps": 10, "final": 0.2}))
    assert values(halfway, 5, 10, 99) == pytest.approx([0.6, 0.2, 0.2])


def test_cosine_decay_is_half_way_down_half_way_through() -> None:
    decay = Scheduled(2.0, make_schedule("cosine_decay", {"steps": 8, "final": 0.1}))
    assert values(decay, 4, 8, 20) == pytest.approx([1.1, 0.2, 0.2])
    assert decay.value(2) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))


def test_outside_its_window_the_value_is_zero_and_inside_it_steps_count_anew() -> None:
    adrs = Scheduled(0.02, make_schedule("constant", {}), start_step=21, stop_step=71)
    assert values(adrs, 1, 20, 21, 70, 71, 150) == [0.0, 0.0, 0.02, 0.02, 0.0, 0.0]
    late = Scheduled(1.0, make_schedule("linear_decay", {"steps": 10}), start_step=11)
    early = Scheduled(1.0, make_schedule("linear_decay", {"steps": 10}))
    assert values(late, 11, 15, 20) == values(early, 1, 5, 10)


def test_warm_up_rises_linearly_from_the_start_and_multiplies_the_schedule() -> None:
    warm = Scheduled(1.0, make_schedule("constant", {}), start_step=3, warmup_steps=4)
    assert values(warm, 2, 3, 4, 6, 7) == [0.0, 0.25, 0.5, 1.0, 1.0]
    both = Scheduled(1.0, make_schedule("linear_decay", {"steps": 10}), warmup_steps=5)
    assert both.value(2) == pytest.approx(0.4 * 0.8)


def follow(scheduled: Scheduled, ratio: float, steps: int) -> float:
    """Run with a distillation gradient ``ratio`` times the policy gradient's; the share that is left."""
    for step in range(1, steps + 1):
        value = scheduled.value(step)
        scheduled.schedule.observe(value, value * ratio)
    return scheduled.value(steps + 1) * ratio


@pytest.mark.parametrize("ratio", [0.2, 1.0, 8.0])
def test_grad_share_moves_lambda_to_the_chosen_share(ratio: float) -> None:
    scheduled = Scheduled(0.5, make_schedule("grad_share", {"share": 0.1}))
    assert scheduled.value(1) == 0.5
    assert follow(scheduled, ratio, 200) == pytest.approx(0.1, rel=1e-3)


def test_grad_share_without_smoothing_is_there_after_one_step() -> None:
    assert follow(Scheduled(0.5, make_schedule("grad_share", {"share": 0.1, "smoothing": 0.0})), 3.0, 1) == (
        pytest.approx(0.1)
    )


def test_grad_share_stays_within_its_bound() -> None:
    scheduled = Scheduled(1.0, make_schedule("grad_share", {"share": 1.0, "bound": 10.0, "smoothing": 0.0}))
    follow(scheduled, 1e6, 5)
    assert scheduled.value(6) == pytest.approx(0.1)


@pytest.mark.parametrize("measured", [0.0, math.nan, math.inf])
def test_grad_share_ignores_a_step_that_says_nothing(measured: float) -> None:
    schedule = make_schedule("grad_share", {"share": 0.1})
    schedule.observe(0.5, measured)
    assert schedule.factor(2) == 1.0


def test_grad_share_says_which_metric_it_follows() -> None:
    followed = [make_schedule("grad_share", {"share": 0.1, **of}).measures for of in ({}, {"of": "weights"})]
    assert followed == ["sdar/grad_share", "sdar/grad_share_weights"]


def test_grad_share_keeps_its_state() -> None:
    schedule = make_schedule("grad_share", {"share": 0.1})
    schedule.observe(0.5, 2.0)
    fresh = make_schedule("grad_share", {"share": 0.1})
    fresh.state = schedule.state
    assert fresh.factor(1) == schedule.factor(1) != 1.0


@given(step=st.integers(1, 500), steps=st.integers(1, 200), final=st.floats(0.0, 1.0))
def test_decays_never_leave_their_range_and_never_rise(step: int, steps: int, final: float) -> None:
    for name in ("linear_decay", "cosine_decay"):
        schedule = make_schedule(name, {"steps": steps, "final": final})
        assert final - 1e-12 <= schedule.factor(step + 1) <= schedule.factor(step) + 1e-12 <= 1.0 + 1e-9


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("linear", {}, "unknown schedule 'linear'; known: constant, cosine_decay, grad_share, hand_off, linear_decay"),
        ("constant", {"steps": 3}, "schedule 'constant' has no option 'steps'; known: none"),
        ("linear_decay", {}, "schedule 'linear_decay' needs the option 'steps'"),
        ("cosine_decay", {"steps": 0}, "steps=0"),
        ("linear_decay", {"steps": 5, "final": 2.0}, "final=2.0"),
        ("grad_share", {"share": 0.0}, "share=0.0"),
        ("grad_share", {"share": 0.1, "smoothing": 1.0}, "smoothing=1.0"),
        ("grad_share", {"share": 0.1, "bound": 0.5}, "bound=0.5"),
        ("grad_share", {"share": 0.1, "of": "logits"}, "of='logits'; known: tokens, weights"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_schedule(name, options)


def test_a_schedule_that_is_a_function_is_told_what_it_should_be() -> None:
    with pytest.raises(TypeError, match=r"subclass of .*Schedule, whose method factor\(step\)"):
        register_schedule("square")(lambda step: 1 / step**2)


def test_own_schedule_is_selectable_by_name() -> None:
    @register_schedule("halving_in_a_test")
    @dataclass
    class Halving(Schedule):
        every: int

        def factor(self, step: int) -> float:
            return 0.5 ** (step / self.every)

    try:
        assert Scheduled(8.0, make_schedule("halving_in_a_test", {"every": 2})).value(4) == 2.0
    finally:
        del _SCHEDULES._entries["halving_in_a_test"]
