"""A teacher with a good context against the same teacher with bad ones.

    e_t = log pi_T(y_t | s_t, c+) - log[ (1/K) sum_k pi_T(y_t | s_t, c-_k) ]

What any text in the prompt does to style and length is in both, and cancels; the student's own log-probs are in
neither. e_t stands where the gap Delta_t stands otherwise: gates, signals and statistics read it without knowing.
"""

from __future__ import annotations

import torch


def mixture_log_probs(log_probs: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Log of the mean probability of a row's texts.

    Args:
        log_probs: (K, rows, response_length), nats; of a row with n texts the first n are read.
        texts: (rows,) how many each row has, 0 to K.

    Returns:
        (rows, response_length), nats; 0 on rows without a text.
    """
    there = torch.arange(len(log_probs), device=log_probs.device).unsqueeze(-1) < texts.to(log_probs.device)
    known = log_probs.masked_fill(~there.unsqueeze(-1), float("-inf"))
    mean = known.logsumexp(dim=0) - texts.clamp(min=1).to(log_probs).log().unsqueeze(-1)
    return torch.where((texts > 0).to(log_probs.device).unsqueeze(-1), mean, 0.0)
