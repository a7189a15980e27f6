"""Asking a run to end in order after its step: a file in its folder, and in its mirror."""

from __future__ import annotations

from collections.abc import Sequence

from sdar_verl.cloud.store import Store, StoreError

FILE = "stop.json"


def ask(stores: Sequence[Store], reason: str, attempt: str | None = None) -> None:
    """Leave the wish.

    Args:
        stores: the run's folder, its mirror, or both.
        reason: for the log and the ledger.
        attempt: whom it is for. None: whoever runs, or starts next; somebody asked for it by hand.

    Raises:
        StoreError: none of them could be written.
    """
    faults = []
    for store in stores:
        try:
            store.write_json(FILE, {"reason": reason, "attempt": attempt})
        except StoreError as error:
            faults.append(error)
    if len(faults) == len(stores):
        raise faults[0]


def asked(store: Store, attempt: str | None = None) -> str | None:
    """The reason, if an end was asked for, of ``attempt`` or by hand.

    Raises:
        StoreError: the store cannot be read.
    """
    wish = store.read_json(FILE)
    if wish is None or wish.get("attempt") not in (None, attempt):
        return None
    return str(wish.get("reason", "asked to stop"))


def forget(stores: Sequence[Store]) -> None:
    """The wish is fulfilled."""
    for store in stores:
        store.delete(FILE)
