"""What a signal is given, and the table of signals; the signals themselves: :mod:`sdar_verl.algorithm.signals`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdar_verl.algorithm.registry import Registry

Signal = Callable[..., torch.Tensor]

Reads = Iterable[str] | Callable[[Mapping[str, Any]], Iterable[str]]


@dataclass(frozen=True)
class SignalRows:
    """All rows of a step; tensors (rows, response_length) unless said otherwise, without gradient.

    Attributes:
        advantages: as the estimator gave them; 0 where ``response_mask`` is off.
        response_mask: bool, sampled tokens.
        mask: bool, sampled tokens that have a teacher.
        old_log_probs: the student's at the weights the step began with, nats; 0 where ``mask`` is off.
        teacher_log_probs: the teacher's, nats; 0 where ``mask`` is off.
        gap: centred and clamped as ``sdar.loss.centre`` and ``clamp`` say, nats; 0 where ``mask`` is off.
        gate: g_t of the chosen gate; 0 where ``mask`` is off.
        episode_ids: (rows,), which rollout; unique over the step.
        group_ids: (rows,), which task (verl's uid).
        turns: (rows,), 0-based index of the row's first turn in its episode.
        scores: (rows,), return of the row's episode.
    """

    advantages: torch.Tensor
    response_mask: torch.Tensor
    mask: torch.Tensor
    old_log_probs: torch.Tensor
    teacher_log_probs: torch.Tensor
    gap: torch.Tensor
    gate: torch.Tensor
    episode_ids: Sequence[Hashable]
    group_ids: Sequence[Hashable]
    turns: Sequence[int]
    scores: torch.Tensor


_SIGNALS: Registry[Signal] = Registry("signal", ("strength",))


def register_signal(name: str, *, reads: Reads = ("gap", "gate")) -> Callable[[Signal], Signal]:
    """Decorator: make a signal selectable as ``name``. Raises ValueError when the name is taken.

    Args:
        name: what ``sdar.loss.signal`` is set to.
        reads: what it looks at, of ``gap``, ``gate`` and ``loss`` (the auxiliary loss with its objective and
            divisor), or a function of its options that says so. Options that shape anything else are errors.
    """
    return _SIGNALS.register(name, reads=reads)


def get_signal(name: str) -> Signal:
    """The signal called ``name``. Raises ValueError that lists the known names."""
    return _SIGNALS.get(name)


def list_signals() -> list[str]:
    """Names of all signals, sorted."""
    return _SIGNALS.names()


def signal_reads(name: str, what: str, options: Mapping[str, Any]) -> bool:
    """Whether the signal, with these options, looks at ``gap``, ``gate`` or ``loss``."""
    reads = _SIGNALS.fact(name, "reads", ("gap", "gate"))
    return what in (reads(options) if callable(reads) else reads)


def check_signal(name: str, strength: float, options: dict[str, Any]) -> None:
    """Raise ValueError for an option the signal does not take, one that is missing, or a value that it refuses."""
    _SIGNALS.check_options(name, options)
    token = torch.zeros(1, 1)
    on = torch.ones(1, 1, dtype=torch.bool)
    rows = SignalRows(token, on, on, token, token, token, token, ["e"], ["g"], [0], torch.zeros(1))
    get_signal(name)(rows, strength=strength, **options)
