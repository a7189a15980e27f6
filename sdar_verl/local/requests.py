"""A generation request on its way through the CPU rollout's scheduler, and what comes of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from sdar_verl.local.sampling import SamplingParams

Scored = tuple[list[list[int]], list[list[float]]]


@dataclass(frozen=True)
class Completion:
    """What a request got.

    Attributes:
        token_ids: response tokens, the end-of-sequence token included when it was drawn.
        log_probs: one per token; None when the request did not ask.
        finish_reason: ``stop`` (end of sequence), ``length`` (max_tokens reached) or ``abort``.
        scored: per prompt token but the first, which nothing predicts: tokens, and their log-probs; the token itself,
            or the likeliest in its place. None when the request did not ask, or was aborted before.
    """

    token_ids: list[int]
    log_probs: list[float] | None
    finish_reason: str
    scored: Scored | None = None


@dataclass
class Request:
    """A request on its way; ``offset`` is the padding in front of its prompt inside its slot."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    rng: random.Random
    future: Future[Completion]
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    scored: Scored | None = None
    offset: int = 0

    @property
    def length(self) -> int:
        """Cells of its slot that hold, or get next, a token of this request or the padding in front of it."""
        return self.offset + len(self.prompt_ids) + len(self.token_ids)

    def completion(self, finish_reason: str) -> Completion:
        log_probs = self.log_probs if self.params.logprobs else None
        return Completion(self.token_ids, log_probs, finish_reason, self.scored)
