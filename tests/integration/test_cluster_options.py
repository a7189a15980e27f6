"""What clusters switch on and the recipes of a CPU do not: Ulysses sequence parallelism, fused kernels, bf16.

One update on two ranks of verl's FSDP engines, without Ray, as in ``test_ranks.py``: log-probs of the teacher, terms of
the loss and gradient must be those of a plain model. Fused kernels are verl's torch backend.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdar_verl.config.loss import LossConfig
from sdar_verl.fields import (
    NORM_PREFIX,
    STEP_VALUES,
    SUMS_PREFIX,
    TEACHER_HIDDEN,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    TEACHER_PROMPTS,
)
from sdar_verl.method import Method, StepValues
from sdar_verl.requests import HEAD_REQUEST, SCORING_PASS, StepRequests
from sdar_verl.table import nested
from tests.integration.test_ranks import CHECKPOINTING, FEW_TOKENS, FSDP1, PACKED, SAME, weights
from tests.support import ulysses
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

RANKS = 2
PACKS = PACKED | FEW_TOKENS
ULYSSES = {
    "actor.fsdp_config.ulysses_sequence_parallel_size": RANKS,
    "model.override_config.attn_implementation": ulysses.ATTENTION,
}
FUSED = {"model.use_fused_kernels": True, "model.fused_kernel_options": {"impl_backend": "torch"}}
BF16 = {
    "actor.fsdp_config.mixed_precision": {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
    "objective": "jsd",
}
# verl replaces the forward pass of the model's class where kernels are fused, for good: such cases have a process of
# their own.
CASES: dict[str, dict[str, Any]] = {
    "ulysses": PACKS | ULYSSES | {"measure": True},
    "ulysses, fsdp1, checkpointing": FSDP1 | PACKS | ULYSSES | CHECKPOINTING,
    "ulysses, scored within the update": PACKS | ULYSSES | {"source": "actor_fresh"},
    "distributions, measured": PACKS | {"objective": "jsd", "measure": True},
    "distributions in bf16": PACKS | BF16,
    "distributions in bf16, fsdp1": FSDP1 | PACKS | BF16,
}
FUSED_CASES: dict[str, dict[str, Any]] = {
    "fused, fsdp1": FSDP1 | PACKS | FUSED,
    "fused, fsdp1, ulysses": FSDP1 | PACKS | FUSED | ULYSSES,
    "fused, fsdp1, padded": FSDP1 | FEW_TOKENS | FUSED,
    "fused, fsdp1, scored within the update": FSDP1 | PACKS | FUSED | {"source": "actor_fresh"},
}
TIED_CASES: dict[str, dict[str, Any]] = {"fused, fsdp2, tied": PACKS | FUSED}
GROUPS = {"own": CASES, "fused": FUSED_CASES, "tied": TIED_CASES}
ALL = CASES | FUSED_CASES | TIED_CASES


# ---------------------------------------------------------------- on the ranks


def run_case(rank: int, root: Path, fields: dict[str, list[torch.Tensor]], case: dict[str, Any]) -> dict[str, Any]:
    """The teacher's pass, then one SGD step at a learning rate of 1: the weights move by the gradient."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass

    from sdar_verl.verl.loss import sdar_loss
    from sdar_verl.verl.worker import TeacherWorker

    settings = dict(case)
    measure, source = settings.pop("measure", False), settings.pop("source", "actor")
    objective = settings.pop("objective", "sampled")
    loss = LossConfig(coef=COEF, beta=BETA, objective=objective, chunk_tokens=None if objective == "sampled" else 8)
    requests = StepRequests.of(loss)
    config = worker_config(str(root / "model"), overrides=UPDATE | settings, source=source)
    worker = TeacherWorker(config, "actor")
    worker.init_model()
    worker.set_loss_fn(partial(sdar_loss, config=omega_conf_to_dataclass(config.actor), method=Method(loss)))

    # Under Ulysses both ranks have the same rows.
    mine = range(ROWS) if ULYSSES.items() <= case.items() else range(rank, ROWS, RANKS)
    theirs = [teacher_rows()[row] for row in mine]
    data = update_batch(mine, fields)
    teacher = None
    if source == "actor_fresh":
        seen = [bool(fields[TEACHER_MASK][row].any()) for row in mine]
        data[TEACHER_PROMPTS] = nested(
            [prompt[: len(prompt) * has] for has, (prompt, *_) in zip(seen, theirs, strict=True)]
        )
        tu.assign_non_tensor(data, **{SCORING_PASS: requests.teacher.to_json()})
    else:
        teacher = worker.compute_teacher_log_prob(teacher_batch(theirs, requests.teacher))
    if requests.update is not None:
        data[TEACHER_HIDDEN] = teacher[TEACHER_HIDDEN]
        tu.assign_non_tensor(data, **{HEAD_REQUEST: requests.update.to_json()})
    if measure:
        tu.assign_non_tensor(data, **{STEP_VALUES: asdict(StepValues(COEF, BETA, measure=1))})
    before = weights(worker)
    output = worker.update_actor(data)
    after = weights(worker)
    # One rank of those that share a row reports.
    metrics = {} if output is None else tu.get(output, "metrics")
    return {
        "rows": list(mine),
        "teacher": [] if teacher is None else [row.clone() for row in teacher[TEACHER_LOG_PROBS].unbind()],
        "metrics": {name: float(torch.tensor(value, dtype=torch.double).sum()) for name, value in metrics.items()},
        "gradient": {name: before[name] - after[name] for name in before},
    }


