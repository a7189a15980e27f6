"""Schedules: how lambda (the strength of the signal) and beta (the sharpness of the gate) change over the steps.

    value(step) = base * window(step) * warm-up(step) * factor(step')

``window`` is 1 from ``start_step`` up to, but without, ``stop_step``, and 0 outside; steps count from 1, as verl's.
Inside it step' counts on from the window's start (step' = step for a window that starts at 1), and the warm-up rises
linearly, min(1, step' / warmup_steps). The factor is the schedule's own::

    @register_schedule("halving")
    @dataclass
    class Halving(Schedule):
        '''factor(n) = 2^-(n / every).'''

        every: int

        def factor(self, step):
            return 0.5 ** (step / self.every)

The fields of a schedule are its options, set in ``sdar.loss.coef_schedule.options``. One that follows measured
quantities names them in ``measures``, overrides ``observe`` and keeps what it learned in ``state``, which goes into the
checkpoint. One whose factor is 0 from some step on for good says so in ``ended``: the teacher's pass then ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdar_verl.algorithm import hand_over  # noqa: F401  registers its own
from sdar_verl.algorithm.schedule_base import (
    _SCHEDULES,
    GAP_MEAN,
    GAP_SIZE,
    GRAD_SHARE,
    GRAD_SHARE_WEIGHTS,
    SUCCESS,
    Schedule,
    Scheduled,
    get_schedule,
    list_schedules,
    make_schedule,
    measures_of,
    register_schedule,
)

__all__ = [
    "GAP_MEAN",
    "GAP_SIZE",
    "GRAD_SHARE",
    "GRAD_SHARE_WEIGHTS",
    "SUCCESS",
    "_SCHEDULES",
    "Schedule",
    "Scheduled",
    "get_schedule",
    "list_schedules",
    "make_schedule",
    "measures_of",
    "register_schedule",
]


@register_schedule("linear_decay")
@dataclass
class LinearDecay(Schedule):
    """factor(n) = 1 - (1 - final) * min(n / steps, 1). With final 0 and 100 steps: what the released RLSD does."""

    steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_decay(self.steps, self.final)

    def factor(self, step: int) -> float:
        """See the class."""
        return 1.0 - (1.0 - self.final) * min(step / self.steps, 1.0)

    def ended(self, step: int) -> bool:
        """At the end of a decay to 0."""
        return self.final == 0.0 and step >= self.steps


@register_schedule("cosine_decay")
@dataclass
class CosineDecay(Schedule):
    """factor(n) = final + (1 - final) * (1 + cos(pi * min(n / steps, 1))) / 2."""

    steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_decay(self.steps, self.final)

    def factor(self, step: int) -> float:
        """See the class."""
        wave = (1.0 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2.0
        return self.final + (1.0 - self.final) * wave

    def ended(self, step: int) -> bool:
        """At the end of a decay to 0."""
        return self.final == 0.0 and step >= self.steps


@register_schedule("grad_share")
@dataclass
class GradShare(Schedule):
    """Lambda that keeps the distillation gradient at a chosen share of the policy gradient.

        share_n  = |lambda_n grad L_SDAR| / |grad L_RL|       measured at step n
        target   = lambda_n * share / share_n
        log lambda_(n+1) = smoothing * log lambda_n + (1 - smoothing) * log target

    The gradients are those in the log-probs of the sampled tokens (``of="tokens"``, :data:`GRAD_SHARE`, every step, for
    objectives on sampled tokens) or in the weights (``of="weights"``, :data:`GRAD_SHARE_WEIGHTS`). Starts at the base
    value and stays within a factor ``bound`` of it, both ways. A step without a policy gradient (no group with
    variance), without a distillation gradient or without a measurement changes nothing.
    """

    share: float
    of: str = "tokens"
    smoothing: float = 0.9
    bound: float = 100.0

    def __post_init__(self) -> None:
        if self.of not in ("tokens", "weights"):
            raise ValueError(f"grad_share has of={self.of!r}; known: tokens, weights")
        self.measures = GRAD_SHARE if self.of == "tokens" else GRAD_SHARE_WEIGHTS
        if not self.share > 0.0:
            raise ValueError(f"grad_share has share={self.share}; it must be above 0")
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"grad_share has smoothing={self.smoothing}; it must lie in [0, 1)")
        if not self.bound >= 1.0:
            raise ValueError(f"grad_share has bound={self.bound}; it must be at least 1")
        self._log_factor = 0.0

    def factor(self, step: int) -> float:
        """The factor learned so far."""
        return math.exp(self._log_factor)

    def observe(self, value: float, *measurements: float) -> None:
        """One measurement; see the class."""
        (measured,) = measurements
        if value > 0.0 and math.isfinite(measured) and measured > 0.0:
            moved = self._log_factor + (1.0 - self.smoothing) * math.log(self.share / measured)
            limit = math.log(self.bound)
            self._log_factor = min(max(moved, -limit), limit)

    @property
    def state(self) -> dict[str, Any]:
        """The logarithm of the factor."""
        return {"log_factor": self._log_factor}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._log_factor = float(state["log_factor"])


def _check_decay(steps: int, final: float) -> None:
    if not steps >= 1:
        raise ValueError(f"a decay has steps={steps}; it must be at least 1")
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"a decay has final={final}; it is the share left at the end, in [0, 1]")
