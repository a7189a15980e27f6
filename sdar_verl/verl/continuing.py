"""verl's client of the rollout servers for asynchronous modes, with other random numbers for the rest of an answer.

Where the trainer interrupts an answer, verl's client asks again with what is there already, and the same sampling
parameters. A server would start the request's random stream anew and draw the numbers of its first tokens again.
"""

from __future__ import annotations

import hashlib
from contextvars import ContextVar
from typing import Any

from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from sdar_verl.rollout.uids import SEED_NAMES

SEEDS = {"seed", *SEED_NAMES.values()}
"""What servers call a request's seed."""

_asked: ContextVar[int] = ContextVar("sdar_asked_prompt_tokens", default=0)
"""Prompt tokens of the answer that this task waits for."""


class _OneRequest(LLMServerClient):
    """Stands between verl's two clients: sees each request that an answer is made of."""

    async def generate(
        self, request_id: Any, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        """verl's, with a seed of its own for a request that goes on from earlier tokens."""
        so_far = len(prompt_ids) - _asked.get()
        if so_far > 0:
            others = {name: seed_of_rest(sampling_params[name], so_far) for name in SEEDS & {*sampling_params}}
            sampling_params = {**sampling_params, **others}
        return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs)


class ContinuingClient(FullyAsyncLLMServerClient, _OneRequest):
    """verl's client that goes on where an answer was interrupted; its requests go through :class:`_OneRequest`."""

    async def generate(self, request_id: Any, *, prompt_ids: list[int], **kwargs: Any) -> TokenOutput:
        """Sample one answer, in as many requests as it takes."""
        token = _asked.set(len(prompt_ids))
        try:
            return await super().generate(request_id, prompt_ids=prompt_ids, **kwargs)
        finally:
            _asked.reset(token)


def seed_of_rest(seed: int, tokens: int) -> int:
    """Seed of a request that goes on after ``tokens`` tokens of an answer whose own seed is ``seed``; 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}+{tokens}".encode()).digest()[:4], "big") >> 1
