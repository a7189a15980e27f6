"""The numbers of a few golden runs are as they were; ``scripts/golden.py`` has all, bit for bit on one machine."""

from __future__ import annotations

import json

import pytest

from tests.support.golden import OTHER_PROCESSORS, golden


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sdar", "rlsd", "jsd-top_k"])
def test_numbers_are_as_they_were(tmp_path, case):
    """``source-actor`` is looked at in test_training, where it is run."""
    old = json.loads(golden.golden_file(case).read_text())
    assert list(golden.differences(old, golden.run_case(case, tmp_path), OTHER_PROCESSORS)) == []


def test_a_number_that_moves_appears_or_goes_is_named():
    old = {"1": {"a": 1.0, "b": 2.0, "c": "nan"}, "2": {"a": 1.0}}
    new = {"1": {"a": 1.0, "b": 2.1, "d": 0.0}, "2": {"a": 1.0 + 1e-9}}
    assert list(golden.differences(old, new, 1e-6)) == [
        "step 1: b was 2.0, is 2.1",
        "step 1: c is gone",
        "step 1: d is new",
    ]


def test_every_case_that_repeats_itself_has_numbers():
    assert {path.stem for path in golden.FOLDER.glob("*.json")} == {*golden.CASES} - {*golden.NOT_REPEATABLE}
