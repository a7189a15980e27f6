"""``sdar.teacher.placement=rollout_server``: verl's rollout server is asked for the teacher while episodes still run.

The server holds the weights that the step began with. It scores a text as verl's own distillation has it scored: the
teacher's prompt and the sampled ids are the prompt of a request for one token, and ``prompt_logprobs=0`` asks for the
log-prob of every token of it. An objective over the teacher's likeliest tokens asks for those in its place
(``prompt_logprobs=k``), and for the row's own tokens, too, where one of them is not among the k. A request goes out as
soon as a turn is sampled (with ``rows=trajectory``: as soon as the episode ends); nobody waits for the answer before
the next turn.

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
        likeliest: also have the teacher's so many likeliest tokens at each place; 0: none.
    """

    def __init__(
        self, client: Any, engine: str, temperature: float, *, checks: bool = False, likeliest: int = 0
    ) -> None:
        self._client = client
        self._engine = engine
        self._temperature = temperature
        self._checks = checks
        self._likeliest = likeliest
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
            known = None
            if self._likeliest:
                ids, log_probs = await self._asked(prompt_ids, response_ids, self._likeliest)
                info.teacher_support = ids, with_tail(log_probs)
                known = _own(ids, log_probs, response_ids)
            info.teacher_log_probs = await self._log_probs(prompt_ids, response_ids) if known is None else known
        except Exception as error:
            info.teacher_failure = f"{type(error).__name__}: {error}"
            logger.warning("no teacher for a row of task %s: %s", info.task_id, info.teacher_failure)

    async def _student(self, info: RowInfo, prompt_ids: list[int], response_ids: list[int]) -> None:
        try:
            info.student_log_probs = await self._log_probs(prompt_ids, response_ids)
        except Exception as error:
            logger.warning("a row of task %s cannot be compared with the trainer: %s", info.task_id, error)

    async def _log_probs(self, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
        """Log-probs of ``response_ids``."""
        return (await self._asked(prompt_ids, response_ids))[1][:, 0]

    async def _asked(
        self, prompt_ids: list[int], response_ids: list[int], likeliest: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """:func:`scored_response`; tried :data:`ATTEMPTS` times."""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                output = await self._client.generate(
                    # Of its own: the load balancer may choose the replica that has the least to do.
                    request_id=uuid4().hex,
                    prompt_ids=[*prompt_ids, *response_ids],
                    sampling_params=scoring_params(self._engine, self._temperature, likeliest),
                )
                return scored_response(output.extra_fields, len(prompt_ids), response_ids, likeliest)
            except Exception:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")


def scoring_params(engine: str, temperature: float, likeliest: int = 0) -> dict[str, Any]:
    """Sampling parameters of a request that scores its prompt.

    Args:
        engine: ``rollout.name``.
        temperature: vLLM and SGLang score prompts at 1, whatever it is.
        likeliest: score so many of the likeliest tokens at each place; 0: the prompt's own.
    """
    params: dict[str, Any] = {"max_tokens": 1, "temperature": temperature, "prompt_logprobs": likeliest}
    if engine == "vllm":
        params["detokenize"] = False  # it would look up the text of every token of the prompt
    return params


def scored_response(
    fields: Mapping[str, Any], prompt_tokens: int, response_ids: Sequence[int], likeliest: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What is said of a response that was the end of a scored prompt.

    Args:
        fields: ``TokenOutput.extra_fields`` of verl's server: in ``prompt_ids`` and ``prompt_logprobs`` entry i is
            about the place of token i + 1: a list of one, that token, or of the likeliest; the last one is a dummy.
        prompt_tokens: tokens in front of the response, at least 1.
        response_ids: the response.
        likeliest: how many tokens were asked for at each place; 0: its own.

    Returns:
        Tokens, int32, and their log-probs, float32, nats: (response tokens, 1), or (response tokens, likeliest).

    Raises:
        ScoringError: the fields are not there, or are about other tokens.
    """
    ids, values = fields.get("prompt_ids"), fields.get("prompt_logprobs")
    if ids is None or values is None:
        raise ScoringError("the rollout server's answer holds no prompt_logprobs")
    start, stop, width = prompt_tokens - 1, prompt_tokens - 1 + len(response_ids), max(likeliest, 1)
    others = len(ids) != stop + 1 or len(values) != stop + 1
    if others or (not likeliest and [row[0] for row in ids[start:stop]] != list(response_ids)):
        raise ScoringError(
            f"the rollout server was sent {stop + 1} tokens and answered about {len(ids)} of them, or about others"
        )
    if wrong := {len(row) for part in (ids, values) for row in part[start:stop]} - {width}:
        raise ScoringError(f"the rollout server was asked for {width} tokens at each place and gave {min(wrong)}")
    return np.asarray(ids[start:stop], dtype=np.int32), np.asarray(values[start:stop], dtype=np.float32)


NO_TAIL = 1e-6
"""Probability that is not told from 0 when it is what is left of 1 in float32."""


def with_tail(log_probs: np.ndarray) -> np.ndarray:
    """(tokens, k + 1) of (tokens, k) log-probs: the last is that of all other tokens together, -infinity where nothing
    that float32 could tell is left."""
    left = 1.0 - np.exp(log_probs.astype(np.float64)).sum(axis=-1, keepdims=True)
    tail = np.where(left > NO_TAIL, np.log(np.maximum(left, NO_TAIL)), -np.inf)
    return np.concatenate([log_probs, tail.astype(np.float32)], axis=-1)


def _own(ids: np.ndarray, log_probs: np.ndarray, response_ids: Sequence[int]) -> np.ndarray | None:
    """The log-probs of the response's own tokens, if all are among the likeliest."""
    own = ids == np.asarray(response_ids, dtype=np.int32)[:, None]
    return log_probs[own] if own.any(axis=-1).all() else None
