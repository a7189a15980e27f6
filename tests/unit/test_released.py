"""Agreement with the released code: numbers that its functions gave for the same tensors, committed as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdar_verl.algorithm.advantages import rlsd_advantages
from sdar_verl.algorithm.schedules import Scheduled, make_schedule
from sdar_verl.algorithm.stats import finalize_stats
from sdar_verl.verl.scalar_loss import gated_distillation_loss

CASES = json.loads((Path(__file__).parents[1] / "data" / "released_losses.json").read_text())["cases"]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def tensors(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(case[name], dtype=torch.float64)
        for name in ("student", "teacher", "old", "mask", "advantages")
    }


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("options", [{"beta": 5.0}, {"beta": 0.0}, {"gate": "half"}])
def test_sdar_and_its_beta_zero_baselines(index: int, options: dict[str, Any]) -> None:
    case = CASES[index]
    x = tensors(case)
    released = case[f"sdar_beta{options.get('beta', 0.0):g}"]
    student = x["student"].requires_grad_()
    loss, sums = gated_distillation_loss(student, x["teacher"], x["mask"], **options)
    assert loss.item() == pytest.approx(released["loss"], rel=1e-6, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.tensor(released["gradient"], dtype=torch.float64), **CLOSE)
    stats = finalize_stats(sums)
    assert stats["gate_mean"] == pytest.approx(released["gate_mean"], rel=1e-6)
    assert stats["gap_mean"] == pytest.approx(released["gap_mean"], rel=1e-6)
    assert stats["active_share"] == pytest.approx(released["active"], rel=1e-6)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_skill_sd(index: int) -> None:
    case = CASES[index]
    x = tensors(case)
    student = x["student"].requires_grad_()
    loss, _ = gated_distillation_loss(
        student, x["teacher"], x["mask"], gate="none", objective="k3", old_log_probs=x["old"]
    )
    assert loss.item() == pytest.approx(case["skill_sd"]["loss"], rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.tensor(case["skill_sd"]["gradient"], dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_rlsd_at_the_start_and_half_way_through_its_decay(index: int) -> None:
    case = CASES[index]
    x = tensors(case)
    decay = Scheduled(0.5, make_schedule("linear_decay", {"steps": 100}))
    for mix, released in ((0.5, case["rlsd"]["0.5"]), (decay.value(50), case["rlsd"]["0.25"])):
        ours = rlsd_advantages(x["advantages"], x["old"], x["teacher"], x["mask"], mix=mix)
        torch.testing.assert_close(ours, torch.tensor(released, dtype=torch.float64), **CLOSE)
