"""Metrics of a step that has several updates: counts, maxima and means of all of them."""

from __future__ import annotations

import math

import pytest

from sdar_verl.observe.step_metrics import step_metrics

FIRST = {
    "sdar/episodes": 8,
    "sdar/rows": 20,
    "sdar/success": 0.5,
    "sdar/gap_mean": 1.0,
    "sdar/gap_mean/first_third": math.nan,
    "sdar/context_tokens/max": 12.0,
    "sdar/groups": 2,
    "sdar/skill_episodes/examine-and-consume": 3,
    "sdar/skill_queries/maximum": 5,
    "sdar/grad_share": 0.2,
    "actor/loss": 1.0,
}
SECOND = {
    "sdar/episodes": 24,
    "sdar/rows": 60,
    "sdar/success": 1.0,
    "sdar/gap_mean": 2.0,
    "sdar/gap_mean/first_third": 0.3,
    "sdar/context_tokens/max": 9.0,
    "sdar/groups": 3,
    "sdar/skill_episodes/examine-and-consume": 4,
    "sdar/skill_queries/maximum": 9,
    "sdar/nonfinite_rows": 2,
}


def test_the_metrics_of_one_update_stay_as_they_are():
    assert step_metrics([SECOND]) == SECOND


def test_those_of_several_are_put_together_by_what_they_are():
    both = step_metrics([FIRST, SECOND])
    assert both == {
        "sdar/episodes": 32,
        "sdar/rows": 80,
        "sdar/success": pytest.approx((8 * 0.5 + 24 * 1.0) / 32),
        "sdar/gap_mean": pytest.approx((20 * 1.0 + 60 * 2.0) / 80),
        "sdar/gap_mean/first_third": 0.3,
        "sdar/context_tokens/max": 12.0,
        "sdar/groups": 5,
        # verl would take the smallest of these, for "min" and "sum" and "max" in their names.
        "sdar/skill_episodes/examine-and-consume": 7,
        "sdar/skill_queries/maximum": 9,
        "sdar/grad_share": 0.2,
        "sdar/nonfinite_rows": 2,
    }


def test_what_no_update_has_is_not_a_number():
    assert math.isnan(step_metrics([{"sdar/gap_mean": math.nan}, {"sdar/gap_mean": math.nan}])["sdar/gap_mean"])
