"""Means over rows, episodes and arms."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import collate_fn

from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.stats import finalize_stats, stats_sums
from sdar_verl.config import ValidationArm
from sdar_verl.observe.lines import step_line, validation_line
from sdar_verl.observe.metrics import gap_metrics, reduce_loss_sums, row_metrics
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.verl.validation import ArmDataset, ArmLoader, arm_metrics, with_lost
from tests.support.plain import add_stats
from tests.support.table import make_table


def info(**kwargs) -> RowInfo:
    return RowInfo(**{"turn": 0, "task_type": "pick", **kwargs})


def test_row_metrics_count_episodes_once_and_leave_padding_out():
    infos = [
        info(success=True, skills=("a",), teacher_prompt_tokens=4, context_tokens=10, history_dropped=1),
        info(success=True, skills=("a",), teacher_prompt_tokens=4, context_tokens=20, unparsed=True),
        info(skills=("a", "b"), inadmissible=True, truncated=True, no_match=True, context_empty=True),
        info(failed=True),
        None,
    ]
    metrics = row_metrics(make_table(["u1_0_0", "u1_0_1", "u1_1_0", "u2_0_0", "pad_0_0"], infos))
    assert metrics["sdar/episodes"] == 3
    assert metrics["sdar/success"] == pytest.approx(1 / 3)
    assert metrics["sdar/failed_episodes"] == 1
    assert metrics["sdar/rows"] == 4
    assert metrics["sdar/turns"] == pytest.approx(3 / 2)
    assert metrics["sdar/invalid_share"] == pytest.approx(2 / 3)
    assert metrics["sdar/unparsed_share"] == pytest.approx(1 / 3)
    assert metrics["sdar/history_dropped_share"] == pytest.approx(1 / 3)
    assert metrics["sdar/context_share"] == pytest.approx(2 / 3)
    assert metrics["sdar/truncated_share"] == pytest.approx(1 / 3)
    assert metrics["sdar/no_match_share"] == pytest.approx(1 / 3)
    assert metrics["sdar/context_empty_share"] == pytest.approx(1 / 3)
    assert metrics["sdar/context_tokens/mean"] == 15
    assert metrics["sdar/context_tokens/max"] == 20
    assert metrics["sdar/skill_episodes/a"] == 2
    assert metrics["sdar/skill_episodes/b"] == 1


def test_row_metrics_of_failed_episodes_alone():
    assert row_metrics(make_table(["u_0_0"], [info(failed=True)]))["sdar/failed_episodes"] == 1
    assert row_metrics(make_table(["pad_0_0"], [None])) == {}


def test_loss_sums_reduce_to_the_means_of_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (-torch.rand(6, 5, generator=generator) for _ in range(2))
    mask = torch.rand(6, 5, generator=generator) > 0.3
    whole = finalize_stats(stats_sums(distillation_terms(student, teacher, mask)))
    parts = [stats_sums(distillation_terms(student[s], teacher[s], mask[s])) for s in (slice(0, 1), slice(1, 6))]
    # verl averages over mini-batches and ranks: a common factor on every sum.
    metrics = {f"actor/sdar_total/{key}": value / 2 for key, value in add_stats(parts).items()}
    metrics |= {"actor/sdar/loss": 0.5, "actor/pg_loss": 1.0}
    reduced = reduce_loss_sums(metrics)
    for name in ("gate_mean", "active_share", "gap_mean", "gap_std", "gap_positive_share", "distill_loss"):
        assert reduced[f"sdar/{name}"] == pytest.approx(whole[name], abs=1e-6)
    assert reduced["sdar/loss"] == 0.5
    assert metrics == {"actor/pg_loss": 1.0}


def test_arm_metrics_are_means_over_episodes():
    outcomes = {
        "acc": [1.0, 0.0, 1.0, 1.0],
        "task_score": [1.0, 0.25, 1.0, 1.0],
        "turns": [2.0, 8.0, 4.0, 4.0],
        "invalid_actions": [1.0, 4.0, 0.0, 2.0],
        "failed": [0.0, 1.0, 0.0, 0.0],
        "task_type": ["pick", "pick", "look", "pick"],
        "arm": ["student", "student", "student", "teacher"],
        "task_id": ["a", "b", "c", "a"],
    }
    metrics = arm_metrics(outcomes)
    assert metrics["sdar-val/student/success"] == pytest.approx(2 / 3)
    assert metrics["sdar-val/student/success/pick"] == 0.5
    assert metrics["sdar-val/student/success_mean_of_types"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["sdar-val/student/score"] == pytest.approx(2.25 / 3)
    assert metrics["sdar-val/student/success/look"] == 1.0
    assert metrics["sdar-val/student/invalid_share"] == pytest.approx(5 / 14)
    assert metrics["sdar-val/student/failed"] == 1
    assert metrics["sdar-val/student/episodes"] == 3
    assert metrics["sdar-val/teacher/success"] == 1.0
    assert arm_metrics({"acc": [1.0]}) == {}


def test_arm_dataset_repeats_the_panel_in_order():
    panel = [{"data_source": "alfworld", "index": i} for i in range(3)]
    arms = ArmDataset(panel, {"student": None, "teacher": None})
    assert len(arms) == 6
    assert [arms[i]["index"] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert arms[4]["data_source"] == "alfworld/teacher"
    assert arms[4]["sdar_arm"] == "teacher"
    assert panel[1] == {"data_source": "alfworld", "index": 1}


def test_lines_show_what_there_is():
    line = step_line(3, 20, {"sdar/success": 0.5, "sdar/gate_mean": 0.49, "timing_s/step": 9.87})
    assert line == "sdar step 3/20  success 0.500  gate 0.490  seconds 9.9"
    values = {"sdar-val/student/success": 0.4, "sdar-val/student/success/pick": 0.1, "sdar-val/teacher/success": 0.8}
    assert validation_line(0, values) == "sdar validation at step 0  student 0.400  teacher 0.800"


def test_equal_fractional_rewards_are_a_flat_group_whatever_the_turns():
    """.7 has no exact float; its mean over 3 turns must not make a group look as if it varied."""
    from sdar_verl.verl.advantage import AdvantageRows, advantage_rows, compute_sdar_advantage

    keys = [f"u_{session}_{turn}" for session, turns in enumerate((3, 5, 7, 11)) for turn in range(turns)]
    infos = [info() for _ in keys]
    rewards = torch.zeros(len(keys), 4)
    rewards[:, -1] = 0.7
    settings = SimpleNamespace(group_stats="episode", invalid_action_penalty=0.0)
    for kl_in_reward in (False, True):
        with advantage_rows(AdvantageRows.of(settings, make_table(keys, infos))) as rows:
            advantages, _ = compute_sdar_advantage(
                rewards, torch.ones(len(keys), 4), config={"use_kl_in_reward": kl_in_reward}, index=np.array(["u"] * 26)
            )
        assert advantages.abs().max() == 0
        assert rows.counts.groups_without_variance == 1


def test_a_row_that_was_left_out_does_not_lower_its_episodes_score():
    """With KL in the reward an episode's score is the mean over its rows; a row left out has a reward of 0."""
    from sdar_verl.verl.advantage import AdvantageRows, advantage_rows, compute_sdar_advantage

    keys = ["u_0_0", "u_0_1", "u_1_0", "u_1_1"]
    rewards = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    settings = SimpleNamespace(group_stats="episode", invalid_action_penalty=0.0)
    table = make_table(keys, [info(), None, info(), info()])
    with advantage_rows(AdvantageRows.of(settings, table)) as rows:
        advantages, _ = compute_sdar_advantage(
            rewards, torch.ones(4, 1), config={"use_kl_in_reward": True}, index=np.array(["u"] * 4)
        )
    assert advantages.abs().max() == 0
    assert rows.counts.groups_without_variance == 1


