"""Distributions of a step's gaps, gates and rewards over all its tokens and episodes, small enough to keep each step.

A trace shows a few episodes; these numbers miss none. All arrays of tokens are flat: one entry per distilled token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
GATE_EDGES = np.linspace(0.0, 1.0, 21)
GAP_EDGES = np.concatenate([[-np.inf], np.linspace(-4.0, 4.0, 65), [np.inf]])
"""Nats; the two outer bins take the rest."""
MAX_TURNS = 64
POSITIONS = 32
HALF = 0.01
"""A gate within this distance of 1/2 says nothing about its token."""


@dataclass(frozen=True)
class Tokens:
    """The distilled tokens of a step; all arrays (tokens,).

    Attributes:
        gap: log pi_T - log pi_old of the sampled token, nats.
        gate: weight of the token in the distillation term.
        turn: 0-based index of its turn.
        position: 0-based index within the answer.
        kl: k3 estimate of KL(policy || reference) at the token, nats; None when the run has no reference log-probs.
    """

    gap: np.ndarray
    gate: np.ndarray
    turn: np.ndarray
    position: np.ndarray
    kl: np.ndarray | None = None


def token_distributions(tokens: Tokens, max_length: int) -> dict[str, Any]:
    """Quantiles, histograms, and means by turn and by position; plain JSON values.

    Args:
        tokens: at least one.
        max_length: longest answer, tokens; positions are put into at most 32 bins of it.

    Returns:
        ``tokens``; ``gap_quantiles`` and ``gate_quantiles`` (at :data:`QUANTILES`); ``gap_histogram`` and
        ``gate_histogram`` (counts between :data:`GAP_EDGES` and :data:`GATE_EDGES`); ``half_share`` (gates within
        0.01 of 1/2); ``by_turn`` and ``by_position``, columns of :func:`_means`.
    """
    width = max(1, -(-max_length // POSITIONS))
    result: dict[str, Any] = {
        "tokens": len(tokens.gap),
        "gap_quantiles": _round(np.quantile(tokens.gap, QUANTILES)),
        "gate_quantiles": _round(np.quantile(tokens.gate, QUANTILES)),
        "gap_histogram": np.histogram(tokens.gap, GAP_EDGES)[0].tolist(),
        "gate_histogram": np.histogram(tokens.gate, GATE_EDGES)[0].tolist(),
        "half_share": float((np.abs(tokens.gate - 0.5) <= HALF).mean()),
        "by_turn": _means(tokens, np.minimum(tokens.turn, MAX_TURNS - 1)),
        "by_position": _means(tokens, tokens.position // width),
    }
    result["by_position"]["width"] = width
    return result


def reward_statistics(rewards: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over episodes, each counted once whatever its number of turns."""
    values = np.asarray(rewards, dtype=float)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"episodes": len(values), "mean": float(values.mean()), "std": spread}


def pool(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Add up ``by_turn`` or ``by_position`` columns of several steps: means weighted by their tokens.

    Returns:
        ``index`` and ``tokens``, and each mean that all steps have.
    """
    size = 1 + max((max(row["index"], default=-1) for row in rows), default=-1)
    names = [name for name in ("gap", "abs_gap", "gate", "kl") if rows and all(name in row for row in rows)]
    tokens = np.zeros(size)
    sums = {name: np.zeros(size) for name in names}
    for row in rows:
        index, weights = np.asarray(row["index"], dtype=int), np.asarray(row["tokens"], dtype=float)
        tokens[index] += weights
        for name in names:
            sums[name][index] += weights * np.asarray(row[name])
    seen = np.flatnonzero(tokens)
    means = {name: _round(total[seen] / tokens[seen]) for name, total in sums.items()}
    return {"index": seen.tolist(), "tokens": tokens[seen].tolist(), **means}


def _means(tokens: Tokens, bins: np.ndarray) -> dict[str, Any]:
    """Per bin that holds a token: ``index``, ``tokens``, and means ``gap``, ``abs_gap``, ``gate`` (and ``kl``)."""
    counts = np.bincount(bins)
    seen = np.flatnonzero(counts)
    columns = {"gap": tokens.gap, "abs_gap": np.abs(tokens.gap), "gate": tokens.gate}
    if tokens.kl is not None:
        columns["kl"] = tokens.kl
    means = {name: np.bincount(bins, weights=values)[seen] / counts[seen] for name, values in columns.items()}
    return {
        "index": seen.tolist(),
        "tokens": counts[seen].tolist(),
        **{name: _round(values) for name, values in means.items()},
    }


def _round(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
