"""Whether the processes of a run still live; a dead one ends the run in bounded time, with its name.

verl hands prompts to its agent-loop workers and then polls a queue for what they write. A worker that was killed writes
nothing, and the poll would go on for ever; a queue that was killed does not even answer the poll. A thread asks every
process in turn. What it finds out reaches the trainer at its next look into the queue, or through Ray's own error where
the trainer waits for the process itself; a trainer that neither reaches is ended from outside.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import transfer_queue.interface
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from sdar_verl.errors import ConfigError, ProcessDiedError

EVERY_S = 5.0
"""Seconds between two rounds of questions."""
ANSWER_S = 10.0
"""Seconds that processes have to answer when an error has already happened."""
GRACE_S = 60.0
"""Seconds that the trainer has to end by itself when a process is dead."""
PRINTED_S = 3.0
"""Seconds until Ray has carried a last line to the driver."""


class Liveness:
    """Asks every process whether it lives; a busy one answers later, a dead one makes Ray raise.

    Args:
        processes: gives name -> Ray actor of the processes that there are at the moment.
        every_s: seconds between two rounds of questions.
        grace_s: seconds from a death to the end of this process, if it does not end by itself.
    """

    def __init__(self, processes: Callable[[], Mapping[str, Any]], every_s: float = EVERY_S, grace_s: float = GRACE_S):
        self._processes = processes
        self._every_s = every_s
        self._grace_s = grace_s
        self._asked: dict[str, Any] = {}
        self._asking = threading.Lock()
        self._over = threading.Event()
        self._death: ProcessDiedError | None = None

    def check(self) -> None:
        """Raise what the thread has found out; costs nothing.

        Raises:
            ProcessDiedError: a process is dead; names it and gives Ray's reason.
        """
        if self._death is not None:
            raise self._death

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The thread runs within the context. An error there becomes :class:`ProcessDiedError` if a process is dead."""
        threading.Thread(target=self._watch, name="sdar-liveness", daemon=True).start()
        try:
            yield
        except ProcessDiedError:
            raise  # and the thread goes on: what verl closes now may wait for the dead, too
        except Exception as error:
            death = self._death or self._look(ANSWER_S)
            if death is not None and death is not error:
                raise death from error
            self._over.set()
            raise
        else:
            self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            death = self._death or self._look(0.0)
            if death is not None:
                self._death = death
                break
        else:
            return
        if not self._over.wait(self._grace_s):
            print(f"{self._death}\n(the trainer did not end in {self._grace_s:g} s)", file=sys.stderr, flush=True)
            time.sleep(PRINTED_S)
            os._exit(1)

    def _look(self, timeout_s: float) -> ProcessDiedError | None:
        """Ask all who have answered the last question, and read what answers there are within ``timeout_s``."""
        with self._asking:
            for name, actor in self._processes().items():
                if name not in self._asked:
                    self._asked[name] = actor.__ray_ready__.remote()
            names = {answer: name for name, answer in self._asked.items()}
            answers, _ = ray.wait(list(names), num_returns=len(names), timeout=timeout_s) if names else ([], [])
            for answer in answers:
                name = names[answer]
                del self._asked[name]
                try:
                    ray.get(answer)
                except ActorUnavailableError:
                    continue  # a lost connection, say; asked again in the next round
                except (RayActorError, OutOfMemoryError) as error:
                    return _died(name, error)
        return None


def run_processes(trainer: Any) -> dict[str, Any]:
    """Name -> Ray actor of the processes without which a step cannot end.

    Args:
        trainer: verl's trainer, in :meth:`fit`. What every run has is asked for by name, so that a verl that calls it
            otherwise is an error, and not a watch that watches nothing.
    """
    found: dict[str, Any] = {}
    for number, worker in enumerate(trainer.agent_loop_manager.agent_loop_workers):
        found[f"agent-loop worker {number}"] = worker
    standalone = getattr(trainer, "standalone_server_manager", None)  # of the separate trainer alone
    managers = [trainer.llm_server_manager, *([standalone] if standalone is not None else [])]
    for number, replica in enumerate(replica for manager in managers for replica in manager.rollout_replicas):
        for part, server in enumerate(replica.servers):
            found[f"rollout server {number}" + (f" (part {part})" if part else "")] = server
    for name, group in (
        ("training worker", trainer.actor_rollout_wg),
        ("reference worker", getattr(trainer, "ref_policy_wg", None)),
        ("critic worker", getattr(trainer, "critic_wg", None)),
        ("teacher worker", trainer.teacher.pool if trainer.teacher is not None else None),
    ):
        for number, worker in enumerate(group.workers if group is not None else ()):
            if worker not in found.values():
                found[f"{name} {number}"] = worker
    return found


def queue_processes(storage_units: int) -> dict[str, Any]:
    """Name -> Ray actor of verl's TransferQueue, as far as it runs in actors.

    Args:
        storage_units: how many there may be.
    """
    wanted: list[tuple[str, str, str | None]] = [
        ("TransferQueue's controller", "TransferQueueController", "transfer_queue"),
        *((f"TransferQueue's storage unit {i}", f"TransferQueueStorageUnit#{i}", None) for i in range(storage_units)),
    ]
    found = {}
    for name, actor, namespace in wanted:
        try:
            found[name] = ray.get_actor(actor, namespace=namespace)
        except ValueError:
            continue  # another storage backend
    return found


def check_queue_is_ours(config: DictConfig) -> None:
    """verl's queue has one fixed name in a Ray cluster: a second run there would take and delete the first one's rows.

    Raises:
        ConfigError: another run has it.
    """
    backend = OmegaConf.select(config, "transfer_queue.backend.storage_backend") or "SimpleStorage"
    if backend != "SimpleStorage" or len(queue_processes(1)) == 2:  # its storage is named in the namespace of a run
        return
    transfer_queue.interface._TQ_CONTROLLER = None  # else verl's last act would be to kill the other run's
    raise ConfigError(
        "another run of this Ray cluster has verl's TransferQueue, which is there once in a cluster; wait for its end "
        "(`ray job list`), or start a cluster for each run"
    )


def watched(buffer: Any, liveness: Liveness) -> Any:
    """verl's replay buffer, whose every look into the queue comes with a look at the processes.

    A buffer that is not verl's (``trainer.v1.sampler.custom_sampler`` may name any class) is returned as it is.
    """
    if isinstance(buffer, ReplayBuffer):
        kind = type(buffer)
        buffer.__class__ = type(f"Watched{kind.__name__}", (_Watching, kind), {"liveness": liveness})
    return buffer


class _Watching:
    """In front of a replay buffer's class."""

    liveness: Liveness

    def _sync_metadata_from_transfer_queue(self) -> None:
        # verl's first act in each round of all its waiting loops.
        self.liveness.check()
        super()._sync_metadata_from_transfer_queue()  # type: ignore[misc]


def _died(name: str, error: Exception) -> ProcessDiedError:
    # Ray's words, without its list of log files.
    reason = " ".join(str(error).split("Check python-core-worker")[0].split())
    return ProcessDiedError(
        f"{name} of this run is dead: {reason}\nIts work cannot be had back, so the run ends here. Start it again with "
        "the same command: trainer.resume_mode=auto goes on from the last checkpoint (docs/reliability.md). Ray's logs "
        "on the node of the process say more; a process that was killed without a word mostly ran out of memory."
    )
