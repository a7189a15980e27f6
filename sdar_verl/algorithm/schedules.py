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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdar_verl.algorithm.registry import Registry

GRAD_SHARE = "sdar/grad_share"
"""Norm of lambda times the distillation gradient over the norm of the rest's, both in the sampled tokens' log-probs."""

GRAD_SHARE_WEIGHTS = "sdar/grad_share_weights"
"""The same in the weights, measured every ``sdar.loss.measure_every`` steps."""

GAP_SIZE = "sdar/gap_size"
"""Mean of abs(Delta_t) over the tokens of a turn, then over the step's turns, nats; measured where a schedule asks."""

GAP_MEAN = "sdar/gap_mean"
SUCCESS = "sdar/success"


class Schedule:
    """A constant; base class of all schedules.

    Attributes:
        measures: the metrics that :meth:`observe` needs, in this order; one may stand without a tuple around it.
    """

    measures: str | tuple[str, ...] | None = None

    def factor(self, step: int) -> float:
        """What the base value is multiplied by; ``step`` counts from 1 at the start of the window."""
        return 1.0

    def observe(self, value: float, *measured: float) -> None:
        """After a step of the window: ``value`` was used and the metrics ``measures`` came out as ``measured``; not
        called when one of them was not measured."""

    def ended(self, step: int) -> bool:
        """Whether the factor is 0 at ``step`` and will be at every later one."""
        return False

    @property
    def state(self) -> dict[str, Any]:
        """What has been learned from measurements; JSON."""
        return {}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {sorted(state)}")


S = Callable[..., Schedule]
_SCHEDULES: Registry[S] = Registry("schedule")


def register_schedule(name: str) -> Callable[[type], type]:
    """Decorator: make a subclass of :class:`Schedule` selectable as ``name``.

    Raises:
        ValueError: the name is taken.
        TypeError: it is another class, or a function; it learns (``observe``) and has no ``state``; or ``name`` is no
            text.
    """
    put = _SCHEDULES.register(name)

    def enter(schedule: type) -> type:
        if not (isinstance(schedule, type) and issubclass(schedule, Schedule)):
            raise TypeError(
                f"schedule {name!r} is {schedule!r}; it must be a subclass of "
                "sdar_verl.algorithm.schedules.Schedule, whose method factor(step) gives the factor, and whose fields "
                "are its options"
            )
        if schedule.observe is not Schedule.observe and schedule.state is Schedule.state:
            raise TypeError(
                f"schedule {name!r} overrides observe and not the property state: a run that resumes would have lost "
                "what it learned"
            )
        put(schedule)
        return schedule

    return enter


def get_schedule(name: str) -> S:
    """The schedule called ``name``. Raises ValueError that lists the known names."""
    return _SCHEDULES.get(name)


def list_schedules() -> list[str]:
    """Names of all schedules, sorted."""
    return _SCHEDULES.names()


register_schedule("constant")(Schedule)


@dataclass
class Scheduled:
    """A base value, its window and its schedule.

    Args:
        base: lambda, beta or the weight of the policy gradient as configured.
        schedule: its factor.
        start_step: first step with a value other than 0.
        stop_step: first step after the window; None: no end.
        warmup_steps: length of the linear rise.
    """

    base: float
    schedule: Schedule
    start_step: int = 1
    stop_step: int | None = None
    warmup_steps: int = 0

    def value(self, step: int) -> float:
        """The value at ``step`` (from 1)."""
        if not self.within(step):
            return 0.0
        inside = step - self.start_step + 1
        rise = min(1.0, inside / self.warmup_steps) if self.warmup_steps else 1.0
        return self.base * rise * self.schedule.factor(inside)

    def within(self, step: int) -> bool:
        """Whether ``step`` lies in the window."""
        return step >= self.start_step and (self.stop_step is None or step < self.stop_step)

    def learns(self, step: int) -> bool:
        """Whether what is measured at ``step`` is of the value that the schedule gives, and not of one on its rise."""
        return self.within(step) and step - self.start_step + 1 >= self.warmup_steps

    def ended(self, step: int) -> bool:
        """Whether the schedule or its window has taken the value to 0 for good; a base of 0 is no schedule's doing."""
        over = self.stop_step is not None and step >= self.stop_step
        return self.base > 0.0 and (over or self.schedule.ended(step - self.start_step + 1))


def measures_of(schedule: Schedule) -> tuple[str, ...]:
    """The metrics that it follows."""
    named = schedule.measures
    return (named,) if isinstance(named, str) else tuple(named or ())


def make_schedule(name: str, options: Mapping[str, Any]) -> Schedule:
    """Build a schedule.

    Raises:
        ValueError: unknown name, unknown or missing option, or a value that the schedule refuses.
    """
    _SCHEDULES.check_options(name, options)
    return get_schedule(name)(**options)


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
