"""What the trainer makes of all rows before an update: strengths, statistics, signals; without Ray."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import verl.trainer.ppo.v1  # noqa: F401  loads our trainers, which stand on it

from sdar_verl.algorithm.advantages import rlsd_advantages
from sdar_verl.algorithm.gap import step_statistics
from sdar_verl.algorithm.schedules import LinearDecay, Schedule
from sdar_verl.config import AdvantageConfig
from sdar_verl.config.context import ContextConfig
from sdar_verl.config.loss import LossConfig
from sdar_verl.errors import ConfigError
from sdar_verl.fields import GAP_POOLED, GAP_SHIFT, LOSS_SCALE, STEP_VALUES, TEACHER_LOG_PROBS
from sdar_verl.method import Judgement, Method, StepValues, Strengths
from sdar_verl.observe.base import load_states, save_states
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.step import LocalUpdate
from sdar_verl.table import StepTable
from sdar_verl.verl.advantage import compute_sdar_advantage
from tests.support.table import make_table, stored

KEYS = ["s1p0_0_0", "s1p0_0_1", "s1p0_1_0", "s1p1_0_0", "padding_0_0"]
LENGTHS = [3, 2, 4, 1, 2]


def table_of(step: int = 1, *, with_teacher: bool = True) -> StepTable:
    """Four rows and one that fills up."""
    generator = torch.Generator().manual_seed(0)

    def column() -> list[torch.Tensor]:
        return [-torch.rand(length, generator=generator) for length in LENGTHS]

    ones = [torch.ones(length, dtype=torch.long) for length in LENGTHS[:-1]] + [torch.zeros(2, dtype=torch.long)]
    columns = {
        "response_mask": ones,
        "old_log_probs": column(),
        "advantages": [mask * value for mask, value in zip(ones, (1.0, 1.0, -1.0, 0.5, 0.0), strict=True)],
        "rm_scores": [mask * 0.0 for mask in ones],
        "entropy": [-values for values in column()],
    }
    if with_teacher:
        columns[TEACHER_LOG_PROBS] = column()
    infos = [RowInfo(turn, "pick", teacher_prompt_tokens=5) for turn in (0, 1, 0, 0)]
    return make_table(KEYS, [*infos, None], columns, step=step)


def judged(table: StepTable, **loss: Any) -> Judgement:
    settings = LossConfig(**loss)
    return Method(settings).judge(table, *Strengths(settings).at(table.step))


def test_by_default_the_workers_get_lambda_and_beta_alone() -> None:
    found = judged(table_of())
    assert found.values == StepValues(0.01, 5.0)
    assert found.columns == {} and found.change is None


def test_schedules_give_each_step_its_values() -> None:
    strengths = Strengths(
        LossConfig(
            coef=0.5,
            coef_schedule={"name": "linear_decay", "options": {"steps": 10}},
            beta_schedule={"start_step": 3},
        )
    )
    seen = [strengths.at(step) for step in (1, 3, 5, 10)]
    assert seen == [pytest.approx((*pair, 1.0)) for pair in ((0.45, 0.0), (0.35, 5.0), (0.25, 5.0), (0.0, 5.0))]


def test_a_measurement_is_asked_for_every_so_many_steps() -> None:
    loss = {"measure_every": 3, "coef_schedule": {"stop_step": 7}}
    asked = [judged(table_of(step), **loss).values.measure for step in range(1, 9)]
    assert asked == [1, None, None, 4, None, None, None, None]
    assert judged(table_of(), **loss, signal="advantage_weight").values.measure is None, "there is one loss only"


def test_statistics_are_those_of_the_whole_step() -> None:
    options = {"centre": "batch", "granularity": "trajectory", "divide_by": "weights"}
    table = table_of()
    found = judged(table, **options)
    expected = step_statistics(
        table.columns["old_log_probs"],
        table.columns[TEACHER_LOG_PROBS],
        table.response,
        [key.rsplit("_", 1)[0] for key in KEYS],
        **options,
    )
    assert set(found.columns) == {GAP_SHIFT, GAP_POOLED, LOSS_SCALE}
    for name, value in ((GAP_SHIFT, expected.shift), (GAP_POOLED, expected.pooled), (LOSS_SCALE, expected.scale)):
        torch.testing.assert_close(found.columns[name][table.response], value[table.response])


def test_a_gate_that_reads_the_entropy_gets_the_steps_ranges() -> None:
    table = table_of()
    found = judged(table, gate="soft_or", gate_options={"norm": "batch_minmax"})
    entropy = table.columns["entropy"][table.response]
    assert found.values.ranges is not None
    assert found.values.ranges[:2] == pytest.approx((entropy.min().item(), entropy.max().item()))
    assert Method(LossConfig(gate="soft_or")).reads_entropy and not Method(LossConfig()).reads_entropy


def test_gap_and_gate_are_those_of_the_loss_and_nothing_where_there_is_no_teacher() -> None:
    table = table_of()
    table.silence([1], "no answer")
    found = judged(table, beta=2.0)
    gap = table.columns[TEACHER_LOG_PROBS] - table.columns["old_log_probs"]
    torch.testing.assert_close(found.gap[table.mask], gap[table.mask])
    torch.testing.assert_close(found.gate[table.mask], torch.sigmoid(2.0 * gap[table.mask]))
    assert not found.gap[1].any() and not found.gate[1].any() and not found.gate[4].any()


def test_a_signal_changes_advantages_and_keeps_the_loss_out() -> None:
    table = table_of()
    found = judged(table, signal="advantage_weight", coef=0.5)
    before = table.columns["advantages"]
    expected = rlsd_advantages(before, table.columns["old_log_probs"], table.columns[TEACHER_LOG_PROBS], table.response)
    torch.testing.assert_close(found.columns["advantages"], expected)
    assert found.values.coef == 0.0
    change = (expected - before).abs().sum() / table.response.sum()
    assert found.change == pytest.approx(change.item()) != 0.0


def test_without_teacher_log_probs_only_the_values_are_sent() -> None:
    found = judged(table_of(with_teacher=False), centre="batch")
    assert found == Judgement(StepValues(0.01, 5.0), {})


def test_the_mean_over_trajectories_needs_no_teacher_before_the_update() -> None:
    scales = [
        judged(table_of(with_teacher=there), divide_by="trajectory").columns["sdar_loss_scale"]
        for there in (True, False)
    ]
    assert torch.equal(*scales) and len(scales[0].unique()) > 1


@pytest.mark.parametrize("step", [1, 2])
def test_the_students_weight_in_the_target_follows_its_schedule(step: int) -> None:
    options = {"name": "linear_decay", "options": {"steps": 2, "final": 0.4}}
    anchor = {"reference": 0.3, "student": 0.5, "student_schedule": options}
    weight = Strengths(LossConfig(objective="k1", anchor=anchor)).anchor(step)
    assert weight == pytest.approx({1: 0.35, 2: 0.2}[step])


def test_a_schedule_that_leaves_the_teacher_no_weight_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearDecay, "factor", lambda self, step: 3.0)  # a third party's may rise
    schedule = {"name": "linear_decay", "options": {"steps": 2}}
    anchor = {"reference": 0.3, "student": 0.5, "student_schedule": schedule}
    with pytest.raises(ValueError, match=r"student_schedule makes the student's weight 1.5 at step 4.*\[0, 0.7\)"):
        Strengths(LossConfig(objective="k1", anchor=anchor)).anchor(4)


def test_a_signal_that_breaks_its_rows_is_named() -> None:
    from sdar_verl.algorithm.signals import _SIGNALS, register_signal

    register_signal("wrong_in_a_test")(lambda rows, *, strength: rows.advantages * float("nan"))
    register_signal("narrow_in_a_test")(lambda rows, *, strength: rows.advantages[:, :1])
    try:
        with pytest.raises(ValueError, match="signal wrong_in_a_test holds NaN"):
            judged(table_of(), signal="wrong_in_a_test")
        with pytest.raises(ValueError, match=r"'narrow_in_a_test' returned shape \(5, 1\); expected \(5, 4\)"):
            judged(table_of(), signal="narrow_in_a_test")
    finally:
        del _SIGNALS._entries["wrong_in_a_test"], _SIGNALS._entries["narrow_in_a_test"]


def test_what_a_schedule_learned_survives_a_checkpoint(tmp_path: Any) -> None:
    settings = LossConfig(coef=1.0, coef_schedule={"name": "grad_share", "options": {"share": 0.1, "smoothing": 0.0}})
    strengths = Strengths(settings)
    strengths.observe(1, {"sdar/grad_share": 2.0})
    save_states([strengths], tmp_path)
    fresh = Strengths(settings)
    load_states([fresh], tmp_path)
    assert fresh.at(2) == pytest.approx((0.05, 5.0, 1.0))
    assert Strengths(LossConfig()).state_dict() == {}
    save_states([Strengths(LossConfig())], tmp_path)
    with pytest.raises(ConfigError, match="it holds nothing of the schedule of coef"):
        load_states([Strengths(settings)], tmp_path)


def test_a_schedule_learns_within_its_window_alone() -> None:
    retire = {"name": "retire", "options": {"teacher_success": 0.5, "every": 1}}
    late = Strengths(LossConfig(coef=1.0, coef_schedule={**retire, "start_step": 11}))
    for step in range(1, 13):
        assert not late.retired(step), "two windows of its own"
        late.observe(step, {"sdar/gap_mean": -0.1, "sdar/success": 1.0})
    assert late.retired(13)


def test_a_schedule_that_turns_a_strength_around_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    strengths = Strengths(LossConfig(coef=0.5))
    for factor in (-1.0, math.nan):
        monkeypatch.setattr(Schedule, "factor", lambda self, step, factor=factor: factor)
        with pytest.raises(ValueError, match=r"coef_schedule comes to .* at step 3"):
            strengths.at(3)


@pytest.mark.parametrize(
    ("signal", "options"),
    [("advantage_distance", {}), ("advantage_nudge", {"means": "two", "unpaired": "drop"}), ("advantage_weight", {})],
)
def test_a_strength_of_zero_is_plain_grpo(signal: str, options: dict[str, str]) -> None:
    table = table_of()
    found = Method(LossConfig(coef=0.5, signal=signal, signal_options=options)).judge(table, 0.0, 5.0)
    assert "advantages" not in found.columns and found.change == 0.0


def trainer(**loss: Any) -> Any:
    """As far as the trainer's own part of the judgement goes."""
    settings = LossConfig(**loss)
    return SimpleNamespace(
        method=Method(settings),
        strengths=Strengths(settings),
        global_steps=1,
        teacher=object(),
        sdar=SimpleNamespace(loss=settings, context=ContextConfig()),
    )


