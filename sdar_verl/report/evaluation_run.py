"""Runs an evaluation plan: one guarded run after the other, until all are done or the budget is spent."""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdar_verl.atomic import write_text_atomically
from sdar_verl.cloud import ledger, stop
from sdar_verl.cloud.guard import AGAIN
from sdar_verl.cloud.mirror import local_step
from sdar_verl.cloud.store import Store
from sdar_verl.errors import ConfigError, SdarError
from sdar_verl.planner.hardware import DEFAULT_GPU
from sdar_verl.report.evaluation import (
    Plan,
    Planned,
    affordable,
    give_up,
    look,
    order,
    planned_hours,
    read_plan,
    step_counts,
    validation_faults,
)
from sdar_verl.report.layout import RecordError
from sdar_verl.report.one_run import (
    FINISHED,
    OneByOne,
    attempts,
    check,
    check_finished,
    check_overrides,
    finish,
    run_command,
    tail,
)
from sdar_verl.report.read import RunData

GIVEN_UP = "given_up.txt"
EVERY_S = 10.0
TRIES = 3


@dataclass
class Evaluation:
    """A plan under way; a finished run is not run again, an unfinished one goes on, an arm that was given up stays so.

    Args:
        plan: what is to be run.
        out: folder of all runs, ``<arm>-<seed>``.
        overrides: for all runs, after the plan's.
        price: USD an hour of what a run runs on; None: unknown.
        budget: USD for all runs together; None: no limit.
        folders: the words of :class:`~sdar_verl.config_folders.ConfigFolders`.
        processes: of its runs.
    """

    plan: Plan
    out: Path
    overrides: Sequence[str]
    price: float | None
    budget: float | None
    folders: Sequence[str] = ()
    processes: OneByOne = field(default_factory=OneByOne)

    def words(self, arm: str, seed: int) -> list[str]:
        """The training command of one run."""
        own = [*self.plan.overrides, *self.plan.arms[arm]]
        return run_command(self.plan.config, arm, seed, self.folder(arm, seed), own, self.overrides, self.folders)

    def folder(self, arm: str, seed: int) -> Path:
        """Of one run."""
        return self.out / f"{arm}-{seed}"

    def spent(self) -> float:
        """USD by the ledgers of all runs; an attempt without a price counts at this one's."""
        return sum(self._spent(self.folder(arm, seed)) for arm in self.plan.arms for seed in self.plan.seeds)

    def run(self, runs: Sequence[Planned]) -> int:
        """All runs in their order.

        Returns:
            The exit status: 0; 1 when one failed or money was short; :attr:`OneByOne.status` after a signal.
        """
        status = 0
        with self.processes:
            for number, planned in enumerate(runs):
                arm, folder = planned.arm, self.folder(planned.arm, planned.seed)
                if (folder / FINISHED).is_file():
                    print(f"{folder} is finished already")
                    continue
                why = self.given_up(arm)
                if why is not None:
                    print(f"{folder} is left out: {arm} was given up: {why}")
                    continue
                left = None if self.budget is None else self.budget - self.spent()
                # By the checkpoint that it goes on from: the steps of its ledger after that are made again.
                needs = planned.usd_from(local_step(folder / "checkpoints"))
                if left is not None and left < needs:
                    names = ", ".join(f"{one.arm}-{one.seed}" for one in runs[number:])
                    takes = f"{folder.name} takes about {needs:.2f}"
                    print(f"the budget has {left:.2f} USD left, and {takes}; not run: {names}")
                    status = 1
                    break
                status |= self._one(arm, planned.seed, left)
                if self.processes.status:
                    return self.processes.status
        return status

    def given_up(self, arm: str) -> str | None:
        """Why no more is run of an arm."""
        for seed in self.plan.seeds:
            file = self.folder(arm, seed) / GIVEN_UP
            if file.is_file():
                return file.read_text(encoding="utf-8").strip()
        return None

    def finished(self) -> list[str]:
        """``ARM=FOLDER`` of every finished run, as ``sdar-verl compare`` takes them."""
        return [
            f"{arm}={self.folder(arm, seed)}"
            for arm in self.plan.arms
            for seed in self.plan.seeds
            if (self.folder(arm, seed) / FINISHED).is_file()
        ]

    def _spent(self, folder: Path) -> float:
        """USD of one run, as its guard counts them."""
        prices = [(self.price if line.price is None else line.price, line.seconds) for line in attempts(folder)]
        return sum((price or 0.0) * seconds / 3600 for price, seconds in prices)

    def _one(self, arm: str, seed: int, left: float | None) -> int:
        folder = self.folder(arm, seed)
        guard = [sys.executable, "-m", "sdar_verl.cli", "guard"]
        if self.price is not None:
            guard += ["--price", str(self.price)]
            guard += ["--budget", str(left + self._spent(folder))] if left is not None else []
        for _ in range(TRIES):
            process = self.processes.start([*guard, "--", *self.words(arm, seed)], folder)
            why = self._watch(process, arm, folder)
            if process.returncode != AGAIN or self.processes.status:
                break
        if why is None and process.returncode == 0:
            return 0 if finish(folder) else 1
        if why is None and self.processes.status:
            return 1
        if why is None:
            made = attempts(folder)
            why = f"its run ended with status {process.returncode}: {made[-1].ended if made else 'see its log'}"
            print(*tail(folder / "train.log"), sep="\n  ")
        write_text_atomically(folder / GIVEN_UP, why + "\n")
        print(f"  {arm} is given up: {why}", flush=True)
        return 1

    def _watch(self, process: subprocess.Popen[bytes], arm: str, folder: Path) -> str | None:
        why: str | None = None
        while True:
            try:
                process.wait(EVERY_S)
                over = True
            except subprocess.TimeoutExpired:
                over = False
            if why is None:
                why = self._judge(arm, folder)
                if why is not None and not over:
                    store = Store(folder / "checkpoints")
                    stop.ask([store], stop.Wish(why, ledger.newest(store)))
            if over:
                return why

    def _judge(self, arm: str, folder: Path) -> str | None:
        try:
            run = look(folder)
            return None if run is None else give_up(self.plan, arm, run, self._baselines())
        except RecordError:  # in the middle of a write
            return None

    def _baselines(self) -> list[RunData]:
        folders = [self.folder(self.plan.baseline, seed) for seed in self.plan.seeds]
        return [run for folder in folders if (folder / FINISHED).is_file() and (run := look(folder)) is not None]


