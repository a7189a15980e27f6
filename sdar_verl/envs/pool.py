"""A pool of environment processes for the episodes of one agent-loop process.

Each process is a Ray actor that hosts several environments and steps them one at a time (game engines are rarely
thread-safe); processes run in parallel. Environments that declare themselves thread-safe, since they wait for a server
most of the time, are stepped in a thread per episode instead. Episodes advance on their own: no lock-step, a finished
one costs nothing more. A process that dies or hangs takes its own episodes with it and is replaced; the others do not
notice.

The pool belongs to the process and event loop that use it, and its actors end with that process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sdar_verl.envs.base import Step, Task
from sdar_verl.envs.host import EnvHost, EnvRaised, Started, Timed
from sdar_verl.errors import SdarError

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
"""Processes that may die in a row while they start; then the environment itself is taken to be at fault."""

_THREADS = "threads"
"""Ray's concurrency group for thread-safe environments. All other calls run in the actor's main thread."""


class EnvProcessError(SdarError):
    """The process of this episode died or hung, or its environment raised in a step: the episode is lost.

    A new reset, of the same session or another, runs on a fresh process.
    """


class EnvError(SdarError):
    """The environment cannot be made, refuses the task, or answers with what is no Step; trying again does not help."""


@dataclass
class PoolStats:
    """Counters since the pool was made.

    Attributes:
        resets: resets that succeeded.
        steps: steps that succeeded.
        reset_seconds: seconds that environments spent in them.
        step_seconds: same for steps.
        wait_seconds: seconds that sessions waited for a free slot.
        restarts: processes replaced after a failure.
        timeouts: resets and steps that ran past their limit.
        failures: episodes lost (:class:`EnvProcessError`).
    """

    resets: int = 0
    steps: int = 0
    reset_seconds: float = 0.0
    step_seconds: float = 0.0
    wait_seconds: float = 0.0
    restarts: int = 0
    timeouts: int = 0
    failures: int = 0

    def as_dict(self) -> dict[str, float]:
        """All counters, and ``seconds_per_step``, ``seconds_per_reset`` (0 before the first)."""
        return {
            **asdict(self),
            "seconds_per_step": self.step_seconds / max(1, self.steps),
            "seconds_per_reset": self.reset_seconds / max(1, self.resets),
        }


@dataclass(eq=False)
class _Process:
    """One actor, until it fails."""

    actor: Any
    free: list[int]
    started: asyncio.Task[None] | None = None
    pid: int | None = None
    failure: str | None = None
    # One call at a time, first come first served, so that a time limit covers an episode's own call and no other's.
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    # A thread per episode instead.
    threads: bool = False

    def check(self) -> None:
        if self.failure is not None:
            raise EnvProcessError(f"environment process {self.pid} is gone: {self.failure}")

    def vanished(self) -> bool:
        """Whether its process is known and no longer there; it runs on this machine."""
        if self.pid is None:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False


class EnvPool:
    """Processes for many concurrent episodes of one environment.

    Args:
        env_name: registered name of the environment.
        env_options: its keyword arguments.
        processes: number of processes.
        envs_per_process: episodes that a process hosts at a time; more sessions than
            ``processes * envs_per_process`` wait in order of arrival.
        reset_timeout_s: limit for one reset, in seconds.
        step_timeout_s: limit for one step, in seconds.
        start_timeout_s: limit for the start of a process, in seconds.
        env_modules: modules that each process imports first; they register environments of other packages.

    Raises:
        ValueError: a number is not positive.
    """

    def __init__(
        self,
        env_name: str,
        env_options: Mapping[str, Any] | None = None,
        *,
        processes: int = 4,
        envs_per_process: int = 16,
        reset_timeout_s: float = 60.0,
        step_timeout_s: float = 30.0,
        start_timeout_s: float = 180.0,
        env_modules: Sequence[str] = (),
    ) -> None:
        numbers = {
            "processes": processes,
            "envs_per_process": envs_per_process,
            "reset_timeout_s": reset_timeout_s,
            "step_timeout_s": step_timeout_s,
            "start_timeout_s": start_timeout_s,
        }
        for name, value in numbers.items():
            if value <= 0:
                raise ValueError(f"EnvPool {name}={value}: must be above 0")
        self._host_arguments = (env_name, dict(env_options or {}), tuple(env_modules))
        self._envs_per_process = envs_per_process
        self._limits = {"start": start_timeout_s, "reset": reset_timeout_s, "step": step_timeout_s}
        self._size = processes
        self._processes: list[_Process] = []
        self._failed_starts = 0
        self._seats = asyncio.Semaphore(processes * envs_per_process)
        self.stats = PoolStats()

    def session(self, task: Task) -> EnvSession:
        """An episode of ``task``, to be used as ``async with pool.session(task) as session``."""
        return EnvSession(self, task)

    def close(self) -> None:
        """End all processes; sessions still open fail."""
        for process in self._processes:
            self._stop(process, "the pool was closed", logging.DEBUG)

    def _place(self) -> _Process:
        """The process with most free slots; ended ones are replaced first."""
        for process in self._processes:
            if process.failure is None and process.vanished():
                self._stop(process, "it died between two calls")
        for index in range(self._size):
            if index >= len(self._processes):
                self._processes.append(self._launch())
            elif self._processes[index].failure is not None:
                self.stats.restarts += 1
                self._processes[index] = self._launch()
        return max(self._processes, key=lambda process: len(process.free))

    def _launch(self) -> _Process:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        # Ray's annotations do not know the groups.
        actor_class: Any = ray.remote(concurrency_groups={_THREADS: self._envs_per_process})  # type: ignore[call-overload]
        actor = (
            actor_class(EnvHost)
            .options(
                # Nothing is reserved: verl's placement groups may have taken every CPU of the node.
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}},
            )
            .remote(*self._host_arguments)
        )
        # Slots are taken from the end, so that a low number is used again before a higher one is made.
        process = _Process(actor, free=list(reversed(range(self._envs_per_process))))
        process.started = asyncio.ensure_future(self._start(process))
        # Sessions see its exception when they await it; there may be none to do so.
        process.started.add_done_callback(lambda started: started.cancelled() or started.exception())
        return process

    async def _start(self, process: _Process) -> None:
        try:
            started: Started = await self._answer(process, process.actor.start.remote(), "start")
            process.pid, process.threads = started.pid, started.thread_safe
            self._failed_starts = 0
        except EnvError as error:
            self._stop(process, str(error))
            raise
        except EnvProcessError as error:
            self._failed_starts += 1
            if self._failed_starts < MAX_FAILED_STARTS:
                raise
            raise EnvError(
                f"{self._failed_starts} environment processes in a row did not start; the last: {error}. See the "
                "processes' own output in Ray's logs"
            ) from error

    async def _call(self, process: _Process, method: str, *arguments: Any) -> Step:
        assert process.started is not None
        await asyncio.shield(process.started)
        call = getattr(process.actor, method)
        if process.threads:
            call = call.options(concurrency_group=_THREADS)
        async with contextlib.nullcontext() if process.threads else process.turn:
            process.check()
            answer: Timed = await self._answer(process, call.remote(*arguments), method)
        if method == "reset":
            self.stats.resets += 1
            self.stats.reset_seconds += answer.seconds
        else:
            self.stats.steps += 1
            self.stats.step_seconds += answer.seconds
        return answer.step

    async def _answer(self, process: _Process, reference: Any, method: str) -> Any:
        from ray.exceptions import RayError, RayTaskError

        limit = self._limits[method]
        try:
            return await asyncio.wait_for(_result(reference), limit)
        except asyncio.TimeoutError:
            self.stats.timeouts += 1
            self._stop(process, f"a {method} took more than {method}_timeout_s={limit:g}")
        except RayTaskError as error:
            name, cause = f"environment {self._host_arguments[0]!r}", error.cause
            if not isinstance(cause, EnvRaised):  # the host told everything else: only its answer could not be sent
                raise EnvError(
                    f"{name}, method {method}: a field of its Step cannot be sent to another process "
                    f"({_first_line(cause)}); what Step.info holds must be picklable"
                ) from error
            if cause.authors:
                raise EnvError(f"{name}, method {method}: {cause.text}") from error
            reason = f"{name} raised in a {method}: {cause.text}"
            if method == "step":
                logger.warning("%s\n%s", reason, error)
                raise EnvProcessError(reason) from error
            raise EnvError(reason) from error
        except RayError as error:
            self._stop(process, f"it died during a {method} ({_first_line(error)})")
        process.check()

    def _stop(self, process: _Process, reason: str, level: int = logging.WARNING) -> None:
        import ray

        if process.failure is None:
            process.failure = reason
            logger.log(level, "environment process %s ended: %s", process.pid, reason)
            ray.kill(process.actor, no_restart=True)


class EnvSession:
    """One episode: reset first, then step until done; after an :class:`EnvProcessError`, reset starts it afresh."""

    def __init__(self, pool: EnvPool, task: Task) -> None:
        self.task = task
        self._pool = pool
        self._process: _Process | None = None
        self._slot = 0

    async def __aenter__(self) -> EnvSession:
        loop = asyncio.get_running_loop()
        asked = loop.time()
        await self._pool._seats.acquire()
        self._pool.stats.wait_seconds += loop.time() - asked
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()
        self._pool._seats.release()

    async def reset(self) -> Step:
        """Start the task.

        Raises:
            EnvProcessError: the process died or hung; calling reset again moves to a fresh one.
            EnvError: the environment cannot be made, or refuses the task.
        """
        if self._process is not None and self._process.failure is not None:
            self._leave()
        if self._process is None:
            self._process = self._pool._place()
            self._slot = self._process.free.pop()
        return await self._call(self._process, "reset", self._slot, self.task)

    async def step(self, action: str) -> Step:
        """Apply ``action``.

        Raises:
            EnvProcessError: the process died or hung, or the environment raised; the episode is lost.
            EnvError: the environment's answer is no Step, or a field of it is wrong.
            RuntimeError: no reset before.
        """
        if self._process is None:
            raise RuntimeError("step before reset: the session has no environment yet")
        return await self._call(self._process, "step", self._slot, action)

    async def _call(self, process: _Process, method: str, *arguments: Any) -> Step:
        try:
            return await self._pool._call(process, method, *arguments)
        except EnvProcessError:
            self._pool.stats.failures += 1
            raise

    def _leave(self) -> None:
        if self._process is not None:
            self._process.free.append(self._slot)
            self._process = None


async def _result(reference: Any) -> Any:
    return await reference


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"