def test_the_judgement_goes_to_the_rows_the_batch_and_the_metrics() -> None:
    table = table_of()
    before = set(stored(table))
    metrics = LocalUpdate.judge(trainer(centre="batch"), table)
    assert set(stored(table)) - before == {GAP_SHIFT}
    assert [len(row) for row in stored(table)[GAP_SHIFT]] == LENGTHS
    values = StepValues(**table.rows.batch.extra_info[STEP_VALUES])
    assert values == StepValues(0.01, 5.0)
    assert (metrics["sdar/lambda"], metrics["sdar/beta"]) == (0.01, 5.0)
    assert "sdar/gap_centred_std" in metrics and "sdar/advantage_change" not in metrics
    assert table.columns["gap"].shape == table.columns["gate"].shape == (5, 4)


def test_shaped_advantages_are_what_the_workers_get() -> None:
    table = table_of()
    before = [row.clone() for row in stored(table)["advantages"]]
    metrics = LocalUpdate.judge(trainer(signal="advantage_weight", coef=0.5), table)
    assert (metrics["sdar/lambda"], StepValues(**table.rows.batch.extra_info[STEP_VALUES]).coef) == (0.5, 0.0)
    assert metrics["sdar/advantage_change"] > 0.0
    assert not torch.equal(stored(table)["advantages"][0], before[0])
    assert torch.equal(table.columns["advantages"][0, :3], stored(table)["advantages"][0]), (
        "the record shows what was trained on"
    )


