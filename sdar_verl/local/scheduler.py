"""Continuous batching of one transformers model on the CPU: requests join and leave the batch at every token.

A single thread owns the model and a key-value cache made of slots, one per running request. Each turn of its loop
admits waiting requests (a prefill over their prompts), then decodes one token for all running requests together; a
request that ends gives its slot away at once. Callers get a ``concurrent.futures.Future``.

Compared with batches that run to their end, and with transformers' own continuous batching, in docs/local.md
(benchmarks/cpu_rollout.py).
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from sdar_verl.local.passes import make_passes
from sdar_verl.local.requests import Completion, Request
from sdar_verl.local.sampling import SamplingParams, sample

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass
class Counters:
    """Work done since the start; seconds are those of the scheduler's thread while it had requests."""

    requests: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    prefills: int = 0
    decode_steps: int = 0
    busy_seconds: float = 0.0


@dataclass
class _Call:
    """A function to run between two forward passes."""

    function: Callable[[], Any]
    future: Future[Any]


class BatchScheduler:
    """Runs generation requests through one model, sharing every forward pass.

    Args:
        model: a causal language model of transformers in eval mode on the CPU; attention by sdpa where every layer has
            full attention.
        eos_token_ids: tokens that end a response.
        max_num_seqs: most requests that run at the same time; more wait.
        max_num_batched_tokens: most prompt tokens, padding included, of one prefill.
        seed: seed of the random streams handed to requests that bring no seed of their own.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Sequence[int],
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        seed: int = 0,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError(
                f"rollout.max_num_seqs={max_num_seqs}, rollout.max_num_batched_tokens={max_num_batched_tokens}: "
                "both must be at least 1"
            )
        self._passes = make_passes(model)
        self._eos = frozenset(eos_token_ids)
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._seeds = random.Random(seed)
        self._inbox: queue.SimpleQueue[Request | _Call | None] = queue.SimpleQueue()
        self._waiting: list[Request] = []
        self._running: list[Request] = []  # the request in slot i is self._running[i]
        self._counters = Counters()
        self._failure: BaseException | None = None
        self._gate = threading.Lock()  # orders "the thread has stopped" and "put into the inbox"
        self._thread = threading.Thread(target=self._loop, name="sdar-batch-scheduler", daemon=True)
        self._thread.start()

    # Called from any thread.

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Future[Completion]:
        """Queue one request.

        Args:
            prompt_ids: at least one token id.
            params: how to sample.

        Raises:
            RuntimeError: when the scheduler has stopped; so does the future of a request that was under way.
        """
        if not prompt_ids:
            raise ValueError("a rollout request has an empty prompt")
        rng = random.Random(self._seeds.getrandbits(64) if params.seed is None else params.seed)
        request = Request(prompt_ids, params, rng, Future())
        self._put(request)
        return request.future

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Run ``function`` in the scheduler's thread, between two forward passes."""
        call = _Call(function, Future())
        self._put(call)
        return call.future

    def abort_all(self) -> Future[int]:
        """End every running and waiting request with what it has; the future holds their number."""
        return self.call(self._abort_all)

    def counters(self) -> dict[str, float]:
        """Work done so far, and the requests now running and waiting."""
        return {**asdict(self._counters), "running": len(self._running), "waiting": len(self._waiting)}

    def close(self) -> None:
        """Stop the thread; requests under way fail."""
        self._inbox.put(None)
        self._thread.join()

    def _put(self, item: Request | _Call) -> None:
        with self._gate:
            if self._failure is not None:
                raise self._stopped()
            self._inbox.put(item)

    # The scheduler's thread.

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while self._receive():
                    started = time.perf_counter()
                    while self._waiting and len(self._running) < self._max_num_seqs:
                        self._prefill(self._admit())
                    if self._running:
                        self._decode()
                    self._counters.busy_seconds += time.perf_counter() - started
            self._stop(RuntimeError("the server was closed"))
        except BaseException as error:
            logger.exception("the rollout server's sampling loop failed")
            self._stop(error)

    def _receive(self) -> bool:
        """Take in what has arrived; waits only when there is nothing to do. False means: stop."""
        while True:
            try:
                item = self._inbox.get(block=not (self._running or self._waiting))
            except queue.Empty:
                return True
            if item is None:
                return False
            if not item.future.set_running_or_notify_cancel():  # the caller went away
                continue
            if isinstance(item, Request):
                self._waiting.append(item)
                self._counters.requests += 1
                continue
            try:
                item.future.set_result(item.function())
            except Exception as error:
                item.future.set_exception(error)

    def _admit(self) -> list[Request]:
        """Choose waiting requests for one prefill: of similar length, within the token budget and the free slots.

        Requests for the prompt's log-probs come last, in prefills of their own: these need the logits of every
        position, and an episode waits for the others.
        """
        self._waiting.sort(key=lambda request: (request.params.scores_prompt, len(request.prompt_ids)))
        first = self._waiting[0].params.scores_prompt
        alike = sum(request.params.scores_prompt == first for request in self._waiting)
        room = min(self._max_num_seqs - len(self._running), alike)
        count = 1
        while count < room and (count + 1) * len(self._waiting[count].prompt_ids) <= self._max_num_batched_tokens:
            count += 1
        chosen, self._waiting = self._waiting[:count], self._waiting[count:]
        return chosen

    def _prefill(self, requests: list[Request]) -> None:
        """Run the prompts of ``requests``, which :meth:`_admit` has sorted, and draw their first token."""
        first_slot = len(self._running)
        self._running += requests
        logits = self._passes.prefill(requests, first_slot)
        self._counters.prefills += 1
        self._counters.prompt_tokens += sum(len(request.prompt_ids) for request in requests)
        self._append_tokens(first_slot, logits)

    def _decode(self) -> None:
        """One more token for every running request."""
        logits = self._passes.decode(self._running)
        self._counters.decode_steps += 1
        self._append_tokens(0, logits)

    def _append_tokens(self, first_slot: int, logits: torch.Tensor) -> None:
        """Draw a token for the slots from ``first_slot`` on and let finished requests go."""
        requests = self._running[first_slot:]
        tokens, log_probs = sample(logits, [r.params for r in requests], [r.rng.random() for r in requests])
        self._counters.response_tokens += len(requests)
        for request, token, log_prob in zip(requests, tokens.tolist(), log_probs.tolist(), strict=True):
            request.token_ids.append(token)
            request.log_probs.append(log_prob)
        for slot in range(len(self._running) - 1, first_slot - 1, -1):  # downwards: a freed slot takes the last one
            request = self._running[slot]
            if request.token_ids[-1] in self._eos and not request.params.ignore_eos:
                self._finish(slot, "stop")
            elif len(request.token_ids) >= request.params.max_tokens:
                self._finish(slot, "length")

    def _finish(self, slot: int, reason: str) -> None:
        request = self._running[slot]
        request.future.set_result(request.completion(reason))
        last = self._running.pop()
        if last is not request:
            self._running[slot] = last
            self._passes.move(len(self._running), slot, last.length - 1)

    def _abort_all(self) -> int:
        requests = self._running + self._waiting
        self._running, self._waiting = [], []
        for request in requests:
            request.future.set_result(request.completion("abort"))
        return len(requests)

    def _stop(self, error: BaseException) -> None:
        """Refuse whatever comes, and fail whatever still waits for an answer."""
        with self._gate:
            self._failure = error
        for request in self._running + self._waiting:
            request.future.set_exception(self._stopped())
        self._running, self._waiting = [], []
        while not self._inbox.empty():
            item = self._inbox.get()
            if item is not None and item.future.set_running_or_notify_cancel():
                item.future.set_exception(self._stopped())

    def _stopped(self) -> RuntimeError:
        return RuntimeError(f"the rollout server's sampling loop has stopped: {self._failure!r}")