def test_a_task_of_two_types_is_counted_as_often_as_it_was_asked_for():
    outcomes = {"arm": ["a", "a"], "task_id": ["t", "t"], "task_type": ["x", "y"], "acc": [1.0, 1.0]}
    whole = with_lost(outcomes, Counter({("a", "t", "x"): 2, ("a", "t", "y"): 2}))
    assert whole["acc"] == [1.0, 1.0, 0.0, 0.0]


def validate(environments: bool, outcomes: dict, sources: list, counts: dict, panel: list) -> list:
    """What an observer is told by the trainer's own hook behind verl's."""
    from sdar_verl.verl.trainer import SdarTrainer

    trainer: Any = object.__new__(SdarTrainer)
    told: list = []
    observer = SimpleNamespace(after_validation=lambda *given: told.append(given))
    trainer._environments, trainer.observers, trainer.global_steps = environments, [observer], 2
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"val_kwargs": {"n": 1}}}})
    frame = SimpleNamespace(dataframe={"extra_info": panel})
    trainer.val_dataset = ArmDataset(frame, {"student": None}, None if environments else "single_turn_agent")
    trainer.val_dataloader = ArmLoader(dataset=trainer.val_dataset, batch_size=4)
    trainer.val_dataloader._batches = [{"uid": ["u0", "u1"], "sdar_arm": ["", ""]}]
    trainer._val_metrics_update(sources, ["u0"], outcomes, [1], expected_acc_counts=counts)
    return told


