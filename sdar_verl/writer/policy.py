"""The policy writes contexts itself: through verl's client of its rollout servers, with the weights of the step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

from sdar_verl.config.context import WriterConfig
from sdar_verl.rollout.actions import leaves_thought_open, without_thought
from sdar_verl.rollout.answers import AnswerReader
from sdar_verl.rollout.uids import request_seed, seeded
from sdar_verl.writer.base import Answer

PAUSE_S = 1.0
"""Before the second attempt, seconds; doubled before each further one."""


class PolicyWriter:
    """Asks the rollout servers.

    They hold the weights that the step's episodes were played with until verl puts them to sleep for the update. With
    ``sdar.rollout.seed`` a request's seed is made of step and prompt, so that a run repeats.

    Args:
        client: gives verl's client (``get_llm_client``), when first asked.
        tokenizer: of the policy.
        settings: the ``sdar.context.writer`` node.
        prompt_tokens: ``data.max_prompt_length``.
        answer_tokens: ``data.max_response_length``.
        temperature: the rollout's.
        seed: ``sdar.rollout.seed``.
        server: ``actor_rollout_ref.rollout.name``.
        chat_template_kwargs: ``data.apply_chat_template_kwargs``.
    """

    during_rollout = True

    def __init__(
        self,
        client: Callable[[], Any],
        tokenizer: Any,
        settings: WriterConfig,
        *,
        prompt_tokens: int,
        answer_tokens: int,
        temperature: float,
        seed: int | None = None,
        server: str = "transformers",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.limit = settings.max_prompt_length or prompt_tokens
        self._client = client
        self._tokenizer = tokenizer
        self._reader = AnswerReader(tokenizer, ())
        self._retries = settings.retries
        self._params = {
            "temperature": temperature if settings.temperature is None else settings.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "max_tokens": settings.max_tokens or answer_tokens,
        }
        self._seed, self._server = seed, server
        self._template = dict(chat_template_kwargs or {})

    def tokens(self, text: str) -> int:
        """Of the whole prompt, chat template and all."""
        return len(self._prompt(text))

    def write(self, texts: Sequence[str], step: int) -> list[Answer]:
        """Of :class:`~sdar_verl.writer.base.Writer`."""

        async def all_of_them() -> list[Answer]:
            client = self._client()
            return list(await asyncio.gather(*(self._ask(client, text, step) for text in texts)))

        # In a thread of its own: whoever calls may have an event loop, in which none other can run.
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(lambda: asyncio.run(all_of_them())).result()

    def __str__(self) -> str:
        return "the policy's rollout server"

    async def _ask(self, client: Any, text: str, step: int) -> Answer:
        prompt = self._prompt(text)
        seed = request_seed(self._seed, "writer", step, text)
        params = seeded(self._params, seed, self._server)
        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                # A request id of its own: the load balancer may choose the replica that has the least to do.
                output = await client.generate(request_id=uuid4().hex, prompt_ids=prompt, sampling_params=dict(params))
                break
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
        else:
            return Answer(failure=failure)
        ids = list(output.token_ids)
        opened = leaves_thought_open(self._tokenizer.decode(prompt[-16:]))
        return Answer(without_thought(self._reader.text(ids), opened=opened), len(prompt) + len(ids))

    def _prompt(self, text: str) -> list[int]:
        return list(
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},  # lengths have limits of their own
                **self._template,
            )
        )
