"""What a teacher pass can compute from its logits beside the log-probs of the sampled tokens.

An output is a pure function ``output(logits, data, **arguments) -> {field: tensor}``:

- ``logits``: (tokens, vocabulary), divided by the temperature; the tokens of a micro-batch, packed. Row i is about
  token i + 1;
- ``data``: the micro-batch, with verl's fields and those named by ``carry``
  (:meth:`sdar_verl.training.teacher.PrivilegedTeacher.score`);
- each tensor: (tokens,) or (tokens, columns). It arrives on the training rows as the field's name, nested
  (rows, response tokens) or (rows, response tokens, columns): the positions that predict the response.

An output of your own, in your own package::

    @register_teacher_output("largest")
    def largest(logits, data, **_):
        return {"my_largest_log_prob": logits.max(-1).values - logits.logsumexp(-1)}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sdar_verl.algorithm.registry import Registry
from sdar_verl.training.teacher_rows import nested

TeacherOutput = Callable[..., dict[str, torch.Tensor]]

TOPK_IDS = "sdar_teacher_topk_ids"
"""Nested (rows, response tokens, k), int64."""

TOPK_LOG_PROBS = "sdar_teacher_topk_log_probs"
"""Nested (rows, response tokens, k), nats, largest first."""

_OUTPUTS: Registry[TeacherOutput] = Registry("teacher output")


def register_teacher_output(name: str) -> Callable[[TeacherOutput], TeacherOutput]:
    """Decorator: make an output available as ``name``. Raises ValueError when the name is taken."""
    return _OUTPUTS.register(name)


def get_teacher_output(name: str) -> TeacherOutput:
    """The output called ``name``. Raises ValueError that lists the known names."""
    return _OUTPUTS.get(name)


@register_teacher_output("topk")
def topk(logits: torch.Tensor, data: Any, *, k: int, **_: Any) -> dict[str, torch.Tensor]:
    """Ids and log-probs of the teacher's ``k`` likeliest tokens."""
    largest, ids = logits.topk(k, dim=-1)
    return {TOPK_IDS: ids, TOPK_LOG_PROBS: largest - logits.logsumexp(-1, keepdim=True)}


class LogitsOutputs:
    """The outputs of one pass, as verl's FSDP engine calls a loss function that wants the logits.

    The engine takes tensors of one number per token only, so columns travel one by one and are put together again by
    :meth:`gather`.

    Args:
        requests: output name -> keyword arguments.
    """

    def __init__(self, requests: Mapping[str, Mapping[str, Any]]):
        self._outputs = {name: (get_teacher_output(name), dict(arguments)) for name, arguments in requests.items()}
        self._columns: dict[str, int | None] = {}

    def __call__(
        self,
        model_output: Any = None,
        data: Any = None,
        dp_group: Any = None,
        student_logits: torch.Tensor | None = None,
    ) -> Any:
        if student_logits is None:  # the engine's second call, for a loss
            return torch.zeros(()), {}
        logits = student_logits.squeeze(0)
        flat = {}
        for output, arguments in self._outputs.values():
            for field, value in output(logits, data, **arguments).items():
                self._columns[field] = None if value.dim() == 1 else value.shape[1]
                for name, column in zip(self._names(field), value.reshape(len(value), -1).unbind(1), strict=True):
                    flat[name] = column.unsqueeze(0).contiguous()
        return flat

    def gather(self, model_output: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fields of the outputs, nested (rows, sequence tokens[, columns]), from what the engine returned."""
        fields = {}
        for field, width in self._columns.items():
            columns = [model_output[name] for name in self._names(field)]
            if width is None:
                fields[field] = columns[0]
            else:
                rows = zip(*(column.unbind() for column in columns), strict=True)
                fields[field] = nested([torch.stack(row, dim=-1) for row in rows])
        return fields

    def _names(self, field: str) -> list[str]:
        width = self._columns[field]
        return [field] if width is None else [f"{field}.{i}" for i in range(width)]