def test_observers_are_told_of_episodes_that_were_lost():
    one = {"acc": [1.0], "task_score": [1.0], "turns": [2.0], "invalid_actions": [0.0], "failed": [0.0]}
    outcomes = {**one, "task_type": ["pick"], "task_id": ["p"], "arm": ["student"], "error": [""], "failure": [""]}
    panel = [{"task_id": "p", "task_type": "pick"}, {"task_id": "q", "task_type": "pick"}]
    counts = {("alfworld/student", "u0"): 1, ("alfworld/student", "u1"): 1}
    [(step, metrics, found)] = validate(True, outcomes, ["alfworld/student"], counts, panel)
    assert (step, metrics["sdar-val/student/success"], found["task_id"]) == (2, 0.5, ["p", "q"])
    # And in a recipe of verl's, with verl's own metrics.
    counts = {("gsm8k", "u0"): 1, ("gsm8k", "u1"): 1}
    [(_, metrics, found)] = validate(False, {"reward": [1.0], "acc": [1.0]}, ["gsm8k"], counts, panel)
    assert metrics["val-core/gsm8k/acc/mean@1"] == 0.5 and found["acc"] == [1.0, 0.0]


def test_an_episode_that_left_nothing_behind_is_not_solved():
    """The panel says how many of each task there were; means over those that came back would flatter."""
    outcomes = {
        "acc": [1.0, 1.0],
        "task_score": [1.0, 1.0],
        "turns": [2.0, 2.0],
        "invalid_actions": [0.0, 0.0],
        "failed": [0.0, 0.0],
        "task_type": ["pick", "look"],
        "task_id": ["p1", "l1"],
        "arm": ["student", "student"],
        "error": ["", ""],
    }
    # Four tasks, one rollout each; one "pick" crashed, and so did every "heat".
    tasks = [("p1", "pick"), ("l1", "look"), ("p2", "pick"), ("h1", "heat")]
    panel = SimpleNamespace(dataframe={"extra_info": [{"task_id": i, "task_type": kind} for i, kind in tasks]})
    asked = ArmDataset(panel, {"student": None}).asked
    assert asked(3) == {("student", *task): 3 for task in tasks}
    whole = with_lost(outcomes, asked(1))
    assert whole["task_id"] == ["p1", "l1", "p2", "h1"] and whole["failed"] == [0, 0, 1, 1] and len(whole["error"]) == 4
    assert len(outcomes["acc"]) == 2 and with_lost({"acc": [1.0]}, asked(1)) == {"acc": [1.0]}
    metrics = arm_metrics(whole)
    assert metrics["sdar-val/student/success/pick"] == 0.5
    assert metrics["sdar-val/student/success/look"] == 1.0
    assert metrics["sdar-val/student/success/heat"] == 0.0
    assert metrics["sdar-val/student/success"] == 0.5 and metrics["sdar-val/student/failed"] == 2
    assert metrics["sdar-val/student/episodes"] == 4 and metrics["sdar-val/student/turns"] == 2.0
    twice = arm_metrics(with_lost(outcomes, asked(2)))
    assert twice["sdar-val/student/success/pick"] == 0.25


def test_the_gap_by_thirds_of_an_episode_and_what_centring_leaves():
    gap = torch.tensor([[-1.0, 0.0], [-2.0, -3.0], [-4.0, 9.0], [1.0, 9.0], [9.0, 9.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]]).bool()
    episodes, turns = ["a", "a", "a", "b", "padding"], [0, 1, 2, 0, 0]
    metrics = gap_metrics(gap, mask, mask, episodes, turns, entropy=gap.abs())
    assert metrics["sdar/gap_mean/first_third"] == pytest.approx((-1 + 0 + 1) / 3)
    assert metrics["sdar/gap_mean/middle_third"] == pytest.approx(-2.5)
    assert metrics["sdar/gap_mean/last_third"] == pytest.approx(-4.0)
    centred = np.array([-1, 0, -2, -3, -4]) + 2.0
    assert metrics["sdar/gap_centred_std"] == pytest.approx(np.sqrt((centred**2).sum() / 6))
    assert metrics["sdar/gap_centred_positive_share"] == pytest.approx(2 / 6)
    assert metrics["sdar/student_entropy"] == pytest.approx(11 / 6)
    assert gap_metrics(gap, torch.zeros_like(mask), mask, episodes, turns) == {}


def test_the_thirds_of_a_conversation_in_one_row_are_those_of_its_turns():
    response = torch.tensor([[1, 1, 0, 1, 0, 1]]).bool()
    metrics = gap_metrics(torch.tensor([[1.0, 3.0, 9.0, 5.0, 9.0, 7.0]]), response, response, ["a"], [0])
    thirds = [metrics[f"sdar/gap_mean/{name}_third"] for name in ("first", "middle", "last")]
    assert thirds == [2.0, 5.0, 7.0]


