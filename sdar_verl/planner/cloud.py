"""What a run costs on rented machines: on demand, on spot with what interruptions lose, and how often to save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdar_verl.planner.hardware import Efficiency, find_gpu
from sdar_verl.planner.layout import Layout
from sdar_verl.planner.plan import Plan, changed, make_plan
from sdar_verl.planner.prices import Node, Rate

MOST_NODES = 4
WEEKEND_H = 63.0
"""Friday 18:00 to Monday 9:00."""
NOTICE_S = 120.0
"""Amazon's, before it takes a spot machine away."""
_OWN_TEACHER = ("ema", "snapshot")


@dataclass(frozen=True)
class Assumptions:
    """What no recipe says; each is printed with the plan.

    Attributes:
        interruption_h: hours between two interruptions of a spot machine, on average.
        restart_s: from an interruption to the first step again: a machine is found, booted, filled.
        disk: bytes a second that a node writes a checkpoint with, while training waits.
        upload: bytes a second that a node copies it to the mirror with, in the background.
        kept: checkpoints in the mirror.
        months: how long they stay there.
    """

    interruption_h: float = 4.0
    restart_s: float = 900.0
    disk: float = 1e9
    upload: float = 3e8
    kept: int = 2
    months: float = 1.0


@dataclass(frozen=True)
class Saving:
    """How often to save, and what interruptions do then.

    Attributes:
        save_s: seconds that training waits for a save.
        upload_s: seconds until the checkpoint counts, after that.
        every: steps between saves.
        lost_s: seconds of work that an interruption loses, on average: since the last save that counts.
        stretch: expected time of the run over the time without interruptions or saves.
        interruptions: expected number in the run.
    """

    save_s: float
    upload_s: float
    every: int
    lost_s: float
    stretch: float
    interruptions: float


@dataclass(frozen=True)
class Offer:
    """A recipe on machines of one kind.

    Attributes:
        node: the machine.
        nodes: how many, for training, for a rollout and for a teacher of their own.
        plan: memory and time on them.
        overrides: what the recipe has to say otherwise.
        checkpoint: bytes of one.
        saving: on spot.
    """

    node: Node
    nodes: int
    plan: Plan
    overrides: list[str]
    checkpoint: float
    saving: Saving

    @property
    def hours(self) -> float:
        """Of steps and validations."""
        return self.plan.hours

    @property
    def on_demand(self) -> float:
        """USD of the run when nothing happens."""
        return self.hours * self.node.on_demand * self.nodes

    @property
    def spot(self) -> tuple[float, float] | None:
        """USD of the run on spot machines, at the lowest and the highest price; None where there are none."""
        if self.node.spot_low is None or self.node.spot_high is None:
            return None
        hours = self.hours * self.saving.stretch * self.nodes
        return hours * self.node.spot_low, hours * self.node.spot_high

    @property
    def weekend(self) -> float:
        """USD of a weekend in which nobody looks."""
        return WEEKEND_H * self.node.on_demand * self.nodes

    @property
    def step_fits_notice(self) -> bool:
        """Whether a step, its save and its upload end within a spot notice."""
        return self.plan.step + self.saving.save_s + self.saving.upload_s <= NOTICE_S


def checkpoint_bytes(layout: Layout) -> float:
    """Bytes of a checkpoint: weights and Adam's moments in float32, and the teacher's own copy where it has one."""
    weights = float(layout.architecture.parameters)
    moments = weights if layout.lora_rank == 0 else 0.0  # an adapter's are a few per cent of it
    return 4 * weights + 8 * moments + (4 * weights if layout.teacher in _OWN_TEACHER else 0.0)


def saving(
    step_s: float, steps: int, hours: float, size: float, nodes: int, given: Assumptions, *, writers: int | None = None
) -> Saving:
    """Of ``nodes``, of which ``writers`` hold a part of the checkpoint (None: all of them).

    Young's interval, sqrt(2 x save time x time between interruptions), in whole steps; at least one upload long.

    The expected time is Daly's (2006) for interruptions at random times. What counts as saved is what is in the mirror,
    so an interruption also loses the time that an upload takes.
    """
    between = 3600 * given.interruption_h / nodes  # any of them ends the run
    writers = writers or nodes
    save_s, upload_s = size / writers / given.disk, size / writers / given.upload
    every = max(1, round(math.sqrt(2 * save_s * between) / step_s), math.ceil(upload_s / step_s))
    every = min(every, max(steps, 1))
    interval = every * step_s
    segment = (interval + save_s) / between
    again = math.exp(min((given.restart_s + upload_s) / between, 50.0))
    stretch = again * between * math.expm1(min(segment, 50.0)) / interval
    lost = interval / 2 + save_s + upload_s
    return Saving(save_s, upload_s, every, lost, stretch, 3600 * hours * stretch / between)


def offers(
    wished: Layout, listed: Sequence[Node], given: Assumptions, efficiency: Efficiency | None = None
) -> list[Offer]:
    """The machines on which the recipe fits, each on as few as it needs, cheapest first.

    A rollout and a teacher on devices of their own have as many as the recipe says; the other cards train.
    """
    found, apart = [], wished.gpus_apart
    for node in listed:
        first = apart // node.cards + 1
        for number in range(first, first + MOST_NODES):
            training = node.cards * number - apart
            writers = -(-training // node.cards)
            plan = make_plan(wished.with_gpus(training), find_gpu(node.gpu), efficiency)
            if training % writers or not plan.fits:  # verl's trainer has as many cards on each machine
                continue
            size = checkpoint_bytes(plan.layout)
            found.append(
                Offer(
                    node,
                    number,
                    plan,
                    changed(wished, plan.layout, node.cards),
                    size,
                    saving(plan.step, plan.layout.steps, plan.hours, size, number, given, writers=writers),
                )
            )
            break
    return sorted(found, key=lambda offer: offer.on_demand)


def storage_usd(offer: Offer, given: Assumptions, rates: dict[str, Rate]) -> dict[str, float]:
    """USD for keeping checkpoints, for the node's disk, and for taking one home."""
    gigabytes = offer.checkpoint / 1e9
    hours_of_month = offer.hours * offer.saving.stretch / 730
    return {
        "object storage": gigabytes * given.kept * given.months * rates["object storage"].usd,
        "disk": gigabytes * 3 * hours_of_month * rates["disk"].usd,
        "egress": gigabytes * rates["egress"].usd,
    }