def run(rank: int, folder: Path, group: str) -> None:
    fields = start_fields(folder)
    ulysses.install()
    torch.save(
        {name: run_case(rank, folder, fields, case) for name, case in GROUPS[group].items()}, folder / f"{rank}.pt"
    )


# ---------------------------------------------------------------- in the test process


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Group of cases -> what its ranks wrote."""
    folders = {}
    for group in GROUPS:
        folder = folders[group] = tmp_path_factory.mktemp(group)
        make_tiny_model(folder / "model", scale=4.0, tie_word_embeddings=group == "tied")
        run_on_ranks(run, folder, group, ranks=RANKS)
    return folders


def numbers(folders: dict[str, Path], case: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What each rank saw, and the same from a plain model."""
    folder = folders[next(group for group, cases in GROUPS.items() if case in cases)]
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False)[case] for rank in range(RANKS)]
    fields, objective = start_fields(folder), ALL[case].get("objective", "sampled")
    plain = plain_numbers(plain_model(folder), objective, fields)
    if ALL[case].get("source") == "actor_fresh":
        fields[TEACHER_LOG_PROBS] = plain["teacher"]
        plain = plain_numbers(plain_model(folder), objective, fields)
    return ranks, plain


@pytest.mark.parametrize("case", ALL)
def test_the_update_is_that_of_a_plain_model(folders, case):
    ranks, plain = numbers(folders, case)
    rough = "bf16" in case
    for seen in ranks:
        for row, found in zip(seen["rows"], seen["teacher"], strict=bool(seen["teacher"])):
            torch.testing.assert_close(
                found.float(), plain["teacher"][row].detach(), **({"rtol": 0.02, "atol": 0.05} if rough else SAME)
            )
        found, expected = (
            torch.cat([values[name].flatten() for name in plain["gradient"]])
            for values in (seen["gradient"], plain["gradient"])
        )
        if rough:  # bf16 holds three digits; the directions agree all the same
            assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999
            assert found.norm().item() == pytest.approx(expected.norm().item(), rel=0.01)
        else:
            torch.testing.assert_close(found, expected, **SAME)


@pytest.mark.parametrize("case", ALL)
def test_the_terms_are_those_of_a_plain_model(folders, case):
    ranks, plain = numbers(folders, case)
    reporting = [seen["metrics"] for seen in ranks if seen["metrics"]]
    assert len(reporting) == (1 if "ulysses" in case else RANKS)
    close = {"rel": 0.02} if "bf16" in case else {"rel": 1e-4}
    for metrics in reporting:
        for name in ("actor/pg_loss", "kl_loss", "sdar/loss", "grad_norm"):
            assert metrics[name] == pytest.approx(plain["metrics"][name], **close), name
        gate = metrics[f"{SUMS_PREFIX}gate"] / metrics[f"{SUMS_PREFIX}tokens"]
        assert gate == pytest.approx(plain["metrics"][f"{SUMS_PREFIX}gate"], **close)


@pytest.mark.parametrize("case", [case for case in ALL if ALL[case].get("measure")])
def test_both_gradients_are_measured(folders, case):
    """Their norms bound that of their sum, the update's: RL and lambda times the distillation's."""
    ranks, plain = numbers(folders, case)
    rl, distillation = (ranks[0]["metrics"][f"{NORM_PREFIX}{part}"] for part in ("rl", "distillation"))
    assert rl > 0 and distillation > 0
    assert abs(rl - COEF * distillation) - 1e-4 <= plain["metrics"]["grad_norm"] <= rl + COEF * distillation + 1e-4
