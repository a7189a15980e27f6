"""Forward passes for the requests that run on the CPU rollout: with a cache of slots, or over whole sequences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from sdar_verl.local.requests import Request
from sdar_verl.local.sampling import likeliest, token_log_probs
from sdar_verl.local.slot_cache import SlotCache, attends_fully

logger = logging.getLogger(__name__)


class SlotPasses:
    """Prefill and decode through a :class:`SlotCache`; the request in slot i is the i-th of those that run."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = SlotCache(model.config)

    def prefill(self, requests: Sequence[Request], first_slot: int) -> torch.Tensor:
        """Run prompts, left-padded to a common width, into fresh slots.

        Args:
            requests: sorted by the length of their prompts; all want their prompts' log-probs, or none does.
            first_slot: the first one's.

        Returns:
            Logits behind the prompts, (requests, V).
        """
        width = len(requests[-1].prompt_ids)
        input_ids = torch.zeros(len(requests), width, dtype=torch.long)
        attention_mask = torch.zeros(len(requests), width, dtype=torch.long)
        for row, request in enumerate(requests):
            request.offset = width - len(request.prompt_ids)
            input_ids[row, request.offset :] = torch.tensor(request.prompt_ids)
            attention_mask[row, request.offset :] = 1
        self._cache.begin_prefill(first_slot)
        scores = requests[0].params.scores_prompt
        logits = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=0 if scores else 1,  # 0: of all positions
        ).logits
        if scores:
            for row, request in enumerate(requests):
                _score(request, logits[row, request.offset : -1])
        return logits[:, -1]

    def decode(self, requests: Sequence[Request]) -> torch.Tensor:
        """Logits for the next token of every request that runs, (requests, V)."""
        lengths = torch.tensor([request.length for request in requests])
        offsets = torch.tensor([request.offset for request in requests])
        width = int(lengths.max())
        cells = torch.arange(width)
        visible = (cells >= offsets[:, None]) & (cells < lengths[:, None])
        self._cache.begin_decode(lengths - 1, width)
        return self._model(
            input_ids=torch.tensor([request.token_ids[-1:] for request in requests]),
            attention_mask=visible[:, None, None, :],  # transformers passes 4-d masks on as they are
            position_ids=(lengths - 1 - offsets)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]

    def move(self, source: int, target: int, filled: int) -> None:
        """The request of slot ``source``, with ``filled`` cells, is in slot ``target`` from now on."""
        self._cache.move(source, target, filled)


class WholePasses:
    """Every token from a pass over the whole sequence: slow, and right for any causal model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        logger.warning(
            "model type %s has more than full attention: rollout.name=transformers samples every token of it by a pass "
            "over the whole sequence, which is slow",
            model.config.model_type,
        )

    def prefill(self, requests: Sequence[Request], first_slot: int) -> torch.Tensor:
        """As :meth:`SlotPasses.prefill`."""
        return self._logits(requests, scores=requests[0].params.scores_prompt)

    def decode(self, requests: Sequence[Request]) -> torch.Tensor:
        """As :meth:`SlotPasses.decode`."""
        return self._logits(requests, scores=False)

    def move(self, source: int, target: int, filled: int) -> None:
        """Nothing is kept."""

    def _logits(self, requests: Sequence[Request], scores: bool) -> torch.Tensor:
        rows = [torch.tensor([*request.prompt_ids, *request.token_ids]) for request in requests]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = pad_sequence(rows, batch_first=True)
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        logits = self._model(
            input_ids=input_ids,
            attention_mask=(places < lengths[:, None]).long(),
            position_ids=places,
            use_cache=False,
        ).logits
        if scores:
            for row, request in enumerate(requests):
                _score(request, logits[row, : len(request.prompt_ids) - 1])
        return logits[torch.arange(len(rows)), lengths - 1]


def make_passes(model: Any) -> SlotPasses | WholePasses:
    """The faster of the two that the model allows."""
    return SlotPasses(model) if attends_fully(model.config) else WholePasses(model)


def _score(request: Request, logits: torch.Tensor) -> None:
    count, temperature = request.params.prompt_logprobs, request.params.temperature
    if count:
        ids, log_probs = likeliest(logits, count, temperature)
    else:
        ids = torch.tensor(request.prompt_ids[1:])
        ids, log_probs = ids[:, None], token_log_probs(logits, ids, temperature)[:, None]
    request.scored = ids.tolist(), log_probs.tolist()
