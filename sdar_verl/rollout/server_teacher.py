"""``sdar.teacher.placement=rollout_server``: verl's rollout server is asked for the teacher while episodes still run.

The server holds the weights that the step began with. It scores a text as verl's own distillation has it scored: the
teacher's prompt and the sampled ids are the prompt of a request for one token, and ``prompt_logprobs=0`` asks for the
log-prob of every token of it. A request goes out as soon as a turn is sampled (with ``rows=trajectory``: as soon as the
episode ends); nobody waits for the answer before the next turn.

A request that fails is made again; after the last attempt the row says why, and has no teacher.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import numpy as np

from sdar_verl.rollout.rows import RowInfo

logger = logging.getLogger(__name__)

ATTEMPTS = 3
PAUSE_S = 1.0
"""Before the second attempt, seconds; doubled before each further one."""


class ScoringError(RuntimeError):
    """The server answered, but not with the log-probs it was asked for."""


class ServerTeacher:
    """The requests of one episode.

    Args:
        client: verl's client of its rollout servers.
        engine: ``rollout.name``.
        temperature: at which log-probs are taken, where the engine can.
        checks: also have the student's own prompt of the first row scored, to compare the server with the trainer.
    """

    def __init__(self, client: Any, engine: str, temperature: float, *, checks: bool = False) -> None:
        self._client = client
        self._engine = engine
        self._temperature = temperature
        self._checks = checks
        self._tasks: list[asyncio.Task[None]] = []

    def ask(self, info: RowInfo, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> None:
        """Send what a row needs, and return; its record gets the answer by the end of :meth:`collect`.

        Args:
            info: the row's record, with the teacher's prompt where the teacher has a say.
            prompt_ids: the student's prompt.
            response_ids: what follows either prompt; of a conversation with what the environment said in between.
        """
        if not response_ids:
            return
        if info.teacher_prompt_ids is not None:
            teacher = self._teacher(info, info.teacher_prompt_ids.tolist(), list(response_ids))
            self._tasks.append(asyncio.create_task(teacher))
        if self._checks:
            self._checks = False
            self._tasks.append(asyncio.create_task(self._student(info, list(prompt_ids), list(response_ids))))

    async def collect(self) -> float:
        """Wait for all answers; returns the seconds that took."""
        started = time.perf_counter()
        await asyncio.gather(*self._tasks)
        return time.perf_counter() - started

    def cancel(self) -> None:
        """Forget what has not been answered."""
        for task in self._tasks:
            task.cancel()

    async def _teacher(self, info: RowInfo, prompt_ids: list[int], response_ids: list[int]) -> None:
        try:
            info.teacher_log_probs = await self._log_probs(prompt_ids, response_ids)
        except Exception as error:
            info.teacher_failure = f"{type(error).__name__}: {error}"
            logger.warning("no teacher for a row of task %s: %s", info.task_id, info.teacher_failure)

    async def _student(self, info: RowInfo, prompt_ids: list[int], response_ids: list[int]) -> None:
        try:
            info.student_log_probs = await self._log_probs(prompt_ids, response_ids)
        except Exception as error:
            logger.warning("a row of task %s cannot be compared with the trainer: %s", info.task_id, error)

    async def _log_probs(self, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
        """Log-probs of ``response_ids``; tried :data:`ATTEMPTS` times."""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                output = await self._client.generate(
                    # Of its own: the load balancer may choose the replica that has the least to do.
                    request_id=uuid4().hex,
                    prompt_ids=[*prompt_ids, *response_ids],
                    sampling_params=scoring_params(self._engine, self._temperature),
                )
                return response_log_probs(output.extra_fields, len(prompt_ids), response_ids)
            except Exception:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")


def scoring_params(engine: str, temperature: float) -> dict[str, Any]:
    """Sampling parameters of a request that scores its prompt.

    Args:
        engine: ``rollout.name``.
        temperature: vLLM and SGLang score prompts at 1, whatever it is.
    """
    params: dict[str, Any] = {"max_tokens": 1, "temperature": temperature, "prompt_logprobs": 0}
    if engine == "vllm":
        params["detokenize"] = False  # it would look up the text of every token of the prompt
    return params


def response_log_probs(fields: Mapping[str, Any], prompt_tokens: int, response_ids: Sequence[int]) -> np.ndarray:
    """Log-probs of a response that was the end of a scored prompt, (response tokens,) float32, nats.

    Args:
        fields: ``TokenOutput.extra_fields`` of verl's server: in ``prompt_ids`` and ``prompt_logprobs`` entry i, a
            list of one, is about token i + 1; the last entry is a dummy.
        prompt_tokens: tokens in front of the response, at least 1.
        response_ids: the response.

    Raises:
        ScoringError: the fields are not there, or are about other tokens.
    """
    ids, values = fields.get("prompt_ids"), fields.get("prompt_logprobs")
    if ids is None or values is None:
        raise ScoringError("the rollout server's answer holds no prompt_logprobs")
    start, stop = prompt_tokens - 1, prompt_tokens - 1 + len(response_ids)
    if len(ids) != stop + 1 or len(values) != stop + 1 or [row[0] for row in ids[start:stop]] != list(response_ids):
        raise ScoringError(
            f"the rollout server was sent {stop + 1} tokens and answered about {len(ids)} of them, or about others"
        )
    return np.asarray([row[0] for row in values[start:stop]], dtype=np.float32)
