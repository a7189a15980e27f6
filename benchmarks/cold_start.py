"""From the start of the process to the end of the first training step: where the time goes.

    python -m benchmarks.cold_start [--out outputs/benchmarks/cold_start] [--real]

Starts two steps of the quick start's recipe (toy environment; ``--real``: generated ALFWorld games) through verl's
main_ppo, and prints when each landmark of its log came, and the CPU seconds of every process up to the end of the first
step. Ray forwards a worker's lines with a delay of up to half a second.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common import as_task, machine, real_games, table
from benchmarks.runs import Watched, watch
from sdar_verl.panels import write_panel
from tests.support.toy_run import SHORT, train
from tests.support.verl_run import Run, run_main_ppo

LANDMARKS = {
    "driver: verl imported, config composed": r"^ray init kwargs",
    "driver: Ray is up": r"Started a local Ray instance",
    "trainer's process: verl imported": r"\(TaskRunnerV1 pid=",
    "trainer: panels read": r"dataloader initialized",
    "trainer: asks for the training worker": r"create worker group",
    "training worker: verl imported": r"\(WorkerDict pid=",
    "training worker: models built": r"actor and ref model engine initialized",
    "trainer: servers up, first weights sent": r"ready to fit",
    "agent loop: verl imported": r"\(AgentLoopWorkerTQ pid=",
    "first rollout done": r"Upsampled batch|RolloutReward|\[rank0\]",
    "first step done": r"sdar step 1/",
}
"""What is seen -> the first line that shows it."""


def timeline(watched: Watched) -> list[list[str]]:
    """Landmark, seconds since the start, seconds since the landmark before; in order of time."""
    found = [(seconds, name) for name, line in LANDMARKS.items() if (seconds := watched.when(line)) is not None]
    rows, before = [], 0.0
    for seconds, name in sorted(found, key=lambda pair: pair[0]):
        rows.append([name, f"{seconds:.1f}", f"{seconds - before:.1f}"])
        before = seconds
    return rows


def cpu_by_process(watched: Watched) -> list[list[str]]:
    """Class of process, when its first process was seen, CPU seconds of all of them until the first step ended."""
    end = watched.when(LANDMARKS["first step done"]) or float("inf")
    seen: dict[str, float] = {}
    for sample in watched.samples:
        seen.setdefault(sample.name, sample.seconds)
    used = watched.cpu_between(0.0, end)
    names = sorted(used, key=lambda name: -used[name])
    return [[name, f"{seen[name]:.1f}" if name in seen else "", f"{used[name]:.1f}"] for name in names]


def real_run(folder: Path, games: Path) -> Run:
    """Two steps on real games."""
    tasks = [as_task(game) for game in real_games(games / "small_room", 4)]
    panels = [folder / "train.parquet", folder / "validation.parquet"]
    for file in panels:
        write_panel(tasks, file, file.stem)
    files = [f"data.train_files={panels[0]}", f"data.val_files={panels[1]}"]
    short = ["trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=-1"]
    return run_main_ppo(
        folder, [*files, *short, "trainer.total_training_steps=2"], forked=False, PYTHONUNBUFFERED="1", timeout=900
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="generated ALFWorld games instead of the toy environment")
    parser.add_argument("--data", type=Path, default=Path("outputs/benchmarks/games"), help="games are kept here")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/cold_start"))
    args = parser.parse_args()
    folder = args.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start: Callable[[], Run] = partial(
        train, folder, "trainer.save_freq=-1", steps=2, base=SHORT, timeout=900, PYTHONUNBUFFERED="1"
    )
    watched = watch(folder, partial(real_run, folder, args.data) if args.real else start, every=0.5)
    print(machine("verl", "torch", "ray") + "\n")
    print(table(["landmark", "at, s", "after, s"], timeline(watched)) + "\n")
    print(table(["process", "first seen, s", "CPU s"], cpu_by_process(watched)))


if __name__ == "__main__":
    main()