def test_the_gradient_share_is_lambda_times_a_ratio_of_norms():
    terms = distillation_terms(-torch.ones(1, 2), -torch.ones(1, 2), torch.ones(1, 2))
    sums = {f"actor/sdar_total/{key}": value for key, value in stats_sums(terms).items()}
    squares = {"actor/sdar_total/grad_rl_squared": 4.0, "actor/sdar_total/grad_distill_squared": 9.0}
    metrics = {**sums, **squares, "actor/sdar/loss": 0.0, "sdar/lambda": 0.2}
    assert reduce_loss_sums(metrics)["sdar/grad_share"] == pytest.approx(0.2 * 1.5)
    squares["actor/sdar_total/grad_rl_squared"] = 0.0  # no group with variance: nothing to be a share of
    metrics = {**sums, **squares, "actor/sdar/loss": 0.0, "sdar/lambda": 0.2}
    assert "sdar/grad_share" not in reduce_loss_sums(metrics)
    norms = {"actor/sdar_norm/rl": 4.0, "actor/sdar_norm/distillation": 6.0}
    metrics = {**sums, **norms, "actor/sdar/loss": 0.0, "sdar/lambda": 0.2}
    assert reduce_loss_sums(metrics)["sdar/grad_share_weights"] == pytest.approx(0.3)
    assert not any(name.startswith("actor/sdar_norm") for name in metrics)


def test_an_arm_of_a_recipe_keeps_the_data_source_by_which_its_reward_is_chosen():
    """Its name stands behind the source in the metrics alone, by the uids that verl gives to the loader's batches."""
    panel = [{"data_source": "openai/gsm8k", "raw_prompt": str(index)} for index in range(3)]
    student, told = ValidationArm(temperature=0.4), ValidationArm(context="teacher", temperature=0.4)
    arms = ArmDataset(panel, {"student": student, "told": told}, "single_turn_agent")
    loader = ArmLoader(dataset=arms, batch_size=4, collate_fn=collate_fn)
    for number, batch in enumerate(loader):
        assert set(batch["data_source"]) == {"openai/gsm8k"}
        batch["uid"] = [f"{number}-{index}" for index in range(len(batch["sdar_arm"]))]
    uids = ["0-0", "1-1", "0-3"]
    counts = {("openai/gsm8k", uid): 2 for uid in uids}
    named = "openai/gsm8k/told"
    assert loader.named(["openai/gsm8k"] * 3, uids, counts) == (
        ["openai/gsm8k", named, named],
        {("openai/gsm8k", "0-0"): 2, (named, "1-1"): 2, (named, "0-3"): 2},
    )
    assert loader.named(["openai/gsm8k"], ["0-0"], None) == (["openai/gsm8k"], None)
    # What becomes of each is kept by task, which has one name in all arms.
    rewards = {"reward": [0.5, 1.0, 0.0, 0.25], "acc": [None, True, False, False]}
    sources, uids = ["openai/gsm8k"] * 4, ["0-0", "0-0", "1-1", "0-3"]
    found = loader.outcomes(sources, uids, rewards, None)
    assert found == {
        "arm": ["student", "student", "told", "told"],
        "task_id": ["openai/gsm8k/0", "openai/gsm8k/0", "openai/gsm8k/2", "openai/gsm8k/0"],
        "task_type": ["openai/gsm8k"] * 4,
        "acc": [0.5, 1.0, 0.0, 0.0],
        "reward": [0.5, 1.0, 0.0, 0.25],
    }
    whole = loader.outcomes(sources, uids, rewards, counts)  # one answer of each in the arm was lost
    assert {name: values[:4] for name, values in whole.items()} == found
    assert whole["task_id"][4:] == ["openai/gsm8k/2", "openai/gsm8k/0"] and whole["acc"][4:] == [0.0, 0.0]
    # A reward is nobody's to invent, and verl adds none either where the reward function says no accuracy.
    alone = loader.outcomes(["s"] * 4, uids, {"reward": rewards["reward"]}, {("s", uid): 2 for uid in set(uids)})
    assert alone["acc"] == rewards["reward"]
    del rewards["acc"]
    assert loader.outcomes(["s"] * 4, ["0-0", "0-1", "0-2", "0-3"], rewards, None)["acc"] == rewards["reward"]


@pytest.mark.parametrize(
    ("arms", "run"),
    [
        ({"student": ValidationArm(temperature=0.4)}, []),
        ({"student": ValidationArm(temperature=1.0)}, ["student"]),
        ({"student": ValidationArm(temperature=0.4), "hot": ValidationArm(temperature=1.0)}, ["hot"]),
        ({"hot": ValidationArm(temperature=0.4)}, ["hot"]),
    ],
)
def test_every_arm_that_somebody_sets_is_run_beside_verls_own_validation(arms, run):
    panel = [{"data_source": "openai/gsm8k", "raw_prompt": "0"}]
    rows = list(ArmDataset(panel, arms, "single_turn_agent"))
    assert [row["sdar_arm"] for row in rows] == ["", *run]
