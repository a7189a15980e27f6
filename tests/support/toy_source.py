"""A source of the teacher's weights from somebody else's module."""

from __future__ import annotations

from sdar_verl.teacher.sources import Snapshot, register_source


@register_source("toy_every_odd_step")
class EveryOddStep(Snapshot):
    """A copy of the actor, made after steps 1, 3, 5, ..."""

    def updated(self, step: int) -> None:
        if step % 2 == 1:
            self.weights.blend(0.0)
