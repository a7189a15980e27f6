"""What the driver does for a run on rented machines: it answers SIGTERM, and tells a guard where the run lies.

The driver is the process of ``python -m verl.trainer.main_ppo``. It waits for the trainer, which is an actor of Ray's.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from sdar_verl.atomic import write_text_atomically
from sdar_verl.cloud import ledger, stop
from sdar_verl.cloud.store import Store
from sdar_verl.config import load_config
from sdar_verl.errors import SdarError

if TYPE_CHECKING:
    import psutil

GUARD = "SDAR_GUARD"
"""Environment variable: the file in which the driver leaves, for a guard around it, where the run lies."""
GUARD_PROCESS = "SDAR_GUARD_PROCESS"
"""Environment variable: the guard's process id. A run whose guard was killed ends in order: nobody watches it."""
GUARD_EVERY_S = 5.0


def places(config: DictConfig) -> list[Store]:
    """The run's folder, and its mirror where it has one."""
    folder = Path(str(config.trainer.default_local_dir)).expanduser().absolute()
    mirror = config.sdar.cloud.mirror
    return [Store(folder), *([Store(mirror)] if mirror else [])]


def before_ray(config: DictConfig) -> str | None:
    """Tell the guard, if there is one, and answer SIGTERM from now on.

    Returns:
        Why the run is not to start at all: somebody asked it to stop while it was down. That fulfils the wish.
    """
    stores = places(config)
    for store in stores:
        wish = stop.asked(store)
        if wish is not None:
            stop.forget(stores, wish)
            return wish.reason
    known = [name for store in stores for name in [ledger.newest(store)] if name is not None]
    step_s = planned_step_s(config, _card()) if os.environ.get(GUARD) else None
    tell_guard(stores, known, int(config.trainer.nnodes), int(config.trainer.n_gpus_per_node), step_s)
    answer_sigterm(lambda: _stop(stores, known))
    return None


def tell_guard(stores: list[Store], known: list[str], nodes: int, cards: int, step_s: float | None = None) -> None:
    """Leave word for the guard, if there is one.

    Args:
        stores: where the run lies.
        known: attempts that were before this one.
        nodes, cards: nodes, and cards on each.
        step_s: seconds that a step will take by the planner; None: unknown.
    """
    note = os.environ.get(GUARD)
    if note:
        facts = {"places": [store.place for store in stores], "nodes": nodes, "cards": nodes * cards, "before": known}
        write_text_atomically(Path(note), json.dumps(facts | {"step_s": step_s}))


def planned_step_s(config: DictConfig, card: str | None) -> float | None:
    """Seconds of a step by the planner; None for a card or a model that it does not know.

    Args:
        config: verl's.
        card: what its driver calls the card.
    """
    from sdar_verl.planner.hardware import recognised
    from sdar_verl.planner.layout import Layout
    from sdar_verl.planner.timing import step_seconds

    gpu = recognised(card) if card else None
    if gpu is None:
        return None
    try:
        return sum(step_seconds(Layout.from_config(config, load_config(config.sdar)), gpu).values())
    except SdarError:
        return None  # the run's own checks tell what is wrong, if something is


def _card() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def opened(stores: list[Store], before: list[str]) -> str | None:
    """The attempt that has been opened since ``before`` was the list of known ones; None when none has."""
    for store in stores:
        found = ledger.newest(store)
        if found is not None and all(ledger.later(found, name) for name in before):
            return found
    return None


def _stop(stores: list[Store], before: list[str]) -> bool:
    attempt = opened(stores, before)
    if attempt is None:
        return False
    print("sdar: SIGTERM: stopping after the step under way (again: at once)", flush=True)
    stop.ask(stores, stop.Wish("SIGTERM", attempt, again=True))
    return True


def answer_sigterm(act: Callable[[], bool]) -> None:
    """Call ``act`` at the first SIGTERM; at the next, or when it returns False, what Ray would have done.

    Ray sets a handler of its own whenever it starts, so ours is set after that: a thread waits for Ray and then wakes
    the main thread, which alone may set handlers, by a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def install(*_: Any) -> None:
        theirs = signal.getsignal(signal.SIGTERM)

        def handle(number: int, frame: Any) -> None:
            signal.signal(signal.SIGTERM, theirs)
            if not act() and callable(theirs):
                theirs(number, frame)

        signal.signal(signal.SIGTERM, handle)

    signal.signal(signal.SIGUSR2, install)
    threading.Thread(target=_wake, args=(_guard(),), name="sdar-sigterm", daemon=True).start()


def _guard() -> psutil.Process | None:
    if GUARD_PROCESS not in os.environ:
        return None
    import psutil  # the guard's, too; a run without one needs no such package

    try:
        return psutil.Process(int(os.environ[GUARD_PROCESS]))
    except (ValueError, psutil.NoSuchProcess):
        return None


def _wake(guard: psutil.Process | None) -> None:
    """Signals to this process: once Ray is there, and once its guard no longer is."""
    import ray

    while not ray.is_initialized():
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGUSR2)
    if guard is not None:
        while guard.is_running():
            time.sleep(GUARD_EVERY_S)
        print("sdar: the guard around this run is gone", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
