"""One update on verl's FSDP2 and FSDP1 engines, without Ray: one rank or two, packed or padded, in any micro-batches.

Log-probs, loss, metrics and gradient must be those of a plain model and a plain backward pass, with every term that
verl's loss can have: clipped and dual-clipped policy gradient, KL to the reference, entropy bonus, and our own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdar_verl.config.loss import LossConfig
from sdar_verl.fields import SUMS_PREFIX, TEACHER_HIDDEN, TEACHER_LOG_PROBS
from sdar_verl.method import Method
from sdar_verl.requests import HEAD_REQUEST, StepRequests
from tests.support.one_update import (
    BETA,
    COEF,
    ROWS,
    UPDATE,
    make_rows,
    plain_model,
    plain_numbers,
    start_fields,
    teacher_rows,
    update_batch,
)
from tests.support.ranks import run_on_ranks
from tests.support.teacher_worker import batch, teacher_batch, worker_config
from tests.support.tiny_model import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PACKED = {"model.use_remove_padding": True}
# Ranks have 4 or 8 rows of up to 21 tokens.
FEW_TOKENS = {"actor.ppo_max_token_len_per_gpu": 45, "rollout.log_prob_max_token_len_per_gpu": 45}
TWO_ROWS = {
    "actor.use_dynamic_bsz": False,
    "actor.ppo_micro_batch_size_per_gpu": 2,
    "rollout.log_prob_use_dynamic_bsz": False,
    "rollout.log_prob_micro_batch_size_per_gpu": 2,
}
EAGER = {"model.override_config.attn_implementation": "eager"}
CHECKPOINTING = {"model.enable_gradient_checkpointing": True}
FSDP1 = {"actor.strategy": "fsdp"}
CASES: dict[str, dict[str, Any]] = {
    "padded, two rows": TWO_ROWS,
    "padded, few tokens": FEW_TOKENS,
    "packed": PACKED,
    "packed, two rows, eager": PACKED | TWO_ROWS | EAGER,
    "packed, few tokens, checkpointing": PACKED | FEW_TOKENS | CHECKPOINTING,
    "fsdp1, padded, two rows": FSDP1 | TWO_ROWS,
    "fsdp1, packed, few tokens, checkpointing": FSDP1 | PACKED | FEW_TOKENS | CHECKPOINTING,
    "fsdp1, padded, few tokens, views": FSDP1 | FEW_TOKENS | {"actor.fsdp_config.use_orig_params": True},
    # The divergence over the whole vocabulary, in chunks, in place of the sampled token's gap.
    "jsd, few tokens": FEW_TOKENS | {"objective": "jsd"},
    "fsdp1, jsd, packed, few tokens": FSDP1 | PACKED | FEW_TOKENS | {"objective": "jsd"},
}
# What two runs of the same arithmetic may differ by: the order of float32 sums.
SAME = {"rtol": 1e-4, "atol": 2e-5}


# ---------------------------------------------------------------- on the ranks


def run_case(rank: int, ranks: int, root: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of student and teacher, then one SGD step at a learning rate of 1: the weights move by the gradient."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass

    from sdar_verl.verl.loss import sdar_loss
    from sdar_verl.verl.worker import TeacherWorker

    objective = overrides.get("objective", "sampled")
    loss = LossConfig(coef=COEF, beta=BETA, objective=objective, chunk_tokens=None if objective == "sampled" else 8)
    requests = StepRequests.of(loss)
    settings = {
        **UPDATE,
        **{option: value for option, value in overrides.items() if option != "objective"},
    }
    config = worker_config(str(root / "model"), overrides=settings, source="actor")
    worker = TeacherWorker(config, "actor")
    worker.init_model()
    worker.set_loss_fn(partial(sdar_loss, config=omega_conf_to_dataclass(config.actor), method=Method(loss)))
    mine = range(rank, ROWS, ranks)
    rows = [make_rows()[row] for row in mine]
    teacher = worker.compute_teacher_log_prob(teacher_batch([teacher_rows()[row] for row in mine], requests.teacher))
    scored = worker.compute_log_prob(batch(rows, calculate_entropy=True, compute_loss=False))
    student, entropy = (
        [row[-len(response) - 1 : -1] for row, (_, response, _) in zip(scored[name].unbind(), rows, strict=True)]
        for name in ("log_probs", "entropy")
    )

    data = update_batch(mine, start_fields(root))
    if requests.update is not None:
        data[TEACHER_HIDDEN] = teacher[TEACHER_HIDDEN]
        tu.assign_non_tensor(data, **{HEAD_REQUEST: requests.update.to_json()})
    before = weights(worker)
    metrics = tu.get(worker.update_actor(data), "metrics")
    after = weights(worker)
    return {
        "rows": list(mine),
        "student": student,
        "entropy": entropy,
        "teacher": [row.clone() for row in teacher[TEACHER_LOG_PROBS].unbind()],
        "metrics": {name: float(torch.tensor(value, dtype=torch.double).sum()) for name, value in metrics.items()},
        "gradient": {name: before[name] - after[name] for name in before},
    }


def weights(worker: Any) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    parameters, _ = worker.actor.engine.get_per_tensor_param()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in parameters}
    return {name: value.detach().clone() for name, value in whole.items()}


def run(rank: int, folder: Path, ranks: int) -> None:
    results = {name: run_case(rank, ranks, folder, overrides) for name, overrides in CASES.items()}
    torch.save(results, folder / f"{ranks}_{rank}.pt")


# ---------------------------------------------------------------- in the test process


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    # Input and output embedding of their own: then verl gives weights to rank 0 alone, and FSDP must spread them.
    make_tiny_model(folder / "model", scale=4.0, tie_word_embeddings=False)
    for ranks in (1, 2):
        run_on_ranks(run, folder, ranks, ranks=ranks)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[int, list[dict[str, Any]]]:
    """Ranks -> what each rank saw."""
    return {
        ranks: [torch.load(folder / f"{ranks}_{rank}.pt", weights_only=False) for rank in range(ranks)]
        for ranks in (1, 2)
    }


@pytest.fixture(scope="module")
def plain(folder) -> Callable[[str], dict[str, Any]]:
    """Case -> the same numbers from a plain model: forward passes of single rows, and one backward pass."""
    known = functools.cache(lambda objective: plain_numbers(plain_model(folder), objective, start_fields(folder)))
    return lambda case: known(CASES[case].get("objective", "sampled"))


@pytest.mark.parametrize("case", ["padded, few tokens", "jsd, few tokens"])
def test_the_numbers_show_every_term(plain, case):
    """The loss of this test has tokens under either clip, and every term weighs in it."""
    assert all(plain(case)["clipped"])
    metrics = plain(case)["metrics"]
    assert min(abs(metrics[name]) for name in ("actor/pg_loss", "kl_loss", "actor/entropy_loss", "sdar/loss")) > 0.01


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_log_probs_are_those_of_single_rows(results, plain, case, ranks):
    """Packed or padded, no row sees another; the teacher's pass neither."""
    for seen in (result[case] for result in results[ranks]):
        for name in ("student", "entropy", "teacher"):
            for row, found in zip(seen["rows"], seen[name], strict=True):
                torch.testing.assert_close(found, plain(case)[name][row].detach(), **SAME)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_a_plain_backward_pass(results, plain, case, ranks):
    for seen in (result[case] for result in results[ranks]):
        assert seen["gradient"].keys() == plain(case)["gradient"].keys()
        for name, found in seen["gradient"].items():
            torch.testing.assert_close(found, plain(case)["gradient"][name], **SAME)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_metrics_are_those_of_the_whole_batch(results, plain, case, ranks):
    found = results[ranks][0][case]["metrics"]
    # verl takes the mean over the ranks; the trainer divides our sums by one another, where that factor is lost.
    tokens = found[f"{SUMS_PREFIX}tokens"]
    found = {name: value / tokens if name.startswith(SUMS_PREFIX) else value for name, value in found.items()}
    for name, expected in plain(case)["metrics"].items():
        assert found[name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
