"""The pool of environment processes, on a real Ray: concurrency, deaths, hangs, other packages' environments."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from sdar_verl.envs.alfworld.generate import generate_games
from sdar_verl.envs.alfworld.spec import GeneratorConfig
from sdar_verl.envs.base import Task
from sdar_verl.envs.pool import EnvError, EnvPool, EnvProcessError

pytestmark = pytest.mark.integration

# A third party's environment: its module is found by the processes and registers on import.
TOY_MODULE = """
import ctypes, os, signal, sys, threading, time
from sdar_verl.envs.base import Step, TextEnv
from sdar_verl.envs.registry import register_env

class TwoParts(Exception):  # cannot be unpickled
    def __init__(self, code, what):
        super().__init__(f"{code} {what}")

@register_env("toy")
class Toy(TextEnv):
    def __init__(self, greeting="hello"):
        self.greeting = greeting

    def reset(self, task):
        if task.task_id == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.task_id == "impossible":
            raise ValueError("no such level")
        self.task, self.count = task, 0
        info = {"pid": os.getpid(), "modules": sorted(sys.modules), "threads": os.environ["OMP_NUM_THREADS"]}
        return Step(f"{self.greeting} {task.task_id}", info=info)

    def step(self, action):
        verb, _, value = action.partition(" ")
        if verb == "sleep":
            time.sleep(float(value))
        elif verb == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif verb == "hang":
            ctypes.PyDLL(None).sleep(600)  # in C, and without giving up the interpreter lock
        elif verb == "raise":
            raise KeyError("a bug")
        elif verb == "late":
            raise TimeoutError("of its own")
        elif verb == "odd":
            raise TwoParts(503, "busy")
        elif verb == "gym":
            return "observation", 1.0, False, {}
        elif verb == "unpaid":
            return Step("o", reward=None)
        elif verb == "lock":
            return Step("o", info={"lock": threading.Lock()})
        self.count += 1
        return Step(f"{self.task.task_id} {self.count}", reward=1.0, info={"thread": threading.get_ident()})

@register_env("waiting_toy")
class WaitingToy(Toy):
    thread_safe = True
    waiting = []

    def step(self, action):
        if action == "wait for 8":  # all episodes of the process must be in this step at the same time
            self.waiting.append(1)
            while len(self.waiting) < 8:
                time.sleep(0.01)
        return super().step(action)
