"""Step times of methods in the same recipe, by phase and process.

    python -m benchmarks.step_overhead [--methods grpo,sdar_frozen] [--steps 4] [--rounds 2] [OVERRIDE ...]
    python -m benchmarks.step_overhead --methods grpo,sdar_frozen --finished RUN RUN [RUN RUN ...]

Runs the quick start's recipe through verl's main_ppo on generated ALFWorld games, once per method and round, in turn.
With the paper's KL to the reference:

    --methods grpo,sdar actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.01

The learning rate is 0 and every request has its seed, so all methods play the very same episodes and update on the very
same rows (but where a method changes prompts or rows of the student's); the work does not depend on the learning rate.
The first step is left out: it warms up, and SDAR's checks itself then.

Wall seconds are verl's ``timing_s/*``, medians over the steps. On a busy machine compare CPU seconds per step: of the
processes that train, generate, play and control. Ratios are to the first method within each round.

``--finished`` reads the phases of runs that are there already (folders with ``metrics.jsonl``, such as those of
``benchmarks/quickstart_seeds.sh``), one per method and round. Those trained, so their episodes differ.
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

PHASES = ("gen", "old_log_prob", "ref", "teacher", "adv", "method", "update_actor", "update_weights", "step")
WALL = "wall seconds of a step"
SAME = [
    "actor_rollout_ref.actor.optim.lr=0.0",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "sdar.trace.every=0",
]


def run(method: str, games: list[Path], args: argparse.Namespace) -> Watched:
    """One run, from start to end."""
    folder = (args.out / method).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    panels = [folder / "train.parquet", folder / "validation.parquet"]
    for file in panels:
        write_panel([as_task(game) for game in games], file, file.stem)
    files = [f"data.train_files={panels[0]}", f"data.val_files={panels[1]}"]
    every = [*files, *SAME, f"method={method}", f"trainer.total_training_steps={args.steps}", *args.overrides]
    start = partial(run_main_ppo, folder, every, timeout=args.timeout, forked=False, PYTHONUNBUFFERED="1")
    return watch(folder, start, every=0.5)


def phases(run: Run) -> dict[str, float]:
    """Median seconds of each phase over the steps but the first, and the rows of those steps."""
    steps = [data for step, data in run.metrics.items() if step > 1 and "timing_s/step" in data]
    found = {phase: statistics.median(data.get(f"timing_s/{phase}", 0.0) for data in steps) for phase in PHASES}
    return {**found, "rows": statistics.median(data["sdar/rows"] for data in steps)}


def compared(rounds: dict[str, list[dict[str, float]]], names: Iterable[str]) -> list[list[str]]:
    """A line per name: each method's median, and behind it the median of its ratios to the first within the rounds."""
    first, *others = rounds.values()
    rows = []
    for name in names:
        seconds = [[one.get(name, 0.0) for one in runs] for runs in (first, *others)]
        cells = [f"{statistics.median(seconds[0]):.2f}"]
        for own in seconds[1:]:
            ratios = [b / a for a, b in zip(seconds[0], own, strict=True) if a]
            cells.append(f"{statistics.median(own):.2f}" + (f" ({statistics.median(ratios):.2f})" if ratios else ""))
        rows.append([name, *cells])
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
    parser.add_argument("overrides", nargs="*", help="further overrides of verl's and ours, for all methods")
    parser.add_argument("--finished", type=Path, nargs="+", help="folders of runs, the methods in turn")
    parser.add_argument("--methods", default="grpo,sdar_frozen", help="presets; the others are compared with the first")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--games", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one run")
    parser.add_argument("--data", type=Path, default=Path("outputs/benchmarks/games"), help="games are kept here")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/step_overhead"))
    args = parser.parse_args()
    methods = args.methods.split(",")
    if args.finished:
        folders = [Run(folder, "", 0) for folder in args.finished]
        if len(folders) % len(methods):
            parser.error(f"--finished: give rounds of {len(methods)} folders, {args.methods} in turn")
        print(f"{len(folders) // len(methods)} rounds\n")
        walls = {name: [phases(run) for run in folders[i :: len(methods)]] for i, name in enumerate(methods)}
        print(table([WALL, *methods], compared(walls, (*PHASES, "rows"))))
        return
    if args.steps < 2:
        parser.error("--steps: at least 2, the first is left out")
    games = real_games(args.data / "small_room", args.games)
    seen: dict[str, list[Watched]] = {method: [] for method in methods}
    for number in range(args.rounds):
        for method in methods if number % 2 == 0 else reversed(methods):
            seen[method].append(run(method, games, args))
            print(f"round {number + 1}, {method}: done", flush=True)

    print("\n" + machine("verl", "torch", "ray"))
    print(f"{args.steps} steps, {args.rounds} rounds; ratios to {methods[0]}\n")
    walls = {method: [phases(watched.run) for watched in runs if watched.run] for method, runs in seen.items()}
    print(table([WALL, *methods], compared(walls, (*PHASES, "rows"))) + "\n")
    cpus = {method: [cpu_per_step(watched) for watched in runs] for method, runs in seen.items()}
    used = {name: seconds for runs in cpus.values() for one in runs for name, seconds in one.items() if seconds >= 0.05}
    names = sorted(used, key=lambda name: -used[name])
    print(table(["CPU seconds per step of", *methods], compared(cpus, names)))


if __name__ == "__main__":
    main()
