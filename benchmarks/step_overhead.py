"""Step time of SDAR against GRPO in the same recipe, by phase.

    python -m benchmarks.step_overhead [--steps 4] [--rounds 2] [--pair quickstart|paper] [--games 8]
    python -m benchmarks.step_overhead --finished GRPO_RUN SDAR_RUN [GRPO_RUN SDAR_RUN ...]

Runs the quick start's recipe through verl's main_ppo on generated ALFWorld games, once per arm and round, arms in turn:

quickstart  sdar_frozen (the teacher is the frozen reference; the student's rows need no pass of it) against grpo
paper       sdar (the teacher is the current policy) against grpo, both with the paper's KL to the reference, 0.01

The learning rate is 0 and every request has its seed, so both arms play the very same episodes and update on the very
same rows; the work does not depend on the learning rate. The first step is left out: it warms up, and SDAR's checks
itself then.

Wall seconds are verl's ``timing_s/*``, medians over the steps. On a busy machine compare CPU seconds per step: of the
processes that train, generate, play and control. Ratios are of SDAR to GRPO within each round.

``--finished`` reads the phases of runs that are there already (folders with ``metrics.jsonl``, such as those of
``benchmarks/quickstart_seeds.sh``), a pair per round. Those trained, so their episodes differ.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from benchmarks.common import as_task, machine, real_games, table
from benchmarks.runs import Watched, watch
from sdar_verl.panels import write_panel
from tests.support.verl_run import Run, run_main_ppo

KL = ["actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0.01"]
PAIRS: dict[str, dict[str, list[str]]] = {
    "quickstart": {"grpo": ["method=grpo"], "sdar": ["method=sdar_frozen"]},
    "paper": {"grpo": ["method=grpo", *KL], "sdar": ["method=sdar", *KL]},
}
PHASES = ("gen", "old_log_prob", "ref", "teacher", "parts", "adv", "update_actor", "update_weights", "step")
WALL = ["wall seconds of a step", "grpo", "sdar", "ratio"]
SAME = [
    "actor_rollout_ref.actor.optim.lr=0.0",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "sdar.trace.every=0",
]


def run(arm: str, overrides: list[str], games: list[Path], args: argparse.Namespace) -> Watched:
    """One arm, from start to end."""
    folder = (args.out / arm).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    panels = [folder / "train.parquet", folder / "validation.parquet"]
    for file in panels:
        write_panel([as_task(game) for game in games], file, file.stem)
    files = [f"data.train_files={panels[0]}", f"data.val_files={panels[1]}"]
    every = [*files, *SAME, f"trainer.total_training_steps={args.steps}", *overrides, *args.overrides]
    start = partial(run_main_ppo, folder, every, timeout=args.timeout, PYTHONUNBUFFERED="1")
    return watch(folder, start, every=0.5)


def phases(run: Run) -> dict[str, float]:
    """Median seconds of each phase over the steps but the first, and the rows of those steps."""
    steps = [data for step, data in run.metrics.items() if step > 1 and "timing_s/step" in data]
    found = {phase: statistics.median(data.get(f"timing_s/{phase}", 0.0) for data in steps) for phase in PHASES}
    return {**found, "rows": statistics.median(data["sdar/rows"] for data in steps)}


def compared(rounds: dict[str, list[dict[str, float]]], names: Iterable[str]) -> list[list[str]]:
    """A line per name: medians of both arms, and the median of the ratios within the rounds."""
    rows = []
    for name in names:
        grpo, sdar = ([one.get(name, 0.0) for one in rounds[arm]] for arm in ("grpo", "sdar"))
        gains = [b / a for a, b in zip(grpo, sdar, strict=True) if a]
        gain = f"{statistics.median(gains):.3f}" if gains else ""
        rows.append([name, f"{statistics.median(grpo):.2f}", f"{statistics.median(sdar):.2f}", gain])
    return rows


def cpu_per_step(watched: Watched) -> dict[str, float]:
    """Class of process -> CPU seconds per step, from the end of the first step to the end of the last."""
    ends = watched.step_ends()
    first, last = min(ends), max(ends)
    used = watched.cpu_between(ends[first], ends[last])
    return {name: seconds / (last - first) for name, seconds in used.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="further overrides of verl's and ours, for both arms")
    parser.add_argument("--finished", type=Path, nargs="+", help="folders of runs, GRPO and SDAR in turn")
    parser.add_argument("--pair", choices=PAIRS, default="quickstart")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--games", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one run")
    parser.add_argument("--data", type=Path, default=Path("outputs/benchmarks/games"), help="games are kept here")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/step_overhead"))
    args = parser.parse_args()
    if args.finished:
        folders = [Run(folder, "", 0) for folder in args.finished]
        if len(folders) % 2:
            parser.error("--finished: give pairs, GRPO first")
        print(f"{len(folders) // 2} rounds\n")
        walls = {"grpo": [phases(run) for run in folders[::2]], "sdar": [phases(run) for run in folders[1::2]]}
        print(table(WALL, compared(walls, (*PHASES, "rows"))))
        return
    if args.steps < 2:
        parser.error("--steps: at least 2, the first is left out")
    games = real_games(args.data / "small_room", args.games)
    seen: dict[str, list[Watched]] = {arm: [] for arm in PAIRS[args.pair]}
    for number in range(args.rounds):
        for arm in list(seen) if number % 2 == 0 else reversed(list(seen)):
            seen[arm].append(run(arm, PAIRS[args.pair][arm], games, args))
            print(f"round {number + 1}, {arm}: done", flush=True)

    print("\n" + machine("verl", "torch", "ray"))
    print(f"{args.pair}, {args.steps} steps, {args.rounds} rounds\n")
    walls = {arm: [phases(watched.run) for watched in runs if watched.run] for arm, runs in seen.items()}
    print(table(WALL, compared(walls, (*PHASES, "rows"))) + "\n")
    cpus = {arm: [cpu_per_step(watched) for watched in runs] for arm, runs in seen.items()}
    used = {name: seconds for runs in cpus.values() for one in runs for name, seconds in one.items() if seconds >= 0.05}
    names = sorted(used, key=lambda name: -used[name])
    print(table(["CPU seconds per step of", "grpo", "sdar", "ratio"], compared(cpus, names)))


if __name__ == "__main__":
    main()
