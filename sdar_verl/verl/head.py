"""Reads the input of the language-model head inside verl's FSDP engine, and computes there what a request asks for.

verl's engine makes the logits of a whole micro-batch, prompts included. A teacher pass needs those at the positions of
its responses alone: a hook in front of the head takes these hidden states out, and the head sees no others.

A divergence could from logits only be had with several more tensors of their size. So it is computed one step earlier:
a hook behind the head sees the hidden states and the weights, and :func:`sdar_verl.algorithm.head_chunks.map_logits`
makes the logits of some tokens at a time. What comes out per token goes back through verl's own call of a logits
processor (``distillation_use_topk``): the engine puts it beside its log-probs.

FSDP frees gathered weights after a module's forward pass, and gathers them again when a gradient reaches the module's
output. The hook therefore runs inside the head's forward, and its result is tied to the logits (:class:`_Tie`): no
gradient enters the chunks before the one of the logits has come and the weights are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import logprobs_from_logits

from sdar_verl.algorithm.divergence_rows import Anchor, FullDivergence, TargetLogProbs, TopKDivergence
from sdar_verl.algorithm.divergences import COLUMNS, on_support, top_k_ids
from sdar_verl.algorithm.head_chunks import RowFunction, chunk_logits, columns_of_logits, map_logits
from sdar_verl.fields import (
    ANCHOR_HIDDEN,
    ANCHOR_LOG_PROBS,
    SUPPORT_IDS,
    SUPPORT_LOG_PROBS,
    TEACHER_HIDDEN,
    TEACHER_MASK,
)
from sdar_verl.requests import HeadRequest
from sdar_verl.table import nested

COLUMN_PREFIX = "sdar_distribution_"
"""Model outputs of an update, nested (rows, sequence tokens): this and a name of the divergences' ``COLUMNS``, or
``target``."""

Head = tuple[torch.Tensor, torch.Tensor | None]
"""Weight (V, H) and bias (V,) of a language-model head."""


@dataclass
class Heads:
    """Heads that an engine keeps between passes.

    Attributes:
        kept: of a ``hidden`` pass through this engine, a copy, gathered over the ranks.
        teacher: the teacher's, for ``divergence`` over the whole vocabulary; freed after the update.
        anchor: the reference's, likewise.
        checked: the model's logits were seen to be the head's.
    """

    kept: Head | None = None
    teacher: Head | None = None
    anchor: Head | None = None
    checked: bool = False

    def hand_over(self, to: Heads, place: Literal["teacher", "anchor"]) -> None:
        """Give a head that was kept in the last pass to the engine that reads it."""
        if self.kept is not None:
            setattr(to, place, self.kept)
            self.kept = None


class HeadPass:
    """One micro-batch on its way through the model: which tokens, and what to compute of them.

    Args:
        request: what the batch was asked for.
        data: the micro-batch, on the device.
        heads: of the engine.

    Attributes:
        teacher: it is a teacher pass.
        seen: the head was called.
        fields: nested (rows, response tokens, ...), what the request asks for beyond log-probs.
    """

    def __init__(self, request: HeadRequest, data: TensorDict, heads: Heads):
        self._request, self._data, self._heads = request, data, heads
        self.teacher = request.teacher
        self._temperature = _temperature(data)
        self.seen = False
        self.fields: dict[str, torch.Tensor] = {}
        ends = data["input_ids"].offsets()[1:].tolist()
        starts = data["input_ids"].offsets()[:-1].tolist()
        self._lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        self._responses = data["loss_mask"].offsets().diff().tolist()
        device = data["input_ids"].device
        # The logits at position i are about token i + 1; responses are at the end of their sequences.
        self._packed = torch.cat(
            [
                torch.arange(end - tokens - 1, end - 1, device=device)
                for end, tokens in zip(ends, self._responses, strict=True)
            ]
        )
        self._total = ends[-1]
        self._chosen: torch.Tensor | None = None
        self._names = {"divergence": COLUMNS, "target": ("target",)}.get(request.what, ())
        if self._names:
            counted = self._column(TEACHER_MASK).bool() & self._column("loss_mask").bool()
            self._chosen = counted.nonzero().flatten()
        self._columns: torch.Tensor | None = None
        self._probe: torch.Tensor | None = None
        # Sequence parallelism deals the tokens of a row out to ranks: there verl makes all logits.
        self._selects = request.teacher and int(tu.get_non_tensor_data(data, "sp_size", default=1)) == 1
        self._selected = False

    def before_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head shall see: of a teacher pass (1, response tokens, H), else ``hidden``."""
        if not self._selects:
            return hidden
        self._selected = True
        return hidden.flatten(0, -2)[self._index(hidden)].unsqueeze(0)

    def at_head(self, head: Any, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        """Within the head's forward pass; returns the logits to go on with, or None for the same."""
        self.seen = True
        if self._request.what == "log_probs":
            return None
        if type(head.weight).__name__ == "DTensor":
            raise RuntimeError("the head's weights are not gathered within its forward pass; tensor parallelism?")
        index = torch.arange(hidden.shape[1], device=hidden.device) if self._selected else self._index(hidden)
        if self._chosen is not None:
            index = index[self._chosen]
        weight = head.weight.to(output.dtype)
        bias = None if head.bias is None else head.bias.to(output.dtype)
        tokens = hidden.flatten(0, -2)[index].to(output.dtype)
        if not self._names:
            with torch.no_grad():
                self._answer(tokens, weight, bias)
            return None
        if not len(tokens):
            return None
        self._probe = output.detach().flatten(0, -2)[index[0]].float() / self._temperature
        how: dict[str, Any] = {"bias": bias, "temperature": self._temperature, "chunk": self._request.chunk}
        if self._request.what == "target":
            self._columns = columns_of_logits(tokens, weight, self._target(len(weight)), **how)
            return None
        self._columns = map_logits(tokens, weight, self._divergence(len(weight)), **how)
        if not self._columns.requires_grad:
            return None
        output, self._columns = _Tie.apply(output, self._columns)
        return output

    def response_log_probs(self, output: Any) -> torch.Tensor | None:
        """Of a teacher pass: nested (rows, response tokens), nats; None where verl has to make them."""
        if not self._selected:
            return None
        logits = output.logits.squeeze(0)
        if self._temperature != 1.0:
            logits = logits / self._temperature
        return self._rows(logprobs_from_logits(logits, self._column("responses")))

    def response_part(self, values: torch.Tensor) -> torch.Tensor:
        """Nested (rows, sequence tokens): what stands at the positions that predict the response."""
        rows = zip(values.unbind(), self._responses, strict=True)
        return nested([row[-length - 1 : -1] for row, length in rows])

    def spread(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """What verl's engine asks of a logits processor: the columns at their places among all tokens, 0 elsewhere.

        Args:
            logits: (1, tokens, V), the engine's, divided by the temperature; read once: they must be the head's.

        Returns:
            ``COLUMN_PREFIX`` + name -> (1, tokens).
        """
        logits = logits.squeeze(0)
        if len(logits) != self._total:
            raise RuntimeError(
                f"verl's engine has {len(logits)} logits for {self._total} tokens: static padding or sequence "
                "parallelism, which an objective over distributions cannot be used with"
            )
        names = [f"{COLUMN_PREFIX}{name}" for name in self._names]
        if self._columns is None or self._chosen is None:
            return {name: logits.new_zeros(1, self._total, dtype=torch.float32) for name in names}  # no teacher here
        places = self._packed[self._chosen]
        self._check(logits[places[0]].detach())
        spread = self._columns.new_zeros(self._total, len(names)).index_copy(0, places, self._columns)
        return {name: column.unsqueeze(0) for name, column in zip(names, spread.unbind(1), strict=True)}

    def _answer(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """A pass without gradient: values of every response token."""
        request = self._request
        if request.what == "hidden":
            if self._heads.kept is None:  # once per pass
                self._heads.kept = (weight.detach().clone(), None if bias is None else bias.detach().clone())
            self.fields[TEACHER_HIDDEN] = self._rows(hidden)
            return
        given = self._column(SUPPORT_IDS).long() if request.what == "on_support" else None
        if given is not None and int(given.max()) >= len(weight):
            raise RuntimeError(
                f"the student's vocabulary is larger than the teacher's ({len(weight)} tokens); use a teacher with the "
                "student's vocabulary, or sdar.loss.objective=sampled without an anchor"
            )
        ids, log_probs = [], []
        for start in range(0, len(hidden), request.chunk):
            rows = slice(start, start + request.chunk)
            logits = chunk_logits(hidden[rows], weight, bias, self._temperature)
            ids.append(top_k_ids(logits, request.k) if given is None else given[rows])
            if request.what != "top_k_ids":
                log_probs.append(on_support(logits, ids[-1]))
        if given is None:
            self.fields[SUPPORT_IDS] = self._rows(torch.cat(ids).int())
        if log_probs:
            self.fields[SUPPORT_LOG_PROBS] = self._rows(torch.cat(log_probs))

    def _divergence(self, vocabulary: int) -> RowFunction:
        request, chosen = self._request, self._chosen
        if request.k:
            ids, teacher = (self._column(name)[chosen] for name in (SUPPORT_IDS, SUPPORT_LOG_PROBS))
            if int(ids.max()) >= vocabulary:
                # A GPU would stop with an assertion that names nothing.
                raise RuntimeError(
                    f"the teacher's {request.k} most likely tokens hold number {int(ids.max())}, and the student's "
                    f"vocabulary has {vocabulary} tokens; use a smaller sdar.loss.top_k, a teacher with the student's "
                    "vocabulary, or sdar.loss.objective=sampled without an anchor"
                )
            anchor = None
            if request.reference:
                there = self._column(ANCHOR_LOG_PROBS)[chosen]
                anchor = Anchor(request.reference, request.student, lambda rows: there[rows])
            elif request.student:
                anchor = Anchor(0.0, request.student)
            return TopKDivergence(request.kind, ids.long(), teacher, request.tail, anchor, request.options)
        return FullDivergence(request.kind, *self._over_all(vocabulary), request.options)

    def _target(self, vocabulary: int) -> TargetLogProbs:
        return TargetLogProbs(self._column("responses")[self._chosen], *self._over_all(vocabulary))

    def _over_all(self, vocabulary: int) -> tuple[Callable[[slice], torch.Tensor], Anchor | None]:
        """The teacher's logits, and what the target is drawn to."""
        request, anchor = self._request, None
        if request.reference or request.student:
            drawn = self._logits(ANCHOR_HIDDEN, self._heads.anchor, vocabulary) if request.reference else None
            anchor = Anchor(request.reference, request.student, drawn)
        return self._logits(TEACHER_HIDDEN, self._heads.teacher, vocabulary), anchor

    def _logits(self, column: str, head: Head | None, vocabulary: int) -> Callable[[slice], torch.Tensor]:
        """Rows -> logits of the chosen tokens, made from the hidden states that a pass has left in ``column``."""
        whose = "teacher" if column == TEACHER_HIDDEN else "reference"
        if head is None:
            raise RuntimeError(f"the {whose}'s head is not here: the {whose}'s pass did not run on this worker")
        weight, bias = head
        if len(weight) != vocabulary:
            raise RuntimeError(
                f"the student's vocabulary has {vocabulary} tokens, the {whose}'s {len(weight)}; use a teacher with "
                "the student's vocabulary, or sdar.loss.objective=sampled without an anchor"
            )
        # Of this object the function must hold nothing: autograd holds it, and its columns autograd's graph, in a ring
        # through C++ that Python's collector does not see.
        hidden, temperature = self._column(column)[self._chosen], self._temperature
        return lambda rows: chunk_logits(hidden[rows], weight, bias, temperature)

    def _column(self, name: str) -> torch.Tensor:
        """A column of the response tokens of all rows, one after the other. A row by which verl fills a batch up has
        one token, and what an agent loop has stored beside the row that it was made of."""
        rows = zip(self._data[name].unbind(), self._responses, strict=True)
        return torch.cat([row[:tokens] for row, tokens in rows])

    def _index(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of the flattened hidden states that predict response tokens, in the order of the responses."""
        rows, width = hidden.shape[0], hidden.shape[-2]
        if hidden.dim() == 3 and rows == 1 and width >= self._total:  # verl's static padding stands behind the rows
            return self._packed
        if hidden.dim() == 3 and rows == len(self._lengths) and width == max(self._lengths):
            return torch.cat(
                [
                    torch.arange(row * width + length - tokens - 1, row * width + length - 1, device=hidden.device)
                    for row, (length, tokens) in enumerate(zip(self._lengths, self._responses, strict=True))
                ]
            )
        raise RuntimeError(
            f"the head was called on {tuple(hidden.shape)} for {len(self._lengths)} rows of {self._total} tokens: "
            "neither packed nor padded rows. Sequence parallelism is not supported by objectives over distributions"
        )

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        return nested(values.split(self._responses))

    def _check(self, logits: torch.Tensor) -> None:
        """Once per engine: the model's logits are the head's (no soft-capping, no scaling after it)."""
        if self._heads.checked or self._probe is None:
            return
        precision = torch.finfo(logits.dtype).eps
        if not torch.allclose(logits.float(), self._probe, rtol=8 * precision, atol=8 * precision):
            raise RuntimeError(
                "this model changes its logits after the head (soft-capping or scaling), and a divergence over "
                "distributions is computed from the head; use sdar.loss.objective=sampled without an anchor"
            )
        self._heads.checked = True


class _Tie(torch.autograd.Function):
    """Logits and columns as they are; backwards, neither gradient goes on before both are there."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        return logits, columns

    @staticmethod
    def backward(
        ctx: Any, logits: torch.Tensor | None, columns: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return logits, columns


def _temperature(data: TensorDict) -> float:
    temperature = tu.get_non_tensor_data(data, "temperature", default=None)
    if temperature is None or isinstance(temperature, torch.Tensor):
        raise RuntimeError(
            f"a teacher's pass and objectives over distributions need one temperature for all rows, not {temperature!r}"
        )
    return float(temperature)
