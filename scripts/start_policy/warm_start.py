"""Supervised training of the start policy: look-up lesson, then demonstrations."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lookup import lookup_lesson
from torch.nn import functional
from transformers import PreTrainedModel

#: Tokens of one sequence and what each of them weighs in the loss.
Row = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Schedule:
    """Lengths and rates of the training.

    Attributes:
        learning_rate: peak; for Muon on the layers' matrices and AdamW on the rest.
        lookup_steps: most steps of the look-up lesson; it ends earlier at ``lookup_goal``.
        lookup_goal: mean loss of the lesson's last 25 steps that is good enough.
        steps: steps on demonstrations, on a cosine to a twentieth of the peak.
        batch: sequences per step.
        prompt_weight: weight of prompt tokens in the loss: a little language modelling makes names mean something.
    """

    learning_rate: float = 2e-3
    lookup_steps: int = 600
    lookup_batch: int = 24
    lookup_goal: float = 0.04
    steps: int = 1450
    batch: int = 32
    prompt_weight: float = 0.03


def demonstration_row(prompt: list[int], response: list[int], prompt_weight: float) -> Row:
    """A row that learns the response fully and the prompt a little."""
    return prompt + response, [prompt_weight] * len(prompt) + [1.0] * len(response)


def optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))]


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Row],
    schedule: Schedule,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Train in place, in float32 on the CPU."""
    model.train()
    steppers = optimizers(model, schedule.learning_rate)
    _lesson(model, tokenizer, schedule, seed, steppers, log)
    batches = _batches(len(rows), [len(ids) for ids, _ in rows], schedule.batch, random.Random(seed))
    started, recent = time.monotonic(), []
    for step in range(schedule.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        _set_rate(steppers, schedule.learning_rate * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * cosine))
        recent.append(_step(model, [rows[i] for i in next(batches)], steppers))
        if (step + 1) % 100 == 0:
            log(f"step {step + 1}: loss {sum(recent) / len(recent):.4f}, {time.monotonic() - started:.0f} s")
            recent.clear()
    model.eval()


def _lesson(
    model: PreTrainedModel,
    tokenizer: Any,
    schedule: Schedule,
    seed: int,
    steppers: list[torch.optim.Optimizer],
    log: Callable[[str], None],
) -> None:
    rng, losses, started = random.Random(seed), [], time.monotonic()
    for step in range(schedule.lookup_steps):
        _set_rate(steppers, schedule.learning_rate * min(1.0, (step + 1) / 30))
        losses.append(_step(model, [lookup_lesson(tokenizer, rng) for _ in range(schedule.lookup_batch)], steppers))
        mean = sum(losses[-25:]) / len(losses[-25:])
        learnt = step > 100 and mean < schedule.lookup_goal
        if learnt or (step + 1) % 100 == 0:
            log(f"look-up lesson, step {step + 1}: loss {mean:.4f}, {time.monotonic() - started:.0f} s")
        if learnt:
            break


def _step(model: PreTrainedModel, rows: Sequence[Row], steppers: list[torch.optim.Optimizer]) -> float:
    loss = weighted_loss(model, rows)
    for stepper in steppers:
        stepper.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
    return loss.item()


def weighted_loss(model: PreTrainedModel, rows: Sequence[Row]) -> torch.Tensor:
    """Cross-entropy summed with the rows' weights, per token of full weight."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    weights = torch.tensor([w + [0.0] * (width - len(w)) for _, w in rows])[:, 1:]
    # padding is on the right and weighs nothing: the causal mask is all that is needed
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses.view_as(weights) * weights).sum() / (weights == 1).sum()


def _batches(count: int, lengths: Sequence[int], size: int, rng: random.Random) -> Any:
    """Endless batches of rows of like length, all rows once per round."""
    while True:
        order = list(range(count))
        rng.shuffle(order)
        for start in range(0, count, size * 16):
            block = sorted(order[start : start + size * 16], key=lambda i: lengths[i])
            batches = [block[i : i + size] for i in range(0, len(block), size)]
            rng.shuffle(batches)
            yield from batches


def _set_rate(steppers: list[torch.optim.Optimizer], rate: float) -> None:
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = rate
