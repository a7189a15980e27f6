"""LoRA under SDAR's loss on verl's own engine, without Ray: against a plain model with the same adapter.

Gradient checkpointing is on, which with a frozen base needs verl to let gradients through the inputs. Two updates: at
the first, one of an adapter's two matrices is 0, and so is the gradient of the other.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdar_verl.config.loss import LossConfig
from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.method import Method
from tests.support.one_update import (
    BETA,
    COEF,
    ROWS,
    UPDATE,
    plain_model,
    plain_numbers,
    start_fields,
    teacher_rows,
    update_batch,
)
from tests.support.ranks import run_on_ranks
from tests.support.teacher_worker import teacher_batch, worker_config
from tests.support.tiny_model import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RANK, ALPHA, RATE = 4, 8, 3.0
SAME = {"rtol": 1e-4, "atol": 2e-5}


def all_weights(worker: Any) -> dict[str, torch.Tensor]:
    """Base and adapter; one rank holds them whole."""
    return {
        name: parameter.detach().full_tensor().clone()
        for name, parameter in worker.actor.engine.module.named_parameters()
    }


def run(rank: int, folder: Path) -> None:
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass

    from sdar_verl.verl.loss import sdar_loss
    from sdar_verl.verl.worker import TeacherWorker

    settings = {
        **UPDATE,
        "actor.optim.lr": RATE,
        "model.lora_alpha": ALPHA,
        "model.enable_gradient_checkpointing": True,
        "model.use_remove_padding": True,
    }
    config = worker_config(str(folder / "model"), RANK, settings, source="actor")
    worker = TeacherWorker(config, "actor")
    torch.manual_seed(0)  # of the adapter
    worker.init_model()
    loss = LossConfig(coef=COEF, beta=BETA)
    worker.set_loss_fn(partial(sdar_loss, config=omega_conf_to_dataclass(config.actor), method=Method(loss)))
    fields = start_fields(folder)
    out: dict[str, Any] = {"fields": fields, "weights": [all_weights(worker)], "metrics": []}
    for _ in range(2):
        asked = teacher_batch(teacher_rows())
        out["teacher"] = [row.clone() for row in worker.compute_teacher_log_prob(asked)[TEACHER_LOG_PROBS].unbind()]
        metrics = tu.get(worker.update_actor(update_batch(range(ROWS), fields)), "metrics")
        out["metrics"].append({name: float(torch.tensor(value).sum()) for name, value in metrics.items()})
        out["weights"].append(all_weights(worker))
    torch.save(out, folder / "adapter.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    make_tiny_model(folder / "model", scale=4.0, tie_word_embeddings=False)
    run_on_ranks(run, folder, ranks=1)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    return torch.load(folder / "adapter.pt", weights_only=False)


@pytest.fixture(scope="module")
def plain(folder, found) -> dict[str, Any]:
    """The second update, from a plain model with the adapter that the first one left."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(plain_model(folder), settings)
    model.load_state_dict(found["weights"][1])
    return plain_numbers(model, "sampled", found["fields"])


def test_the_base_is_frozen_and_the_adapter_moves(folder, found):
    base = dict(plain_model(folder).named_parameters())
    first, last = found["weights"][0], found["weights"][2]
    frozen = [name for name in first if "lora_" not in name]
    assert len(frozen) == len(base)
    for name in frozen:
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(last[name], base[own]), name
    assert all(not torch.equal(first[name], last[name]) for name in first if "lora_" in name)


def test_the_teacher_reads_base_and_adapter(found, plain):
    for row, expected in zip(found["teacher"], plain["teacher"], strict=True):
        torch.testing.assert_close(row, expected, **SAME)


def test_the_adapters_gradient_is_that_of_a_plain_backward_pass(found, plain):
    before, after = found["weights"][1], found["weights"][2]
    moved = {name: gradient for name, gradient in plain["gradient"].items() if gradient is not None}
    assert moved
    assert all("lora_" in name for name in moved)
    for name, gradient in moved.items():
        largest = gradient.abs().max().item()
        assert largest > 1e-5, f"{name} has hardly a gradient: nothing was tested"
        torch.testing.assert_close((before[name] - after[name]) / RATE, gradient, rtol=1e-3, atol=1e-3 * largest)


def test_the_metrics_are_those_of_a_plain_pass(found, plain):
    for name in ("loss", "actor/pg_loss", "kl_loss", "actor/entropy_loss", "sdar/loss", "grad_norm"):
        assert found["metrics"][1][name] == pytest.approx(plain["metrics"][name], rel=1e-3, abs=1e-5), name
