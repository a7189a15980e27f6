"""The teacher's worker on a process of its own, as verl would build it, and batches for it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from sdar_verl.config import TeacherConfig
from sdar_verl.fields import MODULES_NODE, TEACHER_LOG_PROBS, TEACHER_NODE, TEACHER_PROMPTS
from sdar_verl.requests import SCORING_PASS, HeadRequest, ScoringPass
from sdar_verl.table import nested
from sdar_verl.teacher.rows import teacher_row

RANKS = 2
ROWS = 4  # of each rank
TEMPERATURE = 0.7


def make_rows(rank: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(prompt, response, mask) of a rank; uneven lengths."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    rows = []
    for i in range(ROWS):
        prompt = torch.randint(3, 250, (3 + 2 * i + rank,), generator=generator)
        response = torch.randint(3, 250, (2 + i,), generator=generator)
        rows.append((prompt, response, torch.ones_like(response)))
    return rows


@cache
def recipe() -> Any:
    import verl  # noqa: F401  loads the plugin
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("sdar_quickstart")


def worker_config(model: str, adapter: int = 0, overrides: Mapping[str, Any] | None = None, **teacher: Any) -> Any:
    from omegaconf import OmegaConf, open_dict

    settings = {
        "model.path": model,
        "model.lora_rank": adapter,
        "model.target_modules": "all-linear",
        "actor.optim.lr": 0.02,
        "actor.optim.total_training_steps": 10,
        **(overrides or {}),
    }
    whole = copy.deepcopy(recipe())
    for option, value in settings.items():
        OmegaConf.update(whole, f"actor_rollout_ref.{option}", value, force_add=True)
    config = OmegaConf.create(OmegaConf.to_container(whole.actor_rollout_ref, resolve=True))
    with open_dict(config):
        config[TEACHER_NODE] = TeacherConfig(**teacher).model_dump()
        config[MODULES_NODE] = ["tests.support.toy_source"]
    return config


def batch(rows: list[tuple[torch.Tensor, ...]], **extra: Any) -> Any:
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    inputs = [teacher_row(*row) for row in rows]
    data = TensorDict({name: nested([row[name] for row in inputs]) for name in inputs[0]}, batch_size=len(rows))
    tu.assign_non_tensor(data, temperature=TEMPERATURE, **extra)
    return data


def teacher_batch(rows: list[tuple[torch.Tensor, ...]], asked: ScoringPass | None = None, **extra: Any) -> Any:
    """A teacher pass over rows (the teacher's prompt, empty where it has no say; response; mask)."""
    data = batch(rows, **{SCORING_PASS: (asked or ScoringPass()).to_json()}, **extra)
    data[TEACHER_PROMPTS] = nested([prompt.int() for prompt, *_ in rows])
    return data


def ask(
    worker: Any, rank: int, request: HeadRequest | None = None, rows: Any = None, **extra: Any
) -> dict[str, list[torch.Tensor]]:
    asked = None if request is None else ScoringPass(request)
    data = teacher_batch(make_rows(rank) if rows is None else rows, asked)
    for name, value in extra.items():
        data[name] = value
    fields = worker.compute_teacher_log_prob(data)
    return {name: [row.clone() for row in fields[name].unbind()] for name in sorted(fields.keys())}


def ask_student(worker: Any, rank: int) -> list[torch.Tensor]:
    """verl's own log-probs of the same rows' responses."""
    data = batch(make_rows(rank), calculate_entropy=False, compute_loss=False)
    rows = worker.compute_log_prob(data)["log_probs"].unbind()
    return [row[-len(response) - 1 : -1] for row, (_, response, _) in zip(rows, make_rows(rank), strict=True)]


def update(worker: Any, rank: int, **fields: torch.Tensor) -> None:
    """Two optimizer updates on rows of the rank's own, two rows each."""
    data = batch(
        make_rows(rank, seed=1),
        calculate_entropy=False,
        distillation_use_topk=False,
        distillation_only=False,
        global_batch_size=RANKS * 2,
        mini_batch_size=RANKS * 2,
        epochs=1,
        seed=1,
        dataloader_kwargs={"shuffle": False},
    )
    for name, value in fields.items():
        data[name] = value
    worker.update_actor(data)


def likelihood(model_output: Any, data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """A loss that moves the weights, and keeps what the update was given."""
    if TEACHER_LOG_PROBS in data:
        likelihood.seen.append([row.clone() for row in data[TEACHER_LOG_PROBS].unbind()])
    return -model_output["log_probs"].values().mean(), {}


def weights(worker: Any) -> dict[str, torch.Tensor]:
    parameters, _ = worker.actor.engine.get_per_tensor_param()
    return {name: value.detach().clone() for name, value in parameters}


def make_worker(
    model: str,
    adapter: int = 0,
    role: str = "actor",
    base: Any = None,
    overrides: dict[str, Any] | None = None,
    **teacher: Any,
) -> Any:
    from sdar_verl.verl.worker import TeacherWorker

    strategy = {
        "actor.strategy": os.environ["SDAR_TEST_STRATEGY"],
        # Not hf_model, which FSDP1 cannot write on a CPU.
        "actor.checkpoint.save_contents": ["model", "optimizer", "extra"],
        **(overrides or {}),
    }
    worker = (base or TeacherWorker)(worker_config(model, adapter, strategy, **teacher), role)
    worker.init_model()
    worker.set_loss_fn(likelihood)
    return worker