def run_plan(
    file: Path,
    out: Path,
    overrides: Sequence[str],
    price: float | None,
    budget: float | None,
    gpu: str | None,
    dry: bool,
    folders: Sequence[str] = (),
) -> int:
    """``sdar-verl sweep --plan``.

    Raises:
        ConfigError: the plan, or the config of any of its runs, is at fault; nothing was started.
    """
    if budget is not None and price is None:
        raise ConfigError(f"--budget {budget:g} has no effect without a price: add --price USD_PER_HOUR")
    plan = read_plan(file)
    evaluation = Evaluation(plan, out.resolve(), overrides, price, budget, folders)
    try:
        check_overrides(plan.arms, overrides, "the plan's arms", first=plan.overrides)
        configs = {arm: check(evaluation.words(arm, plan.seeds[0]), whole=not dry) for arm in plan.arms}
        for arm, seed in itertools.product(plan.arms, plan.seeds):
            if (evaluation.folder(arm, seed) / FINISHED).is_file():
                check_finished(evaluation.words(arm, seed), evaluation.folder(arm, seed))
    except SdarError as error:
        raise ConfigError(f"--plan {file}: {error}") from error
    steps = step_counts(configs)
    if faults := validation_faults(plan, configs, steps):
        raise ConfigError(f"--plan {file}: " + "\n".join(faults))
    if gpu is not None and plan.hours is not None:
        raise ConfigError(f"--gpu {gpu} has no effect: the plan says how many hours a run takes (hours={plan.hours:g})")
    hours, notes = planned_hours(plan, configs, gpu or DEFAULT_GPU)
    runs = order(plan, hours, price, steps)
    _announce(runs, budget, price)
    print(*notes, sep="\n", end="\n" * bool(notes), flush=True)
    if dry:
        for one in runs:
            print(shlex.join(evaluation.words(one.arm, one.seed)))
        return 0
    status = evaluation.run(runs)
    if price is not None:
        print(f"{evaluation.spent():.2f} USD spent")
    finished = evaluation.finished()
    if finished and not evaluation.processes.status:
        from sdar_verl.cli import main

        base = ["--baseline", plan.baseline] if any(one.startswith(f"{plan.baseline}=") for one in finished) else []
        words = ["compare", *finished, *base, "--arm", plan.validation, "--any-settings"]
        status |= main([*words, "--out", str(evaluation.out / "comparison")])
    return status


def _announce(runs: Sequence[Planned], budget: float | None, price: float | None) -> None:
    hours = sum(run.hours for run in runs)
    print(f"{len(runs)} runs, about {hours:.1f} h" + ("" if price is None else f" and {hours * price:,.2f} USD"))
    for run in runs:
        print(f"  {run.arm}-{run.seed}: {run.hours:.2f} h" + ("" if run.usd is None else f", {run.usd:,.2f} USD"))
    number = affordable(runs, budget)
    if number < len(runs):
        print(f"the budget of {budget:g} USD pays for the first {number} of them", flush=True)
