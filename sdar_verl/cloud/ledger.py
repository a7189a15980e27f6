"""What every attempt at a run took: one small JSON file each, in the run's folder and in its mirror.

An attempt is one start of the training process. The run itself writes ``attempts/<id>.json``, a guard around it
``attempts/<id>.guard.json``; both are rewritten while it goes on, so that an attempt whose machine was taken away has
its last line, too. Durations are measured by the writer's own clock; nothing compares the clocks of two machines.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdar_verl.cloud.store import DamagedError, Store

FOLDER = "attempts"
_GUARD = ".guard.json"
_ID = re.compile(r"\d{4,}-[0-9a-f]{6}(?=(?:\.guard)?\.json$)")


@dataclass(frozen=True)
class Attempt:
    """One line of the ledger.

    Attributes:
        id: its number in the run, and six random digits.
        started: time of day where it ran, for people.
        nodes, cards: machines, and accelerators in all.
        price: USD an hour for all nodes together; None when nobody said.
        spot: whether the machines could be taken away; None when nobody said.
        first, step, total: the step it went on from, the last one it ended, the one the run is to end at.
        tokens: trained on.
        seconds: from its start to its end, or to its last word.
        slowest: seconds of its slowest step.
        beats: how often the run said that it goes on.
        again: it ended in order because its machine goes away: another start is to go on.
        ended: why; None while it runs, or when it was cut off without a word.
    """

    id: str
    started: str = ""
    nodes: int = 0
    cards: int = 0
    price: float | None = None
    spot: bool | None = None
    first: int = 0
    step: int = 0
    total: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    slowest: float = 0.0
    beats: int = 0
    again: bool = False
    ended: str | None = None

    @property
    def card_hours(self) -> float:
        """Accelerators times hours."""
        return self.cards * self.seconds / 3600

    @property
    def cost(self) -> float | None:
        """USD; None when the price is unknown."""
        return None if self.price is None else self.price * self.seconds / 3600


def open_id(store: Store) -> str:
    """An id after those that ``store`` knows."""
    last = newest(store)
    return f"{_number(last)[0] + 1 if last else 1:04d}-{uuid.uuid4().hex[:6]}"


def write(store: Store, attempt: str, line: dict[str, Any], *, guard: bool = False) -> None:
    """Write what the run, or its guard, knows of an attempt."""
    store.write_json(f"{FOLDER}/{attempt}{_GUARD if guard else '.json'}", line)


def read(store: Store, say: Callable[[str], None] | None = None) -> list[Attempt]:
    """All attempts, in their order.

    Args:
        store: of the run.
        say: is told of a damaged line, which is left out then.

    Raises:
        StoreError: the store cannot be read; a line is damaged, and there is nobody to tell.
    """
    found = []
    for name in _ids(store):
        try:
            found.append(_whole(store, name))
        except DamagedError as error:
            if say is None:
                raise
            say(f"{error}; this attempt is not counted")
    return found


def heard(store: Store, attempt: str) -> Attempt | None:
    """What the run itself says of an attempt; None before it does.

    Raises:
        DamagedError: its line is damaged.
        StoreError: the store cannot be read.
    """
    line = _line(store, f"{attempt}.json")
    return Attempt(attempt, **line) if line else None


def _whole(store: Store, attempt: str) -> Attempt:
    run, guard = (_line(store, f"{attempt}{end}") for end in (".json", _GUARD))
    # The guard sees the whole attempt, and why it ended better than the run does; but it may be killed first.
    line = run | {key: value for key, value in guard.items() if value is not None}
    return Attempt(attempt, **line | {"seconds": max(of.get("seconds", 0.0) for of in (run, guard))})


def _line(store: Store, file: str) -> dict[str, Any]:
    name = f"{FOLDER}/{file}"
    line = store.read_json(name) or {}
    known = {key: value for key, value in line.items() if key in Attempt.__dataclass_fields__ and key != "id"}
    if not all(_sound(key, value) for key, value in known.items()):
        raise DamagedError(f"{store.place}/{name} is damaged: {known}")
    return known


def merge(*ledgers: Sequence[Attempt]) -> list[Attempt]:
    """Of each attempt, what was written last, in their order."""
    found: dict[str, Attempt] = {}
    for attempt in (attempt for ledger in ledgers for attempt in ledger):
        if attempt.id not in found or attempt.seconds > found[attempt.id].seconds:
            found[attempt.id] = attempt
    return sorted(found.values(), key=lambda attempt: _number(attempt.id))


def newest(store: Store) -> str | None:
    """Id of the attempt that was opened last; of two that opened together, the one that counts."""
    return next(reversed(_ids(store)), None)


def later(attempt: str, other: str) -> bool:
    """Whether ``attempt`` was opened after ``other``."""
    return _number(attempt) > _number(other)


def copy(source: Store, target: Store) -> None:
    """Copy the lines that ``target`` does not have."""
    for name in source.names(FOLDER).keys() - target.names(FOLDER).keys():
        content = source.read(name)
        if content is not None:
            target.write(name, content)


@dataclass(frozen=True)
class Total:
    """What all attempts took.

    Attributes:
        attempts: how many.
        card_hours: accelerators times hours.
        cost: USD of the attempts whose price is known; None when none is.
        unpriced: how many have no known price.
        redone: share of the steps that were trained more than once.
    """

    attempts: int
    card_hours: float
    cost: float | None
    unpriced: int
    redone: float


def total(attempts: Sequence[Attempt]) -> Total:
    """Sums over a ledger."""
    costs = [attempt.cost for attempt in attempts if attempt.cost is not None]
    trained = sum(max(attempt.step - attempt.first, 0) for attempt in attempts)
    reached = max((attempt.step for attempt in attempts), default=0)
    return Total(
        len(attempts),
        sum(attempt.card_hours for attempt in attempts),
        sum(costs) if costs else None,
        len(attempts) - len(costs),
        max(trained - reached, 0) / trained if trained else 0.0,
    )


def _ids(store: Store) -> list[str]:
    return sorted({match[0] for name in store.names(FOLDER) if (match := _ID.search(name))}, key=_number)


def _number(attempt: str) -> tuple[int, str]:
    number, _, rest = attempt.partition("-")
    return int(number), rest


_TEXTS = ("started", "ended")


def _sound(key: str, value: Any) -> bool:
    if value is None:
        return key in ("price", "spot", "ended")
    if key in _TEXTS:
        return isinstance(value, str)
    if key in ("spot", "again"):
        return isinstance(value, bool)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e15