"""


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    package = tmp_path_factory.mktemp("third_party")
    (package / "toy_env.py").write_text(TOY_MODULE)
    # Ray's sockets lie here and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="sdar", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            runtime_env={"env_vars": {"PYTHONPATH": str(package)}},
        )
        yield
        ray.shutdown()


def toy_pool(**settings: object) -> EnvPool:
    arguments = {"processes": 2, "envs_per_process": 4, "step_timeout_s": 20, "env_modules": ["toy_env"], **settings}
    return EnvPool("toy", **arguments)


def task(name: str) -> Task:
    return Task("toy", name, "toy", "")


async def alive(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process is still there after waiting for its end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        await asyncio.sleep(0.05)
    return True


def test_many_sessions_share_few_processes() -> None:
    async def episode(pool: EnvPool, name: str, steps: int) -> int:
        async with pool.session(task(name)) as session:
            first = await session.reset()
            assert first.observation == f"hi {name}"
            for count in range(1, steps + 1):
                assert (await session.step("go")).observation == f"{name} {count}"
        return first.info["pid"]

    async def run() -> None:
        pool = toy_pool(env_options={"greeting": "hi"})
        lengths = [random.Random(i).randint(0, 12) for i in range(150)]
        pids = await asyncio.gather(*(episode(pool, f"t{i}", length) for i, length in enumerate(lengths)))
        assert len(set(pids)) == 2
        assert (pool.stats.resets, pool.stats.steps) == (150, sum(lengths))
        assert (pool.stats.failures, pool.stats.restarts) == (0, 0)
        assert pool.stats.wait_seconds > 0
        pool.close()
        assert not any([await alive(pid) for pid in set(pids)])

    asyncio.run(run())


def test_a_process_starts_without_the_training_stack() -> None:
    async def run() -> None:
        pool = toy_pool(processes=1)
        async with pool.session(task("t")) as session:
            info = (await session.reset()).info
        assert not {"torch", "verl", "transformers", "tensordict"} & set(info["modules"])
        assert info["threads"] == "1"
        pool.close()

    asyncio.run(run())


def test_a_killed_process_costs_its_own_episodes_only() -> None:
    async def run() -> None:
        pool = toy_pool()
        sessions = [await pool.session(task(f"t{i}")).__aenter__() for i in range(8)]
        pids = [(await session.reset()).info["pid"] for session in sessions]
        assert sorted(pids.count(pid) for pid in set(pids)) == [4, 4]
        victim = pids[0]
        os.kill(victim, signal.SIGKILL)

        answers = await asyncio.gather(*(session.step("go") for session in sessions), return_exceptions=True)
        for i, (pid, answer) in enumerate(zip(pids, answers, strict=True)):
            if pid == victim:
                assert isinstance(answer, EnvProcessError)
            else:
                assert answer.observation == f"t{i} 1"
        # A lost episode starts afresh in the same session; the others go on where they were.
        again = await asyncio.gather(*(s.reset() for s, pid in zip(sessions, pids, strict=True) if pid == victim))
        assert len({step.info["pid"] for step in again}) == 1
        assert again[0].info["pid"] not in pids
        later = await asyncio.gather(*(session.step("go") for session in sessions))
        counts = [int(step.observation.split()[1]) for step in later]
        assert counts == [1 if pid == victim else 2 for pid in pids]
        assert (pool.stats.failures, pool.stats.restarts) == (4, 1)
        pool.close()

    asyncio.run(run())


def test_a_process_that_died_between_episodes_is_replaced_unnoticed() -> None:
    async def run() -> None:
        pool = toy_pool(processes=1)
        async with pool.session(task("first")) as session:
            victim = (await session.reset()).info["pid"]
        os.kill(victim, signal.SIGKILL)
        assert not await alive(victim)
        async with pool.session(task("second")) as session:
            assert (await session.reset()).info["pid"] != victim
        assert (pool.stats.failures, pool.stats.restarts) == (0, 1)
        pool.close()

    asyncio.run(run())


def test_a_hang_runs_into_the_time_limit_and_the_process_is_replaced() -> None:
    async def run() -> None:
        pool = toy_pool(step_timeout_s=2, envs_per_process=1)
        async with pool.session(task("bad")) as bad, pool.session(task("good")) as good:
            stuck = (await bad.reset()).info["pid"]
            assert (await good.reset()).info["pid"] != stuck
            hanging = asyncio.ensure_future(bad.step("hang"))
            for count in range(1, 30):
                assert (await good.step("go")).observation == f"good {count}"
            assert not hanging.done()
            with pytest.raises(EnvProcessError, match="step_timeout_s=2"):
                await hanging
            assert not await alive(stuck)
            assert (await bad.reset()).info["pid"] != stuck
            assert (await bad.step("go")).observation == "bad 1"
        assert (pool.stats.timeouts, pool.stats.failures, pool.stats.restarts) == (1, 1, 1)
        pool.close()

    asyncio.run(run())


def test_the_time_limit_covers_the_own_step_not_the_queue() -> None:
    async def episode(pool: EnvPool, name: str) -> None:
        async with pool.session(task(name)) as session:
            await session.reset()
            await session.step("sleep 0.5")

    async def run() -> None:
        pool = toy_pool(processes=1, envs_per_process=6, step_timeout_s=2)
        await asyncio.gather(*(episode(pool, f"t{i}") for i in range(6)))  # 3 s of steps, one after the other
        assert pool.stats.timeouts == 0
        assert pool.stats.as_dict()["seconds_per_step"] == pytest.approx(0.5, abs=0.2)
        pool.close()

    asyncio.run(run())


def test_thread_safe_environments_wait_at_the_same_time_in_threads_of_one_process() -> None:
    async def episode(pool: EnvPool, name: str) -> int:
        async with pool.session(task(name)) as session:
            pid = (await session.reset()).info["pid"]
            await session.step("wait for 8")
            assert (await session.step("go")).observation == f"{name} 2"
        return pid

    async def run() -> None:
        # Each step of the eight ends only when all eight have begun: one after the other would run into the limit.
        pool = EnvPool("waiting_toy", processes=1, envs_per_process=8, step_timeout_s=20, env_modules=["toy_env"])
        assert len(set(await asyncio.gather(*(episode(pool, f"t{i}") for i in range(8))))) == 1
        assert (pool.stats.steps, pool.stats.timeouts, pool.stats.failures) == (16, 0, 0)
        pool.close()

    asyncio.run(run())


def test_other_environments_are_stepped_from_one_thread() -> None:
    async def run() -> None:
        pool = toy_pool(processes=1)
        threads = set()
        async with pool.session(task("a")) as a, pool.session(task("b")) as b:
            await asyncio.gather(a.reset(), b.reset())
            for _ in range(3):
                steps = await asyncio.gather(a.step("sleep 0.05"), b.step("sleep 0.05"))
                threads |= {step.info["thread"] for step in steps}
        assert len(threads) == 1
        pool.close()

    asyncio.run(run())


def test_a_step_that_raises_costs_one_episode_and_no_process() -> None:
    async def run() -> None:
        pool = toy_pool(processes=1)
        async with pool.session(task("bad")) as bad, pool.session(task("good")) as good:
            pid = (await bad.reset()).info["pid"]
            await good.reset()
            with pytest.raises(EnvProcessError, match=r"raised in a step: KeyError: 'a bug'"):
                await bad.step("raise")
            assert (await good.step("go")).observation == "good 1"
            assert (await bad.reset()).info["pid"] == pid
            assert (await bad.step("go")).observation == "bad 1"
        pool.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("gym", r"environment 'toy', method step: it returned \('observation', 1.0, False, .*Return Step\("),
        ("unpaid", "environment 'toy', method step: a step's reward must be a number, not None"),
        ("lock", r"environment 'toy', method step: .* cannot be sent .*Step\.info holds must be picklable"),
    ],
)
def test_an_answer_that_is_no_step_is_never_an_unlucky_episode(action: str, message: str) -> None:
    async def run() -> None:
        pool = toy_pool(processes=1)
        async with pool.session(task("t")) as session:
            await session.reset()
            with pytest.raises(EnvError, match=message):
                await session.step(action)
        assert (pool.stats.failures, pool.stats.restarts) == (0, 0)
        pool.close()

    asyncio.run(run())


@pytest.mark.parametrize(("action", "told"), [("late", "TimeoutError: of its own"), ("odd", "TwoParts: 503 busy")])
def test_an_exception_of_its_own_kind_costs_no_process(action: str, told: str) -> None:
    async def run() -> None:
        pool = toy_pool(processes=1)
        async with pool.session(task("t")) as session:
            pid = (await session.reset()).info["pid"]
            with pytest.raises(EnvProcessError, match=f"environment 'toy' raised in a step: {told}"):
                await session.step(action)
            assert (await session.reset()).info["pid"] == pid
        assert (pool.stats.timeouts, pool.stats.failures, pool.stats.restarts) == (0, 1, 0)
        pool.close()

    asyncio.run(run())


def test_a_refused_task_is_named_and_a_deadly_one_loses_its_process() -> None:
    async def run() -> None:
        pool = toy_pool(processes=1)
        async with pool.session(task("impossible")) as session:
            with pytest.raises(EnvError, match="raised in a reset: ValueError: no such level"):
                await session.reset()
        async with pool.session(task("deadly")) as session:
            for _ in range(2):
                with pytest.raises(EnvProcessError, match="died during a reset"):
                    await session.reset()
        async with pool.session(task("fine")) as session:
            await session.reset()
        assert (pool.stats.failures, pool.stats.restarts) == (2, 2)
        pool.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env_modules": ["not_installed_anywhere"]}, "No module named 'not_installed_anywhere'"),
        ({"env_modules": []}, "unknown environment 'toy'; known: alfworld"),
        ({"env_options": {"volume": 11}}, "no option 'volume'; known: greeting"),
    ],
)
def test_an_environment_that_cannot_be_made_says_why(settings: dict[str, object], message: str) -> None:
    async def run() -> None:
        pool = toy_pool(processes=1, **settings)
        for _ in range(2):
            async with pool.session(task("t")) as session:
                with pytest.raises(EnvError, match=message):
                    await session.reset()
        pool.close()

    asyncio.run(run())


def test_processes_end_with_their_owner() -> None:
    @ray.remote(num_cpus=0)
    class Owner:
        async def pids(self) -> list[int]:
            self.pool = EnvPool("toy", processes=2, envs_per_process=1, env_modules=["toy_env"])
            self.sessions = [await self.pool.session(Task("toy", n, "toy", "")).__aenter__() for n in "ab"]
            return [os.getpid()] + [(await session.reset()).info["pid"] for session in self.sessions]

    async def run() -> None:
        owner, *children = await Owner.remote().pids.remote()
        assert len(set(children)) == 2
        assert not any([await alive(pid) for pid in (owner, *children)])

    asyncio.run(run())


def test_alfworld_games_are_won_by_their_walkthroughs(tmp_path: Path) -> None:
    files = generate_games(tmp_path, "train", 4, GeneratorConfig())

    async def episode(pool: EnvPool, file: Path) -> list[str]:
        texts = []
        async with pool.session(Task("alfworld", file.parent.name, "", "", {"game_file": str(file)})) as session:
            step = await session.reset()
            for command in json.loads(file.read_text())["walkthrough"]:
                assert not step.done
                assert command in step.admissible_actions
                texts.append(step.observation)
                step = await session.step(command)
        assert step.success
        assert step.reward == 5.0
        return texts

    async def run() -> None:
        pool = EnvPool("alfworld", {"success_reward": 5}, processes=2, envs_per_process=8)
        plays = await asyncio.gather(*(episode(pool, file) for file in files * 6))
        for i, file in enumerate(files):
            assert all(texts == plays[i] for texts in plays[i :: len(files)]), file
        missing = tmp_path / "gone" / "game.tw-pddl"
        with pytest.raises(EnvError, match=r"not there .*sdar-verl prepare alfworld"):
            await episode(pool, missing)
        pool.close()

    asyncio.run(run())
