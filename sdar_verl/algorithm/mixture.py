"""Several teacher passes over a row as one: the probability of a token is the weighted mean of theirs.

    log p(y_t) = log[ sum_k w_k pi_T(y_t | s_t, c_k) / sum_k w_k ]

Of several teachers (``sdar.context.teachers.weights``) that is the mixture of their distributions, at the token that
was sampled. Of a bad context's K texts (``sdar.context.contrast``, w_k = 1) it is what the good one is compared with,

    e_t = log pi_T(y_t | s_t, c+) - log[ (1/K) sum_k pi_T(y_t | s_t, c-_k) ]

where what any text in the prompt does to style and length is in both, and cancels; the student's own log-probs are in
neither. e_t stands where the gap Delta_t stands otherwise: gates, signals and statistics read it without knowing.
"""

from __future__ import annotations

import torch


def mixture_log_probs(log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Log of the weighted mean probability of a row's passes.

    Args:
        log_probs: (K, rows, response_length), nats; read where the weight is above 0.
        weights: (K, rows), at least 0; 0 where a row has no such pass.

    Returns:
        (rows, response_length), nats; 0 on rows without a pass.
    """
    weights = weights.to(log_probs).unsqueeze(-1)
    there, total = weights > 0, weights.sum(dim=0)
    known = torch.where(there, log_probs + weights.log(), float("-inf"))
    mean = known.logsumexp(dim=0) - torch.where(total > 0, total, 1.0).log()
    return torch.where(total > 0, mean, 0.0)
