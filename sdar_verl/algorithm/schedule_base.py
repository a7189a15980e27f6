"""What a schedule is, the table of schedules, and a value under one; the schedules themselves:
:mod:`sdar_verl.algorithm.schedules`."""

from __future__ import annotations

import inspect
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
        """After a step: ``value`` was used and the metrics ``measures`` came out as ``measured``; not called when one
        of them was not measured."""

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
        TypeError: it is another class, or a function; or ``name`` is no text.
    """
    put = _SCHEDULES.register(name)

    def enter(schedule: type) -> type:
        if not (isinstance(schedule, type) and issubclass(schedule, Schedule)):
            raise TypeError(
                f"schedule {name!r} is {schedule!r}; it must be a subclass of "
                "sdar_verl.algorithm.schedules.Schedule, whose method factor(step) gives the factor, and whose fields "
                "are its options"
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
        if step < self.start_step or (self.stop_step is not None and step >= self.stop_step):
            return 0.0
        inside = step - self.start_step + 1
        rise = min(1.0, inside / self.warmup_steps) if self.warmup_steps else 1.0
        return self.base * rise * self.schedule.factor(inside)

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
    factory = get_schedule(name)
    parameters = inspect.signature(factory).parameters
    unknown = sorted(options.keys() - parameters.keys())
    if unknown:
        raise ValueError(
            f"schedule {name!r} has no option {', '.join(map(repr, unknown))}; known: {', '.join(parameters) or 'none'}"
        )
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise ValueError(f"schedule {name!r} needs the option {', '.join(map(repr, missing))}")
    return factory(**options)
