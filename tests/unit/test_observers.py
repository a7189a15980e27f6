from __future__ import annotations

import json
from typing import Any

import pytest

from sdar_verl.errors import ConfigError
from sdar_verl.observe.base import STATE_FILE, Observer, load_states, save_states


class Counter(Observer):
    name = "counter"

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Stateless(Observer):
    name = "stateless"


def test_a_state_comes_back_from_its_checkpoint(tmp_path):
    save_states([Counter(7), Stateless()], tmp_path / "global_step_3")
    fresh = Counter()
    load_states([Stateless(), fresh], tmp_path / "global_step_3")
    assert fresh.count == 7


def test_saving_replaces_the_file_as_a_whole(tmp_path):
    save_states([Counter(1)], tmp_path)
    save_states([Counter(2)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert json.loads((tmp_path / STATE_FILE).read_text()) == {"counter": {"count": 2}}


def test_a_checkpoint_without_the_state_of_a_part_is_an_error_that_names_the_part(tmp_path):
    save_states([Stateless()], tmp_path)
    with pytest.raises(ConfigError, match="counter"):
        load_states([Counter()], tmp_path)


def test_a_part_without_a_state_resumes_from_any_checkpoint(tmp_path):
    load_states([Stateless()], tmp_path)
