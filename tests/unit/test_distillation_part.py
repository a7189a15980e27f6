"""The trainer's part of the distillation term: what it reads, writes and remembers, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from sdar_verl.algorithm.advantages import rlsd_advantages
from sdar_verl.algorithm.gap import step_statistics
from sdar_verl.config import SdarConfig, load_config
from sdar_verl.observe.base import StepRows, load_parts, save_parts
from sdar_verl.observe.distillation import Distillation
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.fields import (
    GAP_POOLED,
    GAP_SHIFT,
    LOSS_SCALE,
    STEP_VALUES,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    StepValues,
)

KEYS = ["s1p0_0_0", "s1p0_0_1", "s1p0_1_0", "s1p1_0_0", "padding_0_0"]
LENGTHS = [3, 2, 4, 1, 2]


class Rows(StepRows):
    """A step whose fields live in this process instead of the TransferQueue."""

    stored: TensorDict

    def get(self, names: Any) -> TensorDict:
        return self.stored.select(*[name for name in names if name in self.stored])

    def put(self, fields: TensorDict) -> None:
        self.stored.update(fields)


def make_rows(settings: SdarConfig, step: int = 1, *, with_teacher: bool = True) -> Rows:
    generator = torch.Generator().manual_seed(0)

    def column() -> list[torch.Tensor]:
        return [-torch.rand(length, generator=generator) for length in LENGTHS]

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    ones = [torch.ones(length, dtype=torch.long) for length in LENGTHS[:-1]] + [torch.zeros(2, dtype=torch.long)]
    fields = {
        "response_mask": nested(ones),
        "old_log_probs": nested(column()),
        "advantages": nested([mask * value for mask, value in zip(ones, (1.0, 1.0, -1.0, 0.5, 0.0), strict=True)]),
        "rm_scores": nested([mask * 0.0 for mask in ones]),
        "entropy": nested([-values for values in column()]),
        TEACHER_LOG_PROBS: nested(column()),
        TEACHER_MASK: nested(ones),
    }
    if not with_teacher:
        fields = {name: value for name, value in fields.items() if name not in (TEACHER_LOG_PROBS, TEACHER_MASK)}
    batch = SimpleNamespace(keys=KEYS, extra_info={}, fields=None)
    infos = [RowInfo(turn, "pick") for turn in (0, 1, 0, 0)] + [None]
    rows = Rows(step, batch, infos, {}, settings, None)  # type: ignore[arg-type]
    rows.stored = TensorDict(fields, batch_size=len(KEYS))
    return rows


def make_part(**loss: Any) -> tuple[Distillation, SdarConfig, Any]:
    settings = load_config({"loss": loss})
    config = OmegaConf.create({"actor_rollout_ref": {"actor": {"calculate_entropy": False}}})
    return Distillation(settings, config), settings, config


def step_values(rows: Rows) -> StepValues:
    return StepValues.from_dict(rows.batch.extra_info[STEP_VALUES])


def test_by_default_only_lambda_and_beta_travel_with_the_batch() -> None:
    part, settings, config = make_part()
    rows = make_rows(settings)
    before = set(rows.stored.keys())
    part.on_advantages(rows)
    assert set(rows.stored.keys()) == before
    assert step_values(rows) == StepValues(0.01, 5.0)
    assert (rows.metrics["sdar/lambda"], rows.metrics["sdar/beta"]) == (0.01, 5.0)
    assert not config.actor_rollout_ref.actor.calculate_entropy


def test_schedules_give_each_step_its_values() -> None:
    part, settings, _ = make_part(
        coef=0.5,
        coef_schedule={"name": "linear_decay", "options": {"steps": 10}},
        beta_schedule={"start_step": 3},
    )
    seen = []
    for step in (1, 3, 5, 10):
        rows = make_rows(settings, step)
        part.on_advantages(rows)
        seen.append((step_values(rows).coef, step_values(rows).beta))
    assert seen == [pytest.approx(pair) for pair in ((0.45, 0.0), (0.35, 5.0), (0.25, 5.0), (0.0, 5.0))]


def test_a_measurement_is_asked_for_every_so_many_steps() -> None:
    part, settings, _ = make_part(measure_every=3, coef_schedule={"stop_step": 7})
    asked = []
    for step in range(1, 9):
        rows = make_rows(settings, step)
        part.on_advantages(rows)
        asked.append(step_values(rows).measure)
    assert asked == [1, None, None, 4, None, None, None, None]


def test_statistics_of_the_whole_step_are_written_beside_the_rows() -> None:
    options = {"centre": "batch", "granularity": "trajectory", "divide_by": "weights"}
    part, settings, _ = make_part(**options)
    rows = make_rows(settings)
    part.on_advantages(rows)
    padded = rows.stored.to_padded_tensor()
    expected = step_statistics(
        padded["old_log_probs"],
        padded[TEACHER_LOG_PROBS],
        padded["response_mask"],
        [key.rsplit("_", 1)[0] for key in KEYS],
        **options,
    )
    inside = padded["response_mask"].bool()
    for name, value in ((GAP_SHIFT, expected.shift), (GAP_POOLED, expected.pooled), (LOSS_SCALE, expected.scale)):
        torch.testing.assert_close(padded[name][inside], value[inside])
        assert rows.stored[name].offsets().diff().tolist() == LENGTHS


def test_a_gate_that_reads_the_entropy_asks_verl_for_it_and_gets_the_steps_ranges() -> None:
    part, settings, config = make_part(gate="soft_or", gate_options={"norm": "batch_minmax"})
    assert config.actor_rollout_ref.actor.calculate_entropy
    rows = make_rows(settings)
    part.on_advantages(rows)
    entropy = rows.stored["entropy"].to_padded_tensor(0.0)[rows.stored["response_mask"].to_padded_tensor(0).bool()]
    ranges = step_values(rows).ranges
    assert ranges is not None
    assert ranges[:2] == pytest.approx((entropy.min().item(), entropy.max().item()))


def test_a_signal_changes_advantages_and_keeps_the_loss_out() -> None:
    part, settings, _ = make_part(signal="advantage_weight", coef=0.5)
    rows = make_rows(settings)
    before = rows.stored.to_padded_tensor()
    part.on_advantages(rows)
    after = rows.stored.to_padded_tensor()
    expected = rlsd_advantages(
        before["advantages"], before["old_log_probs"], before[TEACHER_LOG_PROBS], before["response_mask"]
    )
    torch.testing.assert_close(after["advantages"], expected)
    assert step_values(rows).coef == 0.0
    assert rows.metrics["sdar/lambda"] == 0.5
    tokens = before["response_mask"].sum()
    change = (after["advantages"] - before["advantages"]).abs().sum() / tokens
    assert rows.metrics["sdar/advantage_change"] == pytest.approx(change.item()) != 0.0


def test_without_teacher_log_probs_in_the_batch_only_the_values_are_sent() -> None:
    part, settings, _ = make_part()
    rows = make_rows(settings, with_teacher=False)
    part.on_advantages(rows)
    assert step_values(rows) == StepValues(0.01, 5.0)
    assert "sdar/gap_centred_std" not in rows.metrics


def test_what_a_schedule_learned_survives_a_checkpoint(tmp_path: Any) -> None:
    loss = {"coef": 1.0, "coef_schedule": {"name": "grad_share", "options": {"share": 0.1, "smoothing": 0.0}}}
    part, settings, _ = make_part(**loss)
    rows = make_rows(settings)
    part.on_advantages(rows)
    part.on_trained(1, {"sdar/grad_share": 2.0})
    save_parts([part], tmp_path)
    fresh, _, _ = make_part(**loss)
    load_parts([fresh], tmp_path)
    later = make_rows(settings, step=2)
    fresh.on_advantages(later)
    assert step_values(later).coef == pytest.approx(0.05)
    assert make_part()[0].state_dict() == {}


def test_a_signal_that_breaks_its_rows_is_named() -> None:
    from sdar_verl.algorithm.signals import _SIGNALS, register_signal

    register_signal("wrong_in_a_test")(lambda rows, *, strength: rows.advantages * float("nan"))
    try:
        part, settings, _ = make_part(signal="wrong_in_a_test")
        with pytest.raises(ValueError, match="signal wrong_in_a_test holds NaN"):
            part.on_advantages(make_rows(settings))
    finally:
        del _SIGNALS._entries["wrong_in_a_test"]
