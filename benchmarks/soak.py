"""Many training steps, and whether memory or open files of any process grow with them.

    python -m benchmarks.soak [--steps 300] [--out outputs/benchmarks/soak]

Trains the quick start's recipe in a small form (toy environment, 2 tasks x 2 rollouts, 2 turns) through verl's
main_ppo, with traces, a validation and a checkpoint now and then, and looks at every process of the run. After a
warm-up of a third of the steps it fits a line to what each process holds: bytes of memory that are its own, and open
file descriptors. Exits with 1 when a slope, less twice its standard error, is above its bound, or when the number of
processes grows.

Ray's control process (gcs_server) keeps the records of the last 100,000 tasks, so it grows for a long time without a
leak. Here it keeps 1,000, to be full when the warm-up is over.

Samples within a step are averaged first. A process that was not there from the end of the warm-up to the last step is
counted, but has no slope of its own.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import machine, table
from benchmarks.runs import Sample, Watched, watch
from tests.support.toy_run import SMALL, train

FEW_ROWS = [
    *SMALL,
    "data.train_batch_size=2",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "sdar.update.mini_batch_rows=8",
    "sdar.env.max_steps=2",
    "trainer.max_actor_ckpt_to_keep=2",
]


@dataclass(frozen=True)
class Line:
    """A line through (step, value) by least squares.

    Attributes:
        slope: per step.
        error: its standard error, from the scatter around the line.
    """

    slope: float
    error: float

    @classmethod
    def through(cls, values: Mapping[int, float]) -> Line:
        """Through step -> value, at least three of them."""
        steps, heights = np.array(list(values), dtype=float), np.array(list(values.values()))
        slope, height = np.polyfit(steps, heights, 1)
        rest = heights - (slope * steps + height)
        scatter = np.sqrt((rest**2).sum() / (len(steps) - 2))
        return cls(float(slope), float(scatter / np.sqrt(((steps - steps.mean()) ** 2).sum())))

    def exceeds(self, bound: float) -> bool:
        """Surely, as far as scatter tells."""
        return self.slope - 2 * self.error > bound


@dataclass(frozen=True)
class Growth:
    """Of one process, or of their number.

    Attributes:
        name: of the process.
        memory: bytes per step; None for the number of processes.
        files: descriptors (or processes) per step.
        last: memory in bytes and files at the end.
    """

    name: str
    memory: Line | None
    files: Line
    last: tuple[float, float]


def by_step(samples: Sequence[Sample], ends: Mapping[int, float]) -> dict[int, list[Sample]]:
    """Samples of each step; those before the first step's end and after the last are left out."""
    steps = sorted(ends)
    found: dict[int, list[Sample]] = defaultdict(list)
    index = 0
    for sample in samples:
        while index < len(steps) and sample.seconds > ends[steps[index]]:
            index += 1
        if 0 < index < len(steps):
            found[steps[index]].append(sample)
    return dict(found)


def growth(watched: Watched, warm_up: int) -> list[Growth]:
    """Of every process that was there all the time, and of the number of processes."""
    steps = {step: seen for step, seen in by_step(watched.samples, watched.step_ends()).items() if step > warm_up}
    if len(steps) < 3:
        raise SystemExit(f"only {len(steps)} steps after the warm-up were long enough to be looked at: run more steps")
    first, last = min(steps), max(steps)
    names = {sample.pid: sample.name for seen in steps.values() for sample in seen}
    found = []
    for pid, name in names.items():
        own = {step: [sample for sample in seen if sample.pid == pid] for step, seen in steps.items()}
        own = {step: seen for step, seen in own.items() if seen}
        if len(own) < 3 or first not in own or last not in own:
            continue
        memory = {step: float(np.mean([sample.memory for sample in seen])) for step, seen in own.items()}
        files = {step: float(np.mean([sample.files for sample in seen])) for step, seen in own.items()}
        found.append(Growth(name, Line.through(memory), Line.through(files), (memory[last], files[last])))
    numbers = {step: float(len({sample.pid for sample in seen})) for step, seen in steps.items()}
    found.sort(key=lambda one: -one.last[0])
    return [*found, Growth("number of processes", None, Line.through(numbers), (0.0, numbers[last]))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two looks at the processes")
    parser.add_argument("--memory-bound", type=float, default=100.0, help="kB per step and process")
    parser.add_argument("--file-bound", type=float, default=0.02, help="descriptors per step and process")
    parser.add_argument("--timeout", type=float, default=3000.0, help="seconds for the whole run")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/soak"))
    args = parser.parse_args()
    if args.steps < 9:
        parser.error("--steps: at least 9, of which a third warm up")
    folder = args.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    pause = max(2, args.steps // 6)
    start = partial(
        train,
        folder,
        f"trainer.save_freq={pause}",
        f"trainer.test_freq={pause}",
        steps=args.steps,
        base=FEW_ROWS,
        timeout=args.timeout,
        PYTHONUNBUFFERED="1",
        RAY_task_events_max_num_task_in_gcs="1000",
    )
    watched = watch(folder, start, args.every)
    found = growth(watched, args.steps // 3)
    ends = sorted(watched.step_ends().values())
    print(machine("verl", "torch", "ray"))
    print(
        f"{args.steps} steps, {(ends[-1] - ends[0]) / (len(ends) - 1):.2f} s each; slopes over the last two thirds, "
        f"+- one standard error\n"
    )
    rows, faults = [], []
    for one in found:
        memory = one.memory
        if memory is not None and memory.exceeds(1000 * args.memory_bound):
            faults.append(f"{one.name}: memory grows by {memory.slope / 1000:.1f} kB per step")
        if one.files.exceeds(args.file_bound):
            faults.append(f"{one.name}: {one.files.slope:.4f} per step (files, or processes)")
        cells = ["", ""] if memory is None else [f"{one.last[0] / 1e6:.0f}", _show(memory, 1000)]
        rows.append([one.name, *cells, f"{one.last[1]:.0f}", _show(one.files, 1)])
    print(table(["process", "MB at the end", "kB per step", "files at the end", "files per step"], rows))
    bounds = f"{args.memory_bound:g} kB and {args.file_bound:g} files per step"
    if faults:
        print(f"\nABOVE THE BOUND of {bounds}:\n" + "\n".join(faults))
        sys.exit(1)
    print(f"\nall below the bound of {bounds}")


def _show(line: Line, unit: float) -> str:
    return f"{line.slope / unit:.4g} +- {line.error / unit:.2g}"


if __name__ == "__main__":
    main()
