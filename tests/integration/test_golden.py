"""The numbers of a few golden runs are as they were; ``scripts/golden.py`` has all, bit for bit on one machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "golden.py"
OTHER_PROCESSORS = 1e-4
"""Relative. They add in another order, and two updates carry that on."""


@pytest.fixture(scope="module")
def golden():
    spec = importlib.util.spec_from_file_location("golden", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "case", ["sdar", *(pytest.param(case, marks=pytest.mark.slow) for case in ("rlsd", "jsd-top_k"))]
)
def test_numbers_are_as_they_were(golden, tmp_path, case):
    old = json.loads(golden.golden_file(case).read_text())
    assert list(golden.differences(old, golden.run_case(case, tmp_path), OTHER_PROCESSORS)) == []


def test_a_number_that_moves_appears_or_goes_is_named(golden):
    old = {"1": {"a": 1.0, "b": 2.0, "c": "nan"}, "2": {"a": 1.0}}
    new = {"1": {"a": 1.0, "b": 2.1, "d": 0.0}, "2": {"a": 1.0 + 1e-9}}
    assert list(golden.differences(old, new, 1e-6)) == [
        "step 1: b was 2.0, is 2.1",
        "step 1: c is gone",
        "step 1: d is new",
    ]


def test_every_case_that_repeats_itself_has_numbers(golden):
    assert {path.stem for path in golden.FOLDER.glob("*.json")} == {*golden.CASES} - {*golden.NOT_REPEATABLE}
