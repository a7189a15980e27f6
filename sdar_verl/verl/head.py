"""Reads the input of the language-model head inside verl's FSDP engine, and computes there what a request asks for.

verl's engine gives a loss function the logits of a whole micro-batch. From these, a divergence could only be had with
several more tensors of that size. So it is computed one step earlier: a forward hook on the head sees the hidden
states and the weights, and :func:`sdar_verl.algorithm.head_chunks.map_logits` makes the logits of some tokens at a
time. What comes out per token goes back through verl's own hook for logits processors (``distillation_use_topk``): the
engine puts it beside its log-probs.

FSDP frees gathered weights after a module's forward pass, and gathers them again when a gradient reaches the module's
output. The hook therefore runs inside the head's forward, and its result is tied to the logits (:class:`_Tie`): no
gradient enters the chunks before the one of the logits has come and the weights are there.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

from sdar_verl.algorithm.divergence_rows import FullDivergence, TopKDivergence
from sdar_verl.algorithm.divergences import COLUMNS, on_support, top_k_ids
from sdar_verl.algorithm.head_chunks import RowFunction, chunk_logits, map_logits
from sdar_verl.verl.fields import TEACHER_MASK
from sdar_verl.verl.requests import (
    COLUMN_PREFIX,
    HEAD_REQUEST,
    SUPPORT_IDS,
    SUPPORT_LOG_PROBS,
    TEACHER_HIDDEN,
    HeadRequest,
)

Head = tuple[torch.Tensor, torch.Tensor | None]
"""Weight (V, H) and bias (V,) of a language-model head."""

_current: _Step | None = None


def columns_of_this_step(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a loss function answers when verl's engine calls it as a logits processor.

    Args:
        logits: (1, tokens, V), the engine's, divided by the temperature; read once, to see that the head makes them.

    Returns:
        ``COLUMN_PREFIX`` + name -> (1, tokens).
    """
    if _current is None:
        raise RuntimeError("verl's engine asked for a divergence outside of a pass that was asked for one")
    return _current.spread(logits)


