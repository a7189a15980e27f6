"""Gradient norms in the weights on verl's FSDP2 engine, without Ray, against plain backward passes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdar_verl.config.loss import LossConfig
from sdar_verl.fields import NORM_PREFIX, TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.method import Method, StepValues
from tests.support.one_update import one_mini_batch, plain_model
from tests.support.ranks import run_on_ranks
from tests.support.teacher_worker import TEMPERATURE, worker_config
from tests.support.tiny_model import make_tiny_model

pytestmark = pytest.mark.integration

ROWS, COEF = 4, 0.5


def make_rows() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(prompt, response, mask); uneven lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = zip([3, 6, 4, 7], [2, 5, 3, 4], strict=True)
    rows = [[torch.randint(3, 250, (length,), generator=generator) for length in pair] for pair in lengths]
    return [(prompt, response, torch.ones_like(response)) for prompt, response in rows]


def make_fields() -> dict[str, list[torch.Tensor]]:
    """Advantages and teacher log-probs of every response token."""
    generator = torch.Generator().manual_seed(1)
    responses = [response for _, response, _ in make_rows()]
    return {
        "advantages": [torch.randn(1, generator=generator).expand(len(row)).clone() for row in responses],
        TEACHER_LOG_PROBS: [-4.0 * torch.rand(len(row), generator=generator) for row in responses],
    }


def log_probs(model: torch.nn.Module) -> list[torch.Tensor]:
    out = []
    for prompt, response, _ in make_rows():
        logits = model(torch.cat([prompt, response])[None]).logits[0] / TEMPERATURE
        out.append(logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0])
    return out


def run(rank: int, folder: Path, ranks: int, measure: bool) -> None:
    """One update of the rank's share of the rows; its metrics and the weights afterwards."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass

    from sdar_verl.verl.loss import sdar_loss
    from sdar_verl.verl.worker import TeacherWorker

    config = worker_config(str(folder / "model"), source="actor")
    config.actor.use_kl_loss = False
    worker = TeacherWorker(config, "actor")
    worker.init_model()
    actor = omega_conf_to_dataclass(config.actor)
    worker.set_loss_fn(partial(sdar_loss, config=actor, method=Method(LossConfig(coef=COEF))))

    fields = make_fields()
    with torch.no_grad():
        fields["old_log_probs"] = log_probs(plain_model(folder))
    fields[TEACHER_MASK] = [mask for _, _, mask in make_rows()]
    values = StepValues(COEF, 5.0, measure=1 if measure else None)
    data = one_mini_batch(make_rows(), range(rank, ROWS, ranks), fields, values, calculate_entropy=False)
    output = worker.update_actor(data)
    metrics = tu.get(output, "metrics")
    parameters, _ = worker.actor.engine.get_per_tensor_param()
    state = {name: value.detach().clone() for name, value in parameters}
    norms = {name: float(torch.tensor(value).mean()) for name, value in metrics.items() if name.startswith(NORM_PREFIX)}
    torch.save({"norms": norms, "weights": state}, folder / f"{ranks}_{measure}_{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    make_tiny_model(folder / "model", scale=4.0, tie_word_embeddings=False)
    for ranks, measure in ((1, True), (1, False), (2, True)):
        run_on_ranks(run, folder, ranks, measure, ranks=ranks)
    return folder


def result(folder: Path, ranks: int, measure: bool = True, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{ranks}_{measure}_{rank}.pt", weights_only=False)


def plain_norm(folder: Path, part: str) -> float:
    model, fields = plain_model(folder), make_fields()
    student = torch.cat(log_probs(model))
    advantages, teacher = (torch.cat(fields[name]) for name in ("advantages", TEACHER_LOG_PROBS))
    if part == "rl":
        loss = -(advantages * torch.exp(student - student.detach())).mean()
    else:
        gap = (teacher - student).detach()
        loss = (torch.sigmoid(5.0 * gap) * (teacher - student)).mean()
    loss.backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("part", ["rl", "distillation"])
def test_the_norm_is_that_of_a_plain_backward_pass(folder, ranks, part):
    expected = plain_norm(folder, part)
    assert expected > 1e-3
    for rank in range(ranks):
        assert result(folder, ranks, rank=rank)["norms"][f"{NORM_PREFIX}{part}"] == pytest.approx(expected, rel=1e-3)


def test_the_update_is_the_one_without_a_measurement_bit_for_bit(folder):
    measured, plain = result(folder, 1), result(folder, 1, measure=False)
    assert plain["norms"] == {}
    start = dict(plain_model(folder).named_parameters())
    for name, value in plain["weights"].items():
        assert torch.equal(measured["weights"][name], value)
    assert not torch.equal(plain["weights"]["lm_head.weight"], start["lm_head.weight"])
