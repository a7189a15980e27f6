"""Sums of what explains a distillation loss, exact over micro-batches and ranks, and the means they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from sdar_verl.algorithm.terms import DistillationTerms


def stats_sums(terms: DistillationTerms) -> dict[str, float]:
    """Sums over the distilled tokens, which add up exactly over micro-batches and ranks where means would not.

    Keys: ``tokens``; ``gate``, ``gap``, ``gap_squared``, ``loss`` (sums of g_t, Delta_t, Delta_t^2, l_t);
    ``gate_active`` and ``gap_positive`` (tokens with g_t > 1/2, with Delta_t > 0).
    """
    gap = terms.gap.double()
    columns = {
        "tokens": terms.mask,
        "gate": terms.gate,
        "gate_active": terms.gate > 0.5,
        "gap": gap,
        "gap_squared": gap.square(),
        "gap_positive": terms.gap > 0.0,
        "loss": terms.loss.detach(),
    }
    sums = torch.stack([column.double().sum() for column in columns.values()])
    return dict(zip(columns, sums.tolist(), strict=True))  # one transfer from the device


def finalize_stats(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over distilled tokens from summed :func:`stats_sums`.

    Returns:
        ``tokens``: distilled tokens. ``gate_mean``: mean g_t. ``active_share``: share with g_t > 1/2. ``gap_mean``,
        ``gap_std``: of Delta_t, nats, the latter of the population. ``gap_positive_share``: share with Delta_t > 0.
        ``distill_loss``: mean l_t per token, before lambda, whatever the aggregation mode of the loss. NaN, apart from
        ``tokens``, when there was no token.
    """
    tokens = sums["tokens"]
    names = ("gate", "gate_active", "gap", "gap_squared", "gap_positive", "loss")
    mean = {name: sums[name] / tokens if tokens else math.nan for name in names}
    variance = mean["gap_squared"] - mean["gap"] ** 2
    return {
        "tokens": tokens,
        "gate_mean": mean["gate"],
        "active_share": mean["gate_active"],
        "gap_mean": mean["gap"],
        "gap_std": 0.0 if variance < 0.0 else math.sqrt(variance),  # rounding can take a zero variance below zero
        "gap_positive_share": mean["gap_positive"],
        "distill_loss": mean["loss"],
    }
