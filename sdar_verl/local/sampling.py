"""Per-request sampling parameters and one vectorised sampling step, for the CPU rollout backend.

The meaning of every parameter, and of the returned log-probs, is that of verl's vLLM rollout with its default
``logprobs_mode: processed_logprobs``: the log-prob of a token is taken after temperature, top-k and top-p. Without
top-k and top-p it equals the actor's own log-prob at the rollout temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Parameters of other engines that verl's agent loops may pass along, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "repetition_penalty": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "min_p": (0, None),
    "min_tokens": (0, None),
    "stop": (None, [], ()),
    "stop_token_ids": (None, [], ()),
}

# What a request may name beside these: type, and value where it does not.
_TYPED = (
    ("temperature", float, 1.0),
    ("top_p", float, 1.0),
    ("top_k", int, -1),
    ("ignore_eos", bool, False),
    ("logprobs", bool, False),
)


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples.

    Attributes:
        max_tokens: upper bound of the response length in tokens, the end-of-sequence token included.
        temperature: divisor of the logits; 0 takes the most probable token (and reports its log-prob at temperature 1).
        top_p: nucleus mass in (0, 1]; 1 keeps all tokens.
        top_k: number of most probable tokens kept; -1 or 0 keeps all.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: whether the caller wants log-probs.
        seed: seed of this request's own random stream; None (in a request also -1) lets the server draw one.
        prompt_logprobs: 0: the caller wants the log-probs of the prompt's tokens; k: those of the k likeliest tokens at
            each place of it. At ``temperature`` (vLLM's and SGLang's are at 1), without top-k and top-p.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    ignore_eos: bool = False
    logprobs: bool = False
    seed: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sampling parameter max_tokens={self.max_tokens}: must be at least 1")
        if not (self.temperature >= 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"sampling parameter temperature={self.temperature}: must be finite and >= 0 (0 = greedy)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling parameter top_p={self.top_p}: must be in (0, 1] (1 = off)")
        if self.top_k < -1:
            raise ValueError(f"sampling parameter top_k={self.top_k}: must be >= -1 (-1 or 0 = off)")
        asked = self.prompt_logprobs
        if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 0):
            raise ValueError(
                f"sampling parameter prompt_logprobs={asked!r}: must be a whole number, at least 0, or None"
            )

    @property
    def scores_prompt(self) -> bool:
        """Whether something about the prompt's own tokens is asked."""
        return self.prompt_logprobs is not None

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p take tokens away; a greedy request ignores both."""
        return self.temperature > 0.0 and (self.top_p < 1.0 or self.top_k > 0)

    @classmethod
    def from_request(cls, params: Mapping[str, Any], *, default_max_tokens: int, room: int) -> SamplingParams:
        """Read the ``sampling_params`` of a rollout request.

        Args:
            params: as passed by an agent loop to ``server_manager.generate``.
            default_max_tokens: response length when the request names none.
            room: tokens left in the model's context after the prompt; ``max_tokens`` is cut to it.

        Raises:
            ValueError: for a value out of range, and for a parameter this backend does not have, unless its value
                changes nothing.
        """
        given = dict(params)
        max_tokens = given.pop("max_tokens", None)
        alias = given.pop("max_new_tokens", None)  # SGLang's name for the same limit
        max_tokens = next(int(limit) for limit in (max_tokens, alias, default_max_tokens) if limit is not None)
        if given.get("prompt_logprobs") is False:
            given["prompt_logprobs"] = None
        if given.get("seed") == -1:  # as vLLM reads it
            given["seed"] = None
        known: dict[str, Any] = {name: given.pop(name, None) for name in ("seed", "prompt_logprobs")}
        for name, kind, default in _TYPED:
            value = given.pop(name, default)
            try:
                known[name] = kind(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"sampling parameter {name}={value!r}: must be a number (leave it out for {default})"
                ) from None
        for name, value in given.items():
            if name not in _NEUTRAL or value not in _NEUTRAL[name]:
                raise ValueError(
                    f"sampling parameter {name}={value!r} is not supported by rollout.name=transformers (the CPU "
                    "default): leave it out, or use rollout.name=vllm on a GPU"
                )
        return cls(max_tokens=max(1, min(max_tokens, room)), **known)


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs of given tokens, (tokens,) float32, nats.

    Args:
        logits: (tokens, vocabulary), any floating type.
        tokens: (tokens,) int64.
        temperature: divisor of the logits; 0 (greedy) counts as 1, as in :func:`sample`.
    """
    return _all_log_probs(logits, temperature).gather(1, tokens[:, None])[:, 0]


def likeliest(logits: torch.Tensor, count: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` likeliest tokens at each place, (tokens, count), the first first, and their log-probs, nats;
    arguments as of :func:`token_log_probs`."""
    log_probs, ids = _all_log_probs(logits, temperature).topk(min(count, logits.shape[-1]), dim=-1)
    return ids, log_probs


def _all_log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits.float() / (temperature or 1.0)).log_softmax(-1)


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Each row brings its own uniform number, so what a request samples does not depend on which other requests happen
    to share its batch.

    Args:
        logits: (rows, vocabulary), any floating type.
        params: one per row.
        uniforms: one number in [0, 1) per row; unused by greedy rows.

    Returns:
        tokens: (rows,) int64.
        log_probs: (rows,) float32, of those tokens under the distribution they were drawn from.

    Raises:
        FloatingPointError: for logits that are not finite.
    """
    temperature = torch.tensor([p.temperature for p in params])
    greedy = temperature == 0.0
    log_probs = (logits.float() / temperature.masked_fill(greedy, 1.0)[:, None]).log_softmax(-1)
    if any(p.truncates for p in params):
        log_probs = _truncate(log_probs, params)
    # float64: the cumulative sum over a large vocabulary must not lose the mass of rare tokens.
    cumulative = log_probs.exp().double().cumsum(-1)
    total = cumulative[:, -1]
    if not bool(total.isfinite().all()):
        raise FloatingPointError("the policy's logits are not finite: training diverged (lower the learning rate)")
    # A float64 below 1 times the total stays below the total, so a token without probability is never drawn.
    point = torch.tensor(uniforms, dtype=torch.float64) * total
    drawn = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
    tokens = torch.where(greedy, log_probs.argmax(-1), drawn)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def _truncate(log_probs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Keep the top-k tokens of each row, of those the smallest set holding top-p of the mass, and renormalise."""
    vocabulary = log_probs.shape[-1]
    top_k = torch.tensor([p.top_k if p.truncates and p.top_k > 0 else vocabulary for p in params])
    # top_p = 1 must keep every token, also where the running mass rounds to 1 before the end.
    top_p = torch.tensor([p.top_p if p.truncates and p.top_p < 1.0 else 2.0 for p in params])
    ordered, order = log_probs.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(torch.arange(vocabulary) >= top_k[:, None], -torch.inf)
    mass = ordered.softmax(-1)
    ordered = ordered.masked_fill(mass.cumsum(-1) - mass >= top_p[:, None], -torch.inf)
    return torch.full_like(log_probs, -torch.inf).scatter(-1, order, ordered).log_softmax(-1)
