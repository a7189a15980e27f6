"""Asking a run to end in order after its step: a file in its folder, and in its mirror."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sdar_verl.cloud.store import DamagedError, Store, StoreError

FILE = "stop.json"


@dataclass(frozen=True)
class Wish:
    """That a run shall end.

    Attributes:
        reason: for the log and the ledger.
        attempt: whom it is for. None: whoever runs, or starts next; somebody asked for it by hand.
        again: the run is to go on elsewhere: its machine goes away.
    """

    reason: str
    attempt: str | None = None
    again: bool = False


def ask(stores: Sequence[Store], wish: Wish) -> None:
    """Leave the wish; one by hand, which the next start answers too, stays.

    Args:
        stores: the run's folder, its mirror, or both.
        wish: the wish.

    Raises:
        StoreError: none of them could be written.
    """
    faults = []
    for store in stores:
        try:
            if wish.attempt is None or asked(store) is None:
                store.write_json(FILE, asdict(wish))
        except StoreError as error:
            faults.append(error)
    if len(faults) == len(stores):
        raise faults[0]


def asked(store: Store, attempt: str | None = None) -> Wish | None:
    """The wish, if an end was asked for, of ``attempt`` or by hand; a file of that name says it whatever it holds.

    Raises:
        StoreError: the store cannot be read.
    """
    try:
        found = store.read_json(FILE)
    except DamagedError:
        found = {}
    if found is None or found.get("attempt") not in (None, attempt):
        return None
    return Wish(str(found.get("reason", f"there is a {FILE}")), found.get("attempt"), found.get("again") is True)


def forget(stores: Sequence[Store], wish: Wish) -> None:
    """The wish is fulfilled; one by hand that came beside one for an attempt is not yet."""
    for store in stores:
        if wish.attempt is None or asked(store) is None:
            store.delete(FILE)
