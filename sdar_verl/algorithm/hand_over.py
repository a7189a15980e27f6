"""Schedules that hand over from the teacher to the reward, by what the step measures of the gap and of success."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdar_verl.algorithm.schedules import GAP_MEAN, GAP_SIZE, SUCCESS, Schedule, register_schedule


@register_schedule("hand_off")
@dataclass
class HandOff(Schedule):
    """TIDE's hand-over (arXiv:2609.35058): from the teacher to the reward while the gap has nearly stopped shrinking.

        G_n  = mean over the step's turns of the mean of abs(Delta_t) on the turn       (``sdar/gap_size``)
        m_n  = momentum * m_(n-1) + (1 - momentum) * G_n,       m_1 = G_1
        I_n  = (m_(n-window+1) - m_n) / m_(n-window+1)
        r    = min(r + pace, 1) at every step with 0 < I_n <= slow;  0 at the start
        factor = floor + (1 - floor) (1 - r),      or with ``rising``  floor + (1 - floor) r

    ``coef_schedule`` takes it as it is, ``rl_schedule`` with ``rising``: each keeps its own m and r, from the same
    numbers. A gap that grows (I <= 0) or still shrinks fast hands nothing over, and what was handed over stays so.
    """

    rising: bool = False
    window: int = 10
    momentum: float = 0.9
    slow: float = 0.02
    pace: float = 0.02
    floor: float = 0.1
    measures = (GAP_SIZE,)

    def __post_init__(self) -> None:
        for name in ("momentum", "floor"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"hand_off has {name}={getattr(self, name)}; it must lie in [0, 1)")
        for name in ("slow", "pace"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"hand_off has {name}={getattr(self, name)}; it must be above 0")
        if self.window < 2:
            raise ValueError(f"hand_off has window={self.window}; it must be at least 2")
        self._means: list[float] = []
        self._handed = 0.0

    def factor(self, step: int) -> float:
        """See the class."""
        return self.floor + (1.0 - self.floor) * (self._handed if self.rising else 1.0 - self._handed)

    def observe(self, value: float, *measured: float) -> None:
        """One step's gap; one that is no number is none."""
        (size,) = measured
        if not math.isfinite(size):
            return
        mean = self.momentum * self._means[-1] + (1.0 - self.momentum) * size if self._means else size
        self._means = [*self._means, mean][-self.window :]
        shrunk = (self._means[0] - mean) / max(self._means[0], 1e-12)
        if len(self._means) == self.window and 0.0 < shrunk <= self.slow:
            self._handed = min(self._handed + self.pace, 1.0)

    @property
    def state(self) -> dict[str, Any]:
        """The last means, and what was handed over."""
        return {"means": self._means, "handed": self._handed}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._means, self._handed = [float(mean) for mean in state["means"]], float(state["handed"])


@register_schedule("retire")
@dataclass
class Retire(Schedule):
    """RetireOPD's end of the teacher (arXiv:2609.20784): 1, and 0 for good once it has nothing more to give.

    Steps are taken in windows of ``every``. At the end of a window, from the second on, the teacher retires when

        distance of this window - distance of the one before >= 0         it has stopped shrinking, and
        success over both windows >= share * teacher_success              the student is near its teacher

    distance: the mean of log pi_theta - log pi_T over the sampled tokens (minus ``sdar/gap_mean``), the sampled reverse
    KL that its loss minimises; success: of the training episodes. ``teacher_success`` is the teacher's own, 0 to 1.
    There is no code of the paper's: how it normalises its gap is our reading (docs/fidelity.md).
    """

    teacher_success: float
    share: float = 0.9
    every: int = 5
    measures = (GAP_MEAN, SUCCESS)

    def __post_init__(self) -> None:
        if not 0.0 < self.teacher_success <= 1.0:
            raise ValueError(f"retire has teacher_success={self.teacher_success}; it must lie in (0, 1]")
        if not self.share > 0.0:
            raise ValueError(f"retire has share={self.share}; it must be above 0")
        if self.every < 1:
            raise ValueError(f"retire has every={self.every}; it must be at least 1")
        self._seen: list[tuple[float, float]] = []
        self._before: tuple[float, float] | None = None
        self._retired = False

    def factor(self, step: int) -> float:
        """See the class."""
        return 0.0 if self._retired else 1.0

    def ended(self, step: int) -> bool:
        """Once it has retired."""
        return self._retired

    def observe(self, value: float, *measured: float) -> None:
        """One step: mean gap and success; a step without a gap (no row had a teacher) is none."""
        gap, success = measured
        if self._retired or not (math.isfinite(gap) and math.isfinite(success)):
            return
        self._seen.append((-gap, success))
        if len(self._seen) < self.every:
            return
        distance, won = (sum(values) / self.every for values in zip(*self._seen, strict=True))
        if self._before is not None:
            near = (won + self._before[1]) / 2 >= self.share * self.teacher_success
            self._retired = distance >= self._before[0] and near
        self._seen, self._before = [], (distance, won)

    @property
    def state(self) -> dict[str, Any]:
        """The window under way, the one before, and whether it is over."""
        seen = [list(pair) for pair in self._seen]
        return {"seen": seen, "before": self._before and list(self._before), "retired": self._retired}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        before = state["before"]
        self._seen = [(float(distance), float(won)) for distance, won in state["seen"]]
        self._before = None if before is None else (float(before[0]), float(before[1]))
        self._retired = bool(state["retired"])
