"""The rows of one update, with every term that a loss can have, and what a plain model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sdar_verl.algorithm.divergences import DIVERGENCES
from sdar_verl.fields import STEP_VALUES, SUMS_PREFIX, TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.method import StepValues
from sdar_verl.table import nested
from sdar_verl.verl.scalar_loss import gated_distillation_loss
from tests.support.plain import padded
from tests.support.teacher_worker import TEMPERATURE, batch

ROWS = 8
COEF, BETA, KL, ENTROPY, CLIP_LOW, CLIP_HIGH, CLIP_C = 0.5, 5.0, 0.05, 0.02, 0.1, 0.2, 1.5
UPDATE: dict[str, Any] = {
    # At a learning rate of 1 the weights move by the gradient.
    "actor.optim.optimizer": "SGD",
    "actor.optim.lr": 1.0,
    "actor.optim.lr_warmup_steps_ratio": 0.0,
    "actor.optim.weight_decay": 0.0,
    "actor.optim.clip_grad": 1e9,
    "actor.use_kl_loss": True,
    "actor.kl_loss_coef": KL,
    "actor.entropy_coeff": ENTROPY,
    "actor.clip_ratio_low": CLIP_LOW,
    "actor.clip_ratio_high": CLIP_HIGH,
    "actor.clip_ratio_c": CLIP_C,
}
"""Options of ``actor_rollout_ref`` that switch every term on."""


def make_rows() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(prompt, response, mask); uneven lengths, some answers with a part that does not count."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(ROWS):
        prompt = torch.randint(3, 250, (3 + (5 * i) % 11,), generator=generator)
        response = torch.randint(3, 250, (2 + (3 * i) % 7,), generator=generator)
        mask = torch.ones_like(response)
        mask[: i % 3] = 0
        rows.append((prompt, response, mask))
    return rows


def teacher_rows() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The same responses after the teacher's longer prompts."""
    context = torch.arange(40, 49)
    return [(torch.cat([context[: 3 + i], prompt]), *rest) for i, (prompt, *rest) in enumerate(make_rows())]


def make_fields(student: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What verl's rows carry beside the tokens, given the start weights' log-probs."""
    generator = torch.Generator().manual_seed(1)

    def noise(row: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(len(row), generator=generator)

    return {
        # Far enough from the present that both clips act, and the dual one too.
        "old_log_probs": [row + noise(row, 0.5) for row in student],
        "ref_log_prob": [row + noise(row, 0.3) for row in student],
        "advantages": [torch.randn(1, generator=generator).expand(len(row)).clone() for row in student],
        TEACHER_LOG_PROBS: [row + noise(row, 0.8) for row in student],
        # The last row has no teacher.
        TEACHER_MASK: [mask * int(i < ROWS - 1) for i, (_, _, mask) in enumerate(make_rows())],
    }


def plain_model(folder: Path) -> torch.nn.Module:
    """The model in ``folder / "model"``."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


def start_fields(folder: Path) -> dict[str, list[torch.Tensor]]:
    """:func:`make_fields` for the model in ``folder``."""
    with torch.no_grad():
        return make_fields(answers(plain_model(folder), make_rows())[0])


def update_batch(chosen: Sequence[int], fields: dict[str, list[torch.Tensor]]) -> Any:
    """The chosen rows as verl's ``update_actor`` takes them, all in one update."""
    return one_mini_batch(make_rows(), chosen, fields, StepValues(COEF, BETA), calculate_entropy=True)


def one_mini_batch(
    rows: Sequence[tuple[torch.Tensor, ...]],
    chosen: Sequence[int],
    fields: dict[str, list[torch.Tensor]],
    values: StepValues,
    **options: Any,
) -> Any:
    """The rows of one rank as verl's ``update_actor`` takes them; together the ranks' rows are one update.

    Args:
        rows: (prompt, response, mask), of all ranks.
        chosen: indices of this rank's rows.
        fields: name -> one tensor per row, of all ranks.
        values: of the step.
        **options: verl's for the batch.
    """
    from verl.utils import tensordict_utils as tu

    data = batch(
        [rows[row] for row in chosen],
        distillation_use_topk=False,
        distillation_only=False,
        global_batch_size=len(rows),
        mini_batch_size=len(rows),
        epochs=1,
        seed=1,
        dataloader_kwargs={"shuffle": False},
        **options,
    )
    for name, per_row in fields.items():
        data[name] = nested([per_row[row] for row in chosen])
    tu.assign_non_tensor(data, **{STEP_VALUES: asdict(values)})
    return data


def answers(model: torch.nn.Module, rows: list[tuple[torch.Tensor, ...]]) -> tuple[list[torch.Tensor], ...]:
    """Log-probs of the responses' tokens, entropies, and log-probs of all tokens, by one forward pass per row."""
    log_probs, entropies, distributions = [], [], []
    for prompt, response, _ in rows:
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        every = logits.log_softmax(-1)
        log_probs.append(every.gather(1, response[:, None])[:, 0])
        entropies.append(-(every.exp() * every).sum(-1))
        distributions.append(every)
    return log_probs, entropies, distributions


def plain_numbers(model: torch.nn.Module, objective: str, fields: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
    """Log-probs, loss, terms, sums and gradient, from forward passes of single rows and one backward pass."""
    rows = make_rows()
    with torch.no_grad():
        teacher, _, theirs = answers(model, teacher_rows())
    log_probs, entropies, ours = answers(model, rows)
    student = padded(log_probs)
    old, reference, advantages, seen_by = (padded(fields[name]) for name in list(fields)[:4])
    mask, seen = padded([mask for _, _, mask in rows]), padded(fields[TEACHER_MASK]).bool()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * mask).sum() / mask.sum()

    ratio = torch.exp(student - old)
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    dual = torch.where(advantages < 0, torch.minimum(clipped, -advantages * CLIP_C), clipped)
    policy = mean(dual)
    kl = mean(torch.exp(reference - student) - (reference - student) - 1)
    entropy = mean(padded(entropies))
    gap = (seen_by - student).detach()
    if objective == "sampled":
        distillation, _ = gated_distillation_loss(student, seen_by, mask, distill_mask=seen, beta=BETA)
    else:
        divergence = padded([DIVERGENCES[objective](*pair) for pair in zip(ours, theirs, strict=True)])
        distillation = (torch.sigmoid(BETA * gap) * divergence * seen).sum() / mask.sum()
    loss = policy + KL * kl - ENTROPY * entropy + COEF * distillation
    loss.backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "student": log_probs,
        "entropy": entropies,
        "teacher": teacher,
        "clipped": (((dual != -advantages * ratio) & mask.bool()).any(), ((dual != clipped) & mask.bool()).any()),
        "gradient": gradient,
        "metrics": {
            "loss": loss.item(),
            "actor/pg_loss": policy.item(),
            "kl_loss": kl.item(),
            "actor/entropy_loss": entropy.item(),
            "sdar/loss": distillation.item(),
            "grad_norm": torch.stack([value.norm() for value in gradient.values() if value is not None]).norm().item(),
            f"{SUMS_PREFIX}gap": gap[seen].mean().item(),
            f"{SUMS_PREFIX}gate": torch.sigmoid(BETA * gap[seen]).mean().item(),
        },
    }