@pytest.mark.parametrize("estimator", ["sdar", "another"])
def test_tokens_that_verl_rejects_while_it_makes_the_advantages_are_out_of_all_that_follows(estimator: str) -> None:
    table, one = table_of(), trainer(divide_by="gap_bearing")

    def compute_advantage(batch: Any, metrics: dict[str, Any]) -> Any:
        stored(table)["response_mask"][0] = torch.tensor([1, 0, 1])
        if estimator == "sdar":
            compute_sdar_advantage(torch.ones(5, 4), table.response.long(), index=np.array(["g"] * 5))
        return batch

    one.sdar.advantage, one._compute_advantage, one.correction = AdvantageConfig(), compute_advantage, {}
    LocalUpdate.advantages(one, table, {})
    assert table.response[0].tolist() == [True, True, True, False], "without rejection it is not read again"
    one.correction = {"rollout_rs": "token"}
    LocalUpdate.advantages(one, table, {})
    assert table.response[0].tolist() == [True, False, True, False]
    LocalUpdate.judge(one, table)
    assert table.columns["gap"][0, 1] == 0 != table.columns["gap"][0, 2]


def test_a_teacher_that_is_scored_within_the_update_has_no_gap_before_it() -> None:
    table = table_of(with_teacher=False)
    metrics = LocalUpdate.judge(trainer(), table)
    assert metrics == {"sdar/lambda": 0.01, "sdar/beta": 5.0}
    assert StepValues(**table.rows.batch.extra_info[STEP_VALUES]) == StepValues(0.01, 5.0)


