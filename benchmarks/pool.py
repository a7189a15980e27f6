"""Episodes per second of the environment pool against stepping the same environments in lock-step, and step times.

    python -m benchmarks.pool [--episodes 64] [--latency 0.05] [--rounds 3]

Both arms use the same pool: the same processes and environments, the same games, actions, episode lengths and simulated
model latencies, all from one seed. They differ in who waits for whom:

pool       each episode goes on by itself, and the next one takes the place of one that ended (what training does)
lock-step  all episodes of a batch wait for the slowest answer, then all step, then all wait for the slowest step; the
           next batch begins when the longest episode of this one has ended

``waves`` is episodes per place in the pool: 1 is a step whose rollouts all have a place. Lengths are uniform from 2 to
``--turns``; a latency is uniform within a factor of 1/4 to 7/4 of its mean, as answers differ in length.

Step times are of the engine alone, in this process, in small rooms (the quick start's) and in rooms as full as the
generator makes them; "stock" is the engine without :mod:`sdar_verl.envs.alfworld.speedups`, arms in turn. "Reset again"
is what the other rollouts of a task cost that come to the same process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import as_task, machine, real_games, table
from sdar_verl.envs.alfworld import speedups
from sdar_verl.envs.alfworld.env import AlfworldEnv
from sdar_verl.envs.base import Step, Task
from sdar_verl.envs.pool import EnvPool, EnvSession

ROOMS = {"small room": {}, "full room": {"n_receptacles": 16, "n_distractors": 6}}
NOTHING = "wait"


@dataclass(frozen=True)
class Script:
    """One episode, the same in both arms.

    Attributes:
        task: what is played.
        latencies: seconds that the model takes for each answer; their number is the episode's length.
        seed: of the actions.
    """

    task: Task
    latencies: tuple[float, ...]
    seed: int


def scripts(tasks: Sequence[Task], episodes: int, turns: int, latency: float) -> list[Script]:
    """``episodes`` episodes of 2 to ``turns`` turns over ``tasks``."""
    rng = random.Random(0)
    drawn = []
    for number in range(episodes):
        length = rng.randint(2, turns)
        waits = tuple(latency * rng.uniform(0.25, 1.75) for _ in range(length))
        drawn.append(Script(tasks[number % len(tasks)], waits, number))
    return drawn


def choose(step: Step, rng: random.Random) -> str:
    """An admissible action."""
    return rng.choice(step.admissible_actions) if step.admissible_actions else NOTHING


async def free(pool: EnvPool, drawn: Sequence[Script], seats: int) -> None:
    """Every episode on its own."""

    async def episode(script: Script) -> None:
        rng = random.Random(script.seed)
        async with pool.session(script.task) as session:
            step = await session.reset()
            for wait in script.latencies:
                await asyncio.sleep(wait)
                step = await session.step(choose(step, rng))

    await asyncio.gather(*[episode(script) for script in drawn])


async def lock_step(pool: EnvPool, drawn: Sequence[Script], seats: int) -> None:
    """Batches of ``seats`` episodes; within one, a turn is over when it is over for all."""
    for start in range(0, len(drawn), seats):
        batch = drawn[start : start + seats]
        rngs = [random.Random(script.seed) for script in batch]
        sessions: list[EnvSession] = [await pool.session(script.task).__aenter__() for script in batch]
        steps = list(await asyncio.gather(*[session.reset() for session in sessions]))
        for turn in range(max(len(script.latencies) for script in batch)):
            active = [i for i, script in enumerate(batch) if turn < len(script.latencies)]
            await asyncio.sleep(max(batch[i].latencies[turn] for i in active))
            answers = await asyncio.gather(*[sessions[i].step(choose(steps[i], rngs[i])) for i in active])
            for i, answer in zip(active, answers, strict=True):
                steps[i] = answer
        for session in sessions:
            await session.__aexit__()


ARMS: dict[str, Callable[[EnvPool, Sequence[Script], int], Awaitable[None]]] = {"pool": free, "lock-step": lock_step}


async def compare(
    name: str, options: dict, modules: Sequence[str], tasks: Sequence[Task], latency: float, args: argparse.Namespace
) -> list[list[str]]:
    """Rows of the table for one environment and one latency."""
    rows = []
    pool = EnvPool(name, options, processes=args.processes, envs_per_process=args.seats, env_modules=modules)
    try:
        seats = args.processes * args.seats
        # Every place plays every game once: the engine remembers what it has seen, and both arms should find that.
        await free(pool, [Script(task, (0.0,), 0) for task in tasks for _ in range(seats)], seats)
        for episodes in sorted({seats, args.episodes}):
            drawn = scripts(tasks, episodes, args.turns, latency)
            seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for number in range(args.rounds):
                for arm in list(ARMS) if number % 2 == 0 else reversed(list(ARMS)):
                    started = time.perf_counter()
                    await ARMS[arm](pool, drawn, seats)
                    seconds[arm].append(time.perf_counter() - started)
            gain = statistics.median(b / a for a, b in zip(seconds["pool"], seconds["lock-step"], strict=True))
            rates = [f"{episodes / statistics.median(seconds[arm]):.1f}" for arm in ARMS]
            turns = sum(len(script.latencies) for script in drawn) / episodes
            rows.append([name, f"{1000 * latency:.0f}", episodes // seats, f"{turns:.1f}", *rates, f"{gain:.2f}"])
        stats = pool.stats.as_dict()
        print(
            f"{name}, latency {latency:g} s: {stats['seconds_per_step'] * 1000:.2f} ms per step and "
            f"{stats['seconds_per_reset'] * 1000:.1f} ms per reset inside the processes",
            flush=True,
        )
    finally:
        pool.close()
    return rows


def step_times(games: dict[str, list[Path]], steps: int) -> list[list[str]]:
    """Milliseconds of CPU per step and per reset, stock engine and ours in turn."""
    rows = []
    for room, files in games.items():
        costs: dict[tuple[bool, str], list[float]] = {}
        for game in files:
            for quick in (False, True):
                speedups.uninstall()
                env = AlfworldEnv(speedups=quick)
                rng = random.Random(0)
                started = time.process_time()
                step = env.reset(as_task(game))
                costs.setdefault((quick, "reset"), []).append(time.process_time() - started)
                started = time.process_time()
                step = env.reset(as_task(game))
                costs.setdefault((quick, "reset again"), []).append(time.process_time() - started)
                for _ in range(steps):
                    action = choose(step, rng)
                    started = time.process_time()
                    step = env.step(action)
                    costs.setdefault((quick, "step"), []).append(time.process_time() - started)
        for kind in ("step", "reset", "reset again"):
            stock, ours = (sorted(1000 * value for value in costs[quick, kind]) for quick in (False, True))
            middle = [statistics.median(stock), statistics.median(ours)]
            cells = [f"{middle[0]:.1f}", f"{middle[1]:.2f}", f"{ours[int(0.95 * len(ours))]:.1f}", f"{ours[-1]:.1f}"]
            rows.append([room, kind, len(ours), *cells, f"{middle[0] / middle[1]:.1f}"])
    speedups.uninstall()
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15, help="of the longest episode")
    parser.add_argument("--latency", type=float, default=0.05, help="mean seconds of the simulated model per answer")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seats", type=int, default=8, help="environments per process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--games", type=int, default=4, help="of each kind of room")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per game")
    parser.add_argument("--data", type=Path, default=Path("outputs/benchmarks/games"), help="games are kept here")
    args = parser.parse_args()

    print(machine("textworld", "alfworld", "ray"), flush=True)
    games = {room: real_games(args.data / room.replace(" ", "_"), args.games, **d) for room, d in ROOMS.items()}
    head = ["room", "what", "n", "stock, ms", "ours, ms", "95th", "most", "stock / ours"]
    print("\nCPU time in the engine:\n\n" + table(head, step_times(games, args.steps)) + "\n", flush=True)

    import ray

    toy = [Task("toy_search", f"toy-{i}", "", "find it", {"place": "nowhere"}) for i in range(args.games)]
    root = str(Path(__file__).parents[1])
    # Ray's sockets lie here and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="sdar", ignore_cleanup_errors=True) as folder:
        env_vars = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            runtime_env={"env_vars": env_vars},
        )
        rows = []
        tasks = [as_task(game) for game in games["small room"]]
        for latency in (args.latency, 0.0):
            rows += asyncio.run(compare("alfworld", {}, [], tasks, latency, args))
            rows += asyncio.run(compare("toy_search", {}, ["tests.support.toy_env"], toy, latency, args))
        ray.shutdown()
    head = ["environment", "latency, ms", "waves", "mean turns", "pool, episodes/s", "lock-step", "ratio"]
    print("\n" + table(head, rows))


if __name__ == "__main__":
    main()
