"""Which turns the teacher looks at (``sdar.context.turns_share``): by brute force, and what that leaves of a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_verl.checks.context import context_faults
from sdar_verl.checks.rollout_server import rollout_server_faults
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.fields import LOOKED_AT
from sdar_verl.requests import ScoringPass, StepRequests
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.teacher.surprise import look_at_surprising, most_surprising
from tests.support.table import make_table


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_they_are_the_least_likely_turns_of_each_episode(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    places = [(episode, turn) for episode, length in enumerate(lengths) for turn in range(length)]
    places = data.draw(st.permutations(places))
    surprise = [data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.5])) for _ in places]
    counted = [data.draw(st.booleans()) for _ in places]
    share = data.draw(st.sampled_from([0.01, 0.2, 0.5, 1.0]))
    episodes, turns = zip(*places, strict=True)
    found = most_surprising(surprise, counted, episodes, turns, share)
    for episode in set(episodes):
        mine = [row for row, _ in enumerate(places) if episodes[row] == episode and counted[row]]
        before = {
            row: sum((-surprise[other], turns[other]) < (-surprise[row], turns[row]) for other in mine) for row in mine
        }
        assert {row for row in mine if row in found} == {
            row for row, rank in before.items() if rank < math.ceil(share * len(mine))
        }
    assert all(counted[row] for row in found)


def row(turn: int, *, taught: bool = True) -> RowInfo:
    info = RowInfo(turn, "pick", task_id="t")
    if taught:
        info.take_teacher_prompt([1, 2, 3])
        info.contrast_prompt_ids = (np.array([4], dtype=np.int32),)
    return info


def test_the_others_lose_their_prompts_and_are_masked_for_every_pass() -> None:
    keys = [f"a_0_{turn}" for turn in range(4)] + ["b_0_0", "pad_0_0"]
    infos = [row(0), row(1), row(2), row(3, taught=False), row(0), None]
    old = [[-0.1, -0.1], [-2.0], [-1.0, -1.0], [-9.0], [float("nan"), -0.1], [-9.0]]
    table = make_table(keys, infos, {"old_log_probs": old, "response_mask": [[1] * len(tokens) for tokens in old]})
    assert look_at_surprising(table, 0.5) == pytest.approx(3 / 4)
    assert [info is not None and info.has_teacher for info in table.infos] == [False, True, True, False, True, False]
    assert not infos[0].further_prompts and list(infos[1].further_prompts) == ["contrast_0"]
    stored = [values.tolist() for values in table.rows.stored[LOOKED_AT]]
    assert stored == [[0, 0], [1], [1, 1], [0], [1, 1], [0]]
    assert torch.equal(table.mask, table.columns[LOOKED_AT].bool())


def test_a_step_without_teachers_has_nothing_to_leave_out() -> None:
    table = make_table(["a_0_0"], [row(0, taught=False)], {"old_log_probs": [[-1.0]], "response_mask": [[1]]})
    assert look_at_surprising(table, 0.2) == 1.0 and not table.mask.any()


def test_all_passes_of_the_teacher_read_the_mask_and_wait_for_the_students() -> None:
    for overrides in ([], ["method=revkl_frozen"], ["method=revkl_frozen", "sdar.loss.support=top_k"]):
        loss = load_config(compose_config("sdar_alfworld", overrides).sdar).loss
        scoring = StepRequests.of(loss, LOOKED_AT).teacher
        assert scoring.waits and scoring.mask == scoring.further("contrast_0").mask == LOOKED_AT
    assert not ScoringPass().waits and ScoringPass().further("teacher_1").mask == "response_mask"


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["sdar.rollout.rows=trajectory"], "rows=trajectory an episode is one row; use rows=per_turn"),
        (
            ["sdar.teacher.source=none", "sdar.loss.coef=0"],
            "turns_share=0.2 has no effect with sdar.teacher.source=none",
        ),
        (["sdar.teacher.placement=rollout_server"], "is known only after it; use sdar.teacher.placement=colocated"),
        ([], None),
        (["sdar.teacher.placement=pool", "sdar.teacher.pool_gpus_per_node=1", "method=sdar_frozen"], None),
    ],
)
def test_where_no_turn_can_be_left_out_is_told(overrides: list[str], fault: str | None) -> None:
    arms = [f"sdar.validation.arms.{arm}.context=none" for arm in ("teacher",)] if "none" in str(overrides) else []
    config = compose_config("sdar_quickstart", [*overrides, *arms, "sdar.context.turns_share=0.2"])
    sdar = load_config(config.sdar)
    told = [text for text in context_faults(config, sdar) if "turns_share" in text]
    if sdar.teacher.placement == "rollout_server":
        told += [text for text in rollout_server_faults(config, sdar) if "turns_share" in text]
    assert (fault is None and not told) or (len(told) == 1 and fault is not None and fault in told[0])