def test_the_policy_gradients_weight_is_a_factor_on_what_a_signal_adds_to() -> None:
    plain, base = judged(table_of()), table_of().columns["advantages"]
    assert "advantages" not in plain.columns
    weighted = judged(table_of(), rl_coef=0.25)
    torch.testing.assert_close(weighted.columns["advantages"], 0.25 * base)
    assert torch.equal(weighted.gate, plain.gate) and weighted.values == plain.values, "the term keeps its own"
    shaped, alone = (judged(table_of(), signal="advantage_shaping", coef=0.3, rl_coef=rl) for rl in (0.25, 0.0))
    torch.testing.assert_close(shaped.columns["advantages"] - alone.columns["advantages"], 0.25 * base)
    assert shaped.change == pytest.approx(alone.change), "the change is the teacher's, not the weight's"
    within = judged(table_of(with_teacher=False), rl_coef=0.25)
    torch.testing.assert_close(within.columns["advantages"], 0.25 * base)


def test_a_retired_teacher_leaves_the_workers_verls_loss_and_the_weight_of_the_policy_gradient() -> None:
    table, one = table_of(with_teacher=False), trainer(rl_coef=0.5, coef_schedule={"stop_step": 2})
    one.teacher, one.global_steps = None, 2
    metrics = LocalUpdate.judge(one, table)
    assert metrics == {"sdar/lambda": 0.0, "sdar/beta": 5.0, "sdar/rl_weight": 0.5}
    assert StepValues(**table.rows.batch.extra_info[STEP_VALUES]).coef == 0
    assert torch.equal(stored(table)["advantages"][0], torch.full((3,), 0.5))