class HeadTap:
    """The hook of one engine; it does nothing until a batch carries a request.

    Attributes:
        teacher_head: the teacher's head for ``divergence`` over the whole vocabulary: handed over by the engine of the
            teacher pass (:meth:`hand_head_to`), freed after the update.
        checked: the model's logits were seen to be the head's.
    """

    def __init__(self, engine: Any):
        self._engine = engine
        self._forward_step = engine.forward_step
        self._hooked = False
        self._kept: Head | None = None
        self.teacher_head: Head | None = None
        self.checked = False

    @classmethod
    def attach(cls, engine: Any) -> HeadTap:
        """The tap of ``engine``, put there if it has none."""
        tap = getattr(engine, "sdar_head_tap", None)
        if tap is None:
            tap = engine.sdar_head_tap = cls(engine)
            engine.forward_step = tap.forward_step
        return tap

    def hand_head_to(self, engine: Any) -> None:
        """Give the head that a ``hidden`` pass kept (a copy, gathered over the ranks) to the tap of ``engine``."""
        if self._kept is not None:
            HeadTap.attach(engine).teacher_head, self._kept = self._kept, None

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """verl's ``forward_step``, with the request answered."""
        global _current
        text = tu.get_non_tensor_data(micro_batch, HEAD_REQUEST, default=None)
        if text is None:
            return self._forward_step(micro_batch, loss_function, forward_only)
        self._hook_in()
        micro_batch = micro_batch.to(get_device_id())
        request = HeadRequest.from_json(text)
        _current = step = _Step(self, request, micro_batch)
        if request.what == "divergence":
            tu.assign_non_tensor(micro_batch, distillation_use_topk=True)
        try:
            loss, output = self._forward_step(micro_batch, loss_function, forward_only)
        finally:
            _current = None
        if not step.seen:
            raise RuntimeError(
                "the model's output embeddings were not called in its forward pass, so their input is unknown; "
                "set actor_rollout_ref.model.use_fused_kernels=False, or use sdar.loss.objective=sampled"
            )
        output.get("model_output", {}).update(step.fields)
        return loss, output

    def keep(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Copy the teacher's head, once per pass."""
        if self._kept is None:
            self._kept = (weight.detach().clone(), None if bias is None else bias.detach().clone())

    def _hook_in(self) -> None:
        if self._hooked:
            return
        head = self._engine.module.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise RuntimeError(
                f"the model's output embeddings are {type(head).__name__}, and a divergence over distributions reads "
                "torch.nn.Linear only; leave lm_head out of the LoRA targets, or use sdar.loss.objective=sampled"
            )
        head.register_forward_hook(_hook, prepend=True)  # before FSDP's own, which frees the weights
        self._hooked = True


def _hook(module: torch.nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    return None if _current is None else _current.at_head(module, args, output)


class _Step:
    """One micro-batch: which tokens, and what to compute of them."""

    def __init__(self, tap: HeadTap, request: HeadRequest, data: TensorDict):
        self._tap, self._request, self._data = tap, request, data
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
        if request.what == "divergence":
            self._chosen = _flat(data[TEACHER_MASK]).bool().nonzero().flatten()
        self._columns: torch.Tensor | None = None
        self._probe: torch.Tensor | None = None

    def at_head(self, head: torch.nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Within the head's forward pass; returns the logits to go on with, or None for the same."""
        self.seen = True
        if type(head.weight).__name__ == "DTensor":
            raise RuntimeError("the head's weights are not gathered within its forward pass; tensor parallelism?")
        index = self._index(args[0])
        chosen = index if self._chosen is None else index[self._chosen]
        weight = head.weight.to(output.dtype)
        bias = None if head.bias is None else head.bias.to(output.dtype)
        hidden = args[0].flatten(0, -2)[chosen].to(output.dtype)
        if self._request.what != "divergence":
            with torch.no_grad():
                self._answer(hidden, weight, bias)
            return None
        if not len(chosen):
            return None
        self._probe = output.detach().flatten(0, -2)[chosen[0]].float() / self._temperature
        self._columns = map_logits(
            hidden,
            weight,
            self._divergence(len(weight)),
            bias=bias,
            temperature=self._temperature,
            chunk=self._request.chunk,
        )
        if not self._columns.requires_grad:
            return None
        output, self._columns = _Tie.apply(output, self._columns)
        return output

    def spread(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns at their places among all tokens, 0 elsewhere."""
        logits = logits.squeeze(0)
        if len(logits) != self._total:
            raise RuntimeError(
                f"verl's engine has {len(logits)} logits for {self._total} tokens: static padding or sequence "
                "parallelism, which an objective over distributions cannot be used with"
            )
        names = [f"{COLUMN_PREFIX}{name}" for name in COLUMNS]
        if self._columns is None or self._chosen is None:
            return {name: logits.new_zeros(1, self._total, dtype=torch.float32) for name in names}  # no teacher here
        places = self._packed[self._chosen]
        self._check(logits[places[0]].detach())
        spread = self._columns.new_zeros(self._total, len(COLUMNS)).index_copy(0, places, self._columns)
        return {name: column.unsqueeze(0) for name, column in zip(names, spread.unbind(1), strict=True)}

    def _answer(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """A pass without gradient: values of every response token."""
        request = self._request
        if request.what == "hidden":
            self._tap.keep(weight, bias)
            self.fields[TEACHER_HIDDEN] = self._rows(hidden)
            return
        given = _flat(self._data[SUPPORT_IDS]).long() if request.what == "on_support" else None
        if given is not None and int(given.max()) >= len(weight):
            raise RuntimeError(
                f"the student's vocabulary is larger than the teacher's ({len(weight)} tokens); use a teacher with the "
                "student's vocabulary, or sdar.loss.objective=sampled"
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
            ids, teacher = (_flat(self._data[name])[chosen] for name in (SUPPORT_IDS, SUPPORT_LOG_PROBS))
            if int(ids.max()) >= vocabulary:
                # A GPU would stop with an assertion that names nothing.
                raise RuntimeError(
                    f"the teacher's {request.k} most likely tokens hold number {int(ids.max())}, and the student's "
                    f"vocabulary has {vocabulary} tokens; use a smaller sdar.loss.top_k, a teacher with the student's "
                    "vocabulary, or sdar.loss.objective=sampled"
                )
            return TopKDivergence(request.kind, ids.long(), teacher, request.tail)
        head = self._tap.teacher_head
        if head is None:
            raise RuntimeError("the teacher's head is not here: the teacher pass did not run on this worker")
        weight, bias = head
        if len(weight) != vocabulary:
            raise RuntimeError(
                f"the student's vocabulary has {vocabulary} tokens, the teacher's {len(weight)}; use a teacher with "
                "the student's vocabulary, or sdar.loss.objective=sampled"
            )
        hidden = _flat(self._data[TEACHER_HIDDEN])[chosen]
        return FullDivergence(request.kind, lambda rows: chunk_logits(hidden[rows], weight, bias, self._temperature))

    def _index(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of the flattened hidden states that predict response tokens, in the order of the responses."""
        rows, width = hidden.shape[0], hidden.shape[-2]
        if hidden.dim() == 3 and rows == 1 and width == self._total:
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
            "neither packed nor padded rows. Sequence parallelism and static padding are not supported by objectives "
            "over distributions."
        )

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        return torch.nested.as_nested_tensor(list(values.split(self._responses)), layout=torch.jagged)

    def _check(self, logits: torch.Tensor) -> None:
        """Once per engine: the model's logits are the head's (no soft-capping, no scaling after it)."""
        if self._tap.checked or self._probe is None:
            return
        precision = torch.finfo(logits.dtype).eps
        if not torch.allclose(logits.float(), self._probe, rtol=8 * precision, atol=8 * precision):
            raise RuntimeError(
                "this model changes its logits after the head (soft-capping or scaling), and a divergence over "
                "distributions is computed from the head; use sdar.loss.objective=sampled with it"
            )
        self._tap.checked = True


class _Tie(torch.autograd.Function):
    """Logits and columns as they are; backwards, neither gradient goes on before both are there."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(logits, columns)  # the same tensors go on, not views of them
        return logits, columns

    @staticmethod
    def backward(
        ctx: Any, logits: torch.Tensor | None, columns: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return logits, columns


def _flat(nested: torch.Tensor) -> torch.Tensor:
    """All rows' entries, one after the other."""
    return torch.cat(list(nested.unbind()))


def _temperature(data: TensorDict) -> float:
    temperature = tu.get_non_tensor_data(data, "temperature", default=None)
    if temperature is None or isinstance(temperature, torch.Tensor):
        raise RuntimeError(f"objectives over distributions need one temperature for all rows, not {temperature!r}")
    return float(temperature)
