"""The measurement of gradients in weight space, on an engine of a few weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from sdar_verl.fields import STEP_VALUES
from sdar_verl.method import StepValues
from sdar_verl.verl.engine import WithRequests


class Engine:
    """verl's engine as far as the measurement knows it; one weight vector, plain SGD."""

    def __init__(self, model_config: Any = None) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(3, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        self.passes = 0

    def optimizer_zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable[..., Any], forward_only: bool) -> dict:
        self.passes += 1
        for rows in data["x"].split(2):
            loss_function(self.module(rows), data).backward()
        return {"metrics": {}}

    def train_batch(self, data: TensorDict, loss_function: Callable[..., Any]) -> dict:
        self.optimizer_zero_grad()
        output = self.forward_backward_batch(data, loss_function, forward_only=False)
        self.optimizer.step()
        return output

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True


class Measuring(WithRequests, Engine):
    """The same with what we put before it."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace())


def loss(outputs: torch.Tensor, data: TensorDict) -> torch.Tensor:
    only = tu.get_non_tensor_data(data, STEP_VALUES, None)["only"]
    rl, distillation = outputs.sum(), 2.0 * outputs.square().sum()
    return {"rl": rl, "distillation": distillation, None: rl + 0.5 * distillation}[only]


def batch(measure: int | None) -> TensorDict:
    data = TensorDict({"x": torch.arange(12.0).reshape(4, 3)}, batch_size=4)
    tu.assign_non_tensor(data, **{STEP_VALUES: asdict(StepValues(0.5, 5.0, measure=measure))})
    return data


def test_norms_are_those_of_each_loss_and_the_update_is_as_without() -> None:
    engine, plain = Measuring(), Engine()
    inputs, weight = batch(None)["x"], engine.module.weight.detach().clone()
    rl = inputs.sum(0)
    distillation = 4.0 * (inputs @ weight.T * inputs).sum(0)
    metrics = engine.train_batch(batch(1), loss_function=loss)["metrics"]
    assert metrics["sdar_norm/rl"].aggregate() == pytest.approx(rl.norm().item(), rel=1e-5)
    assert metrics["sdar_norm/distillation"].aggregate() == pytest.approx(distillation.norm().item(), rel=1e-5)
    plain.train_batch(batch(1), loss)
    assert torch.equal(engine.module.weight, plain.module.weight)


def test_a_step_is_measured_on_its_first_update_alone() -> None:
    engine = Measuring()
    measured = []
    for step in (None, 1, 1, None, 4):
        before = engine.passes
        measured.append("sdar_norm/rl" in engine.train_batch(batch(step), loss_function=loss)["metrics"])
        assert engine.passes - before == (3 if measured[-1] else 1)
    assert measured == [False, True, False, False, True]


def test_the_batch_says_afterwards_what_it_said_before() -> None:
    data = batch(1)
    Measuring().train_batch(data, loss_function=loss)
    assert StepValues(**tu.get_non_tensor_data(data, STEP_VALUES, None)) == StepValues(0.5, 5.0, measure=1)


def test_a_batch_that_says_nothing_is_verls_own() -> None:
    engine = Measuring()
    data = TensorDict({"x": torch.ones(2, 3)}, batch_size=2)
    engine.train_batch(data, loss_function=lambda outputs, _: outputs.sum())
    assert engine.passes == 1
