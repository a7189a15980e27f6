"""The same numbers without verl: one plain forward pass per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch.nn.functional import pad


def padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of different length as one float tensor, zeros at the end."""
    width = max(len(row) for row in rows)
    return torch.stack([pad(row.float(), (0, width - len(row))) for row in rows])


def plain_log_probs(
    prompts: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    model: Path | str,
    state: Mapping[str, torch.Tensor] | None = None,
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """Log-probs of the responses' tokens, nats, of logits over ``temperature``; the rest as in :func:`plain_logits`."""
    rows = plain_logits(prompts, responses, model, state)
    return [
        (logits / temperature).log_softmax(-1).gather(1, response[:, None])[:, 0]
        for logits, response in zip(rows, responses, strict=True)
    ]


def plain_logits(
    prompts: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    model: Path | str,
    state: Mapping[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Logits from which the responses' tokens are drawn, one (response tokens, V) per row.

    Args:
        prompts: token ids of each row's prompt.
        responses: token ids that follow.
        model: a Hugging Face folder.
        state: other weights for it.
    """
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if state is not None:
        missing, unexpected = network.load_state_dict(state, strict=False)
        assert not unexpected
        assert all("lm_head" in name for name in missing), missing  # tied to the embedding
    out = []
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            logits = network(torch.cat([prompt, response])[None]).logits[0]
            out.append(logits[len(prompt) - 1 : -1])
    return out


def add_stats(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add the sums of several micro-batches or ranks, key by key."""
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total
